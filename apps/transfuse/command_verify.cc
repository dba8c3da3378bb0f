// `transfuse verify`: do running engines hold what running trainers publish?
#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "command.h"
#include "job.h"
#include "rpc/rpc.h"
#include "transfuse/deadline.h"
#include "transfuse/digest.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

struct Options {
  JobOptions job;
  std::string model;
  std::optional<uint64_t> revision;  // of this version, 0: the newest
  int64_t deadline_s = 60;
  bool json = false;
};

Result<VerifyReport> verify(const Options& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Job job, open_job(options.job));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string model, choose_model(*job.control, options.model));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string folder, open_runtime_folder());
  TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(folder));
  return verify_model(*transport, *job.control, model,
                      Deadline::after_ms(options.deadline_s * 1000));
}

Result<VersionRevision> revision(const Options& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Job job, open_job(options.job));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string model, choose_model(*job.control, options.model));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string folder, open_runtime_folder());
  TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(folder));
  return version_revision(*transport, *job.control, model, *options.revision,
                          Deadline::after_ms(options.deadline_s * 1000));
}

int run_revision(const Options& options) {
  const auto found = revision(options);
  if (!found) return report_failure(found.error(), options.json);
  const bool stated = found->stated != Digest{};
  const bool equal = !stated || found->stated == found->computed;
  if (options.json) {
    const nlohmann::json out = {{"version", found->version},
                                {"revision", found->computed.to_string()},
                                {"stated", revision_to_json(found->stated)},
                                {"matches", equal}};
    std::printf("%s\n", out.dump().c_str());
  } else {
    const std::string said = !stated ? "its sources state none"
                             : equal ? "as its sources state"
                                     : "but its sources state " + found->stated.to_string();
    std::printf("version %llu: revision %s, %s\n", static_cast<unsigned long long>(found->version),
                found->computed.to_string().c_str(), said.c_str());
  }
  return equal ? kExitOk : kExitNo;
}

int run(const Options& options) {
  if (options.revision) return run_revision(options);
  auto report = verify(options);
  if (!report) return report_failure(report.error(), options.json);
  const std::string text = options.json ? report->to_json() + "\n" : report->to_text();
  std::fputs(text.c_str(), stdout);
  return report->matches() ? kExitOk : kExitNo;
}

}  // namespace

void add_verify_command(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "verify", "Compare what running engines hold with what running trainers publish.");
  add_job_options(*command, options->job);
  command->add_option("--model", options->model,
                      "The stream of versions; not needed if the job has only one");
  command->add_option("--revision", options->revision,
                      "Instead: sum this version (0: the newest) at its sources to its revision");
  command->add_option("--deadline", options->deadline_s, "Seconds")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_flag("--json", options->json, "Machine-readable output");
  command->footer(
      R"(Both sides sum the boxes that each engine holds, in the engine's dtypes, and the sums are
compared: no weights move. Exit code 0: equal; 3: something differs or could not be compared.
A revision is the content address of a version, the same however it is sharded. Exit code 3: its
sources state another.

Examples:
  transfuse verify --job default --model policy
  transfuse verify --revision 0)");
  command->callback([options, &context] { context.run = [options] { return run(*options); }; });
}

}  // namespace transfuse

// `transfuse verify`: do running engines hold what running trainers publish?
#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

#include "command.h"
#include "job.h"
#include "rpc/rpc.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

struct Options {
  JobOptions job;
  std::string model;
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

int run(const Options& options) {
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
  command->add_option("--deadline", options->deadline_s, "Seconds")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_flag("--json", options->json, "Machine-readable output");
  command->footer(
      R"(Both sides sum the boxes that each engine holds, in the engine's dtypes, and the sums are
compared: no weights move. Exit code 0: equal; 3: something differs or could not be compared.

Example:
  transfuse verify --job default --model policy)");
  command->callback([options, &context] { context.run = [options] { return run(*options); }; });
}

}  // namespace transfuse

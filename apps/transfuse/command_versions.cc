// `transfuse versions` and `transfuse why`: the versions of a job, and the story of one.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "job.h"
#include "text_table.h"
#include "transfuse/control.h"
#include "transfuse/digest.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

nlohmann::json version_to_json(const VersionInfo& version) {
  return {{"model", version.model},
          {"version", version.version},
          {"state", version_state_name(version.state)},
          {"published", version.published},
          {"source_count", version.source_count},
          {"leases", version.leases},
          {"reason", version.reason},
          {"revision", revision_to_json(version.revision)},
          {"metadata", version.metadata}};
}

nlohmann::json revision_to_json(const Digest& revision) {
  return revision == Digest{} ? nlohmann::json() : nlohmann::json(revision.to_string());
}

std::string revision_to_text(const Digest& revision) {
  return revision == Digest{} ? "-" : revision.to_string().substr(0, 12);
}

std::string metadata_to_text(const Metadata& metadata) {
  std::string out;
  for (const auto& [key, value] : metadata) {
    out += fmt::format("{}{}={}", out.empty() ? "" : " ", key, value);
  }
  return out.empty() ? "-" : out;
}

namespace {

struct Options {
  JobOptions job;
  std::string model;
  uint64_t version = 0;
  bool json = false;
};

int run_versions(const Options& options) {
  const auto job = open_job(options.job);
  if (!job) return report_failure(job.error(), options.json);
  const auto versions = job->control->versions(options.model);
  if (!versions) return report_failure(versions.error(), options.json);
  if (options.json) {
    nlohmann::json out = nlohmann::json::array();
    for (const VersionInfo& each : *versions) out.push_back(version_to_json(each));
    std::printf("%s\n", out.dump().c_str());
    return kExitOk;
  }
  TextTable table(
      {"model", "version", "state", "published", "leases", "revision", "metadata", "why"});
  for (const VersionInfo& each : *versions) {
    table.add(
        {each.model, std::to_string(each.version), std::string(version_state_name(each.state)),
         fmt::format("{} of {}", each.published, each.source_count), std::to_string(each.leases),
         revision_to_text(each.revision), metadata_to_text(each.metadata), each.reason});
  }
  std::fputs(table.empty() ? "no versions\n" : table.to_text().c_str(), stdout);
  return kExitOk;
}

std::string event_name(const VersionEvent& event) {
  return event.who.empty() ? event.what : event.who + " " + event.what;
}

// The longest time in which nothing happened: where a refit of this version lost most.
struct Wait {
  int64_t us = 0;
  size_t ends_at = 0;  // event; 0: there is none
};
Wait longest_wait(const std::vector<VersionEvent>& events) {
  Wait longest;
  for (size_t i = 1; i < events.size(); ++i) {
    const int64_t us = events[i].at_us - events[i - 1].at_us;
    if (us > longest.us) longest = {.us = us, .ends_at = i};
  }
  return longest;
}

int run_why(const Options& options) {
  const auto job = open_job(options.job);
  if (!job) return report_failure(job.error(), options.json);
  const auto model = choose_model(*job->control, options.model);
  if (!model) return report_failure(model.error(), options.json);
  const auto events = job->control->history(*model, options.version);
  if (!events) return report_failure(events.error(), options.json);
  const Wait wait = longest_wait(*events);
  if (options.json) {
    nlohmann::json story = nlohmann::json::array();
    for (const VersionEvent& event : *events) {
      story.push_back({{"at_us", event.at_us}, {"who", event.who}, {"what", event.what}});
    }
    nlohmann::json out = {
        {"model", *model}, {"version", options.version}, {"events", std::move(story)}};
    if (wait.ends_at != 0) {
      out["longest_wait"] = {{"us", wait.us},
                             {"after", event_name((*events)[wait.ends_at - 1])},
                             {"until", event_name((*events)[wait.ends_at])}};
    }
    std::printf("%s\n", out.dump().c_str());
    return kExitOk;
  }
  TextTable table({"at", "after", "who", "what"});
  int64_t before = 0;
  for (const VersionEvent& event : *events) {
    table.add({fmt::format("{:.1f} ms", static_cast<double>(event.at_us) / 1e3),
               fmt::format("+{:.1f}", static_cast<double>(event.at_us - before) / 1e3), event.who,
               event.what});
    before = event.at_us;
  }
  std::printf("version %llu of model %s\n%s", static_cast<unsigned long long>(options.version),
              model->c_str(), table.to_text(2).c_str());
  if (wait.ends_at != 0) {
    std::printf("longest wait: %.1f ms, from \"%s\" to \"%s\"\n",
                static_cast<double>(wait.us) / 1e3, event_name((*events)[wait.ends_at - 1]).c_str(),
                event_name((*events)[wait.ends_at]).c_str());
  }
  return kExitOk;
}

}  // namespace

void add_versions_command(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<Options>();  // shared: parsing outlives this function
  CLI::App* command = app.add_subcommand("versions", "List the versions of a job.");
  add_job_options(*command, options->job);
  command->add_option("--model", options->model, "Only this stream of versions");
  command->add_flag("--json", options->json, "Machine-readable output");
  command->footer(
      R"(OPEN: being written; READY: every source has published it; RETIRED: overwritten;
ABORTED: given up before it was READY. The last ones that ended are remembered.

Example:
  transfuse versions --job policy)");
  command->callback(
      [options, &context] { context.run = [options] { return run_versions(*options); }; });
}

void add_why_command(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<Options>();  // shared: parsing outlives this function
  CLI::App* command =
      app.add_subcommand("why", "Tell the story of a version: what its refits waited for.");
  add_job_options(*command, options->job);
  command->add_option("--model", options->model,
                      "The stream of versions; not needed if the job has only one");
  command->add_option("version", options->version, "The version")
      ->required()
      ->check(CLI::PositiveNumber);
  command->add_flag("--json", options->json, "Machine-readable output");
  command->footer(
      R"(Every entry with the time since the version was opened and since the entry before.

Example:
  transfuse why 41 --job policy)");
  command->callback([options, &context] { context.run = [options] { return run_why(*options); }; });
}

}  // namespace transfuse

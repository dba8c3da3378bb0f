// `transfuse status`: who takes part in a job, what each holds, and how the last refits went.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "job.h"
#include "rpc/rpc.h"
#include "text_table.h"
#include "transfuse/control.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using nlohmann::json;

struct Options {
  JobOptions job;
  std::string model;
  double watch_s = 0;
  bool json = false;
};

struct ModelStatus {
  std::vector<MemberInfo> sources;
  std::vector<MemberInfo> targets;
  std::vector<GroupInfo> groups;
  std::vector<VersionInfo> versions;
};

Result<std::map<std::string, ModelStatus>> ask(Control& control, const std::string& model) {
  std::map<std::string, ModelStatus> models;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto members, control.members(model));
  for (const MemberInfo& member : members) {
    ModelStatus& status = models[member.model];
    (member.role == MemberRole::kSource ? status.sources : status.targets).push_back(member);
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto groups, control.groups(model));
  for (const GroupInfo& group : groups) models[group.model].groups.push_back(group);
  TRANSFUSE_ASSIGN_OR_RETURN(const auto versions, control.versions(model));
  for (const VersionInfo& version : versions) models[version.model].versions.push_back(version);
  return models;
}

std::string version_or_none(uint64_t version) {
  return version == 0 ? "-" : std::to_string(version);
}

// Of a source and of the version that it offers.
Metadata words_of(const MemberInfo& source) {
  Metadata words = source.version_metadata;
  words.insert(source.metadata.begin(), source.metadata.end());
  return words;
}

std::string last_refit(const RefitSummary& refit) {
  if (refit.version == 0) return "-";
  const double seconds = static_cast<double>(refit.transfer_us) / 1e6;
  std::string out = fmt::format("version {} in {:.1f} ms", refit.version,
                                static_cast<double>(refit.total_us) / 1e3);
  if (seconds > 0) {
    out += fmt::format(", {:.2f} GB/s", static_cast<double>(refit.size_bytes) / 1e9 / seconds);
  }
  if (refit.attempts > 1) out += fmt::format(", {} attempts", refit.attempts);
  return out;
}

// Those that are OPEN or READY, and the newest that has ended.
std::vector<VersionInfo> of_interest(const std::vector<VersionInfo>& versions) {
  std::vector<VersionInfo> out;
  for (const VersionInfo& version : versions) {
    const bool live = version.state == VersionState::kOpen || version.state == VersionState::kReady;
    if (live || &version == &versions.back()) out.push_back(version);
  }
  return out;
}

std::string to_text(const CoordinatorInfo& coordinator,
                    const std::map<std::string, ModelStatus>& models) {
  std::string out = fmt::format("coordinator {} (process {}, epoch {})\n", coordinator.address,
                                coordinator.pid, coordinator.epoch);
  if (models.empty()) out += "no members\n";
  for (const auto& [name, model] : models) {
    out += fmt::format("\nmodel {}\n", name);
    TextTable sources(
        {"source", "version", "slot", "writing", "layout", "kind", "revision", "metadata"});
    for (const MemberInfo& each : model.sources) {
      sources.add({each.name, version_or_none(each.version),
                   each.version == 0 ? "-" : std::to_string(each.slot),
                   version_or_none(each.writing), each.layout.to_string().substr(0, 12),
                   each.kind.empty() ? "-" : each.kind, revision_to_text(each.revision),
                   metadata_to_text(words_of(each))});
    }
    TextTable targets({"target", "version", "leases", "group", "layout", "last refit"});
    for (const MemberInfo& each : model.targets) {
      targets.add({each.name, version_or_none(each.version), std::to_string(each.leases),
                   each.group.empty() ? "-" : each.group, each.layout.to_string().substr(0, 12),
                   last_refit(each.last_refit)});
    }
    TextTable groups({"group", "state", "version", "ranks", "round", "why"});
    for (const GroupInfo& each : model.groups) {
      groups.add({each.name, std::string(group_state_name(each.state)),
                  version_or_none(each.version),
                  fmt::format("{} of {}", each.ranks.size(), each.size),
                  each.round == 0 ? "-" : fmt::format("{:x}", each.round), each.reason});
    }
    TextTable versions({"version", "state", "published", "leases", "revision", "metadata", "why"});
    for (const VersionInfo& each : of_interest(model.versions)) {
      versions.add({std::to_string(each.version), std::string(version_state_name(each.state)),
                    fmt::format("{} of {}", each.published, each.source_count),
                    std::to_string(each.leases), revision_to_text(each.revision),
                    metadata_to_text(each.metadata), each.reason});
    }
    for (const TextTable* table : {&sources, &targets, &groups, &versions}) {
      if (!table->empty()) out += table->to_text(2);
    }
  }
  return out;
}

json to_json(const MemberInfo& member) {
  json out = {{"name", member.name},
              {"version", member.version},
              {"layout", member.layout.to_string()},
              {"incarnation", fmt::format("{:016x}", member.incarnation)}};
  if (member.role == MemberRole::kSource) {
    out["slot"] = member.slot;
    out["writing"] = member.writing;
    out["kind"] = member.kind.empty() ? json() : json(member.kind);
    out["metadata"] = member.metadata;
    out["version_metadata"] = member.version_metadata;
    out["revision"] = revision_to_json(member.revision);
    return out;
  }
  out["leases"] = member.leases;
  out["group"] = member.group.empty() ? json() : json(member.group);
  const RefitSummary& refit = member.last_refit;
  if (refit.version == 0) {
    out["last_refit"] = nullptr;
  } else {
    out["last_refit"] = {{"version", refit.version},
                         {"total_us", refit.total_us},
                         {"transfer_us", refit.transfer_us},
                         {"size_bytes", refit.size_bytes},
                         {"attempts", refit.attempts}};
  }
  return out;
}

json to_json(const GroupInfo& group) {
  json ranks = json::array();
  for (const GroupRank& rank : group.ranks) {
    ranks.push_back({{"name", rank.name}, {"version", rank.version}});
  }
  return {{"name", group.name},       {"size", group.size},
          {"version", group.version}, {"state", group_state_name(group.state)},
          {"reason", group.reason},   {"round", fmt::format("{:x}", group.round)},
          {"ranks", std::move(ranks)}};
}

std::string to_json(const CoordinatorInfo& coordinator,
                    const std::map<std::string, ModelStatus>& models) {
  json out = {
      {"coordinator",
       {{"address", coordinator.address}, {"pid", coordinator.pid}, {"epoch", coordinator.epoch}}},
      {"models", json::object()}};
  for (const auto& [name, model] : models) {
    json& each = out["models"][name];
    for (const char* part : {"sources", "targets", "groups", "versions"})
      each[part] = json::array();
    for (const MemberInfo& source : model.sources) each["sources"].push_back(to_json(source));
    for (const MemberInfo& target : model.targets) each["targets"].push_back(to_json(target));
    for (const GroupInfo& group : model.groups) each["groups"].push_back(to_json(group));
    for (const VersionInfo& version : model.versions) {
      each["versions"].push_back(version_to_json(version));
    }
  }
  return out.dump();
}

Result<void> show(const Job& job, const Options& options, bool clear) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto models, ask(*job.control, options.model));
  const std::string text =
      options.json ? to_json(job.coordinator, models) + "\n" : to_text(job.coordinator, models);
  std::printf("%s%s", clear ? "\x1b[H\x1b[2J" : "", text.c_str());
  std::fflush(stdout);
  return {};
}

// Ctrl-C is waited for, not handled.
bool interrupted_within(double seconds) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  const auto whole = static_cast<time_t>(seconds);
  const timespec wait{.tv_sec = whole,
                      .tv_nsec = static_cast<long>((seconds - static_cast<double>(whole)) * 1e9)};
  return sigtimedwait(&signals, nullptr, &wait) > 0;
}

int run(const Options& options) {
  const bool watches = options.watch_s > 0;
  if (watches) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before gRPC starts threads
  }
  const auto job = open_job(options.job);
  if (!job) return report_failure(job.error(), options.json);
  while (true) {
    if (const auto shown = show(*job, options, watches && !options.json); !shown) {
      return report_failure(shown.error(), options.json);
    }
    if (!watches) return kExitOk;
    if (interrupted_within(options.watch_s)) return kExitInterrupted;
  }
}

}  // namespace

void add_status_command(CLI::App& app, CommandContext& context) {
  auto options = std::make_shared<Options>();  // shared: parsing outlives this function
  CLI::App* command = app.add_subcommand(
      "status", "Show sources, targets, groups, versions, leases and last refits of a job.");
  add_job_options(*command, options->job);
  command->add_option("--model", options->model, "Only this stream of versions");
  command->add_option("--watch", options->watch_s, "Show it again every so many seconds")
      ->check(CLI::Range(0.1, 3600.0));
  command->add_flag("--json", options->json,
                    "Machine-readable output, one line for each time it is shown");
  command->footer(R"(Examples:
  transfuse status
  transfuse status --job policy --watch 1
  transfuse status --json | jq '.models.model.groups[] | select(.state != "WHOLE")')");
  command->callback([options, &context] { context.run = [options] { return run(*options); }; });
}

}  // namespace transfuse

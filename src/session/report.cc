// A refit report for people and for programs.

#include <fmt/format.h>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "base/log.h"
#include "session/receivers.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {

void log_refit(const ReceiverOptions& options, const RefitReport& report,
               const Result<void>& outcome) {
  for (const RefitStep& step : report.steps) {
    log_event(LogLevel::kInfo, "refit_step",
              {{"receiver", options.name},
               {"version", std::to_string(report.version)},
               {"source", step.source},
               {"what", step.what}});
  }
  if (!outcome) {
    log_event(LogLevel::kWarn, "refit_failed",
              {{"receiver", options.name},
               {"version", std::to_string(report.version)},
               {"attempts", std::to_string(report.attempts)},
               {"reason", outcome.error().to_string()}});
    return;
  }
  log_event(LogLevel::kDebug, "refit_landed",
            {{"receiver", options.name},
             {"version", std::to_string(report.version)},
             {"attempts", std::to_string(report.attempts)},
             {"size_bytes", std::to_string(report.size_bytes)},
             {"total_us", std::to_string(report.phases.total_us)}});
}

std::string RefitReport::to_json() const {
  nlohmann::json routes_json = nlohmann::json::array();
  for (const RefitRoute& route : routes) {
    routes_json.push_back({{"source", route.source},
                           {"transport", route.transport},
                           {"route", route.route},
                           {"size_bytes", route.size_bytes},
                           {"run_count", route.run_count}});
  }
  nlohmann::json steps_json = nlohmann::json::array();
  for (const RefitStep& step : steps) {
    steps_json.push_back(
        {{"code", error_code_name(step.code)}, {"source", step.source}, {"what", step.what}});
  }
  const nlohmann::json revision_json =
      revision == Digest{} ? nlohmann::json() : nlohmann::json(revision.to_string());
  const nlohmann::json json = {{"version", version},
                               {"phases",
                                {{"discover_us", phases.discover_us},
                                 {"lease_us", phases.lease_us},
                                 {"transfer_us", phases.transfer_us},
                                 {"verify_us", phases.verify_us},
                                 {"decide_us", phases.decide_us},
                                 {"commit_us", phases.commit_us},
                                 {"total_us", phases.total_us}}},
                               {"size_bytes", size_bytes},
                               {"source_bytes", source_bytes},
                               {"reread_bytes", reread_bytes},
                               {"chunk_count", chunk_count},
                               {"verified_bytes", verified_bytes},
                               {"attempts", attempts},
                               {"planned", planned},
                               {"checkpoint", checkpoint},
                               {"gigabytes_per_second", gigabytes_per_second},
                               {"revision", revision_json},
                               {"metadata", metadata},
                               {"routes", routes_json},
                               {"steps", steps_json}};
  return json.dump();
}

std::string RefitReport::to_text() const {
  const auto ms = [](int64_t us) { return static_cast<double>(us) / 1e3; };
  std::string text = fmt::format(
      "version {}: {:.2f} ms (discover {:.2f}, lease {:.2f}, transfer {:.2f}, verify {:.2f}, "
      "decide {:.2f}, commit {:.2f}); {} bytes at {:.2f} GB/s, {} verified, {} attempt{}{}\n",
      version, ms(phases.total_us), ms(phases.discover_us), ms(phases.lease_us),
      ms(phases.transfer_us), ms(phases.verify_us), ms(phases.decide_us), ms(phases.commit_us),
      size_bytes, gigabytes_per_second, verified_bytes, attempts, attempts == 1 ? "" : "s",
      planned ? ", planned" : "");
  if (!checkpoint.empty()) text += fmt::format("  from checkpoint {}\n", checkpoint);
  if (revision != Digest{}) text += fmt::format("  revision {}\n", revision.to_string());
  for (const auto& [key, value] : metadata) text += fmt::format("  {}={}\n", key, value);
  for (const RefitRoute& route : routes) {
    text += fmt::format("  {} by {}/{}: {} bytes in {} runs\n", route.source, route.transport,
                        route.route, route.size_bytes, route.run_count);
  }
  for (const RefitStep& step : steps) {
    text += fmt::format("  {}{}{}: {}\n", error_code_name(step.code),
                        step.source.empty() ? "" : " at ", step.source, step.what);
  }
  return text;
}

}  // namespace transfuse

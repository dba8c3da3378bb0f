// What a target does when it is told to.
#include "target_process.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "child_process.h"
#include "member_spec.h"
#include "process_memory.h"
#include "rpc/rpc.h"
#include "stopwatch.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/versions.h"
#include "weights.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kRefitDeadlineMs = 120000;

int64_t elapsed_us(const Stopwatch& watch) { return static_cast<int64_t>(watch.seconds() * 1e6); }

// In a shadow in its two steps, so that the pause is known.
Result<TargetRefit> refit(Receiver& receiver, ReceiveInto into, uint64_t version) {
  const Deadline deadline = Deadline::after_ms(kRefitDeadlineMs);
  const VersionRequest request{VersionRequest::Kind::kExactly, version};
  if (into == ReceiveInto::kShadow) {
    TRANSFUSE_RETURN_IF_ERROR(receiver.stage(request, deadline));
    TRANSFUSE_RETURN_IF_ERROR(receiver.wait_staged(deadline));
  }
  const Stopwatch watch;
  TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport report, into == ReceiveInto::kShadow
                                                           ? receiver.commit(deadline)
                                                           : receiver.refit(request, deadline));
  if (report.version != version || report.verified_bytes < report.size_bytes)
    return Error{ErrorCode::kFingerprintMismatch,
                 fmt::format("asked for version {}, got version {} with {} of {} bytes verified",
                             version, report.version, report.verified_bytes, report.size_bytes)};
  return TargetRefit{.phases = report.phases,
                     .pause_us = elapsed_us(watch),
                     .size_bytes = report.size_bytes,
                     .attempts = report.attempts};
}

std::string encode(const TargetRefit& refit) {
  const RefitPhases& p = refit.phases;
  return fmt::format("{} {} {} {} {} {} {} {} {} {}", p.discover_us, p.lease_us, p.transfer_us,
                     p.verify_us, p.decide_us, p.commit_us, p.total_us, refit.pause_us,
                     refit.size_bytes, refit.attempts);
}

}  // namespace

std::string encode(const TargetSpec& spec) {
  nlohmann::json json = to_json(spec.member);
  json["name"] = spec.name;
  json["into"] = static_cast<int>(spec.into);
  json["group"] = spec.group;
  return json.dump();
}

Result<TargetSpec> decode_target_spec(std::string_view text) {
  return decode_spec<TargetSpec>(text, [](const nlohmann::json& json) {
    return TargetSpec{.member = member_spec_from_json(json),
                      .name = json.at("name"),
                      .into = static_cast<ReceiveInto>(json.at("into").get<int>()),
                      .group = json.at("group")};
  });
}

Result<std::unique_ptr<TargetProcess>> TargetProcess::start(const TargetSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto child, ChildProcess::start("bench-target", encode(spec), "target " + spec.name));
  auto target = std::unique_ptr<TargetProcess>(new TargetProcess(std::move(child)));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string open_us, target->child_->ask("opened"));
  target->open_us_ = std::stoll(open_us);
  return target;
}

Result<void> TargetProcess::begin_refit(uint64_t version) {
  return child_->send(fmt::format("refit {}", version));
}

Result<TargetRefit> TargetProcess::end_refit() {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, child_->receive());
  TargetRefit refit;
  RefitPhases& p = refit.phases;
  if (std::sscanf(text.c_str(), "%ld %ld %ld %ld %ld %ld %ld %ld %lu %u", &p.discover_us,
                  &p.lease_us, &p.transfer_us, &p.verify_us, &p.decide_us, &p.commit_us,
                  &p.total_us, &refit.pause_us, &refit.size_bytes, &refit.attempts) != 10)
    return Error{ErrorCode::kCorrupt, fmt::format("the refit of a target: '{}'", text)};
  return refit;
}

Result<void> run_target(const TargetSpec& spec) {
  const MemberSpec& member = spec.member;
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parallel, parse_parallel_spec(member.layout));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout,
                             layout_of(member.config, member.layout, member.rank));
  TRANSFUSE_ASSIGN_OR_RETURN(Weights weights, Weights::allocate(layout, nullptr));
  TransportOptions reading;
  reading.threads = member.threads;
  const Stopwatch watch;
  const uint64_t before = process_memory_bytes("RssAnon");
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport,
                             open_shm_transport(member.runtime_folder, reading));
  ConnectOptions connect;
  connect.runtime_folder = member.runtime_folder;
  connect.address = member.address;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto control, connect_control(connect));
  ReceiverOptions options;
  options.model = member.stream;
  options.name = spec.name;
  options.into = spec.into;
  options.group = spec.group;
  if (!spec.group.empty()) options.group_size = static_cast<uint32_t>(parallel.rank_count());
  TRANSFUSE_ASSIGN_OR_RETURN(
      const auto receiver, Receiver::open(*transport, *control, layout, weights.memory(), options));
  const int64_t open_us = elapsed_us(watch);

  serve_orders([&](const std::string& order) -> Result<std::string> {
    uint64_t version = 0;
    if (std::sscanf(order.c_str(), "refit %lu", &version) == 1) {
      TRANSFUSE_ASSIGN_OR_RETURN(const TargetRefit done, refit(*receiver, spec.into, version));
      return encode(done);
    }
    if (order == "usage") return encode(own_usage(*transport, before));
    if (order == "opened") return std::to_string(open_us);
    return Error{ErrorCode::kInvalidArgument, fmt::format("a target has no order '{}'", order)};
  });
  return receiver->close();
}

}  // namespace transfuse::bench

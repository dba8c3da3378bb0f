// What a source does when it is told to.
#include "source_process.h"

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
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "weights.h"
#include "workload.h"

namespace transfuse::bench {

std::string encode(const SourceSpec& spec) {
  nlohmann::json json = to_json(spec.member);
  json["memory"] = static_cast<int>(spec.memory);
  json["snapshot_slots"] = spec.snapshot_slots;
  return json.dump();
}

Result<SourceSpec> decode_source_spec(std::string_view text) {
  return decode_spec<SourceSpec>(text, [](const nlohmann::json& json) {
    return SourceSpec{.member = member_spec_from_json(json),
                      .memory = static_cast<SourceMemory>(json.at("memory").get<int>()),
                      .snapshot_slots = json.at("snapshot_slots").get<uint32_t>()};
  });
}

Result<std::unique_ptr<SourceProcess>> SourceProcess::start(const SourceSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto child,
      ChildProcess::start("bench-source", encode(spec),
                          fmt::format("source {} {}", spec.member.layout, spec.member.rank)));
  return std::unique_ptr<SourceProcess>(new SourceProcess(std::move(child)));
}

Result<void> SourceProcess::publish(uint64_t version) {
  TRANSFUSE_RETURN_IF_ERROR(child_->ask(fmt::format("publish {}", version)));
  return {};
}

Result<void> run_source(const SourceSpec& spec) {
  const MemberSpec& member = spec.member;
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parallel, parse_parallel_spec(member.layout));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout,
                             layout_of(member.config, member.layout, member.rank));
  TransportOptions reading;
  reading.threads = member.threads;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport,
                             open_shm_transport(member.runtime_folder, reading));
  ConnectOptions connect;
  connect.runtime_folder = member.runtime_folder;
  connect.address = member.address;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto control, connect_control(connect));

  TRANSFUSE_ASSIGN_OR_RETURN(
      Weights weights,
      Weights::allocate(layout, spec.memory == SourceMemory::kMemfd ? transport.get() : nullptr));
  weights.fill(static_cast<uint64_t>(member.rank) + 1);
  const uint64_t before = process_memory_bytes("RssAnon");

  PublisherOptions options;
  options.model = member.stream;
  options.name = fmt::format("source{}", member.rank);
  options.source_count = static_cast<uint32_t>(parallel.rank_count());
  options.snapshot_slots = spec.snapshot_slots;
  if (spec.snapshot_slots > 0) options.retention = Retention::kSnapshot;
  if (weights.arena() != nullptr) options.arenas = {weights.arena()};
  TRANSFUSE_ASSIGN_OR_RETURN(const auto publisher, Publisher::open(*transport, *control, layout,
                                                                   weights.memory(), options));

  serve_orders([&](const std::string& order) -> Result<std::string> {
    uint64_t version = 0;
    if (std::sscanf(order.c_str(), "publish %lu", &version) == 1) {
      TRANSFUSE_RETURN_IF_ERROR(publisher->begin_write(version));
      weights.touch(version);
      TRANSFUSE_RETURN_IF_ERROR(publisher->publish(version));
      return std::string();
    }
    if (order == "usage") return encode(own_usage(*transport, before));
    return Error{ErrorCode::kInvalidArgument, fmt::format("a source has no order '{}'", order)};
  });
  return publisher->close();
}

}  // namespace transfuse::bench

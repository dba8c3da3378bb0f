// T11: many refits leave registrations, handles and memory as they were after the second, in every
// mode.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/child_process.h"
#include "fleet.h"
#include "measure.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

struct Mode {
  std::string_view name;
  uint32_t snapshot_slots;
  ReceiveInto into;
  int64_t ranks;
  int cycles;
};
// A thousand where that is the target's word; what the modes add shows in fewer.
constexpr Mode kModes[] = {
    {"in place", 0, ReceiveInto::kInPlace, 1, 1000},
    {"snapshot, in place", 2, ReceiveInto::kInPlace, 1, 1000},
    {"snapshot, shadow", 2, ReceiveInto::kShadow, 1, 1000},
    {"snapshot, shadow, group of 2", 2, ReceiveInto::kShadow, 2, 1000},
};

// What may grow, at one moment: counts over all processes, and the memory of one of each kind.
struct Holdings {
  uint64_t registrations = 0;
  uint64_t handles = 0;
  uint64_t open_files = 0;
  double target_bytes = 0;
  double source_bytes = 0;
  double coordinator_bytes = 0;
};

Result<Holdings> holdings_of(const Fleet& fleet) {
  Holdings holdings;
  holdings.open_files = fleet.coordinator_files();
  holdings.coordinator_bytes = static_cast<double>(fleet.coordinator_bytes());
  const auto add = [&](const ProcessUsage& usage) {
    holdings.registrations += usage.regions;
    holdings.handles += usage.handles;
    holdings.open_files += usage.open_files;
    return static_cast<double>(usage.anonymous_bytes);
  };
  for (const auto& source : fleet.sources()) {
    TRANSFUSE_ASSIGN_OR_RETURN(const ProcessUsage usage, source->usage());
    holdings.source_bytes = add(usage);
  }
  for (const auto& target : fleet.targets()) {
    TRANSFUSE_ASSIGN_OR_RETURN(const ProcessUsage usage, target->usage());
    holdings.target_bytes = add(usage);
  }
  return holdings;
}

Figure growth(const std::string& workload, std::string quantity, uint64_t before, uint64_t after) {
  const double difference = static_cast<double>(after) - static_cast<double>(before);
  return {"T11",
          workload,
          std::move(quantity),
          "more",
          {difference, difference, difference},
          {{"after_cycle_2", before}, {"at_the_end", after}, {"target", 0}}};
}

// Counts at the end against cycle 2, memory over all cycles but the first tenth.
void emit(const Mode& mode, int cycles, const Holdings& second,
          const std::vector<Holdings>& settled, const Sink& sink) {
  const std::string workload = fmt::format("{}, {} cycles, 16 MiB", mode.name, cycles);
  const Holdings& last = settled.back();
  sink(growth(workload, "registrations since cycle 2", second.registrations, last.registrations));
  sink(growth(workload, "handles since cycle 2", second.handles, last.handles));
  sink(growth(workload, "open files since cycle 2", second.open_files, last.open_files));
  const auto memory = [&](std::string_view who, double Holdings::* bytes) {
    std::vector<double> series, late;
    for (size_t i = 0; i < settled.size(); ++i) {
      series.push_back(settled[i].*bytes);
      if (i >= settled.size() / 2) late.push_back(settled[i].*bytes);
    }
    const double per_cycle = slope_of(series);
    sink({"T11",
          workload,
          fmt::format("slope of memory, {}", who),
          "B/cycle",
          {per_cycle, per_cycle, per_cycle},
          {{"cycles", series.size()},
           {"first_bytes", series.front()},
           {"last_bytes", series.back()},
           {"slope_of_second_half", slope_of(late)}}});
  };
  memory("target", &Holdings::target_bytes);
  memory("source", &Holdings::source_bytes);
  memory("coordinator", &Holdings::coordinator_bytes);
}

}  // namespace

Result<void> measure_soak(const Options& options, const Sink& sink) {
  for (const Mode& mode : kModes) {
    const int cycles = options.tiny ? 10 : mode.cycles;
    TRANSFUSE_ASSIGN_OR_RETURN(const auto fleet,
                               Fleet::open({.name = "soak",
                                            .config = narrow_qwen3_4b(16 << 20),
                                            .source = "fsdp:dp=2",
                                            .target = "vllm:tp=2",
                                            .threads = options.threads,
                                            .snapshot_slots = mode.snapshot_slots}));
    for (int64_t rank = 0; rank < mode.ranks; ++rank) {
      TRANSFUSE_RETURN_IF_ERROR(fleet->add_target({.name = fmt::format("engine{}", rank),
                                                   .rank = rank,
                                                   .into = mode.into,
                                                   .group = mode.ranks > 1 ? "engine" : ""}));
    }
    Holdings second;
    std::vector<Holdings> settled;
    for (int cycle = 1; cycle <= cycles; ++cycle) {
      TRANSFUSE_RETURN_IF_ERROR(fleet->publish());
      TRANSFUSE_RETURN_IF_ERROR(fleet->refit());
      TRANSFUSE_ASSIGN_OR_RETURN(const Holdings now, holdings_of(*fleet));
      if (cycle == 2) second = now;
      if (cycle > cycles / 10) settled.push_back(now);
    }
    emit(mode, cycles, second, settled, sink);
  }
  return {};
}

}  // namespace transfuse::bench

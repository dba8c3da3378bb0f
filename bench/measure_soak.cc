// T11: a thousand refits leave registrations, handles and memory as they were after the second.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "bench/source_process.h"
#include "measure.h"
#include "process_memory.h"
#include "refit_world.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

// What may grow, at one moment, in all processes of the world.
struct Holdings {
  uint64_t registrations = 0;
  uint64_t handles = 0;  // peers, remote regions, tickets
  uint64_t open_files = 0;
};

Result<Holdings> holdings_of(RefitWorld& world) {
  const TransportStats stats = world.stats();
  Holdings holdings{stats.regions, stats.peers + stats.remote_regions + stats.tickets,
                    open_file_count()};
  for (auto& source : world.sources()) {
    TRANSFUSE_ASSIGN_OR_RETURN(const SourceUsage usage, source->usage());
    holdings.registrations += usage.regions;
    holdings.open_files += usage.open_files;
  }
  return holdings;
}

// Least squares: y per step of x = 0, 1, 2, ...
double slope(const std::vector<double>& y) {
  const auto n = static_cast<double>(y.size());
  double sum_y = 0, sum_xy = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    sum_y += y[i];
    sum_xy += static_cast<double>(i) * y[i];
  }
  const double sum_x = n * (n - 1) / 2;
  const double sum_xx = (n - 1) * n * (2 * n - 1) / 6;
  return (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x * sum_x);
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

}  // namespace

Result<void> measure_soak(const Options& options, const Sink& sink) {
  const int cycles = options.tiny ? 20 : 1000;
  const int settled = cycles / 10;
  const uint32_t threads = options.threads == 0 ? usable_core_count() : options.threads;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto world,
                             RefitWorld::open({"soak", narrow_qwen3_4b(16 << 20), "fsdp:dp=2",
                                               "vllm:tp=2", SourceMemory::kMemfd, threads}));
  Holdings second;
  std::vector<double> target_bytes, source_bytes, coordinator_bytes;
  for (int cycle = 1; cycle <= cycles; ++cycle) {
    TRANSFUSE_RETURN_IF_ERROR(world->publish());
    TRANSFUSE_RETURN_IF_ERROR(world->refit(Verify::kFull));
    TRANSFUSE_RETURN_IF_ERROR(world->refit(Verify::kOff));
    if (cycle == 2) {
      TRANSFUSE_ASSIGN_OR_RETURN(second, holdings_of(*world));
    }
    if (cycle <= settled) continue;
    TRANSFUSE_ASSIGN_OR_RETURN(const SourceUsage usage, world->sources().front()->usage());
    source_bytes.push_back(static_cast<double>(usage.anonymous_bytes));
    target_bytes.push_back(static_cast<double>(process_memory_bytes("RssAnon")));
    coordinator_bytes.push_back(static_cast<double>(world->coordinator_bytes()));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const Holdings last, holdings_of(*world));

  const std::string workload = fmt::format("{} cycles of two refits, 16 MiB", cycles);
  sink(growth(workload, "registrations since cycle 2", second.registrations, last.registrations));
  sink(growth(workload, "handles since cycle 2", second.handles, last.handles));
  sink(growth(workload, "open files since cycle 2", second.open_files, last.open_files));
  const auto memory = [&](std::string_view who, const std::vector<double>& bytes) {
    const double per_cycle = slope(bytes);
    sink({"T11",
          workload,
          fmt::format("slope of memory, {}", who),
          "B/cycle",
          {per_cycle, per_cycle, per_cycle},
          {{"from_cycle", settled + 1},
           {"first_bytes", bytes.front()},
           {"last_bytes", bytes.back()}}});
  };
  memory("target", target_bytes);
  memory("source", source_bytes);
  memory("coordinator", coordinator_bytes);
  return {};
}

}  // namespace transfuse::bench

// T2, T3, T10: refits through shared memory beside memcpy of the same bytes with the same threads.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/affinity.h"
#include "bench/source_process.h"
#include "ceiling.h"
#include "measure.h"
#include "refit_world.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr double kMiB = 1 << 20;

// Samples of one kind of refit, in the order of the repetitions.
struct Samples {
  std::vector<double> seconds;
  std::vector<double> overhead_ms;  // everything but moving bytes
  RefitReport last;

  void add(const RefitReport& report) {
    seconds.push_back(static_cast<double>(report.phases.total_us) / 1e6);
    overhead_ms.push_back(static_cast<double>(report.phases.total_us - report.phases.transfer_us) /
                          1e3);
    last = report;
  }
};

struct Measured {
  Samples off;         // fingerprints off
  Samples full;        // full; the sources had summed the version before
  Samples full_fresh;  // full, right after publishing: the sources sum while the target reads
  std::vector<double> memcpy_seconds;
  RefitReport cold;  // the first refit: connections, layouts, plan
  double extra_target_mib = 0;
  std::vector<double> extra_source_mib;
};

// The first refits, which connect and plan; then what a target and its sources hold beside weights.
Result<void> warm_up(RefitWorld& world, Measured& measured) {
  for (int i = 0; i < 3; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(world.publish());
    TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport report, world.refit(Verify::kFull));
    TRANSFUSE_RETURN_IF_ERROR(world.refit(Verify::kOff));
    if (i == 0) measured.cold = report;
  }
  measured.extra_target_mib = static_cast<double>(world.extra_target_bytes()) / kMiB;
  for (auto& source : world.sources()) {
    TRANSFUSE_ASSIGN_OR_RETURN(const ProcessUsage usage, source->usage());
    measured.extra_source_mib.push_back(static_cast<double>(usage.anonymous_bytes) / kMiB);
  }
  return {};
}

Result<void> run_cycles(RefitWorld& world, const Ceiling& ceiling, int repetitions,
                        Measured& measured) {
  constexpr int kWarmUp = 1;  // of memcpy
  for (int i = 0; i < kWarmUp + repetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(world.publish());
    TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport fresh, world.refit(Verify::kFull));
    // Which of the compared passes comes first alternates.
    const bool memcpy_first = i % 2 == 0;
    double memcpy_seconds = memcpy_first ? ceiling.copy_seconds(world.target().bytes()) : 0;
    TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport off, world.refit(Verify::kOff));
    if (!memcpy_first) memcpy_seconds = ceiling.copy_seconds(world.target().bytes());
    TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport full, world.refit(Verify::kFull));
    if (i < kWarmUp) continue;
    measured.memcpy_seconds.push_back(memcpy_seconds);
    measured.full_fresh.add(fresh);
    measured.off.add(off);
    measured.full.add(full);
  }
  return {};
}

std::vector<double> divided(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> result(a.size());
  std::ranges::transform(a, b, result.begin(), [](double x, double y) { return x / y; });
  return result;
}

std::vector<double> rates(uint64_t bytes, const std::vector<double>& seconds) {
  std::vector<double> result(seconds.size());
  std::ranges::transform(seconds, result.begin(),
                         [bytes](double s) { return static_cast<double>(bytes) / s / 1e9; });
  return result;
}

nlohmann::json phases(const RefitReport& report) {
  return {{"discover_us", report.phases.discover_us},
          {"lease_us", report.phases.lease_us},
          {"transfer_us", report.phases.transfer_us},
          {"verify_us", report.phases.verify_us},
          {"commit_us", report.phases.commit_us},
          {"total_us", report.phases.total_us},
          {"planned", report.planned},
          {"attempts", report.attempts}};
}

struct Case {
  std::string_view name;
  std::string_view source;
  std::string_view target;
  SourceMemory memory;
  double target_ratio;  // T3
};

void emit(const Case& c, const std::string& workload, const Measured& measured,
          const RefitWorld& world, uint32_t threads, const Sink& sink) {
  const uint64_t bytes = measured.off.last.size_bytes;
  const nlohmann::json detail = {
      {"bytes", bytes},
      {"threads", threads},
      {"source_processes", world.sources().size()},
      {"route", measured.off.last.routes.empty() ? "" : measured.off.last.routes.front().route},
      {"target_ratio", c.target_ratio},
      {"chunks", measured.off.last.chunk_count},
      {"memcpy_seconds", spread_of(measured.memcpy_seconds).median},
      {"phases_off", phases(measured.off.last)},
      {"phases_full", phases(measured.full.last)},
      {"phases_full_fresh", phases(measured.full_fresh.last)},
      {"phases_first_refit", phases(measured.cold)}};
  const auto& copied = measured.memcpy_seconds;
  const std::string target = c.target_ratio > 0 ? fmt::format(" (target {})", c.target_ratio) : "";
  sink({"T3", workload, "refit / memcpy" + target, "ratio",
        spread_of(divided(copied, measured.off.seconds)), detail});
  sink({"T3", workload, "fingerprints full", "ratio",
        spread_of(divided(copied, measured.full.seconds)), detail});
  sink({"T3", workload, "full, sums made meanwhile", "ratio",
        spread_of(divided(copied, measured.full_fresh.seconds)), detail});
  sink({"T3", workload, "refit", "GB/s", spread_of(rates(bytes, measured.off.seconds)), detail});
  sink({"T3", workload, "memcpy", "GB/s", spread_of(rates(bytes, copied)), detail});
  sink({"T2", workload, "all but moving bytes (target 1)", "ms",
        spread_of(measured.off.overhead_ms), detail});
  sink({"T2", workload, "the same, fingerprints full", "ms", spread_of(measured.full.overhead_ms),
        detail});

  const double mib = measured.extra_target_mib;
  sink({"T10",
        workload,
        "extra memory at the target",
        "MiB",
        {mib, mib, mib},
        {{"receivers", 2}, {"staging_target_mib", 64}}});
  sink({"T10",
        workload,
        "extra memory at a source",
        "MiB",
        spread_of(measured.extra_source_mib),
        {{"staging_target_mib", 64}}});
}

}  // namespace

Result<void> measure_refit(const Options& options, const Sink& sink) {
  constexpr Case kCases[] = {
      {"matched", "hf", "hf", SourceMemory::kMemfd, 0.95},
      {"mixed", "fsdp:dp=2", "vllm:tp=2", SourceMemory::kMemfd, 0.85},
      {"gathered", "fsdp:dp=2", "hf", SourceMemory::kMemfd, 0},  // beside bench/by_hand.py
      {"matched", "hf", "hf", SourceMemory::kPrivate, 0},
      {"mixed", "fsdp:dp=2", "vllm:tp=2", SourceMemory::kPrivate, 0},
  };
  const uint32_t threads = options.threads == 0 ? usable_core_count() : options.threads;
  const ModelConfig config = options.tiny ? narrow_qwen3_4b(16 << 20) : qwen3_4b(options.layers);
  const std::string model = options.tiny ? "tiny" : fmt::format("4b/{}", options.layers);
  for (const Case& c : kCases) {
    const std::string_view route = c.memory == SourceMemory::kMemfd ? "memfd" : "vm_readv";
    const std::string workload =
        fmt::format("{} {} {} -> {}, {}", model, c.name, c.source, c.target, route);
    TRANSFUSE_ASSIGN_OR_RETURN(
        const auto world,
        RefitWorld::open({fmt::format("{}-{}", c.name, route), config, std::string(c.source),
                          std::string(c.target), c.memory, threads}));
    Measured measured;
    TRANSFUSE_RETURN_IF_ERROR(warm_up(*world, measured));
    TRANSFUSE_ASSIGN_OR_RETURN(const Ceiling ceiling,
                               Ceiling::open(world->target().size_bytes(), threads));
    TRANSFUSE_RETURN_IF_ERROR(run_cycles(*world, ceiling, options.repetitions, measured));
    emit(c, workload, measured, *world, threads, sink);
  }
  return {};
}

Result<void> measure_tensor_count(const Options& options, const Sink& sink) {
  const uint32_t threads = options.threads == 0 ? usable_core_count() : options.threads;
  const uint64_t bytes = uint64_t{options.tiny ? 32u : 1200u} << 20;
  TRANSFUSE_ASSIGN_OR_RETURN(
      const auto few,
      RefitWorld::open({"few", narrow_qwen3_4b(bytes), "hf", "hf", SourceMemory::kMemfd, threads}));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto many,
                             RefitWorld::open({"many", narrow_qwen3_30b_a3b(bytes), "hf", "hf",
                                               SourceMemory::kMemfd, threads}));
  for (const Verify verify : {Verify::kOff, Verify::kFull}) {
    std::vector<double> few_rate, many_rate;
    nlohmann::json detail;
    constexpr int kWarmUp = 2;
    for (int i = 0; i < kWarmUp + options.repetitions; ++i) {
      double rate[2] = {};
      for (RefitWorld* world : {few.get(), many.get()}) {
        TRANSFUSE_RETURN_IF_ERROR(world->publish());
        if (verify == Verify::kFull)  // the sources make their sums
          TRANSFUSE_RETURN_IF_ERROR(world->refit(verify));
        TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport report, world->refit(verify));
        rate[world == many.get()] = static_cast<double>(report.size_bytes) /
                                    static_cast<double>(report.phases.total_us) / 1e3;
        detail[world == many.get() ? "many" : "few"] = {{"bytes", report.size_bytes},
                                                        {"phases", phases(report)},
                                                        {"chunks", report.chunk_count}};
      }
      if (i < kWarmUp) continue;
      few_rate.push_back(rate[0]);
      many_rate.push_back(rate[1]);
    }
    const std::string workload = fmt::format("18,867 against 398 tensors, {} MB", bytes / 1000000);
    const std::string_view suffix = verify == Verify::kFull ? ", full" : "";
    sink({"T4", workload, fmt::format("rate / rate (target 0.9){}", suffix), "ratio",
          spread_of(divided(many_rate, few_rate)), detail});
    sink({"T4", workload, fmt::format("18,867 tensors{}", suffix), "GB/s", spread_of(many_rate),
          detail});
    sink({"T4", workload, fmt::format("398 tensors{}", suffix), "GB/s", spread_of(few_rate),
          detail});
  }
  return {};
}

}  // namespace transfuse::bench

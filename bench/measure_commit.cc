// T14: the commit of a staged version beside memcpy of the same bytes with the same threads, and
// how long an engine stands still for a refit, in place and with a shadow.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/affinity.h"
#include "bench/source_process.h"
#include "bench/target_process.h"
#include "ceiling.h"
#include "fleet.h"
#include "measure.h"
#include "refit_world.h"
#include "stopwatch.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kDeadlineMs = 120000;

struct Samples {
  std::vector<double> memcpy_over_commit;
  std::vector<double> commit_ms;  // the copy alone
  std::vector<double> pause_ms;   // of the engine: all of commit()
  std::vector<double> stage_ms;   // meanwhile the engine serves
  uint64_t size_bytes = 0;
};

Result<void> commit_one(RefitWorld& world, Receiver& receiver, const Ceiling& ceiling,
                        bool memcpy_first, Samples& samples) {
  TRANSFUSE_RETURN_IF_ERROR(world.publish());
  const Deadline deadline = Deadline::after_ms(kDeadlineMs);
  const Stopwatch stage_watch;
  TRANSFUSE_RETURN_IF_ERROR(receiver.stage({}, deadline));
  TRANSFUSE_RETURN_IF_ERROR(receiver.wait_staged(deadline));
  samples.stage_ms.push_back(stage_watch.seconds() * 1e3);
  double copied = memcpy_first ? ceiling.copy_seconds(world.target().bytes()) : 0;
  const Stopwatch pause_watch;
  TRANSFUSE_ASSIGN_OR_RETURN(const RefitReport report, receiver.commit(deadline));
  samples.pause_ms.push_back(pause_watch.seconds() * 1e3);
  if (!memcpy_first) copied = ceiling.copy_seconds(world.target().bytes());
  const double commit_seconds = static_cast<double>(report.phases.commit_us) / 1e6;
  samples.commit_ms.push_back(commit_seconds * 1e3);
  samples.memcpy_over_commit.push_back(copied / commit_seconds);
  samples.size_bytes = report.size_bytes;
  return {};
}

Result<void> measure_shadow(RefitWorld& world, const Ceiling& ceiling, const std::string& workload,
                            bool keep_previous, int repetitions, const Sink& sink) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto receiver,
                             world.open_shadow({.keep_previous = keep_previous}));
  constexpr int kWarmUp = 2;
  Samples warm_up, samples;
  for (int i = 0; i < kWarmUp + repetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(
        commit_one(world, *receiver, ceiling, i % 2 == 0, i < kWarmUp ? warm_up : samples));
  }
  const std::string how = keep_previous ? "exchange" : "copy";
  const nlohmann::json detail = {{"bytes", samples.size_bytes},
                                 {"commit_ms", spread_of(samples.commit_ms).median},
                                 {"keep_previous", keep_previous}};
  sink({"T14", workload,
        keep_previous ? "memcpy / commit, keep_previous" : "memcpy / commit (target 0.9)", "ratio",
        spread_of(samples.memcpy_over_commit), detail});
  sink({"T14", workload, fmt::format("pause, shadow, {}", how), "ms", spread_of(samples.pause_ms),
        detail});
  sink({"T14", workload, fmt::format("staged meanwhile, {}", how), "ms",
        spread_of(samples.stage_ms), detail});
  return {};
}

Result<void> measure_in_place(RefitWorld& world, const std::string& workload, int repetitions,
                              const Sink& sink) {
  constexpr int kWarmUp = 2;
  std::vector<double> pause_ms;
  for (int i = 0; i < kWarmUp + repetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(world.publish());
    const Stopwatch watch;
    TRANSFUSE_RETURN_IF_ERROR(world.refit(Verify::kFull));
    if (i >= kWarmUp) pause_ms.push_back(watch.seconds() * 1e3);
  }
  sink({"T14", workload, "pause, in place, verified", "ms", spread_of(pause_ms)});
  return {};
}

// Two ranks of one engine, which are one pause: both vote, and neither goes on before both hold the
// version. The slower of the two counts.
Result<void> measure_group(const Options& options, const Sink& sink) {
  const uint64_t total_bytes = uint64_t{options.tiny ? 16u : 512u} << 20;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto fleet, Fleet::open({.name = "group",
                                                            .config = narrow_qwen3_4b(total_bytes),
                                                            .source = "fsdp:dp=2",
                                                            .target = "vllm:tp=2"}));
  for (int64_t rank = 0; rank < 2; ++rank) {
    TRANSFUSE_RETURN_IF_ERROR(fleet->add_target({.name = fmt::format("engine{}", rank),
                                                 .rank = rank,
                                                 .into = ReceiveInto::kShadow,
                                                 .group = "engine"}));
  }
  constexpr int kWarmUp = 2;
  std::vector<double> pause_ms, decide_ms, copy_ms;
  for (int i = 0; i < kWarmUp + options.repetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(fleet->publish());
    TRANSFUSE_ASSIGN_OR_RETURN(const auto refits, fleet->refit());
    if (i < kWarmUp) continue;
    const auto slower = [&](auto phase) {
      return static_cast<double>(std::max(phase(refits[0]), phase(refits[1]))) / 1e3;
    };
    pause_ms.push_back(slower([](const TargetRefit& r) { return r.pause_us; }));
    copy_ms.push_back(slower([](const TargetRefit& r) { return r.phases.commit_us; }));
    // Who has its bytes first waits for the other: what the decision itself takes is the last's.
    decide_ms.push_back(
        static_cast<double>(std::min(refits[0].phases.decide_us, refits[1].phases.decide_us)) /
        1e3);
  }
  const std::string workload =
      fmt::format("{} MiB fsdp:dp=2 -> vllm:tp=2, group of 2", total_bytes >> 20);
  sink({"T14", workload, "decide, the last rank to vote", "ms", spread_of(decide_ms)});
  sink({"T14", workload, "copy, both ranks at once", "ms", spread_of(copy_ms)});
  sink({"T14", workload, "pause, with waiting for the other", "ms", spread_of(pause_ms)});
  return {};
}

}  // namespace

Result<void> measure_commit(const Options& options, const Sink& sink) {
  const uint32_t threads = usable_core_count();  // those of a receiver's commit
  TRANSFUSE_ASSIGN_OR_RETURN(
      const auto world,
      RefitWorld::open({"commit",
                        options.tiny ? narrow_qwen3_4b(16 << 20) : qwen3_4b(options.layers),
                        "fsdp:dp=2", "vllm:tp=2", SourceMemory::kMemfd, threads}));
  const std::string workload = fmt::format(
      "{} fsdp:dp=2 -> vllm:tp=2", options.tiny ? "tiny" : fmt::format("4b/{}", options.layers));
  TRANSFUSE_ASSIGN_OR_RETURN(const Ceiling ceiling,
                             Ceiling::open(world->target().size_bytes(), threads));
  TRANSFUSE_RETURN_IF_ERROR(measure_in_place(*world, workload, options.repetitions, sink));
  for (const bool keep_previous : {false, true}) {
    TRANSFUSE_RETURN_IF_ERROR(
        measure_shadow(*world, ceiling, workload, keep_previous, options.repetitions, sink));
  }
  return measure_group(options, sink);
}

}  // namespace transfuse::bench

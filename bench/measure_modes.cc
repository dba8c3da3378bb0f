// T2 of the other modes: what a warm refit takes beside moving bytes, from snapshots and through a
// shadow.
#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "measure.h"
#include "refit_world.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kDeadlineMs = 120000;
constexpr int kWarmUp = 2;

// The copy of a shadow's commit moves bytes; in place that phase gives the lease back.
double overhead_ms(const RefitPhases& phases, ReceiveInto into) {
  const int64_t copy_us = into == ReceiveInto::kShadow ? phases.commit_us : 0;
  return static_cast<double>(phases.total_us - phases.transfer_us - copy_us) / 1e3;
}

Result<void> measure_one(RefitWorld& world, ReceiveInto into, Verify verify, int repetitions,
                         std::vector<double>& samples) {
  std::unique_ptr<Receiver> shadow;
  if (into == ReceiveInto::kShadow) {
    TRANSFUSE_ASSIGN_OR_RETURN(shadow, world.open_shadow({.verify = verify}));
  }
  for (int i = 0; i < kWarmUp + repetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(world.publish());
    TRANSFUSE_RETURN_IF_ERROR(world.refit(Verify::kFull));  // the sources make their sums
    const VersionRequest request{VersionRequest::Kind::kExactly, world.version()};
    TRANSFUSE_ASSIGN_OR_RETURN(
        const RefitReport report,
        shadow ? shadow->refit(request, Deadline::after_ms(kDeadlineMs)) : world.refit(verify));
    if (i >= kWarmUp) samples.push_back(overhead_ms(report.phases, into));
  }
  return {};
}

}  // namespace

Result<void> measure_modes(const Options& options, const Sink& sink) {
  const uint64_t total_bytes = uint64_t{options.tiny ? 16u : 512u} << 20;
  for (const uint32_t slots : {0u, 2u}) {
    const std::string from = slots > 0 ? "snapshot" : "in place";
    TRANSFUSE_ASSIGN_OR_RETURN(const auto world,
                               RefitWorld::open({.name = "modes",
                                                 .config = narrow_qwen3_4b(total_bytes),
                                                 .source = "fsdp:dp=2",
                                                 .target = "vllm:tp=2",
                                                 .threads = options.threads,
                                                 .snapshot_slots = slots}));
    for (const ReceiveInto into : {ReceiveInto::kInPlace, ReceiveInto::kShadow}) {
      const std::string workload =
          fmt::format("{} MiB fsdp:dp=2 -> vllm:tp=2, {} -> {}", total_bytes >> 20, from,
                      into == ReceiveInto::kShadow ? "shadow" : "in place");
      for (const Verify verify : {Verify::kOff, Verify::kFull}) {
        std::vector<double> samples;
        TRANSFUSE_RETURN_IF_ERROR(measure_one(*world, into, verify, options.repetitions, samples));
        sink({"T2", workload,
              verify == Verify::kFull ? "the same, fingerprints full"
                                      : "all but moving bytes (target 1)",
              "ms", spread_of(samples)});
      }
    }
  }
  return {};
}

}  // namespace transfuse::bench

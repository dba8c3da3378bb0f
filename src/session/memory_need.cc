// Sums of what publishers, receivers and their transports allocate.
#include "transfuse/memory_need.h"

#include <algorithm>
#include <cstdint>
#include <span>

#include "session/device_memory.h"
#include "session/memory.h"
#include "session/shadow.h"
#include "transfuse/digest.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/region.h"

namespace transfuse {
namespace {

// Two pinned buffers, in which everything between the host and a device is staged.
constexpr uint64_t kStagingBytes = uint64_t{64} << 20;

uint64_t bytes_of(const Plan& plan, const Run& run) {
  return static_cast<uint64_t>(run.element_count()) *
         dtype_size_bytes(plan.target().parameters()[run.parameter].dtype);
}

bool holds(const Plan& plan, const Run& run, const Digest& layout) {
  return std::ranges::any_of(plan.holders_of(run), [&](const Holder& holder) {
    return plan.source_layouts()[holder.source_layout].digest() == layout;
  });
}

// Each parameter in one piece, to or from a second copy within the device.
uint64_t plain_table_bytes(const Layout& layout) {
  uint64_t sum = 0;
  for (const ParameterSpec& parameter : layout.parameters()) {
    sum += device_table_bytes(parameter_size_bytes(parameter));
  }
  return sum;
}

}  // namespace

PlanOptions plan_options_for(MemoryPlace weights, PlanOptions asked) {
  if (weights == MemoryPlace::kDevice) {
    asked.chunk_bytes = std::max(asked.chunk_bytes, kDeviceChunkBytes);
  }
  return asked;
}

MemoryNeed memory_of_source(const Layout& source, std::span<const Plan* const> plans,
                            const SourceChoice& choice) {
  MemoryNeed need;
  const bool on_device = choice.weights == MemoryPlace::kDevice;
  const bool kept_on_device = on_device && choice.snapshot_place == SnapshotPlace::kWithWeights;
  const uint64_t snapshots =
      choice.snapshot_slots == 0 ? 0 : snapshot_bytes(source, choice.snapshot_slots);
  (kept_on_device ? need.device_bytes : need.host_bytes) += snapshots;
  if (on_device && snapshots > 0) {
    if (kept_on_device) {
      need.device_bytes += choice.snapshot_slots * plain_table_bytes(source);
    } else {
      need.host_bytes += kStagingBytes;
    }
  }
  // The weights themselves and every slot have tables of their own.
  const uint64_t summed_there = !on_device ? 0 : 1 + (kept_on_device ? choice.snapshot_slots : 0);
  for (const Plan* plan : plans) {
    need.host_bytes += fingerprint_table_bytes(*plan, source, choice.snapshot_slots);
    for (const Run& run : plan->runs()) {
      if (summed_there == 0 || !holds(*plan, run, source.digest())) continue;
      need.device_bytes +=
          summed_there * (device_table_bytes(bytes_of(*plan, run)) + kDeviceSumBytes);
      need.host_bytes += summed_there * kDeviceSumBytes;
    }
  }
  return need;
}

MemoryNeed memory_of_target(const Plan& plan, const TargetChoice& choice) {
  MemoryNeed need;
  const bool on_device = choice.weights == MemoryPlace::kDevice;
  // A device reads memory of the host by itself where the system pins it, and has it staged where
  // it does not.
  if (choice.weights != choice.sources) need.host_bytes += kStagingBytes;
  if (on_device) {
    for (const Run& run : plan.runs()) {
      need.device_bytes += device_table_bytes(bytes_of(plan, run)) + kDeviceSumBytes;
      need.host_bytes += kDeviceSumBytes;
    }
  }
  if (choice.into == ReceiveInto::kInPlace) return need;
  const uint64_t shadow = shadow_bytes(plan.target());
  if (!on_device) {
    need.host_bytes += shadow;
    return need;
  }
  need.device_bytes += shadow + plain_table_bytes(plan.target());
  if (choice.keep_previous) {
    // Out of the parameters, into them, and back, through memory between both.
    need.device_bytes += 2 * plain_table_bytes(plan.target());
    need.device_bytes += std::min(shadow, kHeldBytes);
  }
  return need;
}

}  // namespace transfuse

// What a rank takes beside its weights, by the choices that it has: before anything is allocated.
#pragma once

#include <cstdint>
#include <span>

#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/region.h"

namespace transfuse {

struct MemoryNeed {
  uint64_t device_bytes = 0;
  uint64_t host_bytes = 0;
};

struct SourceChoice {
  MemoryPlace weights = MemoryPlace::kHost;
  uint32_t snapshot_slots = 0;  // 0: in place
  SnapshotPlace snapshot_place = SnapshotPlace::kWithWeights;
};

struct TargetChoice {
  MemoryPlace weights = MemoryPlace::kHost;
  MemoryPlace sources = MemoryPlace::kHost;  // where what is read lies, snapshots too
  ReceiveInto into = ReceiveInto::kInPlace;
  bool keep_previous = false;  // only with a shadow
};

// The chunks of a plan for a receiver whose parameters lie there.
PlanOptions plan_options_for(MemoryPlace weights, PlanOptions asked = {});

// Of a source that serves these targets: snapshots, fingerprint tables, and what its GPU needs to
// make them.
MemoryNeed memory_of_source(const Layout& source, std::span<const Plan* const> plans,
                            const SourceChoice& choice);
// Of a target: its shadow, and what its GPU needs to copy. The plan itself is not in it
// (Plan::memory_bytes()).
MemoryNeed memory_of_target(const Plan& plan, const TargetChoice& choice);

}  // namespace transfuse

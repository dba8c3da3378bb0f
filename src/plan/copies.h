// From a run of a plan to the strided copy that a transport executes.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/plan.h"

namespace transfuse {

// Turns runs into copies without looking anything up by name. Immutable after construction; holds
// the plan.
class CopyTable {
 public:
  explicit CopyTable(Plan plan);
  const Plan& plan() const { return plan_; }

  // `source_offset_bytes` is where the holder's parameter starts in its region; `target` where the
  // run's parameter starts (null for a sum without a write).
  StridedCopy copy(const Run& run, const Holder& holder, uint64_t source_offset_bytes,
                   std::byte* target, bool fingerprint) const;
  // The runs that source layout `source_layout` holds, rising.
  std::span<const uint32_t> held_runs(uint32_t source_layout) const;
  uint64_t target_bytes(const Run& run) const;
  uint64_t source_bytes(const Run& run, const Holder& holder) const;

 private:
  Plan plan_;
  std::vector<uint64_t> keys_;                     // per tensor of the target layout
  std::vector<Dtype> target_dtypes_;               // per parameter of the target layout
  std::vector<std::vector<Dtype>> source_dtypes_;  // per source layout, per parameter
  std::vector<uint32_t> held_runs_;                // by source layout
  std::vector<uint32_t> first_held_;               // per source layout, and one past the last
};

}  // namespace transfuse

// From a run of a plan to the strided copy that a transport executes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "copy/copy.h"
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
  // `scales` of it are null; where is_scaled() they are what block_scales() gives.
  StridedCopy copy(const Run& run, const Holder& holder, uint64_t source_offset_bytes,
                   std::byte* target, bool fingerprint) const;
  // The scales that `run` writes, or else those that it reads at `holder`; null if neither.
  const ScaleRun* scale_run(const Run& run, const Holder& holder) const;
  // `target` is where the parameter of the scales starts (null for a sum without a write), as far
  // as they are written; `source_offset_bytes`, as far as they are read, where that parameter
  // starts in its region at the source.
  BlockScales block_scales(const Run& run, const Holder& holder, std::byte* target,
                           uint64_t source_offset_bytes) const;
  // The fingerprint of `run` as `holder` holds it; data(parameter) is where a parameter of the
  // holder's layout starts in this process.
  template <typename Data>
  uint64_t sum(const Run& run, const Holder& holder, Data&& data) const {
    const auto address = [&data](uint32_t parameter) {
      return static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data(parameter)));
    };
    StridedCopy held = copy(run, holder, address(holder.parameter), nullptr, true);
    BlockScales scales;
    if (const ScaleRun* const at = scale_run(run, holder)) {
      scales = block_scales(run, holder, nullptr, run.scales != 0 ? 0 : address(at->parameter));
      held.scales = &scales;
    }
    return sum_copy(held, reinterpret_cast<const std::byte*>(held.source_offset_bytes));
  }
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

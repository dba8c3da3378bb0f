// Element sizes, casts, offsets and fingerprint keys of a run, ready for a copy engine.
#include "plan/copies.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

ElementOp element_op(Dtype source, Dtype target) {
  if (source != target) {
    TRANSFUSE_CHECK(castable(source, target));
    if (target == Dtype::kF32) {
      return source == Dtype::kBF16 ? ElementOp::kBF16ToF32 : ElementOp::kF16ToF32;
    }
    return target == Dtype::kBF16 ? ElementOp::kF32ToBF16 : ElementOp::kF32ToF16;
  }
  return plain_copy(static_cast<uint32_t>(dtype_size_bytes(source)));
}

ElementOp quantizing_op(Dtype source) {
  if (source == Dtype::kF32) return ElementOp::kF32ToE4M3;
  return source == Dtype::kBF16 ? ElementOp::kBF16ToE4M3 : ElementOp::kF16ToE4M3;
}

ElementOp dequantizing_op(Dtype target) {
  if (target == Dtype::kF32) return ElementOp::kE4M3ToF32;
  return target == Dtype::kBF16 ? ElementOp::kE4M3ToBF16 : ElementOp::kE4M3ToF16;
}

}  // namespace

CopyTable::CopyTable(Plan plan) : plan_(std::move(plan)) {
  keys_.reserve(plan_.target().tensors().size());
  for (const TensorSpec& tensor : plan_.target().tensors()) {
    keys_.push_back(transfuse::fingerprint_key(tensor.name));
  }
  for (const ParameterSpec& parameter : plan_.target().parameters()) {
    target_dtypes_.push_back(parameter.dtype);
  }
  for (const Layout& layout : plan_.source_layouts()) {
    auto& dtypes = source_dtypes_.emplace_back();
    for (const ParameterSpec& parameter : layout.parameters()) dtypes.push_back(parameter.dtype);
  }
  // A counting sort of (layout, run), each once.
  std::vector<uint32_t> last_run(plan_.source_layouts().size(), UINT32_MAX);
  const auto for_each_held = [&](auto visit) {
    std::ranges::fill(last_run, UINT32_MAX);
    for (uint32_t run = 0; run < plan_.runs().size(); ++run) {
      for (const Holder& holder : plan_.holders_of(plan_.runs()[run])) {
        if (std::exchange(last_run[holder.source_layout], run) != run) {
          visit(holder.source_layout, run);
        }
      }
    }
  };
  first_held_.assign(plan_.source_layouts().size() + 1, 0);
  for_each_held([&](uint32_t layout, uint32_t) { ++first_held_[layout + 1]; });
  std::partial_sum(first_held_.begin(), first_held_.end(), first_held_.begin());
  held_runs_.resize(first_held_.back());
  std::vector<uint32_t> next(first_held_.begin(), first_held_.end());
  for_each_held([&](uint32_t layout, uint32_t run) { held_runs_[next[layout]++] = run; });
}

std::span<const uint32_t> CopyTable::held_runs(uint32_t source_layout) const {
  const uint32_t first = first_held_[source_layout];
  return {held_runs_.data() + first, first_held_[source_layout + 1] - first};
}

StridedCopy CopyTable::copy(const Run& run, const Holder& holder, uint64_t source_offset_bytes,
                            std::byte* target, bool fingerprint) const {
  const Dtype source_dtype = source_dtypes_[holder.source_layout][holder.parameter];
  const Dtype target_dtype = target_dtypes_[run.parameter];
  StridedCopy copy;
  copy.source_offset_bytes = source_offset_bytes + static_cast<uint64_t>(holder.source_offset) *
                                                       dtype_size_bytes(source_dtype);
  if (target != nullptr) copy.target = target + run.target_offset * dtype_size_bytes(target_dtype);
  copy.linear_index = static_cast<uint64_t>(run.linear_index);
  copy.fingerprint_key = keys_[run.tensor];
  copy.op = run.scales != 0      ? quantizing_op(source_dtype)
            : holder.scales != 0 ? dequantizing_op(target_dtype)
                                 : element_op(source_dtype, target_dtype);
  copy.fingerprint = fingerprint;
  const Strides3& source = plan_.pattern(holder.source_pattern);
  const Strides3& written = plan_.pattern(run.target_pattern);
  const Strides3& index = plan_.pattern(run.index_pattern);
  for (int level = 0; level < 3; ++level) {
    copy.count[level] = run.count[level];
    copy.source_stride[level] = source.level[level];
    copy.target_stride[level] = written.level[level];
    copy.index_stride[level] = index.level[level];
  }
  return copy;
}

const ScaleRun* CopyTable::scale_run(const Run& run, const Holder& holder) const {
  const uint32_t scales = run.scales != 0 ? run.scales : holder.scales;
  return scales == 0 ? nullptr : &plan_.block_scales()[scales - 1];
}

BlockScales CopyTable::block_scales(const Run& run, const Holder& holder, std::byte* target,
                                    uint64_t source_offset_bytes) const {
  constexpr auto kScaleBytes = static_cast<int64_t>(sizeof(float));
  const ScaleRun* const at = scale_run(run, holder);
  TRANSFUSE_CHECK(at != nullptr);
  BlockScales scales;
  for (int axis = 0; axis < 2; ++axis) {
    scales.block[axis] = at->block[axis];
    scales.phase[axis] = at->phase[axis];
    scales.stride[axis] = at->stride[axis];
    scales.index_stride[axis] = at->index_stride[axis];
  }
  if (run.scales != 0) {
    if (target != nullptr) scales.target = target + at->offset * kScaleBytes;
    scales.linear_index = static_cast<uint64_t>(at->linear_index);
    scales.fingerprint_key = keys_[at->tensor];
  } else {
    scales.source_offset_bytes =
        source_offset_bytes + static_cast<uint64_t>(at->offset * kScaleBytes);
  }
  return scales;
}

uint64_t CopyTable::target_bytes(const Run& run) const { return plan_.target_bytes(run); }

uint64_t CopyTable::source_bytes(const Run& run, const Holder& holder) const {
  return static_cast<uint64_t>(run.element_count()) *
         dtype_size_bytes(source_dtypes_[holder.source_layout][holder.parameter]);
}

}  // namespace transfuse

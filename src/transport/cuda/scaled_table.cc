// Copies with block scales become runs of a device table, and their blocks its items.
#include "transport/cuda/scaled_table.h"

#include <cstdint>
#include <limits>

#include "copy/element_size.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr uint32_t kScaleBytes = 4;

// Every unit of every row lies in one piece on both sides and begins at a multiple of its size: 8
// or 16 bytes, of which two make one of 32.
bool takes_vectors(const ScaledRun& run, uint64_t base_alignment) {
  const auto fits = [&](uint64_t begin, const int64_t(&stride)[2], uint32_t element_bytes) {
    const uint64_t unit = element_bytes == 1 ? 8 : 16;
    return stride[1] == element_bytes && begin % unit == 0 &&
           static_cast<uint64_t>(stride[0]) % unit == 0 &&
           uint64_t{run.block[1]} * element_bytes % unit == 0 &&
           uint64_t{run.phase[1]} * element_bytes % unit == 0;
  };
  return base_alignment % 16 == 0 && run.count[1] % kScaledUnit == 0 &&
         run.block[1] % kScaledUnit == 0 && run.phase[1] % kScaledUnit == 0 &&
         fits(run.source_offset, run.source_stride, source_bytes_of(run.op)) &&
         fits(run.target, run.target_stride, target_bytes_of(run.op));
}

}  // namespace

Result<void> add_scaled(const StridedCopy& copy, ScaledSources sources, uint32_t sum,
                        uint64_t base_alignment, ScaledTable& table) {
  if (copy.element_count() == 0 || (copy.target == nullptr && !copy.fingerprint)) return {};
  const BlockScales& scales = *copy.scales;
  ScaledRun run{.source_offset = copy.source_offset_bytes,
                .target = reinterpret_cast<uint64_t>(copy.target),
                .linear_index = copy.linear_index,
                .key = copy.fingerprint_key,
                .scale_linear_index = scales.linear_index,
                .scale_key = scales.fingerprint_key,
                .source = sources.numbers,
                .scale_source = sources.scales,
                .sum = sum,
                .op = copy.op,
                .fingerprint = copy.fingerprint};
  run.scales =
      quantizes(copy.op) ? reinterpret_cast<uint64_t>(scales.target) : scales.source_offset_bytes;
  for (int axis = 0; axis < 2; ++axis) {
    const int level = axis + 1;
    run.count[axis] = copy.count[level];
    run.source_stride[axis] = copy.source_stride[level] * source_bytes_of(copy.op);
    run.target_stride[axis] = copy.target_stride[level] * target_bytes_of(copy.op);
    run.index_stride[axis] = copy.index_stride[level];
    run.block[axis] = scales.block[axis];
    run.phase[axis] = scales.phase[axis];
    run.scale_stride[axis] = scales.stride[axis] * kScaleBytes;
    run.scale_index_stride[axis] = scales.index_stride[axis];
  }
  run.vectors = takes_vectors(run, base_alignment);
  const uint64_t rows = copy.block_count(0);
  const uint64_t columns = copy.block_count(1);
  constexpr uint64_t kMost = std::numeric_limits<uint32_t>::max();
  if (table.runs.size() >= kMost || rows * columns > kMost - table.items.size()) {
    return Error{ErrorCode::kResourceExhausted, "more than 2^32 - 1 runs or blocks in one table"};
  }
  const auto number = static_cast<uint32_t>(table.runs.size());
  table.runs.push_back(run);
  for (uint32_t i = 0; i < rows; ++i) {
    for (uint32_t j = 0; j < columns; ++j) {
      table.items.push_back({.run = number, .block = {i, j}});
    }
  }
  return {};
}

}  // namespace transfuse

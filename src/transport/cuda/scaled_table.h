// The table of copies with block scales that one kernel launch walks: an item is a block.
#pragma once

#include <cstdint>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// One copy. Rows first, columns second; strides in bytes, those of indices in elements.
struct ScaledRun {
  uint64_t source_offset = 0;  // from the source's base
  uint64_t target = 0;         // device address; 0: sum only
  // Of the first block's scale: a device address where it is written (0: sum only), else from its
  // source's base.
  uint64_t scales = 0;
  uint64_t linear_index = 0;
  uint64_t key = 0;
  uint64_t scale_linear_index = 0;
  uint64_t scale_key = 0;
  int64_t source_stride[2] = {0, 0};
  int64_t target_stride[2] = {0, 0};
  int64_t index_stride[2] = {0, 0};
  int64_t scale_stride[2] = {0, 0};
  int64_t scale_index_stride[2] = {0, 0};
  uint32_t count[2] = {0, 0};
  uint32_t block[2] = {1, 1};
  uint32_t phase[2] = {0, 0};
  uint32_t source = 0;        // whose base
  uint32_t scale_source = 0;  // likewise of the scales that are read
  uint32_t sum = 0;           // which sum its elements add to
  ElementOp op = ElementOp::kF32ToE4M3;
  bool fingerprint = false;
  bool vectors = false;  // rows are contiguous on both sides, and their units aligned
};

// Columns that a lane moves at once where ScaledRun::vectors.
inline constexpr uint32_t kScaledUnit = 8;

struct ScaledItem {
  uint32_t run = 0;
  uint32_t block[2] = {0, 0};
};

struct ScaledTable {
  std::vector<ScaledRun> runs;
  std::vector<ScaledItem> items;
};

// Whose bases a copy reads its numbers and its scales from.
struct ScaledSources {
  uint32_t numbers = 0;
  uint32_t scales = 0;
};

// Appends `copy`, which has scales and is checked (check_copy). The base of a source is a multiple
// of `base_alignment`. kResourceExhausted beyond 2^32 - 1 runs or blocks.
Result<void> add_scaled(const StridedCopy& copy, ScaledSources sources, uint32_t sum,
                        uint64_t base_alignment, ScaledTable& table);

}  // namespace transfuse

// Arguments of the kernels, shared by who launches and who runs.
#pragma once

#include <cstdint>

#include "transport/cuda/device_table.h"

namespace transfuse {

inline constexpr uint32_t kCopyThreads = 512;
inline constexpr uint32_t kCopyBlocksPerMultiprocessor = 2;

// Blocks that occupy at most `limit` (0: all) of `all` multiprocessors. The hardware spreads blocks
// over multiprocessors before it doubles them up: so many blocks occupy so many.
constexpr uint32_t block_count(uint32_t limit, uint32_t all) {
  return limit == 0 || limit >= all ? all * kCopyBlocksPerMultiprocessor : limit;
}

// What blocks of one launch share; all zero before it.
struct CopyProgress {
  uint64_t begun_bytes = 0;  // of the wider side; where there is a pace
  uint64_t start_ns = 0;     // by the device's clock, when the first item was taken; likewise
  uint32_t next = 0;         // item
  uint32_t reserved = 0;
};

// All pointers are device memory.
struct CopyLaunch {
  const DeviceRun* runs = nullptr;
  const DeviceItem* items = nullptr;
  const uint64_t* bases = nullptr;  // per source: the address of its region
  uint64_t* sums = nullptr;         // zero before the launch
  CopyProgress* progress = nullptr;
  double ns_per_byte = 0;  // 0: no pace
  uint32_t item_count = 0;
};

}  // namespace transfuse

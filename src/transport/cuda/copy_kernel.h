// Arguments of the kernels, shared by who launches and who runs.
#pragma once

#include <cstdint>

#include "transport/cuda/device_table.h"

namespace transfuse {

inline constexpr uint32_t kCopyThreads = 512;
inline constexpr uint32_t kCopyBlocksPerMultiprocessor = 2;

// All pointers are device memory.
struct CopyLaunch {
  const DeviceRun* runs = nullptr;
  const DeviceItem* items = nullptr;
  const uint64_t* bases = nullptr;  // per source: the address of its region
  uint64_t* sums = nullptr;         // zero before the launch
  uint32_t* next = nullptr;         // zero before the launch
  uint32_t item_count = 0;
};

struct WordsLaunch {
  const uint64_t* addresses = nullptr;  // per source: of two words
  uint64_t* out = nullptr;              // per source: both
  uint32_t count = 0;
};

}  // namespace transfuse

// The kernel for copies with block scales, and its arguments: persistent blocks of threads, one
// block of numbers at a time.
#pragma once

#include <cstdint>

#include "transport/cuda/scaled_device.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse {

inline constexpr uint32_t kScaledThreads = 512;
inline constexpr uint32_t kScaledBlocksPerMultiprocessor = 2;

// All pointers are device memory.
struct ScaledLaunch {
  const ScaledRun* runs = nullptr;
  const ScaledItem* items = nullptr;
  const uint64_t* bases = nullptr;  // per source: the address of its region
  uint64_t* sums = nullptr;         // other copies may add to them too
  uint32_t* next = nullptr;         // zero before the launch
  uint32_t item_count = 0;
};

#ifdef __CUDACC__
// Launched with kScaledThreads threads a block.
extern "C" __global__ void __launch_bounds__(kScaledThreads, kScaledBlocksPerMultiprocessor)
    transfuse_scaled_copy(const ScaledLaunch launch) {
  constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
  __shared__ alignas(kVectorBytes) std::byte stage[kScaledStageBytes];
  __shared__ ScaledView view;
  __shared__ bool last;
  __shared__ uint32_t largest;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t number = atomicAdd(launch.next, 1u);
      last = number >= launch.item_count;
      largest = 0;
      if (!last) {
        const ScaledItem item = launch.items[number];
        const ScaledRun& run = launch.runs[item.run];
        view = view_of(run, item, launch.bases, blockDim.x);
      }
    }
    __syncthreads();
    if (last) return;
    uint32_t scale = 0;
    const bool writes = quantizes_of(view.op);
    if (writes) {
      const uint32_t own =
          __reduce_max_sync(kWholeWarp, scaled_magnitude(view, threadIdx.x, stage));
      if (threadIdx.x % 32 == 0) atomicMax(&largest, own);
      __syncthreads();
      scale = scale_bits_of_block(largest);
    } else {
      scale = read_scale(view);
    }
    uint64_t sum = scaled_move(view, threadIdx.x, stage, scale);
    if (writes && threadIdx.x == 0) sum += write_scale(view, scale);
    if (view.fingerprint) {
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(kWholeWarp, sum, distance);
      }
      if (threadIdx.x % 32 == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&launch.sums[view.sum]),
                  static_cast<unsigned long long>(sum));
      }
    }
  }
}
#endif

}  // namespace transfuse

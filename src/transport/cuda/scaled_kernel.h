// The kernel for copies with block scales, and its arguments: persistent blocks of threads, one
// block of numbers at a time.
#pragma once

#include <cstdint>

#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/held_units.h"
#include "transport/cuda/pace.h"
#include "transport/cuda/scaled_device.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse {

inline constexpr uint32_t kScaledThreads = 512;
inline constexpr uint32_t kScaledBlocksPerMultiprocessor = kCopyBlocksPerMultiprocessor;

// All pointers are device memory.
struct ScaledLaunch {
  const ScaledRun* runs = nullptr;
  const ScaledItem* items = nullptr;
  const uint64_t* bases = nullptr;   // per source: the address of its region
  uint64_t* sums = nullptr;          // other copies may add to them too
  CopyProgress* progress = nullptr;  // of this launch alone
  double ns_per_byte = 0;            // 0: no pace
  uint32_t item_count = 0;
};

#ifdef __CUDACC__
// What the threads of a block share of one item.
struct TakenBlock {
  ScaledView view;
  uint64_t due_ns;   // where there is a pace
  uint32_t largest;  // magnitude that was found
  bool last;         // there was none left
};

// Finds work, by one thread, one step for each block of numbers that is moved meanwhile: what a
// step asks memory for is used by the next one.
template <bool kPaced>
class BlockTaker {
 public:
  // `takes`: whether this thread does.
  __device__ __forceinline__ BlockTaker(const ScaledLaunch& launch, bool takes) : launch_(launch) {
    if (!takes) return;
    item_ = item(atomicAdd(&launch_.progress->next, 1u));
    number_ = atomicAdd(&launch_.progress->next, 1u);
  }
  __device__ __forceinline__ void take(TakenBlock& taken) {
    taken.last = item_.run == kNone;
    taken.largest = 0;
    if (taken.last) return;
    const ScaledItem now = item_;
    item_ = item(number_);
    number_ = atomicAdd(&launch_.progress->next, 1u);
    taken.view = view_of(launch_.runs[now.run], now, launch_.bases, blockDim.x);
    if constexpr (kPaced) {
      taken.due_ns = due_at_ns(launch_.progress->start_ns, launch_.progress->begun_bytes,
                               taken.view.size_bytes(), launch_.ns_per_byte);
    }
  }

 private:
  static constexpr uint32_t kNone = 0xFFFFFFFFu;  // no table has so many runs

  __device__ __forceinline__ ScaledItem item(uint32_t number) const {
    if (number < launch_.item_count) return launch_.items[number];
    return {.run = kNone};
  }

  const ScaledLaunch& launch_;
  ScaledItem item_{};    // the next one
  uint32_t number_ = 0;  // of the one after that
};

// All threads of a block: the largest magnitude of all, through `largest`, which is zero.
__device__ __forceinline__ uint32_t largest_of_block(uint32_t own, uint32_t& largest) {
  const uint32_t found = __reduce_max_sync(0xFFFFFFFFu, own);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, found);
  __syncthreads();
  return largest;
}

// Persistent blocks, a block of numbers at a time.
template <bool kPaced>
__device__ void walk_blocks(const ScaledLaunch& launch) {
  __shared__ alignas(kVectorBytes) std::byte stage[kScaledStageBytes];
  // A variable with a constructor cannot be shared.
  __shared__ alignas(TakenBlock) std::byte room[2 * sizeof(TakenBlock)];
  auto* const both = reinterpret_cast<TakenBlock*>(room);
  BlockTaker<kPaced> taker(launch, threadIdx.x == 0);
  if (threadIdx.x == 0) taker.take(both[0]);
  for (uint32_t place = 0;; place ^= 1) {
    __syncthreads();
    TakenBlock& taken = both[place];
    if (taken.last) return;
    if constexpr (kPaced) {
      if (threadIdx.x == 0) wait_until(taken.due_ns);
      __syncthreads();
    }
    const ScaledView& view = taken.view;
    const bool writes = quantizes_of(view.op);
    // Before there are units in registers, which it needs itself; other warps load meanwhile.
    if (threadIdx.x == 0) taker.take(both[place ^ 1]);
    uint32_t scale = 0;
    const auto scale_of = [&](uint32_t magnitude) {
      scale = writes ? scale_bits_of_block(largest_of_block(magnitude, taken.largest))
                     : read_scale(view);
      return scale;
    };
    uint64_t sum = 0;
    if (view.held) {
      if (!move_held(view, threadIdx.x, scale_of, sum)) {
        sum = scaled_move(view, threadIdx.x, stage, scale);
      }
    } else {
      const uint32_t magnitude = writes ? scaled_magnitude(view, threadIdx.x, stage) : 0;
      sum = scaled_move(view, threadIdx.x, stage, scale_of(magnitude));
    }
    if (writes && threadIdx.x == 0) sum += write_scale(view, scale);
    if (!view.fingerprint) continue;
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    }
    if (threadIdx.x % 32 == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&launch.sums[view.sum]),
                static_cast<unsigned long long>(sum));
    }
  }
}

// Launched with kScaledThreads threads a block; the second one at a pace.
extern "C" __global__ void __launch_bounds__(kScaledThreads, kScaledBlocksPerMultiprocessor)
    transfuse_scaled_copy(const __grid_constant__ ScaledLaunch launch) {
  walk_blocks<false>(launch);
}
extern "C" __global__ void __launch_bounds__(kScaledThreads, kScaledBlocksPerMultiprocessor)
    transfuse_scaled_copy_paced(const __grid_constant__ ScaledLaunch launch) {
  walk_blocks<true>(launch);
}
#endif

}  // namespace transfuse

// The kernel that walks a device table: persistent blocks, an item at a time.
#include <cstdint>

#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/device_stage.h"
#include "transport/cuda/pace.h"
#include "transport/cuda/scaled_kernel.h"  // another kernel of the same image

namespace transfuse {
namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// What the threads of a block share of one item.
struct Taken {
  ItemView view;
  uint64_t due_ns;  // where there is a pace
  bool last;        // there was none left
};

// By one thread. Who takes the first item of a paced launch starts its clock.
template <bool kPaced>
__device__ __forceinline__ void take(const CopyLaunch& launch, Taken& taken) {
  CopyProgress* const progress = launch.progress;
  const uint32_t number = atomicAdd(&progress->next, 1u);
  taken.last = number >= launch.item_count;
  if (taken.last) return;
  const DeviceItem item = launch.items[number];
  const DeviceRun& run = launch.runs[item.run];
  taken.view =
      view_of(run, item, reinterpret_cast<const std::byte*>(launch.bases[run.source]), blockDim.x);
  if (!kPaced || launch.ns_per_byte == 0) return;
  taken.due_ns = due_at_ns(progress->start_ns, progress->begun_bytes, item_bytes(run, item),
                           launch.ns_per_byte);
}
// A function of its own: inlined, it would take registers from the loops that move.
__device__ __noinline__ void take_any(const CopyLaunch& launch, Taken& taken) {
  take<true>(launch, taken);
}

// All threads of a block.
__device__ __forceinline__ void add_sum(const CopyLaunch& launch, const ItemView& view,
                                        uint64_t sum) {
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(kFullWarp, sum, distance);
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(&launch.sums[view.sum]),
              static_cast<unsigned long long>(sum));
  }
}

// Persistent blocks: a thread takes the next item while the others move the one before. Of tables
// without stage and launches without pace, which almost all are: the loops that move are part of
// it.
template <bool kSums>
__device__ void walk_table(const CopyLaunch& launch) {
  __shared__ Taken taken[2];
  if (threadIdx.x == 0) take<false>(launch, taken[0]);
  for (uint32_t place = 0;; place ^= 1) {
    __syncthreads();
    if (taken[place].last) return;
    if (threadIdx.x == blockDim.x - 1) take<false>(launch, taken[place ^ 1]);
    const ItemView& view = taken[place].view;
    const uint64_t sum = copy_item<kSums, true>(view, threadIdx.x);
    if (kSums && view.fingerprint) add_sum(launch, view, sum);
  }
}

// Of any table, at any pace.
template <bool kSums>
__device__ void walk_any_table(const CopyLaunch& launch) {
  extern __shared__ __align__(kVectorBytes) std::byte stage[];
  __shared__ Taken taken[2];
  if (threadIdx.x == 0) take_any(launch, taken[0]);
  for (uint32_t place = 0;; place ^= 1) {
    __syncthreads();
    if (taken[place].last) return;
    if (launch.ns_per_byte > 0) {
      if (threadIdx.x == 0) wait_until(taken[place].due_ns);
      __syncthreads();
    }
    const ItemView& view = taken[place].view;
    const bool staged = uses_stage(view.walk);
    if (staged) stage_item(view, threadIdx.x, stage);
    if (threadIdx.x == blockDim.x - 1) take_any(launch, taken[place ^ 1]);
    uint64_t sum;
    if (staged) {
      finish_staging();
      __syncthreads();
      sum = write_staged_item<kSums>(view, threadIdx.x, stage);
    } else {
      sum = copy_item<kSums, false>(view, threadIdx.x);
    }
    if (kSums && view.fingerprint) add_sum(launch, view, sum);
  }
}

}  // namespace

// Launched with kCopyThreads threads a block and as many blocks as the caller allows;
// launch.progress is all zero. The first of each two is of a table without fingerprints; the _any
// ones have kStageBytes of dynamic shared memory where an item of the table uses the stage.
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy(const __grid_constant__ CopyLaunch launch) {
  walk_table<false>(launch);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy_and_sum(const __grid_constant__ CopyLaunch launch) {
  walk_table<true>(launch);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy_any(const __grid_constant__ CopyLaunch launch) {
  walk_any_table<false>(launch);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy_any_and_sum(const __grid_constant__ CopyLaunch launch) {
  walk_any_table<true>(launch);
}

}  // namespace transfuse

// The kernel that walks a device table: persistent blocks, an item at a time.
#include <cstdint>

#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/scaled_kernel.h"  // another kernel of the same image

namespace transfuse {
namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

}  // namespace

// A thread takes the next item and makes what the others need of it, while they move the one
// before.
template <bool kSums>
__device__ void walk_table(const CopyLaunch& launch) {
  __shared__ ItemView views[2];
  __shared__ bool last[2];
  const auto take = [&](uint32_t place) {
    const uint32_t number = atomicAdd(launch.next, 1u);
    last[place] = number >= launch.item_count;
    if (last[place]) return;
    const DeviceItem item = launch.items[number];
    const DeviceRun& run = launch.runs[item.run];
    views[place] = view_of(run, item, reinterpret_cast<const std::byte*>(launch.bases[run.source]),
                           blockDim.x);
  };
  if (threadIdx.x == 0) take(0);
  for (uint32_t place = 0;; place ^= 1) {
    __syncthreads();
    if (last[place]) return;
    if (threadIdx.x == blockDim.x - 1) take(place ^ 1);
    const ItemView& view = views[place];
    uint64_t sum = copy_item<kSums>(view, threadIdx.x);
    if (kSums && view.fingerprint) {
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(kFullWarp, sum, distance);
      }
      if (threadIdx.x % 32 == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&launch.sums[view.sum]),
                  static_cast<unsigned long long>(sum));
      }
    }
  }
}

// Launched with kCopyThreads threads a block and as many blocks as the caller allows; launch.next
// is 0. The first of a table without fingerprints.
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy(const CopyLaunch launch) {
  walk_table<false>(launch);
}
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy_and_sum(const CopyLaunch launch) {
  walk_table<true>(launch);
}

// One thread a source: the words of its generation, as they are at this point of the stream.
extern "C" __global__ void transfuse_read_words(const WordsLaunch launch) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= launch.count) return;
  const auto* words = reinterpret_cast<const volatile uint64_t*>(launch.addresses[i]);
  __threadfence_system();
  launch.out[2 * i] = words[0];
  launch.out[2 * i + 1] = words[1];
  __threadfence_system();
}

}  // namespace transfuse

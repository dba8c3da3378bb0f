// The kernel that walks a device table: persistent blocks, an item at a time.
#include <cstdint>

#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device_copy.h"

namespace transfuse {
namespace {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

}  // namespace

// Launched with kCopyThreads threads a block and as many blocks as the caller allows; `next` is 0.
extern "C" __global__ void __launch_bounds__(kCopyThreads, kCopyBlocksPerMultiprocessor)
    transfuse_copy(const CopyLaunch launch) {
  __shared__ uint32_t shared_item;
  const Lane lane{.index = threadIdx.x, .count = blockDim.x};
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) shared_item = atomicAdd(launch.next, 1u);
    __syncthreads();
    const uint32_t number = shared_item;
    if (number >= launch.item_count) return;
    const DeviceItem item = launch.items[number];
    const DeviceRun& run = launch.runs[item.run];
    const auto* base = reinterpret_cast<const std::byte*>(launch.bases[run.source]);
    uint64_t sum = copy_item(run, item, base, lane);
    if (run.fingerprint) {
      for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_down_sync(kFullWarp, sum, distance);
      }
      if (threadIdx.x % 32 == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&launch.sums[run.sum]),
                  static_cast<unsigned long long>(sum));
      }
    }
  }
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

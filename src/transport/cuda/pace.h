// When a paced launch may begin an item: the arithmetic, by the clock of the device.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace transfuse {

// One multiprocessor reads 8 GB/s of another GPU (H200): half of it leaves room for every pace.
inline constexpr double kGigabytesPerMultiprocessor = 4.0;
constexpr uint32_t multiprocessors_of_pace(double gigabytes_per_second) {
  const double most = gigabytes_per_second < 1e6 ? gigabytes_per_second : 1e6;
  return 2 + static_cast<uint32_t>(most / kGigabytesPerMultiprocessor);
}

// A longer wait may be asked for in pieces.
inline constexpr uint64_t kLongestNapNs = 1000000;

// After the first item: nanoseconds until an item is due that comes after `bytes_before` others.
TRANSFUSE_HOST_DEVICE constexpr uint64_t due_after_ns(uint64_t bytes_before, double ns_per_byte) {
  return static_cast<uint64_t>(static_cast<double>(bytes_before) * ns_per_byte);
}

// How long to sleep where `left_ns` are left: a thread sleeps up to twice what it asks for. 0: look
// at the clock again.
TRANSFUSE_HOST_DEVICE constexpr uint32_t nap_ns(uint64_t left_ns) {
  const uint64_t half = left_ns / 2;
  return static_cast<uint32_t>(half < kLongestNapNs ? half : kLongestNapNs);
}

#ifdef __CUDACC__
__device__ inline uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ __noinline__ inline void wait_until(uint64_t due) {
  for (uint64_t now = clock_ns(); now < due; now = clock_ns()) __nanosleep(nap_ns(due - now));
}

// When an item of `bytes` is due. Who asks first of a launch starts its clock: both words are zero
// before it.
__device__ inline uint64_t due_at_ns(uint64_t& start_ns, uint64_t& begun_bytes, uint64_t bytes,
                                     double ns_per_byte) {
  const auto word = [](uint64_t& at) { return reinterpret_cast<unsigned long long*>(&at); };
  const uint64_t now = clock_ns();
  const uint64_t known = atomicCAS(word(start_ns), 0ull, now);
  const uint64_t before = atomicAdd(word(begun_bytes), bytes);
  return (known == 0 ? now : known) + due_after_ns(before, ns_per_byte);
}
#endif

}  // namespace transfuse

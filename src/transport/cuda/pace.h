// When a paced launch may begin an item: the arithmetic, by the clock of the device.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace transfuse {

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

}  // namespace transfuse

// What copies and sums of a device take there: numbers for who says so before there is a device.
#pragma once

#include <cstdint>

namespace transfuse {

// A device cuts its work by itself; what is cut in a plan costs the host 0.1 us a run and cycle.
inline constexpr uint64_t kDeviceChunkBytes = uint64_t{64} << 20;

// One strided copy in the table that a launch walks, and one piece of it, and of how many bytes a
// piece is at least where a copy has as many (tests/device_memory_test.cc compares).
inline constexpr uint64_t kDeviceRunBytes = 120;
inline constexpr uint64_t kDeviceItemBytes = 20;
inline constexpr uint64_t kDevicePieceBytes = uint64_t{32} << 10;
inline constexpr uint64_t kDeviceSumBytes = 8;  // there, and as many pinned in the host

// Of a copy of so many bytes, at most.
constexpr uint64_t device_table_bytes(uint64_t size_bytes) {
  const uint64_t pieces = (size_bytes + kDevicePieceBytes - 1) / kDevicePieceBytes;
  return kDeviceRunBytes + pieces * kDeviceItemBytes;
}

}  // namespace transfuse

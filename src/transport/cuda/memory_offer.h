// What a process says of device memory that others may read: enough to find the GPU, to open the
// allocation and to check that the region lies in it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {

// Lies in memory of the host that readers of the process can open.
inline constexpr uint64_t kOfferBytes = 256;

struct MemoryOffer {
  DeviceUuid device{};
  uint64_t process = 0;     // random, of the offering process' transport
  uint64_t allocation = 0;  // unique in the process: another one after the memory was mapped anew
  uint64_t allocation_bytes = 0;
  uint64_t offset_bytes = 0;  // of the region in its allocation
  uint64_t size_bytes = 0;
  uint64_t address = 0;  // in the offering process
  CUipcMemHandle handle{};

  void encode(std::span<std::byte, kOfferBytes> out) const;
  // kCorrupt unless it is one, and the region lies in its allocation (I13).
  static Result<MemoryOffer> decode(std::span<const std::byte, kOfferBytes> bytes);
};

}  // namespace transfuse::cuda

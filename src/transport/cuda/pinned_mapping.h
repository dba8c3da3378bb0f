// Memory of the host that is mapped in this process, made readable for a GPU.
#pragma once

#include <cstddef>
#include <span>
#include <utility>

#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {

// Pages of a mapping that is only read, locked while this lives: kernels and copy engines of the
// device read them at the rate of the bus. Goes before the mapping does, and is outlived by the
// device.
class PinnedMapping {
 public:
  // Takes about 50 ms a GB. An error where the system locks no such pages.
  static Result<PinnedMapping> make(const Device& device, std::span<const std::byte> mapping);
  PinnedMapping(PinnedMapping&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        mapping_(other.mapping_),
        address_(other.address_) {}
  PinnedMapping& operator=(PinnedMapping&&) = delete;
  ~PinnedMapping();

  CUdeviceptr address() const { return address_; }  // of its first byte, as the device sees it

 private:
  PinnedMapping(const Device& device, std::span<const std::byte> mapping)
      : device_(&device), mapping_(mapping) {}

  const Device* device_;
  std::span<const std::byte> mapping_;
  CUdeviceptr address_ = 0;
};

}  // namespace transfuse::cuda

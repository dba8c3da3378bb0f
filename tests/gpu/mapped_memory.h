// Device memory as PyTorch's expandable segments and engines that sleep map it: one reservation,
// many physical allocations.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse {

// Used from one thread. Outlived by its device.
class MappedMemory {
 public:
  struct Shape {
    uint64_t count = 1;        // of physical allocations
    uint64_t range_bytes = 0;  // of each; a multiple of 2 MiB
    CUmemAllocationHandleType handles = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  };
  static Result<std::unique_ptr<MappedMemory>> create(const cuda::Device& device, Shape shape) {
    std::unique_ptr<MappedMemory> memory(new MappedMemory(device, shape));
    const cuda::Current current = device.use();
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(device.driver(), cuMemAddressReserve,
                                             &memory->address_, memory->size_bytes(), 0, 0, 0));
    TRANSFUSE_RETURN_IF_ERROR(memory->map());
    return memory;
  }
  ~MappedMemory() {
    unmap();
    const cuda::Current current = device_.use();
    if (address_ != 0) (void)device_.driver().cuMemAddressFree(address_, size_bytes());
  }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  CUdeviceptr address() const { return address_; }
  uint64_t size_bytes() const { return shape_.count * shape_.range_bytes; }

  // Other physical memory at the same address.
  Result<void> map() {
    const cuda::Driver& driver = device_.driver();
    const cuda::Current current = device_.use();
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device_.ordinal()};
    properties.requestedHandleTypes = shape_.handles;
    for (uint64_t i = 0; i < shape_.count; ++i) {
      CUmemGenericAllocationHandle handle = 0;
      TRANSFUSE_RETURN_IF_ERROR(
          TRANSFUSE_CUDA(driver, cuMemCreate, &handle, shape_.range_bytes, &properties, 0));
      auto mapped = TRANSFUSE_CUDA(driver, cuMemMap, address_ + i * shape_.range_bytes,
                                   shape_.range_bytes, 0, handle, 0);
      (void)driver.cuMemRelease(handle);
      TRANSFUSE_RETURN_IF_ERROR(mapped);
      ++mapped_;
    }
    CUmemAccessDesc access{};
    access.location = properties.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return TRANSFUSE_CUDA(driver, cuMemSetAccess, address_, size_bytes(), &access, 1);
  }
  void unmap() {
    const cuda::Current current = device_.use();
    for (; mapped_ > 0; --mapped_) {
      (void)device_.driver().cuMemUnmap(address_ + (mapped_ - 1) * shape_.range_bytes,
                                        shape_.range_bytes);
    }
  }

 private:
  MappedMemory(const cuda::Device& device, Shape shape) : device_(device), shape_(shape) {}

  const cuda::Device& device_;
  const Shape shape_;
  CUdeviceptr address_ = 0;
  uint64_t mapped_ = 0;  // the first so many allocations
};

}  // namespace transfuse

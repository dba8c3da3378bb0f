// The driver locks the pages; the address that it gives for them is the device's.
#include "transport/cuda/pinned_mapping.h"

#include <cstddef>
#include <span>

#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::cuda {
namespace {

void* start_of(std::span<const std::byte> mapping) {
  return const_cast<std::byte*>(mapping.data());  // NOLINT: the driver takes no pointer to const
}

}  // namespace

Result<PinnedMapping> PinnedMapping::make(const Device& device,
                                          std::span<const std::byte> mapping) {
  const Current current = device.use();
  const Driver& driver = device.driver();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver, cuMemHostRegister, start_of(mapping), mapping.size(),
                     CU_MEMHOSTREGISTER_DEVICEMAP | CU_MEMHOSTREGISTER_READ_ONLY));
  PinnedMapping pinned(device, mapping);
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver, cuMemHostGetDevicePointer, &pinned.address_, start_of(mapping), 0));
  return pinned;
}

PinnedMapping::~PinnedMapping() {
  if (device_ == nullptr) return;
  const Current current = device_->use();
  (void)device_->driver().cuMemHostUnregister(start_of(mapping_));
}

}  // namespace transfuse::cuda

// The table of blocks goes up once; a launch resets its progress.
#include "transport/cuda/scaled_copies.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "transfuse/result.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/scaled_kernel.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse::cuda {

Result<ScaledCopies> ScaledCopies::make(const Device& device, const ScaledTable& table) {
  ScaledCopies copies;
  if (table.items.empty()) return copies;
  copies.device_ = &device;
  copies.item_count_ = static_cast<uint32_t>(table.items.size());
  const auto allocate = [&](uint64_t size) {
    return Memory::allocate(device, MemoryKind::kDevice, size);
  };
  TRANSFUSE_ASSIGN_OR_RETURN(copies.runs_, allocate(table.runs.size() * sizeof(ScaledRun)));
  TRANSFUSE_ASSIGN_OR_RETURN(copies.items_, allocate(table.items.size() * sizeof(ScaledItem)));
  TRANSFUSE_ASSIGN_OR_RETURN(copies.progress_, allocate(sizeof(CopyProgress)));
  TRANSFUSE_ASSIGN_OR_RETURN(const Stream stream, Stream::create(device));
  const Current current = device.use();
  const Driver& driver = device.driver();
  const auto send = [&](const Memory& to, const void* from) {
    return TRANSFUSE_CUDA(driver, cuMemcpyAsync, to.address(), reinterpret_cast<CUdeviceptr>(from),
                          to.size_bytes(), stream.get());
  };
  TRANSFUSE_RETURN_IF_ERROR(send(copies.runs_, table.runs.data()));
  TRANSFUSE_RETURN_IF_ERROR(send(copies.items_, table.items.data()));
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuStreamSynchronize, stream.get()));
  return copies;
}

Result<void> ScaledCopies::launch(const Launch& launch) {
  if (item_count_ == 0) return {};
  const Driver& driver = device_->driver();
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemsetD8Async, progress_.address(), 0,
                                           progress_.size_bytes(), launch.stream));
  ScaledLaunch arguments{.runs = runs_.as<ScaledRun>(),
                         .items = items_.as<ScaledItem>(),
                         .bases = launch.bases,
                         .sums = launch.sums,
                         .progress = progress_.as<CopyProgress>(),
                         .ns_per_byte = launch.ns_per_byte,
                         .item_count = item_count_};
  std::array<void*, 1> pointers = {&arguments};
  const Device::Kernels& kernels = device_->kernels();
  const CUfunction kernel =
      launch.ns_per_byte > 0 ? kernels.scaled_copy_paced : kernels.scaled_copy;
  return TRANSFUSE_CUDA(driver, cuLaunchKernel, kernel, std::min(launch.blocks, item_count_), 1, 1,
                        kScaledThreads, 1, 1, 0, launch.stream, pointers.data(), nullptr);
}

uint64_t ScaledCopies::memory_bytes() const {
  return runs_.size_bytes() + items_.size_bytes() + progress_.size_bytes();
}

}  // namespace transfuse::cuda

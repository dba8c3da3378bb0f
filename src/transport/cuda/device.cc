// Contexts, modules and handles of the driver.
#include "transport/cuda/device.h"

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "transfuse/result.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/kernel_image.h"

namespace transfuse::cuda {

std::string to_string(const DeviceUuid& uuid) {
  std::string text = "GPU-";
  for (size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += fmt::format("{:02x}", uuid[i]);
  }
  return text;
}

Result<std::unique_ptr<Device>> Device::open(const Driver& driver, int ordinal) {
  std::unique_ptr<Device> device(new Device(driver));
  device->ordinal_ = ordinal;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGet, &device->handle_, ordinal));
  CUuuid uuid{};
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGetUuid, &uuid, device->handle_));
  for (size_t i = 0; i < device->uuid_.size(); ++i) {
    device->uuid_[i] = static_cast<uint8_t>(uuid.bytes[i]);
  }
  std::array<char, 128> name{};
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGetName, name.data(),
                                           static_cast<int>(name.size()), device->handle_));
  device->name_ = name.data();
  int multiprocessors = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGetAttribute, &multiprocessors,
                                           CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                                           device->handle_));
  device->multiprocessors_ = static_cast<uint32_t>(multiprocessors);
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver, cuDevicePrimaryCtxRetain, &device->context_, device->handle_));
  const Current current = device->use();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver, cuModuleLoadData, &device->module_, kernel_image()));
  const auto find = [&](CUfunction& function, const char* kernel) {
    return TRANSFUSE_CUDA(driver, cuModuleGetFunction, &function, device->module_, kernel);
  };
  TRANSFUSE_RETURN_IF_ERROR(find(device->kernels_.copy, "transfuse_copy"));
  TRANSFUSE_RETURN_IF_ERROR(find(device->kernels_.copy_and_sum, "transfuse_copy_and_sum"));
  TRANSFUSE_RETURN_IF_ERROR(find(device->kernels_.copy_any, "transfuse_copy_any"));
  TRANSFUSE_RETURN_IF_ERROR(find(device->kernels_.copy_any_and_sum, "transfuse_copy_any_and_sum"));
  TRANSFUSE_RETURN_IF_ERROR(find(device->kernels_.scaled_copy, "transfuse_scaled_copy"));
  TRANSFUSE_RETURN_IF_ERROR(
      find(device->kernels_.scaled_copy_paced, "transfuse_scaled_copy_paced"));
  return device;
}

Device::~Device() {
  if (context_ == nullptr) return;
  if (module_ != nullptr) {
    const Current current = use();
    (void)driver_.cuModuleUnload(module_);
  }
  (void)driver_.cuDevicePrimaryCtxRelease(handle_);
}

DeviceLink Device::link_to(const Device& other) const {
  if (other.handle_ == handle_) return DeviceLink::kSameDevice;
  int atomics = 0;
  const bool known =
      driver_.cuDeviceGetP2PAttribute(&atomics, CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED,
                                      handle_, other.handle_) == CUDA_SUCCESS;
  return known && atomics != 0 ? DeviceLink::kNvlink : DeviceLink::kPcie;
}

Result<void> Device::enable_peer(const Device& other) const {
  if (other.handle_ == handle_) return {};
  int possible = 0;
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver_, cuDeviceCanAccessPeer, &possible, handle_, other.handle_));
  if (possible == 0) {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format("device {} ({}) cannot read memory of device {} ({}): there is neither "
                    "NVLink nor PCIe peer access between them",
                    ordinal_, name_, other.ordinal_, other.name_)};
  }
  const Current current = use();
  const CUresult result = driver_.cuCtxEnablePeerAccess(other.context_, 0);
  if (result == CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) return {};
  return driver_.check(result, "cuCtxEnablePeerAccess");
}

Result<Memory> Memory::allocate(const Device& device, MemoryKind kind, uint64_t size_bytes) {
  Memory memory;
  if (size_bytes == 0) return memory;
  const Current current = device.use();
  if (kind == MemoryKind::kDevice) {
    const CUresult allocated = device.driver().cuMemAlloc(&memory.address_, size_bytes);
    if (allocated == CUDA_ERROR_OUT_OF_MEMORY) {
      size_t free = 0;
      size_t total = 0;
      (void)device.driver().cuMemGetInfo(&free, &total);  // 0 says as much
      return Error{ErrorCode::kResourceExhausted,
                   fmt::format("{} bytes on device {} ({}): {} of {} are free", size_bytes,
                               device.ordinal(), device.name(), free, total)};
    }
    TRANSFUSE_RETURN_IF_ERROR(device.driver().check(allocated, "cuMemAlloc"));
  } else {
    void* pointer = nullptr;
    const CUresult allocated =
        device.driver().cuMemHostAlloc(&pointer, size_bytes, CU_MEMHOSTALLOC_PORTABLE);
    if (allocated == CUDA_ERROR_OUT_OF_MEMORY) {
      return Error{ErrorCode::kResourceExhausted,
                   fmt::format("{} bytes of memory of the host, pinned for device {} ({}): the "
                               "driver got none",
                               size_bytes, device.ordinal(), device.name())};
    }
    TRANSFUSE_RETURN_IF_ERROR(device.driver().check(allocated, "cuMemHostAlloc"));
    memory.address_ = reinterpret_cast<CUdeviceptr>(pointer);
  }
  memory.device_ = &device;
  memory.kind_ = kind;
  memory.size_bytes_ = size_bytes;
  return memory;
}

Result<void> Memory::clear() const {
  if (size_bytes_ == 0) return {};
  TRANSFUSE_ASSIGN_OR_RETURN(const Stream stream, Stream::create(*device_));
  const Current current = device_->use();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device_->driver(), cuMemsetD8Async, address_, 0, size_bytes_, stream.get()));
  return TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream.get());
}

Memory::~Memory() {
  if (device_ == nullptr) return;
  const Current current = device_->use();
  if (kind_ == MemoryKind::kDevice) {
    (void)device_->driver().cuMemFree(address_);
  } else {
    (void)device_->driver().cuMemFreeHost(reinterpret_cast<void*>(address_));
  }
}

Result<Stream> Stream::create(const Device& device) {
  Stream stream;
  const Current current = device.use();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device.driver(), cuStreamCreate, &stream.handle_, CU_STREAM_NON_BLOCKING));
  stream.device_ = &device;
  return stream;
}

Stream::~Stream() {
  if (device_ == nullptr) return;
  const Current current = device_->use();
  (void)device_->driver().cuStreamDestroy(handle_);
}

Result<Event> Event::create(const Device& device, EventKind kind) {
  Event event;
  const Current current = device.use();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device.driver(), cuEventCreate, &event.handle_,
                     kind == EventKind::kTiming ? CU_EVENT_DEFAULT : CU_EVENT_DISABLE_TIMING));
  event.device_ = &device;
  return event;
}

Event::~Event() {
  if (device_ == nullptr) return;
  const Current current = device_->use();
  (void)device_->driver().cuEventDestroy(handle_);
}

}  // namespace transfuse::cuda

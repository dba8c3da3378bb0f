// Finds devices by ordinal, pointer and UUID; opens allocations once.
#include "transport/cuda/devices.h"

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

OpenedMemory::~OpenedMemory() {
  if (devices_ != nullptr) devices_->close(key_);
}

Devices::Devices(const Driver& driver) : driver_(driver), process_(random_identity()) {}

Result<std::unique_ptr<Devices>> Devices::open() {
  TRANSFUSE_ASSIGN_OR_RETURN(const Driver* driver, Driver::load());
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetCount, &count));
  std::unique_ptr<Devices> devices(new Devices(*driver));
  const MutexLock lock(devices->mutex_);
  devices->devices_.resize(static_cast<size_t>(count));
  return devices;
}

Result<const Device*> Devices::device_locked(int ordinal) {
  if (ordinal < 0 || ordinal >= static_cast<int>(devices_.size())) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("device {}: this process sees {}", ordinal, devices_.size())};
  }
  auto& device = devices_[static_cast<size_t>(ordinal)];
  if (device == nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(device, Device::open(driver_, ordinal));
  }
  return device.get();
}

Result<const Device*> Devices::device(int ordinal) {
  const MutexLock lock(mutex_);
  return device_locked(ordinal);
}

Result<const Device*> Devices::find_locked(const DeviceUuid& uuid) {
  for (int ordinal = 0; ordinal < static_cast<int>(devices_.size()); ++ordinal) {
    CUdevice handle = 0;
    CUuuid found{};
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuDeviceGet, &handle, ordinal));
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuDeviceGetUuid, &found, handle));
    bool same = true;
    for (size_t i = 0; i < uuid.size(); ++i)
      same = same && static_cast<uint8_t>(found.bytes[i]) == uuid[i];
    if (same) return device_locked(ordinal);
  }
  return Error{ErrorCode::kUnsupported,
               fmt::format("the source's memory is on {}, which this process does not see: let "
                           "CUDA_VISIBLE_DEVICES name it too (after its own device), or move "
                           "through memory of the host",
                           to_string(uuid))};
}

Result<const Device*> Devices::device_of(std::span<const std::byte> memory) {
  const auto address = reinterpret_cast<CUdeviceptr>(memory.data());
  unsigned type = 0;
  const CUresult known =
      driver_.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address);
  if (known == CUDA_ERROR_INVALID_VALUE) return nullptr;  // ordinary memory of the host
  TRANSFUSE_RETURN_IF_ERROR(driver_.check(known, "cuPointerGetAttribute"));
  unsigned managed = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuPointerGetAttribute, &managed,
                                           CU_POINTER_ATTRIBUTE_IS_MANAGED, address));
  if (managed != 0) {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format("memory at {:#x} is managed (cudaMallocManaged), which no other process "
                    "can open: allocate the parameters with cudaMalloc",
                    address)};
  }
  if (type == CU_MEMORYTYPE_HOST) return nullptr;  // pinned
  int ordinal = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuPointerGetAttribute, &ordinal,
                                           CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address));
  const MutexLock lock(mutex_);
  return device_locked(ordinal);
}

Result<MemoryOffer> Devices::offer(std::span<const std::byte> memory) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Device* device, device_of(memory));
  TRANSFUSE_CHECK(device != nullptr);
  const auto address = reinterpret_cast<CUdeviceptr>(memory.data());
  const Current current = device->use();
  MemoryOffer offer{.device = device->uuid(),
                    .process = process_,
                    .size_bytes = memory.size(),
                    .address = address};
  CUdeviceptr base = 0;
  size_t size = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuMemGetAddressRange, &base, &size, address));
  offer.allocation_bytes = size;
  offer.offset_bytes = address - base;
  if (offer.offset_bytes > size || memory.size() > size - offer.offset_bytes) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} bytes at {:#x} reach beyond their allocation of {} at {:#x}",
                             memory.size(), address, size, base)};
  }
  unsigned long long id = 0;
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver_, cuPointerGetAttribute, &id, CU_POINTER_ATTRIBUTE_BUFFER_ID, base));
  offer.allocation = id;
  int legacy = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuPointerGetAttribute, &legacy,
                                           CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, base));
  if (legacy == 0) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("memory at {:#x} comes from virtual memory mapping or a pool, which "
                             "CUDA IPC does not share: with PyTorch, leave expandable_segments off "
                             "(PYTORCH_CUDA_ALLOC_CONF) in processes whose weights are read",
                             address)};
  }
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver_, cuIpcGetMemHandle, &offer.handle, base));
  return offer;
}

Result<OpenedMemory> Devices::open(const MemoryOffer& offer, const Device& reader) {
  const MutexLock lock(mutex_);
  TRANSFUSE_ASSIGN_OR_RETURN(const Device* owner, find_locked(offer.device));
  TRANSFUSE_RETURN_IF_ERROR(reader.enable_peer(*owner));
  const bool same_device = owner->ordinal() == reader.ordinal();
  const OpenedMemory::Key key{
      .process = offer.process, .allocation = offer.allocation, .reader = reader.ordinal()};
  if (offer.process == process_) return OpenedMemory(nullptr, key, offer.address, same_device);
  Mapping& mapping = mappings_[key];
  if (mapping.users == 0) {
    const Current current = reader.use();
    const CUresult opened =
        driver_.cuIpcOpenMemHandle(&mapping.base, offer.handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (opened != CUDA_SUCCESS) {
      mappings_.erase(key);
      TRANSFUSE_RETURN_IF_ERROR(driver_.check(opened, "cuIpcOpenMemHandle"));
    }
    mapping.reader = &reader;
  }
  ++mapping.users;
  return OpenedMemory(this, key, mapping.base + offer.offset_bytes, same_device);
}

void Devices::close(const OpenedMemory::Key& key) {
  const MutexLock lock(mutex_);
  const auto found = mappings_.find(key);
  TRANSFUSE_CHECK(found != mappings_.end());
  if (--found->second.users > 0) return;
  const Current current = found->second.reader->use();
  (void)driver_.cuIpcCloseMemHandle(found->second.base);
  mappings_.erase(found);
}

uint64_t Devices::opened() const {
  const MutexLock lock(mutex_);
  return mappings_.size();
}

std::span<std::byte> Devices::allocation_of(const std::byte* address) const {
  const auto pointer = reinterpret_cast<CUdeviceptr>(address);
  unsigned type = 0;
  const CUresult known =
      driver_.cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer);
  if (known != CUDA_SUCCESS || type != CU_MEMORYTYPE_DEVICE) return {};
  CUdeviceptr base = 0;
  size_t size = 0;
  if (driver_.cuMemGetAddressRange(&base, &size, pointer) != CUDA_SUCCESS) return {};
  return {reinterpret_cast<std::byte*>(base), size};
}

}  // namespace transfuse::cuda

namespace transfuse {

Result<std::vector<Gpu>> list_gpus() {
  using namespace cuda;
  TRANSFUSE_ASSIGN_OR_RETURN(const Driver* driver, Driver::load());
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetCount, &count));
  std::vector<Gpu> gpus;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    CUdevice handle = 0;
    CUuuid uuid{};
    std::array<char, 128> name{};
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGet, &handle, ordinal));
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetUuid, &uuid, handle));
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetName, name.data(),
                                             static_cast<int>(name.size()), handle));
    DeviceUuid bytes{};
    std::memcpy(bytes.data(), uuid.bytes, bytes.size());
    gpus.push_back({.ordinal = ordinal, .name = name.data(), .uuid = to_string(bytes)});
  }
  return gpus;
}

}  // namespace transfuse

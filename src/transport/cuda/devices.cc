// Finds devices by ordinal, pointer and UUID; opens allocations once.
#include "transport/cuda/devices.h"

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/random.h"
#include "transfuse/gpu.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/imported_memory.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/physical_memory.h"

namespace transfuse::cuda {

OpenedMemory::~OpenedMemory() {
  if (devices_ != nullptr) devices_->close(key_);
}

Devices::Devices(const Driver& driver) : driver_(driver), process_(random_identity()) {}

Result<std::unique_ptr<Devices>> Devices::open() {
  TRANSFUSE_ASSIGN_OR_RETURN(const Driver* driver, Driver::load());
  return open(*driver);
}

Result<std::unique_ptr<Devices>> Devices::open(const Driver& driver) {
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGetCount, &count));
  std::unique_ptr<Devices> devices(new Devices(driver));
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
  if (known == CUDA_ERROR_INVALID_VALUE) {  // ordinary memory of the host, or nothing
    uint64_t reserved = 0;
    auto attribute = CU_POINTER_ATTRIBUTE_RANGE_SIZE;
    void* value = &reserved;
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(driver_, cuPointerGetAttributes, 1, &attribute, &value, address));
    if (reserved == 0) return nullptr;
    return Error{ErrorCode::kUnavailable,
                 fmt::format("memory at {:#x} is reserved for a device, but nothing is mapped "
                             "there now: an engine that sleeps must wake before its weights are "
                             "registered",
                             address)};
  }
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

Result<void> Devices::check_target(const Device& device, const std::byte* target,
                                   std::span<std::byte>& known) {
  const bool inside =
      !known.empty() && target >= known.data() && target < known.data() + known.size();
  if (target == nullptr || inside) return {};
  TRANSFUSE_ASSIGN_OR_RETURN(const Device* found, device_of({target, 1}));
  if (found == nullptr || found->uuid() != device.uuid()) {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format(
            "the target at {} lies {}, this transport writes device {}", fmt::ptr(target),
            found == nullptr ? "in the host" : fmt::format("on device {}", found->ordinal()),
            device.ordinal())};
  }
  known = allocation_of(target);
  return {};
}

Result<std::optional<CUdeviceptr>> Devices::own_address(const MemoryOffer& offer,
                                                        const Device& owner,
                                                        OpenedMemory::Way way) {
  // Peer access between contexts reaches what cudaMalloc gave; mapped memory has its own rights.
  if (way.link != DeviceLink::kSameDevice && way.by_handles) return std::optional<CUdeviceptr>();
  // Anybody can write down the number of this process.
  const std::span<const std::byte> memory(
      reinterpret_cast<const std::byte*>(offer.address),  // NOLINT: an address of this process
      offer.size_bytes);
  TRANSFUSE_ASSIGN_OR_RETURN(const Backing backing, DriverMemory(owner).find(memory));
  if (backing.identity() != offer.identity) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("device memory of this process at {:#x}: other memory is mapped "
                             "there by now",
                             offer.address)};
  }
  return std::optional<CUdeviceptr>(offer.address);
}

Result<OpenedMemory> Devices::use_mapping(Mapping& mapping, const MemoryOffer& offer,
                                          const OpenedMemory::Key& key, OpenedMemory::Way way) {
  // Whoever names the memory of another process again must know it (I13).
  if (mapping.memory.size_bytes() != offer.allocation_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: allocations of {} bytes were opened, {} are offered",
                             mapping.memory.size_bytes(), offer.allocation_bytes)};
  }
  ++mapping.users;
  return OpenedMemory(this, key, mapping.memory.address() + offer.offset_bytes, way);
}

Result<OpenedMemory> Devices::open(const MemoryOffer& offer,
                                   std::span<const std::byte, kOfferBytes> place,
                                   const Device& reader, const HandleMaker& give) {
  const OpenedMemory::Key key{
      .process = offer.process, .identity = offer.identity, .reader = reader.ordinal()};
  const Device* owner = nullptr;
  OpenedMemory::Way way{.by_handles = offer.handle_count > 0};
  {
    const MutexLock lock(mutex_);
    TRANSFUSE_ASSIGN_OR_RETURN(owner, find_locked(offer.device));
    way.link = reader.link_to(*owner);
    const auto known = mappings_.find(key);
    if (known != mappings_.end()) return use_mapping(known->second, offer, key, way);
  }
  TRANSFUSE_RETURN_IF_ERROR(reader.enable_peer(*owner));
  if (offer.process == process_) {
    TRANSFUSE_ASSIGN_OR_RETURN(std::optional<CUdeviceptr> address, own_address(offer, *owner, way));
    if (address) return OpenedMemory(nullptr, key, *address, way);
  }
  // The peer is asked without the lock: this process may have to answer others meanwhile.
  TRANSFUSE_ASSIGN_OR_RETURN(ImportedMemory imported, ImportedMemory::open(reader, offer, give));
  // Handles are those of what is offered when they are asked for.
  if (offered_identity(place) != offer.identity) {
    return Error{ErrorCode::kNotFound,
                 "device memory: its owner mapped other memory there while it was opened"};
  }
  const MutexLock lock(mutex_);
  // Where another thread was first, what was opened here closes again.
  const auto at = mappings_.try_emplace(key, Mapping{.memory = std::move(imported)}).first;
  auto opened = use_mapping(at->second, offer, key, way);
  if (at->second.users == 0) mappings_.erase(at);
  return opened;
}

void Devices::close(const OpenedMemory::Key& key) {
  const MutexLock lock(mutex_);
  const auto found = mappings_.find(key);
  TRANSFUSE_CHECK(found != mappings_.end());
  if (--found->second.users == 0) mappings_.erase(found);
}

uint64_t Devices::opened() const {
  const MutexLock lock(mutex_);
  return mappings_.size();
}

std::span<std::byte> Devices::allocation_of(const std::byte* address) {
  const auto device = device_of({address, 1});
  if (!device || *device == nullptr) return {};
  const Current current = (*device)->use();
  const auto pointer = reinterpret_cast<CUdeviceptr>(address);
  int legacy = 0;
  CUdeviceptr base = 0;
  size_t size = 0;
  const bool known =
      driver_.cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
                                    pointer) == CUDA_SUCCESS &&
      driver_.cuMemGetAddressRange(&base, &size, pointer) == CUDA_SUCCESS;
  if (!known || legacy == 0) return {};
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

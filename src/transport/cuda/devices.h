// The GPUs that this process sees, opened when they are first needed, and the allocations of other
// processes that are mapped here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

class Devices;

// Memory of another process (or of this one) as kernels of `reader` reach it. Outlived by Devices.
class OpenedMemory {
 public:
  OpenedMemory(OpenedMemory&& other) noexcept
      : devices_(std::exchange(other.devices_, nullptr)),
        key_(other.key_),
        address_(other.address_),
        same_device_(other.same_device_) {}
  OpenedMemory& operator=(OpenedMemory&&) = delete;
  ~OpenedMemory();

  CUdeviceptr address() const { return address_; }  // of the region
  bool same_device() const { return same_device_; }

 private:
  friend class Devices;
  struct Key {
    uint64_t process = 0;
    uint64_t allocation = 0;
    int reader = 0;
    auto operator<=>(const Key&) const = default;
  };
  OpenedMemory(Devices* devices, Key key, CUdeviceptr address, bool same_device)
      : devices_(devices), key_(key), address_(address), same_device_(same_device) {}

  Devices* devices_;  // null: nothing to release
  Key key_;
  CUdeviceptr address_;
  bool same_device_;
};

// Safe to call from any thread.
class Devices {
 public:
  // kUnsupported where there is no driver or no GPU.
  static Result<std::unique_ptr<Devices>> open();

  // A number that other processes know this one by.
  uint64_t process() const { return process_; }
  Result<const Device*> device(int ordinal) EXCLUDES(mutex_);
  // nullptr: `memory` is of the host. kUnsupported names what it is that cannot be read by others
  // (managed memory, memory of no device) and the remedy.
  Result<const Device*> device_of(std::span<const std::byte> memory) EXCLUDES(mutex_);
  // What `memory`, which lies on a device, is to other processes. kUnsupported: its allocator does
  // not share.
  Result<MemoryOffer> offer(std::span<const std::byte> memory) EXCLUDES(mutex_);
  // Opened once for each allocation and reader. kUnsupported: the GPU is not visible here, or the
  // reader cannot reach it.
  Result<OpenedMemory> open(const MemoryOffer& offer, const Device& reader) EXCLUDES(mutex_);
  uint64_t opened() const EXCLUDES(mutex_);  // allocations
  // The whole allocation of a device that `address` lies in; empty: it is of the host, or of none.
  std::span<std::byte> allocation_of(const std::byte* address) const;

 private:
  friend class OpenedMemory;
  struct Mapping {
    CUdeviceptr base = 0;
    uint32_t users = 0;
    const Device* reader = nullptr;
  };

  explicit Devices(const Driver& driver);
  Result<const Device*> device_locked(int ordinal) REQUIRES(mutex_);
  Result<const Device*> find_locked(const DeviceUuid& uuid) REQUIRES(mutex_);
  void close(const OpenedMemory::Key& key) EXCLUDES(mutex_);

  const Driver& driver_;
  const uint64_t process_;
  mutable Mutex mutex_;
  std::vector<std::unique_ptr<Device>> devices_ GUARDED_BY(mutex_);  // by ordinal
  std::map<OpenedMemory::Key, Mapping> mappings_ GUARDED_BY(mutex_);
};

}  // namespace transfuse::cuda

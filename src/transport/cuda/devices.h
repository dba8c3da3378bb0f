// The GPUs that this process sees, opened when they are first needed, and the allocations of other
// processes that are mapped here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/imported_memory.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

class Devices;

// Memory of another process (or of this one) as kernels of `reader` reach it. Outlived by Devices.
class OpenedMemory {
 public:
  struct Way {
    DeviceLink link = DeviceLink::kSameDevice;
    bool by_handles = false;  // of virtual memory mapping, not CUDA IPC
  };
  OpenedMemory(OpenedMemory&& other) noexcept
      : devices_(std::exchange(other.devices_, nullptr)),
        key_(other.key_),
        address_(other.address_),
        way_(other.way_) {}
  OpenedMemory& operator=(OpenedMemory&&) = delete;
  ~OpenedMemory();

  CUdeviceptr address() const { return address_; }  // of the region
  DeviceLink link() const { return way_.link; }
  bool by_handles() const { return way_.by_handles; }

 private:
  friend class Devices;
  struct Key {
    uint64_t process = 0;
    uint64_t identity = 0;
    int reader = 0;
    auto operator<=>(const Key&) const = default;
  };
  OpenedMemory(Devices* devices, Key key, CUdeviceptr address, Way way)
      : devices_(devices), key_(key), address_(address), way_(way) {}

  Devices* devices_;  // null: nothing to release
  Key key_;
  CUdeviceptr address_;
  Way way_;
};

// Safe to call from any thread.
class Devices {
 public:
  // kUnsupported where there is no driver or no GPU.
  static Result<std::unique_ptr<Devices>> open();
  // As `driver`, which outlives them, sees them.
  static Result<std::unique_ptr<Devices>> open(const Driver& driver);

  // A number that other processes know this one by.
  uint64_t process() const { return process_; }
  Result<const Device*> device(int ordinal) EXCLUDES(mutex_);
  // nullptr: `memory` is of the host. kUnsupported names what it is that cannot be read by others
  // (managed memory) and the remedy. kUnavailable: reserved for a device, but not mapped now.
  Result<const Device*> device_of(std::span<const std::byte> memory) EXCLUDES(mutex_);
  // That `device` writes at `target` (nullptr: nowhere), else kUnsupported. `known` is what was
  // found last, and is when it returns; empty before the first.
  Result<void> check_target(const Device& device, const std::byte* target,
                            std::span<std::byte>& known) EXCLUDES(mutex_);
  // The same memory is opened once for each reader; `give` is asked for its handles, if it has any.
  // kNotFound: `place`, where the offer was read, says another one by now. kUnsupported: the GPU is
  // not visible here, or the reader cannot reach it.
  Result<OpenedMemory> open(const MemoryOffer& offer, std::span<const std::byte, kOfferBytes> place,
                            const Device& reader, const HandleMaker& give) EXCLUDES(mutex_);
  uint64_t opened() const EXCLUDES(mutex_);  // mappings of memory of others
  // The allocation of a device that `address` lies in and that is shared as one; empty: it is of
  // the host, of none, or of virtual memory mapping, which is shared by spans.
  std::span<std::byte> allocation_of(const std::byte* address) EXCLUDES(mutex_);

 private:
  friend class OpenedMemory;
  struct Mapping {
    ImportedMemory memory;
    uint32_t users = 0;
  };

  explicit Devices(const Driver& driver);
  Result<const Device*> device_locked(int ordinal) REQUIRES(mutex_);
  Result<const Device*> find_locked(const DeviceUuid& uuid) REQUIRES(mutex_);
  // Of memory of this very process; nullopt where the reader cannot use it as it is mapped.
  static Result<std::optional<CUdeviceptr>> own_address(const MemoryOffer& offer,
                                                        const Device& owner, OpenedMemory::Way way);
  Result<OpenedMemory> use_mapping(Mapping& mapping, const MemoryOffer& offer,
                                   const OpenedMemory::Key& key, OpenedMemory::Way way)
      REQUIRES(mutex_);
  void close(const OpenedMemory::Key& key) EXCLUDES(mutex_);

  const Driver& driver_;
  const uint64_t process_;
  mutable Mutex mutex_;
  std::vector<std::unique_ptr<Device>> devices_ GUARDED_BY(mutex_);  // by ordinal
  std::map<OpenedMemory::Key, Mapping> mappings_ GUARDED_BY(mutex_);
};

}  // namespace transfuse::cuda

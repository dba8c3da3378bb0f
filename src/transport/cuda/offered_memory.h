// Device memory of this process that peers may open, and what they are told when it is mapped anew.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/mutex.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/physical_memory.h"

namespace transfuse::cuda {

// Holds neither the physical memory nor descriptors: its owner may unmap and free it at any time,
// and does not wait for readers. Safe to call from any thread. Outlived by `host` and `boards`.
class OfferedMemory {
 public:
  struct Owner {
    DeviceUuid device{};
    uint64_t process = 0;
  };
  static Result<std::unique_ptr<OfferedMemory>> open(Transport& host, OfferBoards& boards,
                                                     std::unique_ptr<PhysicalMemory> physical,
                                                     const Owner& owner,
                                                     std::span<std::byte> memory);

  std::span<std::byte> bytes() const { return memory_; }
  RegionDescriptor descriptor() const {
    return {device_region(slot_.place()), memory_.size(), MemoryPlace::kDevice};
  }
  // LocalRegion::refresh().
  Result<void> refresh() EXCLUDES(mutex_);

 private:
  OfferedMemory(OfferBoards::Slot slot, std::unique_ptr<PhysicalMemory> physical,
                const Owner& owner, std::span<std::byte> memory)
      : physical_(std::move(physical)), owner_(owner), memory_(memory), slot_(std::move(slot)) {}
  Result<void> look() REQUIRES(mutex_);
  Result<void> publish(const Backing& backing) REQUIRES(mutex_);
  Result<MemoryHandle> make_handle(uint64_t index) EXCLUDES(mutex_);

  const std::unique_ptr<PhysicalMemory> physical_;
  const Owner owner_;
  const std::span<std::byte> memory_;
  Mutex mutex_;
  uint64_t identity_ GUARDED_BY(mutex_) = 0;  // of what is offered; 0: nothing is
  Backing backing_ GUARDED_BY(mutex_);
  OfferBoards::Slot slot_;
  std::unique_ptr<LocalRegion> handles_;  // first to go: nobody asks make_handle() any more
};

}  // namespace transfuse::cuda

// The offer follows the memory: whenever somebody looks, it is made true.
#include "transport/cuda/offered_memory.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "base/mutex.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/physical_memory.h"

namespace transfuse::cuda {

Result<std::unique_ptr<OfferedMemory>> OfferedMemory::open(Transport& host, OfferBoards& boards,
                                                           std::unique_ptr<PhysicalMemory> physical,
                                                           const Owner& owner,
                                                           std::span<std::byte> memory) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Backing backing, physical->find(memory));
  TRANSFUSE_ASSIGN_OR_RETURN(OfferBoards::Slot slot, boards.take());
  std::unique_ptr<OfferedMemory> offered(
      new OfferedMemory(std::move(slot), std::move(physical), owner, memory));
  if (backing.sharing == Sharing::kHandles) {
    TRANSFUSE_ASSIGN_OR_RETURN(offered->handles_,
                               host.offer_handles([self = offered.get()](uint64_t index) {
                                 return self->make_handle(index);
                               }));
  }
  const MutexLock lock(offered->mutex_);
  TRANSFUSE_RETURN_IF_ERROR(offered->publish(backing));
  return offered;
}

Result<void> OfferedMemory::refresh() {
  const MutexLock lock(mutex_);
  return look();
}

Result<void> OfferedMemory::look() {
  if (identity_ != 0 && physical_->unchanged(backing_)) return {};
  auto found = physical_->find(memory_);
  Result<void> outcome;
  if (!found) {
    outcome = Unexpected{std::move(found).error()};
  } else if (identity_ != 0 && found->identity() == identity_) {
    return {};
  } else {
    outcome = publish(*found);
  }
  if (!outcome) {
    identity_ = 0;
    withdraw_offer(slot_.bytes());
  }
  return outcome;
}

Result<void> OfferedMemory::publish(const Backing& backing) {
  MemoryOffer offer{.device = owner_.device,
                    .process = owner_.process,
                    .identity = backing.identity(),
                    .allocation_bytes = backing.size_bytes(),
                    .offset_bytes = reinterpret_cast<uint64_t>(memory_.data()) - backing.address(),
                    .size_bytes = memory_.size(),
                    .address = reinterpret_cast<uint64_t>(memory_.data())};
  if (backing.sharing == Sharing::kIpcHandle) {
    TRANSFUSE_ASSIGN_OR_RETURN(offer.ipc_handle, physical_->ipc_handle(backing.ranges.front()));
  } else if (handles_ == nullptr) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("memory at {:#x} was of cudaMalloc when it was registered and is of "
                             "virtual memory mapping now: register it anew",
                             offer.address)};
  } else {
    offer.handles = handles_->descriptor().id;
    offer.handle_count = backing.ranges.size();
  }
  backing_ = backing;
  identity_ = offer.identity;
  publish_offer(slot_.bytes(), offer);
  return {};
}

Result<MemoryHandle> OfferedMemory::make_handle(uint64_t index) {
  const MutexLock lock(mutex_);
  // The first one is asked for by who opens the region: what was mapped since is offered then.
  if (index == 0) TRANSFUSE_RETURN_IF_ERROR(look());
  if (identity_ == 0 || index >= backing_.ranges.size()) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("device memory has no allocation {} (any more)", index)};
  }
  auto handle = physical_->share(backing_.ranges[index]);
  // Mapped anew since the last look: readers find the new offer, or none.
  if (!handle) (void)look();
  return handle;
}

}  // namespace transfuse::cuda

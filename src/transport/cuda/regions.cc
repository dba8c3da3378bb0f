// Offers, and regions opened by them.
#include "transport/cuda/regions.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "base/log.h"
#include "base/mutex.h"
#include "transfuse/deadline.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/offered_memory.h"
#include "transport/cuda/physical_memory.h"
#include "transport/cuda/pinned_mapping.h"

namespace transfuse::cuda {
namespace {

class CudaLocalRegion final : public LocalRegion {
 public:
  // `own` is what the region allocated, if it did.
  CudaLocalRegion(Core& core, std::unique_ptr<OfferedMemory> memory, Memory own)
      : core_(core), own_(std::move(own)), memory_(std::move(memory)) {
    ++core_.regions;
    core_.region_bytes += bytes().size();
  }
  ~CudaLocalRegion() override {
    --core_.regions;
    core_.region_bytes -= bytes().size();
  }
  std::span<std::byte> bytes() const override { return memory_->bytes(); }
  RegionDescriptor descriptor() const override { return memory_->descriptor(); }
  Result<void> refresh() override { return memory_->refresh(); }

 private:
  Core& core_;
  Memory own_;
  std::unique_ptr<OfferedMemory> memory_;  // goes first: nobody opens memory that is being freed
};

// No peer's number is 0.
class TargetRegion final : public LocalRegion {
 public:
  TargetRegion(const Device& device, std::span<std::byte> memory)
      : physical_(device), memory_(memory) {}
  std::span<std::byte> bytes() const override { return memory_; }
  RegionDescriptor descriptor() const override {
    return {RegionId{0}, memory_.size(), MemoryPlace::kDevice};
  }
  Result<void> refresh() override { return physical_.check_mapped(memory_); }

 private:
  DriverMemory physical_;
  std::span<std::byte> memory_;
};

}  // namespace

// Safe to call from any thread.
class CudaPeer final : public Peer {
 public:
  CudaPeer(Core& core, CudaTickets& tickets, std::unique_ptr<Peer> host)
      : core_(core), tickets_(tickets), host_(std::move(host)) {}

  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override;
  Result<MemoryHandle> open_handle(RegionId region, uint64_t index, Deadline deadline) override {
    return host_->open_handle(region, index, deadline);
  }
  bool alive() const override { return host_->alive(); }
  void close_board(RegionId id) EXCLUDES(mutex_);

 private:
  struct Board {
    std::unique_ptr<RemoteRegion> region;
    uint32_t users = 0;  // regions whose offers lie on it
  };
  // Its bytes; to be closed again.
  Result<std::span<const std::byte>> open_board(RegionId id, Deadline deadline) EXCLUDES(mutex_);
  Result<std::unique_ptr<RemoteRegion>> open_offer(OpenedOffer& opened,
                                                   const RegionDescriptor& descriptor,
                                                   Deadline deadline);

  Core& core_;
  CudaTickets& tickets_;
  std::unique_ptr<Peer> host_;
  Mutex mutex_;
  std::map<RegionId, Board> boards_ GUARDED_BY(mutex_);
};

Result<std::unique_ptr<LocalRegion>> offer_region(Core& core, std::span<std::byte> memory,
                                                  Memory own) {
  const OfferedMemory::Owner owner{.device = core.device->uuid(),
                                   .process = core.devices->process()};
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto offered,
      OfferedMemory::open(*core.host, *core.boards, std::make_unique<DriverMemory>(*core.device),
                          owner, memory));
  return std::unique_ptr<LocalRegion>(
      std::make_unique<CudaLocalRegion>(core, std::move(offered), std::move(own)));
}

std::unique_ptr<LocalRegion> keep_target(Core& core, std::span<std::byte> memory) {
  return std::make_unique<TargetRegion>(*core.device, memory);
}

std::unique_ptr<Peer> make_peer(Core& core, CudaTickets& tickets, std::unique_ptr<Peer> host) {
  return std::make_unique<CudaPeer>(core, tickets, std::move(host));
}

CudaRemoteRegion::CudaRemoteRegion(CudaTickets& tickets, Core& core,
                                   std::unique_ptr<RemoteRegion> host)
    : tickets_(tickets), core_(&core), host_(std::move(host)), size_bytes_(host_->size_bytes()) {}

CudaRemoteRegion::CudaRemoteRegion(CudaTickets& tickets, Core& core, OpenedMemory memory,
                                   const OpenedOffer& opened)
    : tickets_(tickets),
      core_(&core),
      memory_(std::move(memory)),
      opened_(opened),
      size_bytes_(opened.offer.size_bytes) {
  ++core_->remote_regions;
}

CudaRemoteRegion::~CudaRemoteRegion() {
  tickets_.retire(*this);
  if (opened_) opened_->peer->close_board(opened_->board);
  if (opened_) --core_->remote_regions;
}

std::string_view CudaRemoteRegion::route() const {
  if (pinned_) return pinned_route_;
  if (host_ != nullptr) return host_->route();
  const bool by_handles = memory_ && memory_->by_handles();
  switch (link()) {
    case DeviceLink::kSameDevice:
      return by_handles ? "cuda_vmm, one GPU" : "cuda_ipc, one GPU";
    case DeviceLink::kNvlink:
      return by_handles ? "cuda_vmm, NVLink" : "cuda_ipc, NVLink";
    case DeviceLink::kPcie:
      return by_handles ? "cuda_vmm, PCIe" : "cuda_ipc, PCIe";
  }
  return "";
}

// Where it is not mapped, or the system locks no pages of it, reads are staged.
void CudaRemoteRegion::expect_reads(MemoryPlace target) {
  if (target != MemoryPlace::kDevice || host_ == nullptr || pinned_) return;
  if (host_->mapped().size() < size_bytes_) return;
  auto pinned = PinnedMapping::make(*core_->device, host_->mapped());
  if (!pinned) {
    log_event(LogLevel::kDebug, "mapping_not_pinned", {{"reason", pinned.error().to_string()}});
    return;
  }
  pinned_.emplace(std::move(*pinned));
  pinned_route_ = fmt::format("{}, pinned", host_->route());
}

bool CudaRemoteRegion::current() const {
  if (host_ != nullptr) return host_->current();
  return !opened_ || offered_identity(opened_->place) == opened_->offer.identity;
}

Result<std::span<const std::byte>> CudaPeer::open_board(RegionId id, Deadline deadline) {
  {
    const MutexLock lock(mutex_);
    const auto known = boards_.find(id);
    if (known != boards_.end()) {
      // Its pages stay when its process is gone, and say nothing of the one that comes after it.
      if (!host_->alive()) {
        return Error{ErrorCode::kUnavailable, "device memory: the process that offers it is gone"};
      }
      ++known->second.users;
      return known->second.region->mapped();
    }
  }
  TRANSFUSE_ASSIGN_OR_RETURN(auto region,
                             host_->open_region({.id = id, .size_bytes = kBoardBytes}, deadline));
  if (region->mapped().size() != kBoardBytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("region {}: expected offers of device memory in shared memory, found "
                             "memory that is read by '{}'",
                             static_cast<uint64_t>(id), region->route())};
  }
  const MutexLock lock(mutex_);
  Board& board = boards_[id];
  if (board.region == nullptr) board.region = std::move(region);
  ++board.users;
  return board.region->mapped();
}

void CudaPeer::close_board(RegionId id) {
  std::unique_ptr<RemoteRegion> last;  // closed without the lock
  const MutexLock lock(mutex_);
  const auto found = boards_.find(id);
  TRANSFUSE_CHECK(found != boards_.end());
  if (--found->second.users > 0) return;
  last = std::move(found->second.region);
  boards_.erase(found);
}

Result<std::unique_ptr<RemoteRegion>> CudaPeer::open_region(const RegionDescriptor& descriptor,
                                                            Deadline deadline) {
  const auto place = offer_place(descriptor.id);
  if (!place) {
    TRANSFUSE_ASSIGN_OR_RETURN(auto host, host_->open_region(descriptor, deadline));
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<CudaRemoteRegion>(tickets_, core_, std::move(host)));
  }
  if (place->slot >= kOffersPerBoard) {
    return Error{ErrorCode::kCorrupt, fmt::format("region {}: no number of device memory",
                                                  static_cast<uint64_t>(descriptor.id))};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto board, open_board(place->board, deadline));
  OpenedOffer opened{.peer = this,
                     .board = place->board,
                     .place = board.subspan(place->slot * kOfferBytes).first<kOfferBytes>()};
  auto region = open_offer(opened, descriptor, deadline);
  if (!region) close_board(place->board);
  return region;
}

Result<std::unique_ptr<RemoteRegion>> CudaPeer::open_offer(OpenedOffer& opened,
                                                           const RegionDescriptor& descriptor,
                                                           Deadline deadline) {
  while (true) {
    TRANSFUSE_ASSIGN_OR_RETURN(opened.offer, read_offer(opened.place, deadline));
    if (opened.offer.size_bytes != descriptor.size_bytes) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("region {}: expected {} bytes by its descriptor, found {}",
                               static_cast<uint64_t>(descriptor.id), descriptor.size_bytes,
                               opened.offer.size_bytes)};
    }
    auto memory = core_.devices->open(
        opened.offer, opened.place, *core_.device,
        [&](uint64_t index) { return host_->open_handle(opened.offer.handles, index, deadline); });
    if (!memory) {
      const bool same = offered_identity(opened.place) == opened.offer.identity;
      if (same || deadline.passed()) return Unexpected{std::move(memory).error()};
      continue;  // other memory was mapped there meanwhile
    }
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<CudaRemoteRegion>(tickets_, core_, std::move(*memory), opened));
  }
}

}  // namespace transfuse::cuda

// Regions of the cuda transport: what it offers, and what it has opened.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/pinned_mapping.h"

namespace transfuse::cuda {

// What all objects of one transport share. Its memory may be shared with another transport that
// reads through another host.
struct Core {
  std::unique_ptr<Transport> host;
  std::unique_ptr<OfferBoards> boards;
  std::shared_ptr<Devices> devices;
  const Device* device = nullptr;  // reads go here
  std::atomic<uint64_t> regions{0};
  std::atomic<uint64_t> region_bytes{0};
  std::atomic<uint64_t> remote_regions{0};
  std::atomic<uint64_t> read_bytes{0};
};

// Registers memory of core.device: what it is to other processes lies in memory of the host. `own`
// is the memory itself where the region keeps it.
Result<std::unique_ptr<LocalRegion>> offer_region(Core& core, std::span<std::byte> memory,
                                                  Memory own);

// Memory of core.device that its allocator does not share: nobody opens it.
std::unique_ptr<LocalRegion> keep_target(Core& core, std::span<std::byte> memory);

class CudaRemoteRegion;
// The transport, as its regions see it.
class CudaTickets {
 public:
  CudaTickets() = default;
  CudaTickets(const CudaTickets&) = delete;
  CudaTickets& operator=(const CudaTickets&) = delete;
  virtual ~CudaTickets() = default;
  virtual void retire(const CudaRemoteRegion& region) = 0;  // waits for what still reads it
};

class CudaPeer;
// The offer of a region, as it was when it was opened, and where it is seen to change.
struct OpenedOffer {
  CudaPeer* peer = nullptr;
  RegionId board{};
  std::span<const std::byte, kOfferBytes> place;
  MemoryOffer offer{};
};

// Memory of the host that another process serves, of a device, or all of this process' own on the
// device. Tickets of it end before it does.
class CudaRemoteRegion final : public RemoteRegion {
 public:
  CudaRemoteRegion(CudaTickets& tickets, Core& core, std::unique_ptr<RemoteRegion> host);
  CudaRemoteRegion(CudaTickets& tickets, Core& core, OpenedMemory memory,
                   const OpenedOffer& opened);
  explicit CudaRemoteRegion(CudaTickets& tickets) : tickets_(tickets), size_bytes_(UINT64_MAX) {}
  ~CudaRemoteRegion() override;

  uint64_t size_bytes() const override { return size_bytes_; }
  std::string_view route() const override;
  void expect_reads(MemoryPlace target) override;
  bool joins_requests() const override { return on_device(); }
  std::span<const std::byte> mapped() const override {
    return host_ == nullptr ? std::span<const std::byte>() : host_->mapped();
  }
  bool current() const override;

  bool belongs_to(const CudaTickets& tickets) const { return &tickets_ == &tickets; }
  const RemoteRegion* host() const { return host_.get(); }  // null: of a device
  // Whether the device reads it by itself: all but memory of the host that is not pinned.
  bool on_device() const { return host_ == nullptr || pinned_; }
  CUdeviceptr address() const {
    return pinned_ ? pinned_->address() : memory_ ? memory_->address() : 0;
  }
  // Whether it is read over a link or a bus.
  bool is_elsewhere() const { return pinned_ || link() != DeviceLink::kSameDevice; }

  // Of the transport, under its mutex: its number in the request that is being submitted.
  mutable uint64_t request = 0;
  mutable uint32_t number = 0;

 private:
  DeviceLink link() const { return memory_ ? memory_->link() : DeviceLink::kSameDevice; }

  CudaTickets& tickets_;
  Core* core_ = nullptr;
  std::unique_ptr<RemoteRegion> host_;
  std::optional<PinnedMapping> pinned_;  // of the host
  std::string pinned_route_;
  std::optional<OpenedMemory> memory_;
  std::optional<OpenedOffer> opened_;
  uint64_t size_bytes_;
};

// Opens regions of `host`'s process: of devices by their offers, of the host as `host` does.
std::unique_ptr<Peer> make_peer(Core& core, CudaTickets& tickets, std::unique_ptr<Peer> host);

}  // namespace transfuse::cuda

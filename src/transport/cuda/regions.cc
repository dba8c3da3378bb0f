// Offers, and regions opened by them.
#include "transport/cuda/regions.h"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <utility>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {
namespace {

constexpr auto kPollPause = std::chrono::microseconds(20);

class CudaLocalRegion final : public LocalRegion {
 public:
  // `own` is what the region allocated, if it did.
  CudaLocalRegion(Core& core, std::unique_ptr<LocalRegion> offer, std::span<std::byte> memory,
                  Memory own)
      : core_(core), own_(std::move(own)), offer_(std::move(offer)), memory_(memory) {
    ++core_.regions;
    core_.region_bytes += memory_.size();
  }
  ~CudaLocalRegion() override {
    --core_.regions;
    core_.region_bytes -= memory_.size();
  }
  std::span<std::byte> bytes() const override { return memory_; }
  RegionDescriptor descriptor() const override {
    return {RegionId{static_cast<uint64_t>(offer_->descriptor().id) | kDeviceBit}, memory_.size()};
  }
  MemoryPlace place() const override { return MemoryPlace::kDevice; }

 private:
  Core& core_;
  Memory own_;
  std::unique_ptr<LocalRegion> offer_;  // goes first: nobody opens memory that is being freed
  std::span<std::byte> memory_;
};

class CudaPeer final : public Peer {
 public:
  CudaPeer(Core& core, CudaTickets& tickets, std::unique_ptr<Peer> host)
      : core_(core), tickets_(tickets), host_(std::move(host)) {}

  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override;
  bool alive() const override { return host_->alive(); }

 private:
  Core& core_;
  CudaTickets& tickets_;
  std::unique_ptr<Peer> host_;
};

// Reads bytes of a region of the host at once.
Result<void> read_now(Transport& host, const RemoteRegion& region, std::span<std::byte> out,
                      Deadline deadline) {
  const StridedCopy copy{.target = out.data(),
                         .count = {1, 1, static_cast<uint32_t>(out.size())},
                         .source_stride = {0, 0, 1},
                         .target_stride = {0, 0, 1},
                         .index_stride = {0, 0, 1}};
  TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket,
                             host.submit({.region = &region, .copies = {&copy, 1}}));
  if (!host.wait_any({&ticket, 1}, deadline)) host.cancel(ticket);
  // A cancelled one ends with what a worker of the host transport has in hand.
  while (host.poll(ticket) == TicketState::kPending ||
         host.poll(ticket) == TicketState::kPoisoned) {
    std::this_thread::sleep_for(kPollPause);
  }
  return host.finish(ticket);
}

}  // namespace

Result<std::unique_ptr<LocalRegion>> offer_region(Core& core, std::span<std::byte> memory,
                                                  Memory own) {
  TRANSFUSE_ASSIGN_OR_RETURN(const MemoryOffer offer, core.devices->offer(memory));
  TRANSFUSE_ASSIGN_OR_RETURN(auto region, core.host->allocate(kOfferBytes));
  offer.encode(region->bytes().first<kOfferBytes>());
  return std::unique_ptr<LocalRegion>(
      std::make_unique<CudaLocalRegion>(core, std::move(region), memory, std::move(own)));
}

std::unique_ptr<Peer> make_peer(Core& core, CudaTickets& tickets, std::unique_ptr<Peer> host) {
  return std::make_unique<CudaPeer>(core, tickets, std::move(host));
}

CudaRemoteRegion::~CudaRemoteRegion() {
  tickets_.retire(*this);
  if (core_ != nullptr) --core_->remote_regions;
}

Result<std::unique_ptr<RemoteRegion>> CudaPeer::open_region(const RegionDescriptor& descriptor,
                                                            Deadline deadline) {
  const auto id = static_cast<uint64_t>(descriptor.id);
  if ((id & kDeviceBit) == 0) {
    TRANSFUSE_ASSIGN_OR_RETURN(auto host, host_->open_region(descriptor, deadline));
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<CudaRemoteRegion>(tickets_, std::move(host)));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(
      const auto region,
      host_->open_region({.id = RegionId{id & ~kDeviceBit}, .size_bytes = kOfferBytes}, deadline));
  std::array<std::byte, kOfferBytes> bytes{};
  TRANSFUSE_RETURN_IF_ERROR(read_now(*core_.host, *region, bytes, deadline));
  TRANSFUSE_ASSIGN_OR_RETURN(const MemoryOffer offer, MemoryOffer::decode(bytes));
  if (offer.size_bytes != descriptor.size_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("region {}: expected {} bytes by its descriptor, found {}", id,
                             descriptor.size_bytes, offer.size_bytes)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(OpenedMemory memory, core_.devices->open(offer, *core_.device));
  return std::unique_ptr<RemoteRegion>(
      std::make_unique<CudaRemoteRegion>(tickets_, core_, std::move(memory), offer.size_bytes));
}

}  // namespace transfuse::cuda

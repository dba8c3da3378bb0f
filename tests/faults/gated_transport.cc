// The door: counts reads of one kind and holds the one that is due.
#include "faults/gated_transport.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::faults {
namespace {

class GatedRegion final : public RemoteRegion {
 public:
  GatedRegion(GatedTransport& door, std::unique_ptr<RemoteRegion> inner)
      : door_(door), inner_(std::move(inner)) {}
  uint64_t size_bytes() const override { return inner_->size_bytes(); }
  std::string_view route() const override { return inner_->route(); }
  std::span<const std::byte> mapped() const override {
    const std::span<const std::byte> bytes = inner_->mapped();
    if (!bytes.empty()) door_.pass(ReadKind::kWords);
    return bytes;
  }
  bool current() const override { return inner_->current(); }
  const RemoteRegion* inner() const { return inner_.get(); }

 private:
  GatedTransport& door_;
  std::unique_ptr<RemoteRegion> inner_;
};

class GatedPeer final : public Peer {
 public:
  GatedPeer(GatedTransport& door, std::unique_ptr<Peer> inner)
      : door_(door), inner_(std::move(inner)) {}
  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto region, inner_->open_region(descriptor, deadline));
    return std::unique_ptr<RemoteRegion>(std::make_unique<GatedRegion>(door_, std::move(region)));
  }
  bool alive() const override { return inner_->alive(); }

 private:
  GatedTransport& door_;
  std::unique_ptr<Peer> inner_;
};

const RemoteRegion* inner_of(const RemoteRegion* region) {
  return region == nullptr ? nullptr : static_cast<const GatedRegion*>(region)->inner();
}

}  // namespace

GatedTransport::GatedTransport(std::unique_ptr<Transport> inner, std::function<void()> on_held)
    : inner_(std::move(inner)), on_held_(std::move(on_held)) {}

void GatedTransport::hold(ReadKind kind, uint64_t number) {
  const MutexLock lock(mutex_);
  kind_ = kind;
  until_held_ = number;
  open_ = false;
}

void GatedTransport::open() {
  const MutexLock lock(mutex_);
  until_held_ = 0;
  open_ = true;
  opened_.notify_all();
}

void GatedTransport::pass(ReadKind kind) {
  {
    const MutexLock lock(mutex_);
    if (until_held_ == 0 || kind != kind_ || --until_held_ > 0) return;
  }
  on_held_();
  const MutexLock lock(mutex_);
  while (!open_) opened_.wait(mutex_);
}

Result<TicketId> GatedTransport::submit(const ReadRequest& request) {
  const bool words = request.copies.size() == 1 && request.copies[0].op == ElementOp::kCopy8;
  pass(words ? ReadKind::kWords : ReadKind::kWeights);
  ReadRequest inner = request;  // the transports of the host join no regions
  inner.region = inner_of(request.region);
  inner.scale_region = inner_of(request.scale_region);
  return inner_->submit(inner);
}

Result<std::unique_ptr<Peer>> GatedTransport::connect(std::string_view endpoint,
                                                      std::string_view token, Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto peer, inner_->connect(endpoint, token, deadline));
  return std::unique_ptr<Peer>(std::make_unique<GatedPeer>(*this, std::move(peer)));
}

}  // namespace transfuse::faults

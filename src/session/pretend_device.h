// For tests: a transport that takes ordinary memory for that of a device, so that what sessions do
// with devices runs without one. It joins requests, and copies and sums within its own memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::testing {

// Reads are over when submit() returns, but for copies that are held. Safe to call from any thread.
class PretendDevice final : public Transport {
 public:
  explicit PretendDevice(std::unique_ptr<Transport> inside) : inside_(std::move(inside)) {}

  uint64_t joined_requests() const { return joined_; }  // over regions of peers
  uint64_t own_requests() const { return own_requests_; }
  // Allocations on the device that are still allowed.
  void set_room(uint64_t allocations) { room_ = allocations; }
  // While it sleeps nothing is mapped at registered memory: no request may touch the device.
  void sleep(bool asleep) { asleep_ = asleep; }
  // The next request within the device fails.
  void fail_next() { fail_next_ = true; }
  // The first byte that the next request within the device writes is wrong afterwards.
  void spoil_next_copy() { spoil_next_ = true; }
  // Copies within the device (no sums) wait for let_go(), or end when they are cancelled.
  void hold_copies() { holding_ = true; }
  void let_go() {
    const MutexLock lock(mutex_);
    holding_ = false;
    for (auto& [ticket, request] : held_) outcomes_.emplace(ticket, copy_own(request));
    held_.clear();
    changed_.notify_all();
  }
  // Of the regions that are opened from now on, those of so many bytes do not join.
  void keep_apart(uint64_t region_bytes) { apart_bytes_ = region_bytes; }
  // Copies with a fingerprint and a target, in requests within the device.
  uint64_t summed_copies() const { return summed_copies_; }

  std::string_view kind() const override { return "pretend"; }
  std::string_view endpoint_kind() const override { return inside_->endpoint_kind(); }
  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return inside_->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> allocate_on_device(uint64_t size_bytes) override {
    if (room_ == 0) {
      return Error{ErrorCode::kResourceExhausted,
                   "the device has no room for " + std::to_string(size_bytes) + " bytes"};
    }
    --room_;
    TRANSFUSE_ASSIGN_OR_RETURN(auto region, inside_->allocate(size_bytes));
    return std::unique_ptr<LocalRegion>(std::make_unique<DeviceRegion>(*this, std::move(region)));
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto region, inside_->register_memory(memory));
    return std::unique_ptr<LocalRegion>(std::make_unique<DeviceRegion>(*this, std::move(region)));
  }
  Result<std::string> endpoint() override { return inside_->endpoint(); }
  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto peer, inside_->connect(endpoint, token, deadline));
    return std::unique_ptr<Peer>(std::make_unique<JoiningPeer>(std::move(peer), apart_bytes_));
  }
  Result<const RemoteRegion*> own_memory() override { return &own_; }

  Result<TicketId> submit(const ReadRequest& request) override {
    Result<void> outcome;
    if (request.region == &own_) {
      ++own_requests_;
      const bool copies = std::ranges::any_of(
          request.copies, [](const StridedCopy& copy) { return copy.target != nullptr; });
      if (holding_ && copies) {
        const MutexLock lock(mutex_);
        held_.emplace(++last_, request);
        return TicketId{last_};
      }
      outcome = copy_own(request);
    } else if (!request.regions.empty()) {
      ++joined_;
      outcome = read_each(request);
    } else {
      ReadRequest inner = request;
      inner.region = inside(request.region);
      inner.scale_region = inside(request.scale_region);
      TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket, inside_->submit(inner));
      inside_->wait_any({&ticket, 1}, Deadline::after_ms(10000));
      outcome = inside_->finish(ticket);
    }
    const MutexLock lock(mutex_);
    outcomes_.emplace(++last_, std::move(outcome));
    return TicketId{last_};
  }
  TicketState poll(TicketId ticket) override {
    const MutexLock lock(mutex_);
    if (held_.contains(static_cast<uint64_t>(ticket))) return TicketState::kPending;
    return outcomes_.at(static_cast<uint64_t>(ticket)) ? TicketState::kLanded
                                                       : TicketState::kFailed;
  }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    const MutexLock lock(mutex_);
    while (std::ranges::all_of(tickets, [this](TicketId ticket) REQUIRES(mutex_) {
      return held_.contains(static_cast<uint64_t>(ticket));
    })) {
      if (!changed_.wait_until(mutex_, deadline)) return false;
    }
    return true;
  }
  uint64_t progress_bytes(TicketId /*ticket*/) override { return 0; }
  void cancel(TicketId ticket) override {
    const MutexLock lock(mutex_);
    const auto id = static_cast<uint64_t>(ticket);
    if (held_.erase(id) == 0) return;
    outcomes_.emplace(id, Error{ErrorCode::kCancelled, "the copy was cancelled"});
    changed_.notify_all();
  }
  Result<void> finish(TicketId ticket) override {
    const MutexLock lock(mutex_);
    return std::move(outcomes_.extract(static_cast<uint64_t>(ticket)).mapped());
  }
  TransportStats stats() const override { return inside_->stats(); }

 private:
  class DeviceRegion final : public LocalRegion {
   public:
    DeviceRegion(const PretendDevice& device, std::unique_ptr<LocalRegion> inside)
        : device_(device), inside_(std::move(inside)) {}
    std::span<std::byte> bytes() const override { return inside_->bytes(); }
    RegionDescriptor descriptor() const override {
      RegionDescriptor descriptor = inside_->descriptor();
      descriptor.place = MemoryPlace::kDevice;
      return descriptor;
    }
    Result<void> refresh() override {
      if (!device_.asleep_) return {};
      return Error{ErrorCode::kUnavailable, "nothing is mapped there now"};
    }

   private:
    const PretendDevice& device_;
    std::unique_ptr<LocalRegion> inside_;
  };
  class JoiningRegion final : public RemoteRegion {
   public:
    JoiningRegion(std::unique_ptr<RemoteRegion> inside, bool joins)
        : inside_(std::move(inside)), joins_(joins) {}
    uint64_t size_bytes() const override { return inside_->size_bytes(); }
    std::string_view route() const override { return "pretend"; }
    bool joins_requests() const override { return joins_; }
    const RemoteRegion* inside() const { return inside_.get(); }

   private:
    std::unique_ptr<RemoteRegion> inside_;
    const bool joins_;
  };
  class JoiningPeer final : public Peer {
   public:
    JoiningPeer(std::unique_ptr<Peer> inside, const std::atomic<uint64_t>& apart_bytes)
        : inside_(std::move(inside)), apart_bytes_(apart_bytes) {}
    Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                      Deadline deadline) override {
      TRANSFUSE_ASSIGN_OR_RETURN(auto region, inside_->open_region(descriptor, deadline));
      const bool joins = region->size_bytes() != apart_bytes_;
      return std::unique_ptr<RemoteRegion>(
          std::make_unique<JoiningRegion>(std::move(region), joins));
    }
    bool alive() const override { return inside_->alive(); }

   private:
    std::unique_ptr<Peer> inside_;
    const std::atomic<uint64_t>& apart_bytes_;
  };
  class OwnMemory final : public RemoteRegion {
   public:
    uint64_t size_bytes() const override { return UINT64_MAX; }
    std::string_view route() const override { return "own"; }
    bool joins_requests() const override { return true; }
  };

  static const RemoteRegion* inside(const RemoteRegion* region) {
    return region == nullptr ? nullptr : static_cast<const JoiningRegion*>(region)->inside();
  }
  Result<void> copy_own(const ReadRequest& request) {
    TRANSFUSE_CHECK(!asleep_);
    if (fail_next_.exchange(false)) return Error{ErrorCode::kUnavailable, "the device is lost"};
    for (size_t i = 0; i < request.copies.size(); ++i) {
      const StridedCopy& copy = request.copies[i];
      const auto* source = reinterpret_cast<const std::byte*>(copy.source_offset_bytes);
      const uint64_t sum = copy.target == nullptr ? sum_copy(copy, source) : run_copy(copy, source);
      if (copy.fingerprint && !request.fingerprints.empty()) request.fingerprints[i] = sum;
      summed_copies_ += copy.fingerprint && copy.target != nullptr;
    }
    if (request.copies[0].target != nullptr && spoil_next_.exchange(false)) {
      *request.copies[0].target ^= std::byte{1};
    }
    copy_fence();
    return {};
  }
  Result<void> read_each(const ReadRequest& request) {
    for (size_t i = 0; i < request.copies.size(); ++i) {
      const RemoteRegion* const of_scales =
          request.scale_regions.empty() ? nullptr : request.scale_regions[i];
      if (!request.regions[i]->joins_requests() ||
          (of_scales != nullptr && !of_scales->joins_requests())) {
        return Error{ErrorCode::kInvalidArgument, "a region that does not join was joined"};
      }
      const RemoteRegion* const scales = inside(of_scales);
      const std::span<uint64_t> sums =
          request.fingerprints.empty() ? request.fingerprints : request.fingerprints.subspan(i, 1);
      TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket,
                                 inside_->submit({.region = inside(request.regions[i]),
                                                  .copies = request.copies.subspan(i, 1),
                                                  .fingerprints = sums,
                                                  .scale_region = scales}));
      inside_->wait_any({&ticket, 1}, Deadline::after_ms(10000));
      TRANSFUSE_RETURN_IF_ERROR(inside_->finish(ticket));
    }
    return {};
  }

  std::unique_ptr<Transport> inside_;
  OwnMemory own_;
  std::atomic<uint64_t> joined_{0};
  std::atomic<uint64_t> own_requests_{0};
  std::atomic<uint64_t> room_{UINT64_MAX};
  std::atomic<bool> asleep_{false};
  std::atomic<uint64_t> apart_bytes_{UINT64_MAX};
  std::atomic<bool> fail_next_{false};
  std::atomic<bool> holding_{false};
  std::atomic<bool> spoil_next_{false};
  std::atomic<uint64_t> summed_copies_{0};
  Mutex mutex_;
  CondVar changed_;
  std::map<uint64_t, ReadRequest> held_ GUARDED_BY(mutex_);
  std::map<uint64_t, Result<void>> outcomes_ GUARDED_BY(mutex_);
  uint64_t last_ GUARDED_BY(mutex_) = 0;
};

}  // namespace transfuse::testing

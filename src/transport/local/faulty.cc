// The faults: each ticket is a small state machine around a ticket of the transport inside.
#include "transport/local/faulty.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr auto kTick = std::chrono::microseconds(500);

Error died() { return {ErrorCode::kUnavailable, "faulty transport: the peer has died"}; }

// The same elements at the target, as a copy that can be summed.
StridedCopy at_target(const StridedCopy& copy) {
  static constexpr std::array<ElementOp, 4> kOps = {ElementOp::kCopy1, ElementOp::kCopy2,
                                                    ElementOp::kCopy4, ElementOp::kCopy8};
  StridedCopy result = copy;
  result.scales = nullptr;
  const uint32_t bytes = target_element_bytes(copy.op);
  result.op = *std::find_if(kOps.begin(), kOps.end(),
                            [&](ElementOp op) { return target_element_bytes(op) == bytes; });
  std::copy(std::begin(copy.target_stride), std::end(copy.target_stride),
            std::begin(result.source_stride));
  return result;
}

// The scales that a quantising copy writes, as a copy that can be summed; of none otherwise.
StridedCopy scales_at_target(const StridedCopy& copy) {
  StridedCopy result;
  result.op = ElementOp::kCopy4;
  result.count[2] = 0;
  if (!quantizes(copy.op) || copy.element_count() == 0) return result;
  const BlockScales& scales = *copy.scales;
  result.target = scales.target;
  result.linear_index = scales.linear_index;
  result.fingerprint_key = scales.fingerprint_key;
  for (int axis = 0; axis < 2; ++axis) {
    result.count[axis + 1] = static_cast<uint32_t>(copy.block_count(axis));
    result.source_stride[axis + 1] = result.target_stride[axis + 1] = scales.stride[axis];
    result.index_stride[axis + 1] = scales.index_stride[axis];
  }
  return result;
}

bool extents_overlap(const StridedCopy& a, const StridedCopy& b) {
  const auto end = [](const StridedCopy& copy) {
    StridedCopy extent = at_target(copy);
    extent.source_offset_bytes = 0;
    return copy.target + extent.source_end_bytes();
  };
  return a.target < end(b) && b.target < end(a);
}

bool overlap(const StridedCopy& a, const StridedCopy& b) {
  const StridedCopy of_a = scales_at_target(a);
  const StridedCopy of_b = scales_at_target(b);
  return extents_overlap(a, b) || extents_overlap(a, of_b) || extents_overlap(of_a, b) ||
         extents_overlap(of_a, of_b);
}

// One of the copies alone, or the first half of several.
void halve(std::vector<StridedCopy>& copies) {
  if (copies.size() > 1) {
    copies.resize(copies.size() / 2);
  } else if (!copies.empty()) {
    auto& count = copies.front().count;
    *std::max_element(std::begin(count), std::end(count)) /= 2;
  }
}

struct PeerState {
  std::string endpoint;
  std::atomic<bool> dead{false};
};

class FaultyWrapper;

class FaultyRegion final : public RemoteRegion {
 public:
  FaultyRegion(FaultyWrapper& owner, std::shared_ptr<PeerState> peer,
               std::unique_ptr<RemoteRegion> inside)
      : owner_(owner), peer_(std::move(peer)), inside_(std::move(inside)) {}
  ~FaultyRegion() override;
  uint64_t size_bytes() const override { return inside_->size_bytes(); }
  std::string_view route() const override { return inside_->route(); }
  std::span<const std::byte> mapped() const override { return inside_->mapped(); }
  bool current() const override { return inside_->current(); }

 private:
  friend class FaultyWrapper;
  FaultyWrapper& owner_;
  std::shared_ptr<PeerState> peer_;  // shared with the peer and its other regions
  std::unique_ptr<RemoteRegion> inside_;
};

class FaultyPeer final : public Peer {
 public:
  FaultyPeer(FaultyWrapper& owner, std::string endpoint, std::unique_ptr<Peer> inside)
      : owner_(owner), state_(std::make_shared<PeerState>()), inside_(std::move(inside)) {
    state_->endpoint = std::move(endpoint);
  }
  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override {
    if (state_->dead) return died();
    TRANSFUSE_ASSIGN_OR_RETURN(auto inside, inside_->open_region(descriptor, deadline));
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<FaultyRegion>(owner_, state_, std::move(inside)));
  }
  Result<MemoryHandle> open_handle(RegionId region, uint64_t index, Deadline deadline) override {
    if (state_->dead) return died();
    return inside_->open_handle(region, index, deadline);
  }
  bool alive() const override { return !state_->dead && inside_->alive(); }

 private:
  FaultyWrapper& owner_;
  std::shared_ptr<PeerState> state_;  // shared with its regions
  std::unique_ptr<Peer> inside_;
};

struct FaultyTicket {
  Fault fault = Fault::kNone;
  FaultyRegion* region = nullptr;  // nullptr once it, or that of the scales, was closed
  FaultyRegion* scales = nullptr;  // where they lie in another one
  std::vector<StridedCopy> copies;
  std::span<uint64_t> fingerprints;
  uint64_t size_bytes = 0;
  std::optional<TicketId> inside;
  std::optional<TimePoint> due;  // when the read inside begins
  bool cancelled = false;        // by the caller
  bool ended = false;
  bool abandoned = false;  // finished by the caller before it ended
  std::optional<Error> error;
};

class FaultyWrapper final : public FaultyTransport {
 public:
  FaultyWrapper(std::unique_ptr<Transport> inside, const FaultPlan& plan)
      : inside_(std::move(inside)), plan_(plan), random_(plan.seed), thread_([this] { tick(); }) {}
  ~FaultyWrapper() override {
    {
      MutexLock lock(mutex_);
      stopping_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  void set_plan(const FaultPlan& plan) override {
    MutexLock lock(mutex_);
    plan_ = plan;
    random_ = Random(plan.seed);
  }
  uint64_t submit_count() const override {
    MutexLock lock(mutex_);
    return submits_;
  }
  uint64_t fault_count(Fault fault) const override {
    MutexLock lock(mutex_);
    return fault_counts_[static_cast<size_t>(fault)];
  }

  std::string_view kind() const override { return inside_->kind(); }
  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return inside_->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    return inside_->register_memory(memory);
  }
  Result<std::unique_ptr<LocalRegion>> offer_handles(HandleMaker make) override {
    return inside_->offer_handles(std::move(make));
  }
  Result<std::string> endpoint() override { return inside_->endpoint(); }
  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    {
      MutexLock lock(mutex_);
      if (dead_.contains(endpoint)) return died();
    }
    TRANSFUSE_ASSIGN_OR_RETURN(auto inside, inside_->connect(endpoint, token, deadline));
    return std::unique_ptr<Peer>(
        std::make_unique<FaultyPeer>(*this, std::string(endpoint), std::move(inside)));
  }

  Result<TicketId> submit(const ReadRequest& request) override;
  TicketState poll(TicketId id) override {
    MutexLock lock(mutex_);
    FaultyTicket& ticket = at(id);
    advance(ticket);
    return state_of(ticket);
  }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override;
  uint64_t progress_bytes(TicketId id) override {
    MutexLock lock(mutex_);
    FaultyTicket& ticket = at(id);
    advance(ticket);
    if (ticket.inside) return inside_->progress_bytes(*ticket.inside);
    return state_of(ticket) == TicketState::kLanded ? ticket.size_bytes : 0;
  }
  void cancel(TicketId id) override;
  Result<void> finish(TicketId id) override;
  TransportStats stats() const override;

  // Called by a region that goes: nothing that has not begun begins any more.
  void close(FaultyRegion& region) {
    MutexLock lock(mutex_);
    for (auto& [id, ticket] : tickets_) {
      if (ticket.region != &region && ticket.scales != &region) continue;
      ticket.region = nullptr;
      if (!ticket.ended && !ticket.inside) {
        end(ticket, Error{ErrorCode::kCancelled, "faulty transport: the region handle was closed"});
      }
    }
  }

 private:
  Fault draw() REQUIRES(mutex_);
  Result<void> check(const FaultyRegion& region, const FaultyRegion& scales,
                     const ReadRequest& request) REQUIRES(mutex_);
  Result<void> begin(FaultyTicket& ticket) REQUIRES(mutex_);
  void kill(PeerState& peer) REQUIRES(mutex_);
  void advance(FaultyTicket& ticket) REQUIRES(mutex_);
  void corrupt(FaultyTicket& ticket) REQUIRES(mutex_);
  void end(FaultyTicket& ticket, std::optional<Error> error) REQUIRES(mutex_);
  void tick() EXCLUDES(mutex_);

  static TicketState state_of(const FaultyTicket& ticket) {
    if (!ticket.ended) return ticket.cancelled ? TicketState::kPoisoned : TicketState::kPending;
    if (ticket.cancelled) return TicketState::kCancelled;
    return ticket.error ? TicketState::kFailed : TicketState::kLanded;
  }
  static void sum_target(const FaultyTicket& ticket, size_t i) {
    if (ticket.fingerprints.empty() || !ticket.copies[i].fingerprint) return;
    const StridedCopy scales = scales_at_target(ticket.copies[i]);
    ticket.fingerprints[i] = sum_copy(at_target(ticket.copies[i]), ticket.copies[i].target) +
                             sum_copy(scales, scales.target);
  }
  FaultyTicket& at(TicketId id) REQUIRES(mutex_) {
    const auto found = tickets_.find(id);
    TRANSFUSE_CHECK(found != tickets_.end() && !found->second.abandoned);
    return found->second;
  }

  const std::unique_ptr<Transport> inside_;
  mutable Mutex mutex_;
  CondVar changed_;
  bool stopping_ GUARDED_BY(mutex_) = false;
  FaultPlan plan_ GUARDED_BY(mutex_);
  Random random_ GUARDED_BY(mutex_);
  uint64_t submits_ GUARDED_BY(mutex_) = 0;
  uint64_t last_id_ GUARDED_BY(mutex_) = 0;
  std::array<uint64_t, kFaultCount> fault_counts_ GUARDED_BY(mutex_){};
  std::set<std::string, std::less<>> dead_ GUARDED_BY(mutex_);
  std::map<TicketId, FaultyTicket> tickets_ GUARDED_BY(mutex_);
  std::thread thread_;  // last: it uses all of the above
};

FaultyRegion::~FaultyRegion() {
  owner_.close(*this);
  inside_.reset();  // ends what is under way inside
}

Fault FaultyWrapper::draw() {
  const uint64_t index = submits_++;
  Fault fault = Fault::kNone;
  for (size_t f = 1; f < kFaultCount; ++f) {  // always all of them: the order of draws is fixed
    if (random_.chance(plan_.chance[f]) && fault == Fault::kNone) fault = static_cast<Fault>(f);
  }
  for (const ScriptedFault& scripted : plan_.script) {
    if (scripted.submit_index == index) fault = scripted.fault;
  }
  ++fault_counts_[static_cast<size_t>(fault)];
  return fault;
}

Result<void> FaultyWrapper::check(const FaultyRegion& region, const FaultyRegion& scales,
                                  const ReadRequest& request) {
  if (!request.fingerprints.empty() && request.fingerprints.size() != request.copies.size()) {
    return Error{ErrorCode::kInvalidArgument, "submit: fingerprints are neither none nor one each"};
  }
  if (region.peer_->dead) return died();
  for (const StridedCopy& copy : request.copies) {
    TRANSFUSE_RETURN_IF_ERROR(check_copy(copy, region.size_bytes(), scales.size_bytes()));
    for (const auto& [id, ticket] : tickets_) {
      if (state_of(ticket) != TicketState::kPoisoned) continue;
      for (const StridedCopy& poisoned : ticket.copies) {
        if (overlap(copy, poisoned)) {
          return Error{ErrorCode::kPoisoned,
                       "submit: a cancelled read may still write the target memory"};
        }
      }
    }
  }
  return {};
}

Result<TicketId> FaultyWrapper::submit(const ReadRequest& request) {
  auto* region = dynamic_cast<FaultyRegion*>(const_cast<RemoteRegion*>(request.region));
  auto* scales = dynamic_cast<FaultyRegion*>(const_cast<RemoteRegion*>(request.scale_region));
  if (region == nullptr || &region->owner_ != this ||
      (scales != nullptr && &scales->owner_ != this)) {
    return Error{ErrorCode::kInvalidArgument,
                 "submit: the region was not opened through this transport"};
  }
  MutexLock lock(mutex_);
  for (auto& [id, ticket] : tickets_) advance(ticket);
  TRANSFUSE_RETURN_IF_ERROR(check(*region, scales == nullptr ? *region : *scales, request));
  const TicketId id{++last_id_};
  FaultyTicket& ticket = tickets_[id];
  ticket.fault = draw();
  ticket.region = region;
  ticket.scales = scales;
  ticket.copies.assign(request.copies.begin(), request.copies.end());
  ticket.fingerprints = request.fingerprints;
  for (const StridedCopy& copy : ticket.copies) ticket.size_bytes += copy.target_bytes();
  const TimePoint now = std::chrono::steady_clock::now();
  Result<void> begun;
  switch (ticket.fault) {
    case Fault::kNone:
    case Fault::kCorrupt:
    case Fault::kPartial:
      begun = begin(ticket);
      break;
    case Fault::kDelay:
      ticket.due = now + std::chrono::milliseconds(plan_.delay_ms);
      break;
    case Fault::kDrop:
    case Fault::kLateWrite:
      break;
    case Fault::kLie:
      for (size_t i = 0; i < ticket.copies.size(); ++i) sum_target(ticket, i);
      end(ticket, std::nullopt);
      break;
    case Fault::kDie:
      kill(*region->peer_);
      break;
  }
  if (!begun) {
    tickets_.erase(id);
    return begun.error();
  }
  changed_.notify_all();
  return id;
}

Result<void> FaultyWrapper::begin(FaultyTicket& ticket) {
  ticket.due.reset();
  if (ticket.fault == Fault::kPartial) {
    halve(ticket.copies);
    ticket.fingerprints = {};
  }
  // A late write is nobody's result: only the memory is still the caller's.
  if (ticket.cancelled) ticket.fingerprints = {};
  TRANSFUSE_ASSIGN_OR_RETURN(
      ticket.inside,
      inside_->submit(
          {.region = ticket.region->inside_.get(),
           .copies = ticket.copies,
           .fingerprints = ticket.fingerprints,
           .scale_region = ticket.scales == nullptr ? nullptr : ticket.scales->inside_.get()}));
  return {};
}

void FaultyWrapper::kill(PeerState& peer) {
  peer.dead = true;
  dead_.insert(peer.endpoint);
  for (auto& [id, ticket] : tickets_) {
    if (ticket.ended || ticket.region == nullptr || ticket.region->peer_.get() != &peer) continue;
    if (ticket.inside) {
      ticket.error = died();
      inside_->cancel(*ticket.inside);
    } else {
      end(ticket, died());
    }
  }
}

void FaultyWrapper::advance(FaultyTicket& ticket) {
  if (ticket.ended) return;
  if (ticket.due && *ticket.due <= std::chrono::steady_clock::now()) {
    if (auto begun = begin(ticket); !begun) return end(ticket, begun.error());
  }
  if (!ticket.inside) return;
  const TicketState state = inside_->poll(*ticket.inside);
  if (state == TicketState::kPending || state == TicketState::kPoisoned) return;
  const auto outcome = inside_->finish(*ticket.inside);
  ticket.inside.reset();
  if (ticket.error) return end(ticket, ticket.error);
  if (!outcome) return end(ticket, outcome.error());
  if (ticket.fault == Fault::kPartial) {
    return end(ticket, Error{ErrorCode::kUnavailable,
                             "faulty transport: the connection broke in the middle"});
  }
  if (ticket.fault == Fault::kCorrupt) corrupt(ticket);
  end(ticket, std::nullopt);
}

void FaultyWrapper::corrupt(FaultyTicket& ticket) {
  if (ticket.size_bytes == 0) return;
  size_t i = 0;
  do {
    i = static_cast<size_t>(random_.below(ticket.copies.size()));
  } while (ticket.copies[i].target_bytes() == 0);
  const StridedCopy& copy = ticket.copies[i];
  const uint32_t bytes = target_element_bytes(copy.op);
  uint64_t element = 0;
  for (int level = 0; level < 3; ++level) {
    element += random_.below(copy.count[level]) * static_cast<uint64_t>(copy.target_stride[level]);
  }
  copy.target[element * bytes + random_.below(bytes)] ^= std::byte{1} << random_.below(8);
  sum_target(ticket, i);
}

void FaultyWrapper::end(FaultyTicket& ticket, std::optional<Error> error) {
  ticket.ended = true;
  ticket.due.reset();
  ticket.error = std::move(error);
  changed_.notify_all();
}

bool FaultyWrapper::wait_any(std::span<const TicketId> tickets, Deadline deadline) {
  if (tickets.empty()) return false;
  MutexLock lock(mutex_);
  while (true) {
    const bool last = deadline.passed();
    for (const TicketId id : tickets) {
      FaultyTicket& ticket = at(id);
      advance(ticket);
      if (state_of(ticket) != TicketState::kPending) return true;
    }
    if (last) return false;
    changed_.wait_until(mutex_, deadline.earlier(Deadline::after(kTick)));
  }
}

void FaultyWrapper::cancel(TicketId id) {
  MutexLock lock(mutex_);
  FaultyTicket& ticket = at(id);
  advance(ticket);
  if (ticket.ended || ticket.cancelled) return;
  ticket.cancelled = true;
  if (ticket.inside) {
    inside_->cancel(*ticket.inside);
    advance(ticket);
  } else if (ticket.fault == Fault::kLateWrite) {
    ticket.due = std::chrono::steady_clock::now() + std::chrono::milliseconds(plan_.late_write_ms);
  } else {
    end(ticket, Error{ErrorCode::kCancelled, "read: cancelled by the caller"});
  }
  changed_.notify_all();
}

Result<void> FaultyWrapper::finish(TicketId id) {
  MutexLock lock(mutex_);
  FaultyTicket& ticket = at(id);
  advance(ticket);
  TRANSFUSE_CHECK(state_of(ticket) != TicketState::kPending);
  if (!ticket.ended) {
    ticket.abandoned = true;
    return Error{ErrorCode::kPoisoned, "read: cancelled, but its target may still be written"};
  }
  Result<void> outcome;
  if (ticket.cancelled) {
    outcome = Error{ErrorCode::kCancelled, "read: cancelled by the caller"};
  } else if (ticket.error) {
    outcome = std::move(*ticket.error);
  }
  tickets_.erase(id);
  return outcome;
}

TransportStats FaultyWrapper::stats() const {
  MutexLock lock(mutex_);
  TransportStats stats = inside_->stats();
  stats.tickets = 0;
  stats.poisoned_bytes = 0;
  for (const auto& [id, ticket] : tickets_) {
    if (!ticket.abandoned) ++stats.tickets;
    if (state_of(ticket) == TicketState::kPoisoned) stats.poisoned_bytes += ticket.size_bytes;
  }
  return stats;
}

// Delays and late writes happen whether anybody polls or not.
void FaultyWrapper::tick() {
  MutexLock lock(mutex_);
  while (!stopping_) {
    bool waiting = false;
    for (auto& [id, ticket] : tickets_) {
      advance(ticket);
      waiting = waiting || ticket.due || ticket.inside;
    }
    std::erase_if(tickets_,
                  [](const auto& entry) { return entry.second.abandoned && entry.second.ended; });
    if (waiting) {
      changed_.wait_until(mutex_, Deadline::after(kTick));
    } else {
      changed_.wait(mutex_);
    }
  }
}

}  // namespace

std::unique_ptr<FaultyTransport> make_faulty(std::unique_ptr<Transport> inside,
                                             const FaultPlan& plan) {
  return std::make_unique<FaultyWrapper>(std::move(inside), plan);
}

Result<std::unique_ptr<FaultyTransport>> open_faulty_local_transport(
    const FaultPlan& plan, const TransportOptions& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto inside, open_local_transport(options));
  return make_faulty(std::move(inside), plan);
}

}  // namespace transfuse

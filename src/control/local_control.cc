// Control over a lease table in this process: one mutex, one condition, every wait with a deadline.
#include "control/local_control.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr size_t kMaxEvents = 256;           // of one member, not yet taken
constexpr size_t kMaxPendingVersions = 256;  // of one watch, not yet taken

TimePoint clock_now() { return std::chrono::steady_clock::now(); }

// What a slow reader of versions has not seen: per version only its last state.
struct PendingVersions {
  std::string model;
  std::deque<VersionInfo> queue;

  void add(const VersionInfo& version) {
    if (!model.empty() && version.model != model) return;
    std::erase_if(queue, [&](const VersionInfo& other) {
      return other.version == version.version && other.model == version.model;
    });
    if (queue.size() >= kMaxPendingVersions) queue.pop_front();
    queue.push_back(version);
  }
};

}  // namespace

// Safe to call from any thread.
class LocalCoordinator::State {
 public:
  State(const ControlOptions& options, const TableLimits& limits)
      : options_(options), table_(limits) {}

  const ControlOptions& options() const { return options_; }

  uint64_t new_owner() {
    const MutexLock lock(mutex_);
    return ++last_owner_;
  }

  // Runs `call(table, now)` and passes on what it caused.
  template <typename Call>
  auto with_table(Call call) {
    const MutexLock lock(mutex_);
    const TimePoint now = advance();
    auto result = call(table_, now);
    deliver();
    return result;
  }

  // Runs `start(table, waiter, now)`, then waits for its reply, which comes by `deadline`.
  template <typename Reply, typename Start>
  Reply wait_for(Deadline deadline, Start start) {
    const MutexLock lock(mutex_);
    const WaiterId waiter{++last_waiter_};
    start(table_, waiter, advance());
    deliver();
    while (true) {
      if (const auto found = replies_.find(waiter); found != replies_.end()) {
        Reply reply = std::get<Reply>(std::move(found->second));
        replies_.erase(found);
        return reply;
      }
      condition_.wait_until(mutex_, deadline);
      advance();
      deliver();
    }
  }

  // Nothing at the deadline.
  std::optional<MemberEvent> next_event(uint64_t member, Deadline deadline) {
    const MutexLock lock(mutex_);
    while (true) {
      advance();
      deliver();
      const auto found = events_.find(member);
      if (found != events_.end() && !found->second.empty()) {
        MemberEvent event = std::move(found->second.front());
        found->second.pop_front();
        return event;
      }
      if (deadline.passed()) return std::nullopt;
      condition_.wait_until(mutex_, deadline);
    }
  }
  std::optional<VersionInfo> next_version(PendingVersions& watch, Deadline deadline) {
    const MutexLock lock(mutex_);
    while (true) {
      advance();
      deliver();
      if (!watch.queue.empty()) {
        VersionInfo version = std::move(watch.queue.front());
        watch.queue.pop_front();
        return version;
      }
      if (deadline.passed()) return std::nullopt;
      condition_.wait_until(mutex_, deadline);
    }
  }

  Result<uint64_t> join(const JoinRequest& request) {
    const MutexLock lock(mutex_);
    const TimePoint now = advance();
    TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t id, table_.join(request, now));
    members_[request.owner].insert(id);
    events_[id];
    deliver();
    return id;
  }
  Result<void> leave(uint64_t owner, uint64_t member) {
    const MutexLock lock(mutex_);
    const TimePoint now = advance();
    forget(owner, member);
    auto left = table_.leave(member, now);
    deliver();
    return left;
  }
  // Member and version of a lease that was granted and not released.
  std::optional<std::pair<uint64_t, uint64_t>> take_lease(LeaseId lease) {
    const MutexLock lock(mutex_);
    const auto found = leases_.find(lease);
    if (found == leases_.end()) return std::nullopt;
    const auto held = found->second;
    leases_.erase(found);
    return held;
  }
  bool owns(uint64_t owner, uint64_t member) {
    const MutexLock lock(mutex_);
    const auto found = members_.find(owner);
    return found != members_.end() && found->second.contains(member);
  }
  void close(uint64_t owner) {
    const MutexLock lock(mutex_);
    const TimePoint now = advance();
    const std::set<uint64_t> members = members_[owner];
    for (const uint64_t member : members) {
      table_.lose(member, kLeftWord, now);
      forget(owner, member);
    }
    members_.erase(owner);
    deliver();
  }
  bool lose(std::string_view model, MemberRole role, std::string_view name) {
    const MutexLock lock(mutex_);
    const TimePoint now = advance();
    for (const MemberInfo& each : table_.members(model)) {
      if (each.role != role || each.name != name) continue;
      table_.lose(each.id, "its process died", now);
      for (const auto& [owner, ids] : members_) {
        if (ids.contains(each.id)) {
          forget(owner, each.id);
          break;
        }
      }
      deliver();
      return true;
    }
    return false;
  }
  void add_watch(PendingVersions* watch) {
    const MutexLock lock(mutex_);
    advance();
    deliver();
    for (const VersionInfo& version : table_.versions(watch->model)) watch->add(version);
    watches_.insert(watch);
  }
  void remove_watch(PendingVersions* watch) {
    const MutexLock lock(mutex_);
    watches_.erase(watch);
  }
  TableStats stats() {
    const MutexLock lock(mutex_);
    return table_.stats();
  }

 private:
  // Members of this process are alive as long as their handle is.
  TimePoint advance() REQUIRES(mutex_) {
    const TimePoint now = clock_now();
    std::vector<uint64_t> members;
    for (const auto& [owner, ids] : members_) members.insert(members.end(), ids.begin(), ids.end());
    std::vector<LeaseId> leases;
    leases.reserve(leases_.size());
    for (const auto& [lease, held] : leases_) leases.push_back(lease);
    table_.beat(members, leases, now);
    table_.tick(now);
    return now;
  }

  void deliver() REQUIRES(mutex_) {
    for (Effect& effect : table_.take_effects()) {
      if (auto* changed = std::get_if<VersionChanged>(&effect)) {
        for (PendingVersions* watch : watches_) watch->add(changed->version);
      } else if (auto* notice = std::get_if<MemberNotice>(&effect)) {
        const auto found = events_.find(notice->member);
        if (found == events_.end()) continue;
        if (found->second.size() >= kMaxEvents) found->second.pop_front();
        found->second.push_back(std::move(notice->event));
      } else if (auto* lease = std::get_if<LeaseReply>(&effect)) {
        if (lease->result) leases_[lease->result->id] = {lease->target, lease->result->version};
        replies_.emplace(lease->waiter, std::move(effect));
      } else if (auto* drain = std::get_if<DrainReply>(&effect)) {
        replies_.emplace(drain->waiter, std::move(effect));
      } else if (auto* table = std::get_if<TableReply>(&effect)) {
        replies_.emplace(table->waiter, std::move(effect));
      } else if (auto* decision = std::get_if<DecisionReply>(&effect)) {
        replies_.emplace(decision->waiter, std::move(effect));
      } else if (auto* applied = std::get_if<AppliedReply>(&effect)) {
        replies_.emplace(applied->waiter, std::move(effect));
      }
      condition_.notify_all();
    }
  }

  void forget(uint64_t owner, uint64_t member) REQUIRES(mutex_) {
    members_.at(owner).erase(member);
    events_.erase(member);
    std::erase_if(leases_, [&](const auto& lease) { return lease.second.first == member; });
  }

  const ControlOptions options_;
  Mutex mutex_;
  CondVar condition_;
  LeaseTable table_ GUARDED_BY(mutex_);
  std::map<uint64_t, std::set<uint64_t>> members_ GUARDED_BY(mutex_);  // by handle
  std::map<uint64_t, std::deque<MemberEvent>> events_ GUARDED_BY(mutex_);
  std::map<LeaseId, std::pair<uint64_t, uint64_t>> leases_ GUARDED_BY(mutex_);  // member, version
  std::map<WaiterId, Effect> replies_ GUARDED_BY(mutex_);  // until the caller wakes up
  std::set<PendingVersions*> watches_ GUARDED_BY(mutex_);
  uint64_t last_waiter_ GUARDED_BY(mutex_) = 0;
  uint64_t last_owner_ GUARDED_BY(mutex_) = 0;
};

namespace {

using State = LocalCoordinator::State;

class LocalWatch final : public Watch {
 public:
  LocalWatch(std::shared_ptr<State> state, std::string_view model)
      : state_(std::move(state)), owner_pid_(getpid()) {
    pending_.model = model;
    state_->add_watch(&pending_);
  }
  ~LocalWatch() override {
    if (getpid() == owner_pid_) state_->remove_watch(&pending_);
  }
  Result<std::optional<VersionInfo>> next(Deadline deadline) override {
    if (getpid() != owner_pid_) {
      return Error{ErrorCode::kUnavailable, "this watch belongs to the parent process"};
    }
    return state_->next_version(pending_, deadline);
  }

 private:
  std::shared_ptr<State> state_;  // shared: a watch may outlive its handle
  const pid_t owner_pid_;
  PendingVersions pending_;  // guarded by the mutex of the state
};

// Safe to call from any thread.
class LocalControl final : public Control {
 public:
  explicit LocalControl(std::shared_ptr<State> state)
      : state_(std::move(state)), owner_(state_->new_owner()), owner_pid_(getpid()) {}
  ~LocalControl() override {
    if (getpid() == owner_pid_) {
      state_->close(owner_);
    } else {
      // The mutex may have been held by another thread at the fork: nothing here may be touched.
      new std::shared_ptr<State>(std::move(state_));
    }
  }

  Result<void> put_layout(const Layout& layout) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    std::string bytes = encode(layout);
    return state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.layouts().put(layout.digest(), std::move(bytes), now);
    });
  }

  Result<Layout> get_layout(const Digest& digest, Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    TRANSFUSE_ASSIGN_OR_RETURN(const auto bytes,
                               state_->with_table([&](LeaseTable& table, TimePoint /*now*/) {
                                 return table.layouts().get(digest);
                               }));
    return decode_layout(std::as_bytes(std::span(bytes->data(), bytes->size())));
  }

  Result<MemberId> join(const Registration& registration) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    const JoinRequest request{
        .registration = registration,
        .owner = owner_,
        .ttl = std::chrono::milliseconds(state_->options().member_ttl_ms),
        .lease_ttl = std::chrono::milliseconds(state_->options().lease_ttl_ms),
        .resume = std::nullopt};
    TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t id, state_->join(request));
    return MemberId{id};
  }

  Result<void> leave(MemberId member) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(member));
    return state_->leave(owner_, static_cast<uint64_t>(member));
  }

  Result<std::string> describe(uint64_t member, uint64_t incarnation,
                               Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    TRANSFUSE_ASSIGN_OR_RETURN(const auto descriptor,
                               state_->with_table([&](LeaseTable& table, TimePoint /*now*/) {
                                 return table.describe(member, incarnation);
                               }));
    return std::string(*descriptor);
  }

  Result<std::vector<MemberInfo>> members(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return state_->with_table(
        [&](LeaseTable& table, TimePoint /*now*/) { return table.members(model); });
  }

  Result<std::vector<VersionInfo>> versions(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return state_->with_table(
        [&](LeaseTable& table, TimePoint /*now*/) { return table.versions(model); });
  }

  Result<std::vector<VersionEvent>> history(std::string_view model, uint64_t version) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return state_->with_table(
        [&](LeaseTable& table, TimePoint /*now*/) { return table.history(model, version); });
  }

  Result<std::vector<GroupInfo>> groups(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return state_->with_table(
        [&](LeaseTable& table, TimePoint /*now*/) { return table.groups(model); });
  }

  Result<DrainOutcome> begin_write(MemberId source, const WriteRequest& request,
                                   Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(source));
    return state_
        ->wait_for<DrainReply>(deadline,
                               [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                                 table.begin_write(waiter, static_cast<uint64_t>(source), request,
                                                   deadline.at(), now);
                               })
        .result;
  }

  Result<void> publish(MemberId source, const Offer& offer) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(source));
    return state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.publish(static_cast<uint64_t>(source), offer, now);
    });
  }

  Result<void> abort_version(MemberId source, uint64_t version, std::string_view reason) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(source));
    return state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.abort_version(static_cast<uint64_t>(source), version, reason, now);
    });
  }

  Result<Lease> acquire(MemberId target, const VersionRequest& request,
                        Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(target));
    return state_
        ->wait_for<LeaseReply>(deadline,
                               [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                                 table.acquire(waiter, static_cast<uint64_t>(target), request,
                                               deadline.at(), now);
                               })
        .result;
  }

  Result<void> release(LeaseId lease, const LeaseOutcome& outcome, Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    const auto held = state_->take_lease(lease);
    if (!held) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("lease {:x} was released before, or never granted to this handle",
                               static_cast<uint64_t>(lease))};
    }
    auto released = state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.release(held->first, lease, held->second, outcome, now);
    });
    // Revoked in the meantime: the member was told by an event, and the generation of the source
    // says whether what was read is whole.
    if (!released && released.error().code == ErrorCode::kNotFound) return {};
    return released;
  }

  Result<void> hold(MemberId target, uint64_t version, Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(target));
    return state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.hold(static_cast<uint64_t>(target), version, now);
    });
  }

  Result<void> vote(MemberId target, uint64_t round, bool ready, std::string_view reason,
                    Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(target));
    return state_->with_table([&](LeaseTable& table, TimePoint now) {
      return table.vote(static_cast<uint64_t>(target), round, ready, reason, now);
    });
  }

  Result<Decision> decision(MemberId target, uint64_t round, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(target));
    return state_
        ->wait_for<DecisionReply>(deadline,
                                  [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                                    table.decision(waiter, static_cast<uint64_t>(target), round,
                                                   deadline.at(), now);
                                  })
        .result;
  }

  Result<void> applied(MemberId target, uint64_t round, uint64_t version,
                       Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(target));
    return state_
        ->wait_for<AppliedReply>(deadline,
                                 [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                                   table.applied(waiter, static_cast<uint64_t>(target), round,
                                                 version, deadline.at(), now);
                                 })
        .result;
  }

  Result<std::unique_ptr<Watch>> watch(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return std::unique_ptr<Watch>(std::make_unique<LocalWatch>(state_, model));
  }

  Result<void> request_table(MemberId from, uint64_t holder, const TableRequest& request,
                             Deadline /*deadline*/) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(from));
    return state_->with_table([&](LeaseTable& table, TimePoint /*now*/) {
      return table.request_table(static_cast<uint64_t>(from), holder, request);
    });
  }

  Result<void> put_table(MemberId holder, const Digest& plan_key,
                         std::string_view descriptor) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(holder));
    return state_->with_table([&](LeaseTable& table, TimePoint /*now*/) {
      return table.put_table(static_cast<uint64_t>(holder), plan_key, descriptor);
    });
  }

  Result<std::string> get_table(uint64_t holder, const Digest& plan_key,
                                Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    return state_
        ->wait_for<TableReply>(deadline,
                               [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                                 table.get_table(waiter, holder, plan_key, deadline.at(), now);
                               })
        .result;
  }

  Result<std::optional<MemberEvent>> next_event(MemberId member, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_member(member));
    return state_->next_event(static_cast<uint64_t>(member), deadline);
  }

 private:
  Result<void> check_process() const {
    if (getpid() == owner_pid_) return {};
    return Error{ErrorCode::kUnavailable,
                 fmt::format("this control handle was opened by process {}; a forked child must "
                             "open its own",
                             owner_pid_)};
  }
  Result<void> check_member(MemberId member) const {
    TRANSFUSE_RETURN_IF_ERROR(check_process());
    if (state_->owns(owner_, static_cast<uint64_t>(member))) return {};
    return Error{ErrorCode::kNotFound,
                 fmt::format("{:x} is not a live member of this control handle",
                             static_cast<uint64_t>(member))};
  }

  std::shared_ptr<State> state_;  // shared by the handles of one coordinator
  const uint64_t owner_;
  const pid_t owner_pid_;
};

}  // namespace

LocalCoordinator::LocalCoordinator(const ControlOptions& options, const TableLimits& limits)
    : state_(std::make_shared<State>(options, limits)) {}

LocalCoordinator::~LocalCoordinator() = default;

std::unique_ptr<Control> LocalCoordinator::connect() {
  return std::make_unique<LocalControl>(state_);
}

bool LocalCoordinator::lose(std::string_view model, MemberRole role, std::string_view name) {
  return state_->lose(model, role, name);
}

TableStats LocalCoordinator::stats() const { return state_->stats(); }

std::unique_ptr<Control> open_local_control(const ControlOptions& options) {
  return LocalCoordinator(options).connect();
}

}  // namespace transfuse

// Calls that wait, their deadlines, and fingerprint tables that are asked for and announced.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr size_t kMaxTableSources = 65536;

}  // namespace

void LeaseTable::add_waiter(uint64_t id, Waiter waiter) {
  TRANSFUSE_CHECK(!waiters_.contains(id));
  timers_.emplace(waiter.deadline, TimerKind::kWaiter, id);
  members_.at(waiter.member).waiters.insert(id);
  waiters_.emplace(id, std::move(waiter));
}

// Out of every index that names it.
void LeaseTable::remove_waiter(uint64_t id) {
  const auto found = waiters_.find(id);
  const Waiter& waiter = found->second;
  timers_.erase({waiter.deadline, TimerKind::kWaiter, id});
  Member& member = members_.at(waiter.member);
  member.waiters.erase(id);
  Model& model = models_.find(member.registration.model)->second;
  switch (waiter.kind) {
    case WaiterKind::kDrain: {
      if (member.drain == id) member.drain.reset();
      const auto version = model.versions.find(waiter.drained);
      if (version == model.versions.end()) break;
      version->second.drains.erase(id);
      if (version->second.drains.empty()) version->second.closing = false;
      break;
    }
    case WaiterKind::kLease:
      model.waiters.erase(id);
      break;
    case WaiterKind::kTable:
      if (const auto table = member.tables.find(waiter.plan_key); table != member.tables.end()) {
        table->second.waiters.erase(id);
      }
      break;
    case WaiterKind::kDecision:
    case WaiterKind::kApplied:
      if (Group* const group = group_of(member)) group->waiters.erase(id);
      break;
  }
  waiters_.erase(found);
}

void LeaseTable::fail_waiter(uint64_t id, const Error& error) {
  const WaiterKind kind = waiters_.at(id).kind;
  remove_waiter(id);
  switch (kind) {
    case WaiterKind::kDrain:
      effects_.emplace_back(DrainReply{WaiterId{id}, error});
      break;
    case WaiterKind::kLease:
      effects_.emplace_back(LeaseReply{.waiter = WaiterId{id}, .result = error});
      break;
    case WaiterKind::kTable:
      effects_.emplace_back(TableReply{WaiterId{id}, error});
      break;
    case WaiterKind::kDecision:
      effects_.emplace_back(DecisionReply{WaiterId{id}, error});
      break;
    case WaiterKind::kApplied:
      effects_.emplace_back(AppliedReply{WaiterId{id}, error});
      break;
  }
}

void LeaseTable::expire_waiter(uint64_t id, TimePoint now) {
  const Waiter waiter = waiters_.at(id);
  const Member& member = members_.at(waiter.member);
  const Registration& registration = member.registration;
  const auto waited_ms = (now - waiter.started) / std::chrono::milliseconds(1);
  switch (waiter.kind) {
    case WaiterKind::kDrain:
      if (waiter.when_leased == WhenLeased::kWait) {
        const std::string model = registration.model;
        fail_waiter(id, Error{ErrorCode::kDeadlineExceeded,
                              fmt::format("source {} waited {} ms to write version {}: readers "
                                          "hold every version that it could replace, the oldest is "
                                          "{}",
                                          registration.name, waited_ms, waiter.request.version,
                                          waiter.drained)});
        serve_waiters(model, now);  // it is open to readers again
        break;
      }
      finish_version(registration.model, waiter.drained, VersionState::kRetired,
                     fmt::format("source {} writes version {}; readers were revoked after {} ms",
                                 registration.name, waiter.request.version, waited_ms),
                     now);
      TRANSFUSE_CHECK(!waiters_.contains(id));  // finishing a version ends the waits for its drain
      break;
    case WaiterKind::kLease: {
      const auto model = models_.find(registration.model);
      if (const auto unfit = none_fits(model->first, model->second, waiter.request)) {
        fail_waiter(id, Error{unfit->code, fmt::format("{} waited {} ms: {}", registration.name,
                                                       waited_ms, unfit->message)});
        break;
      }
      fail_waiter(
          id,
          Error{ErrorCode::kDeadlineExceeded,
                fmt::format("{} waited {} ms: {}", registration.name, waited_ms,
                            who_is_missing(model->first, model->second, member, waiter.request))});
      break;
    }
    case WaiterKind::kTable:
      fail_waiter(id,
                  Error{ErrorCode::kDeadlineExceeded,
                        fmt::format("{} has not announced the fingerprint table of plan {} "
                                    "after {} ms",
                                    registration.name, waiter.plan_key.to_string(), waited_ms)});
      break;
    case WaiterKind::kDecision:
      fail_waiter(
          id, Error{ErrorCode::kDeadlineExceeded,
                    fmt::format("{} waited {} ms for the decision of round {:x} of group "
                                "{}: it is not known yet",
                                registration.name, waited_ms, waiter.round, registration.group)});
      break;
    case WaiterKind::kApplied:
      fail_waiter(id, Error{ErrorCode::kDeadlineExceeded,
                            fmt::format("{} holds version {}, but after {} ms {}",
                                        registration.name, waiter.request.version, waited_ms,
                                        who_holds_not(*group_of(members_.at(waiter.member)),
                                                      waiter.request.version))});
      break;
  }
}

void LeaseTable::cancel(WaiterId waiter, TimePoint now) {
  const auto id = static_cast<uint64_t>(waiter);
  const auto found = waiters_.find(id);
  if (found == waiters_.end()) return;
  const std::string model = members_.at(found->second.member).registration.model;
  remove_waiter(id);
  serve_waiters(model, now);  // a version that was closing may be open to readers again
}

// -- fingerprint tables --

Result<void> LeaseTable::request_table(uint64_t from, uint64_t holder,
                                       const TableRequest& request) {
  const auto asking = members_.find(from);
  if (asking == members_.end()) return no_member(from);
  const auto found = members_.find(holder);
  if (found == members_.end()) {
    return Error{ErrorCode::kUnavailable,
                 fmt::format("{} asks for a fingerprint table of member {:x}, which is gone",
                             asking->second.registration.name, holder)};
  }
  if (request.sources.size() > kMaxTableSources) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a fingerprint table of {} sources was asked for, at most {} are "
                             "possible",
                             request.sources.size(), kMaxTableSources)};
  }
  Member& member = found->second;
  const bool known = member.tables.contains(request.plan_key);
  if (!known && member.tables.size() >= limits_.tables_per_member) evict_table(member);
  FingerprintTable& table = member.tables[request.plan_key];
  table.last_used = ++table_uses_;
  table.requesters.insert(from);
  asking->second.requested.emplace(holder, request.plan_key);
  table.request = request;
  // Told every time: a holder forgets tables that nobody asks for again.
  effects_.emplace_back(MemberNotice{
      .member = holder,
      .owner = member.owner,
      .event = {.kind = MemberEvent::Kind::kTableRequest, .table = request, .epoch = 0}});
  return {};
}

Result<void> LeaseTable::put_table(uint64_t holder, const Digest& plan_key,
                                   std::string_view descriptor) {
  const auto found = members_.find(holder);
  if (found == members_.end()) return no_member(holder);
  Member& member = found->second;
  if (descriptor.size() > limits_.table_descriptor_bytes) {
    return Error{
        ErrorCode::kResourceExhausted,
        fmt::format("the table descriptor of {} has {} bytes, at most {} are accepted",
                    member.registration.name, descriptor.size(), limits_.table_descriptor_bytes)};
  }
  if (!member.tables.contains(plan_key) && member.tables.size() >= limits_.tables_per_member) {
    evict_table(member);
  }
  FingerprintTable& table = member.tables[plan_key];
  table.last_used = ++table_uses_;
  table.request.plan_key = plan_key;
  table.descriptor = descriptor;
  const std::set<uint64_t> waiting = table.waiters;
  for (const uint64_t waiter : waiting) {
    remove_waiter(waiter);
    effects_.emplace_back(TableReply{WaiterId{waiter}, std::string(descriptor)});
  }
  return {};
}

void LeaseTable::get_table(WaiterId waiter, uint64_t holder, const Digest& plan_key,
                           TimePoint deadline, TimePoint now) {
  const auto refuse = [&](Error error) {
    effects_.emplace_back(TableReply{waiter, std::move(error)});
  };
  const auto found = members_.find(holder);
  if (found == members_.end()) {
    return refuse(
        Error{ErrorCode::kUnavailable,
              fmt::format("member {:x}, whose fingerprint table is wanted, is gone", holder)});
  }
  Member& member = found->second;
  const auto table = member.tables.find(plan_key);
  if (table == member.tables.end()) {
    return refuse(Error{ErrorCode::kNotFound,
                        fmt::format("{} was not asked for a fingerprint table of plan {}",
                                    member.registration.name, plan_key.to_string())});
  }
  table->second.last_used = ++table_uses_;
  if (table->second.descriptor) {
    effects_.emplace_back(TableReply{waiter, *table->second.descriptor});
    return;
  }
  if (waiters_.size() >= limits_.waiters) {
    return refuse(Error{ErrorCode::kResourceExhausted,
                        fmt::format("{} calls wait at the coordinator already", waiters_.size())});
  }
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kTable,
                        .member = holder,
                        .started = now,
                        .deadline = deadline,
                        .plan_key = plan_key});
  table->second.waiters.insert(id);
}

void LeaseTable::repeat_requests(uint64_t owner) {
  const auto owned = owners_.find(owner);
  if (owned == owners_.end()) return;
  for (const uint64_t id : owned->second) {
    for (const auto& [plan, table] : members_.at(id).tables) {
      if (table.descriptor) continue;
      effects_.emplace_back(MemberNotice{
          .member = id,
          .owner = owner,
          .event = {.kind = MemberEvent::Kind::kTableRequest, .table = table.request, .epoch = 0}});
    }
  }
}

// A table that nobody asks for any more is forgotten.
void LeaseTable::forget_requests(Member& requester) {
  for (const auto& [holder, plan] : std::exchange(requester.requested, {})) {
    const auto found = members_.find(holder);
    if (found == members_.end()) continue;
    const auto table = found->second.tables.find(plan);
    if (table == found->second.tables.end()) continue;
    table->second.requesters.erase(requester.id);
    if (table->second.requesters.empty() && table->second.waiters.empty()) {
      found->second.tables.erase(table);
    }
  }
}

// The one that was used longest ago makes room; who waits for it is told.
void LeaseTable::evict_table(Member& holder) {
  const auto oldest = std::min_element(
      holder.tables.begin(), holder.tables.end(),
      [](const auto& a, const auto& b) { return a.second.last_used < b.second.last_used; });
  const Digest plan = oldest->first;
  const std::set<uint64_t> waiting = oldest->second.waiters;
  for (const uint64_t waiter : waiting) {
    fail_waiter(waiter, Error{ErrorCode::kResourceExhausted,
                              fmt::format("{} keeps at most {} fingerprint tables, that of plan {} "
                                          "was the oldest",
                                          holder.registration.name, limits_.tables_per_member,
                                          plan.to_string())});
  }
  for (const uint64_t requester : oldest->second.requesters) {
    if (const auto other = members_.find(requester); other != members_.end()) {
      other->second.requested.erase({holder.id, plan});
    }
  }
  holder.tables.erase(plan);
}

}  // namespace transfuse

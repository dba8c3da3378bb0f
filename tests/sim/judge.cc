// The model of members, versions and leases.
#include "sim/judge.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "sim/facts.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

constexpr int kBeatsWithoutLease = 3;

bool fits(const VersionRequest& wanted, uint64_t version) {
  switch (wanted.kind) {
    case VersionRequest::Kind::kNewest:
      return true;
    case VersionRequest::Kind::kExactly:
      return version == wanted.version;
    case VersionRequest::Kind::kAtLeast:
      return version >= wanted.version;
  }
  return false;
}

}  // namespace

// -- members --

void Judge::coordinator_died(TimePoint now) {
  members_.clear();
  leases_.clear();
  waiters_.clear();
  versions_.clear();
  skipped_.clear();
  states_.clear();
  recounted_ = false;
  for (auto& [id, round] : rounds_) {
    round.recorded.reset();
    round.deadline = now + std::chrono::minutes(1);  // its ranks come back when they can
  }
}

void Judge::joined(uint64_t id, const JoinRequest& request, TimePoint now) {
  upheaval_ = true;
  const Registration& wanted = request.registration;
  std::vector<uint64_t> replaced;
  for (const auto& [other, member] : members_) {
    const bool same_name =
        member.registration.role == wanted.role && member.registration.name == wanted.name;
    if (!same_name || other == id) continue;
    expect(member.suspect, "two live members have one name");
    replaced.push_back(other);
  }
  for (const uint64_t other : replaced) remove(other);
  const auto [at, inserted] = members_.try_emplace(id);
  Member& member = at->second;
  member.owner = request.owner;
  member.expires = now + request.ttl;
  member.suspect = false;
  if (!inserted) return;  // the same process again: nothing of it has ended
  member.registration = wanted;
  if (wanted.role == MemberRole::kSource) {
    skipped_.clear();
    recounted_ = recounted_ || !versions_.empty();
  }
  if (!request.resume) return;
  member.resumed = true;
  member.landed = request.resume->landed;
  for (const Offer& offer : request.resume->offers) member.offers[offer.version] = offer;
}

void Judge::left(uint64_t id) { remove(id); }

void Judge::remove(uint64_t id) {
  upheaval_ = true;
  members_.erase(id);
  std::erase_if(leases_, [&](const auto& lease) { return lease.second.holder == id; });
}

void Judge::beat(std::span<const uint64_t> members, std::span<const LeaseId> leases,
                 TimePoint now) {
  for (const uint64_t id : members) {
    const auto found = members_.find(id);
    if (found == members_.end()) continue;
    found->second.expires = now + kTtl;
    found->second.suspect = false;
    std::vector<uint64_t> orphans;
    for (auto& [lease, held] : leases_) {
      if (held.holder != id) continue;
      if (std::find(leases.begin(), leases.end(), LeaseId{lease}) != leases.end()) {
        held.renewed = now;
        held.beats_without = 0;
      } else if (++held.beats_without > kBeatsWithoutLease) {
        orphans.push_back(lease);
      }
    }
    for (const uint64_t lease : orphans) leases_.erase(lease);
  }
}

void Judge::suspected(uint64_t owner, TimePoint now) {
  for (auto& [id, member] : members_) {
    if (member.owner != owner) continue;
    member.suspect = true;
    member.expires = std::min(member.expires, now + kGrace);
  }
}

void Judge::before_tick(TimePoint now) {
  for (const auto& [id, member] : members_) {
    if (member.expires <= now) dying_.insert(id);
  }
  for (const auto& [id, lease] : leases_) {
    if (lease.renewed + kLeaseTtl <= now || dying_.contains(lease.holder)) ending_.insert(id);
  }
  if (!dying_.empty()) upheaval_ = true;
}

void Judge::after_tick(TimePoint now) {
  for (const uint64_t id : std::exchange(dying_, {})) remove(id);
  for (const uint64_t id : std::exchange(ending_, {})) leases_.erase(id);
  for (const auto& [id, waiter] : waiters_) {
    expect(waiter.deadline > now, "I11: a wait outlived its deadline");
  }
}

// -- sources --

bool Judge::ready(uint64_t version) const {
  const auto found = versions_.find(version);
  return found != versions_.end() && found->second == VersionState::kReady;
}

bool Judge::read(uint64_t version) const {
  return std::any_of(leases_.begin(), leases_.end(),
                     [&](const auto& lease) { return lease.second.version == version; });
}

// All that have ended; else the oldest that nobody reads, or another one if a group may wait for
// that; else the oldest.
std::set<uint64_t> Judge::choose_replaced(const Member& source, const WriteRequest& request) const {
  std::set<uint64_t> ended;
  std::set<uint64_t> unread;
  for (const uint64_t number : request.replaces) {
    const auto state = versions_.find(number);
    const bool live =
        source.offers.contains(number) && state != versions_.end() &&
        (state->second == VersionState::kReady || state->second == VersionState::kOpen);
    if (!live) {
      ended.insert(number);
    } else if (!read(number)) {
      unread.insert(number);
    }
  }
  if (!ended.empty()) return ended;
  const bool awaited = std::any_of(rounds_.begin(), rounds_.end(), [&](const auto& round) {
    return !round.second.recorded && unread.contains(round.second.version);
  });
  if (awaited) return unread;
  if (!unread.empty()) return {*unread.begin()};
  if (request.replaces.empty()) return {0};
  return {*std::min_element(request.replaces.begin(), request.replaces.end())};
}

void Judge::begin_write(WaiterId waiter, uint64_t source, const WriteRequest& request,
                        TimePoint deadline, TimePoint now) {
  Waiter added{.kind = Kind::kDrain, .member = source, .deadline = deadline, .write = request};
  const auto found = members_.find(source);
  if (found != members_.end() && !found->second.resumed) {
    added.may_replace = choose_replaced(found->second, request);
    const uint64_t oldest = *added.may_replace.begin();
    const bool possible = request.version > 0 && deadline > now;
    if (added.may_replace.size() == 1 && possible && ready(oldest) && read(oldest)) {
      added.drains = oldest;
    }
  } else {
    added.may_replace.insert(request.replaces.begin(), request.replaces.end());
    if (request.replaces.empty()) added.may_replace.insert(0);
  }
  waiters_[static_cast<uint64_t>(waiter)] = std::move(added);
}

void Judge::published(uint64_t source, const Offer& offer) {
  const auto found = members_.find(source);
  expect(found != members_.end(), "a publish() of nobody was accepted");
  if (found == members_.end()) return;
  expect(!skipped_.contains(offer.version), "a skipped version was published");
  const auto state = versions_.find(offer.version);
  // One that came back may say again what it had published.
  const bool again = found->second.resumed && ready(offer.version);
  expect(again || (state != versions_.end() && state->second == VersionState::kOpen),
         "a version was published that is not OPEN");
  found->second.offers[offer.version] = offer;
}

void Judge::see_drain(const DrainReply& reply, TimePoint now) {
  const auto waiter = answered(reply.waiter);
  if (!waiter) return;
  const uint64_t wanted = waiter->write.version;
  if (waiter->deadline <= now) due_at_ = now;
  if (!reply.result) {
    const ErrorCode code = reply.result.error().code;
    if (code == ErrorCode::kDeadlineExceeded) {
      ++counts_.waited_in_vain;
      expect(waiter->write.when_leased == WhenLeased::kWait, "I11: only kWait waits in vain");
      expect(waiter->drains == 0 || !ready(waiter->drains) || read(waiter->drains),
             "begin_write() waited in vain for no reader");
    }
    const bool skips = waiter->write.when_leased == WhenLeased::kSkip &&
                       code == ErrorCode::kVersionGone &&
                       reply.result.error().message.find("is skipped") != std::string::npos;
    if (skips) {
      ++counts_.skipped;
      skipped_.insert(wanted);
      const auto state = versions_.find(wanted);
      expect(state != versions_.end() && state->second == VersionState::kAborted,
             "a skipped version is not ABORTED");
      expect(waiter->drains != 0 || members_.at(waiter->member).resumed,
             "a version was skipped though there was room");
    }
    return;
  }
  const uint64_t replaced = reply.result->replaced;
  if (const auto source = members_.find(waiter->member); source != members_.end()) {
    source->second.offers.erase(replaced);
  }
  expect(waiter->may_replace.contains(replaced), "begin_write() replaced another version");
  expect(replaced == 0 || !ready(replaced), "what begin_write() replaced is still READY");
  for (const auto& [id, lease] : leases_) {
    expect(lease.version != replaced || ending_.contains(id),
           "I8: begin_write() came back while a lease is alive");
  }
  counts_.revoked += reply.result->revoked;
  if (reply.result->revoked == 0 || upheaval_) return;
  const auto may_revoke = [&](const Waiter& drain) {
    return drain.kind == Kind::kDrain &&
           (drain.deadline <= now || drain.write.when_leased == WhenLeased::kRevoke);
  };
  const bool due = may_revoke(*waiter) ||
                   std::any_of(waiters_.begin(), waiters_.end(),
                               [&](const auto& other) { return may_revoke(other.second); });
  expect(due || due_at_ == now, "readers were revoked before any deadline");
  if (due) due_at_ = now;
}

void Judge::see_change(const VersionInfo& version) {
  const uint64_t number = version.version;
  const auto before = versions_.find(number);
  const bool open = before != versions_.end() && before->second == VersionState::kOpen;
  switch (version.state) {
    case VersionState::kOpen:
      expect(!ready(number), "READY became OPEN");
      break;
    case VersionState::kReady: {
      expect(open, "READY without OPEN");
      expect(!skipped_.contains(number), "a skipped version is READY");
      uint32_t count = 0;
      for (const auto& [id, member] : members_) {
        count += member.offers.contains(number) ? 1u : 0u;
      }
      expect(count >= version.source_count, "READY before all sources had published");
      break;
    }
    case VersionState::kRetired:
    case VersionState::kAborted:
      expect(!version.reason.empty(), "I10: a version ended without a reason");
      std::erase_if(leases_, [&](const auto& lease) {
        if (lease.second.version != number) return false;
        ++(ending_.contains(lease.first) ? tolerated_ : owed_);
        return true;
      });
      break;
  }
  versions_[number] = version.state;
}

// -- targets --

void Judge::acquire(WaiterId waiter, uint64_t target, const VersionRequest& request,
                    TimePoint deadline) {
  waiters_[static_cast<uint64_t>(waiter)] = {
      .kind = Kind::kLease, .member = target, .deadline = deadline, .wanted = request};
}

void Judge::released(uint64_t target, LeaseId lease, uint64_t version, const LeaseOutcome& outcome,
                     bool accepted) {
  const auto member = members_.find(target);
  if (member == members_.end()) return expect(!accepted, "a release() of nobody was accepted");
  if (outcome.end == LeaseEnd::kLanded) member->second.landed = version;
  if (outcome.end == LeaseEnd::kLost) member->second.landed = 0;
  const auto held = leases_.find(static_cast<uint64_t>(lease));
  const bool holds = held != leases_.end() && held->second.holder == target;
  expect(holds == accepted, "I4: release() did not go by who holds the lease");
  if (holds) leases_.erase(held);
}

void Judge::held(uint64_t target, uint64_t version) {
  if (const auto member = members_.find(target); member != members_.end()) {
    member->second.landed = version;
  }
}

void Judge::see_lease(const LeaseReply& reply, TimePoint now) {
  const auto waiter = answered(reply.waiter);
  if (!waiter || !reply.result) return;
  const Lease& lease = *reply.result;
  const auto target = members_.find(waiter->member);
  expect(target != members_.end(), "a lease for nobody");
  if (target == members_.end()) return;
  expect(ready(lease.version), "I8: a lease on a version that is not READY");
  expect(fits(waiter->wanted, lease.version), "a lease on another version than was asked for");
  expect(!lease.sources.empty(), "a lease without a source");
  for (const MemberInfo& source : lease.sources) {
    const auto found = members_.find(source.id);
    expect(found != members_.end(), "a lease names a source that is gone");
    if (found == members_.end()) continue;
    const auto offer = found->second.offers.find(lease.version);
    expect(offer != found->second.offers.end() && offer->second.generation == source.generation &&
               offer->second.slot == source.slot,
           "I8: a lease names another offer than was published");
  }
  const bool opened = rounds_.contains(lease.round);  // then it may finish what others began
  for (const auto& [id, other] : waiters_) {
    const bool waits = other.kind == Kind::kDrain && other.write.when_leased != WhenLeased::kSkip;
    expect(!waits || other.drains != lease.version || opened,
           "a new lease on a version that is drained");
  }
  if (lease.round != 0) see_round(*waiter, target->second, lease, now);
  leases_[static_cast<uint64_t>(lease.id)] = {
      .holder = waiter->member, .version = lease.version, .renewed = now};
}

// -- waits --

void Judge::cancelled(WaiterId waiter) { waiters_.erase(static_cast<uint64_t>(waiter)); }

std::optional<Judge::Waiter> Judge::answered(WaiterId id) {
  const auto found = waiters_.find(static_cast<uint64_t>(id));
  expect(found != waiters_.end(), "I4: a second answer, or one to nobody");
  if (found == waiters_.end()) return std::nullopt;
  Waiter waiter = std::move(found->second);
  waiters_.erase(found);
  return waiter;
}

void Judge::effect(const Effect& effect, TimePoint now) {
  if (const auto* changed = std::get_if<VersionChanged>(&effect)) {
    see_change(changed->version);
  } else if (const auto* lease = std::get_if<LeaseReply>(&effect)) {
    see_lease(*lease, now);
  } else if (const auto* drain = std::get_if<DrainReply>(&effect)) {
    see_drain(*drain, now);
  } else if (const auto* decision = std::get_if<DecisionReply>(&effect)) {
    see_decision(*decision);
  } else if (const auto* applied = std::get_if<AppliedReply>(&effect)) {
    see_applied(*applied);
  } else if (const auto* notice = std::get_if<MemberNotice>(&effect)) {
    if (notice->event.kind == MemberEvent::Kind::kRevoked) ++notices_;
  }
}

void Judge::check(const LeaseTable& table, TimePoint now) {
  expect(notices_ >= owed_ && notices_ <= owed_ + tolerated_,
         "I8: a version ended and a reader of it was not told");
  notices_ = owed_ = tolerated_ = 0;
  upheaval_ = false;
  for (const auto& [id, waiter] : waiters_) {
    expect(members_.contains(waiter.member), "I4: a wait outlived its member");
    expect(waiter.deadline + kLate >= now, "I11: a wait is long overdue");
  }
  for (const auto& [id, member] : members_) {
    expect(table.is_member(id), "a live member is missing");
    expect(member.expires + kLate >= now, "I11: a silent member is long overdue");
  }
  const TableStats stats = table.stats();
  expect(stats.members == members_.size(), "a member that should be dead");
  expect(stats.leases == leases_.size(), "I4: leases are miscounted");
  expect(stats.waiters == waiters_.size(), "I4: waits are miscounted");
  check_versions(table);
  check_groups(table, now);
}

void Judge::check_versions(const LeaseTable& table) {
  std::map<uint64_t, uint32_t> counted;
  for (const auto& [id, lease] : leases_) ++counted[lease.version];
  size_t finished = 0;
  for (const VersionInfo& version : table.versions("")) {
    const auto told = versions_.find(version.version);
    expect(told != versions_.end() && told->second == version.state,
           "a change of a version was not told");
    const bool ready = version.state == VersionState::kReady;
    expect(ready || version.leases == 0, "I8: a version that is not READY has leases");
    const auto count = counted.find(version.version);
    expect(version.leases == (count == counted.end() ? 0 : count->second),
           "I4: the leases of a version are miscounted");
    if (!ready && version.state != VersionState::kOpen) ++finished;
  }
  expect(finished <= limits_.finished_versions, "I3: too many finished versions are remembered");
}

// -- facts --

void Judge::wrote(uint64_t incarnation, uint64_t version, const Stamp& stamp) {
  truth_[{incarnation, version}] = stamp;
}

void Judge::refit_succeeded(const Lease& lease, const std::map<uint64_t, Chunks>& read) {
  expect(!read.empty(), "I8: a refit succeeded without a byte");
  for (const auto& [incarnation, chunks] : read) {
    const auto truth = truth_.find({incarnation, lease.version});
    for (const Stamp& chunk : chunks) {
      expect(truth != truth_.end() && chunk == truth->second,
             "I8: a refit succeeded with other bytes than those of its version");
    }
  }
}

uint64_t Judge::landed(uint64_t member) const {
  const auto found = members_.find(member);
  return found == members_.end() ? 0 : found->second.landed;
}

}  // namespace transfuse::sim

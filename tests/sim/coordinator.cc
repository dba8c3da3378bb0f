// Calls, effects and timers of the coordinator; and the canaries.
#include "sim/coordinator.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/process.h"
#include "sim/world.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

template <typename Id>
uint64_t number(Id id) {
  return static_cast<uint64_t>(id);
}

template <typename T>
std::string outcome(const Result<T>& result) {
  return result ? "ok" : result.error().to_string();
}

// An effect, for the trace.
std::string told(const Effect& effect) {
  if (const auto* changed = std::get_if<VersionChanged>(&effect)) {
    return fmt::format("version {} {} {}", changed->version.version,
                       version_state_name(changed->version.state), changed->version.reason);
  }
  if (const auto* lease = std::get_if<LeaseReply>(&effect)) {
    if (!lease->result)
      return fmt::format("call {}: {}", number(lease->waiter), outcome(lease->result));
    return fmt::format("call {}: member {:x} gets lease {:x} of version {}, round {:x}",
                       number(lease->waiter), lease->target, number(lease->result->id),
                       lease->result->version, lease->result->round);
  }
  if (const auto* drain = std::get_if<DrainReply>(&effect)) {
    if (!drain->result)
      return fmt::format("call {}: {}", number(drain->waiter), outcome(drain->result));
    return fmt::format("call {}: may write over {}, {} revoked", number(drain->waiter),
                       drain->result->replaced, drain->result->revoked);
  }
  if (const auto* decided = std::get_if<DecisionReply>(&effect)) {
    if (!decided->result) {
      return fmt::format("call {}: {}", number(decided->waiter), outcome(decided->result));
    }
    return fmt::format("call {}: {}", number(decided->waiter),
                       decided->result->commit ? "COMMIT" : "ABORT " + decided->result->reason);
  }
  if (const auto* applied = std::get_if<AppliedReply>(&effect)) {
    return fmt::format("call {}: applied {}", number(applied->waiter), outcome(applied->result));
  }
  return "a notice";
}

}  // namespace

Coordinator::Coordinator(World& world, Canary canary) : world_(world), canary_(canary) {}

void Coordinator::start() {
  ++epoch_;
  TableLimits limits = world_.limits();
  limits.first_id = (epoch_ << 40) + 1;
  table_.emplace(limits);
}

void Coordinator::crash() {
  table_.reset();
  callers_.clear();
  wakes_.reset();
  replaced_.reset();
  granted_.clear();
  asked_.clear();
  world_.judge().coordinator_died(world_.now());
}

// -- calls --

Result<uint64_t> Coordinator::join(const JoinRequest& request) {
  const TimePoint now = world_.now();
  TRANSFUSE_RETURN_IF_ERROR(table_->layouts().put(request.registration.layout, "layout", now));
  auto joined = table_->join(request, now);
  if (joined) {
    world_.say(
        [&] { return fmt::format("member {:x} is {}", *joined, request.registration.name); });
    world_.judge().joined(*joined, request, now);
    if (request.resume) ++world_.counts().resumed;
  }
  return joined;
}

Result<void> Coordinator::leave(uint64_t member) {
  auto left = table_->leave(member, world_.now());
  if (left) world_.judge().left(member);
  return left;
}

bool Coordinator::beat(uint64_t member, const std::vector<LeaseId>& leases) {
  const std::vector<uint64_t> members{member};
  world_.judge().beat(members, leases, world_.now());
  return table_->beat(members, leases, world_.now()).empty();
}

void Coordinator::suspect(uint64_t owner) {
  world_.judge().suspected(owner, world_.now());
  table_->suspect(owner, world_.now());
}

void Coordinator::begin_write(Process& process, WaiterId waiter, uint64_t source,
                              const WriteRequest& request, Duration deadline) {
  const TimePoint now = world_.now();
  callers_[waiter] = &process;
  world_.say([&] {
    return fmt::format("call {}: {} begin_write({}) over {}, policy {}, {} ms", number(waiter),
                       process.name(), request.version, fmt::join(request.replaces, " "),
                       static_cast<int>(request.when_leased), deadline / ms(1));
  });
  world_.judge().begin_write(waiter, source, request, now + deadline, now);
  if (canary_ == Canary::kLeaseForgottenByDrain) {
    for (const uint64_t version : request.replaces) forget_a_lease(version);
  }
  table_->begin_write(waiter, source, request, now + deadline, now);
}

Result<void> Coordinator::publish(uint64_t source, const Offer& offer) {
  auto published = table_->publish(source, offer, world_.now());
  world_.say([&] {
    return fmt::format("member {:x} publish({}): {}", source, offer.version, outcome(published));
  });
  if (published) world_.judge().published(source, offer);
  return published;
}

Result<void> Coordinator::abort_version(uint64_t source, uint64_t version) {
  return table_->abort_version(source, version, "the trainer failed", world_.now());
}

void Coordinator::acquire(Process& process, WaiterId waiter, uint64_t target,
                          const VersionRequest& request, Duration deadline) {
  callers_[waiter] = &process;
  world_.say([&] { return fmt::format("call {}: {} acquire()", number(waiter), process.name()); });
  world_.judge().acquire(waiter, target, request, world_.now() + deadline);
  table_->acquire(waiter, target, request, world_.now() + deadline, world_.now());
}

Result<void> Coordinator::release(uint64_t target, const Lease& lease,
                                  const LeaseOutcome& outcome) {
  auto released = table_->release(target, lease.id, lease.version, outcome, world_.now());
  world_.say([&] { return fmt::format("member {:x} releases {:x}", target, number(lease.id)); });
  world_.judge().released(target, lease.id, lease.version, outcome, released.has_value());
  return released;
}

Result<void> Coordinator::hold(uint64_t target, uint64_t version) {
  world_.say([&] { return fmt::format("member {:x} holds {}", target, version); });
  auto held = table_->hold(target, version, world_.now());
  if (held) world_.judge().held(target, version);
  return held;
}

Result<void> Coordinator::vote(uint64_t target, uint64_t round, bool ready) {
  world_.say([&] {
    return fmt::format("member {:x} votes {} in {:x}", target, ready ? "ready" : "no", round);
  });
  world_.judge().voted(target, round, ready);
  return table_->vote(target, round, ready, "it could not stage", world_.now());
}

void Coordinator::decision(Process& process, WaiterId waiter, uint64_t target, uint64_t round,
                           Duration deadline) {
  callers_[waiter] = &process;
  asked_[waiter] = round;
  world_.say([&] {
    return fmt::format("call {}: {} decision({:x})", number(waiter), process.name(), round);
  });
  world_.judge().decision(waiter, target, round, world_.now() + deadline);
  table_->decision(waiter, target, round, world_.now() + deadline, world_.now());
}

void Coordinator::applied(Process& process, WaiterId waiter, uint64_t target, uint64_t round,
                          uint64_t version, Duration deadline) {
  callers_[waiter] = &process;
  world_.say([&] {
    return fmt::format("call {}: {} applied({:x}, {})", number(waiter), process.name(), round,
                       version);
  });
  world_.judge().applied(waiter, target, round, version, world_.now() + deadline);
  table_->applied(waiter, target, round, version, world_.now() + deadline, world_.now());
}

void Coordinator::cancel(WaiterId waiter) {
  callers_.erase(waiter);
  world_.judge().cancelled(waiter);
  table_->cancel(waiter, world_.now());
}

// -- effects and timers --

void Coordinator::settle() {
  if (!table_) return;
  for (Effect& effect : table_->take_effects()) pass_on(std::move(effect));
  const auto next = table_->next_deadline();
  if (!next) return;
  const Duration late = ms(static_cast<int64_t>(
      world_.random().below(static_cast<uint64_t>(kLate / std::chrono::milliseconds(1)))));
  const TimePoint at = std::max(*next, world_.now()) + late;
  if (wakes_ && *wakes_ <= *next + kLate) return;
  wakes_ = at;
  world_.events().at(at, [this, epoch = epoch_, at] {
    if (epoch != epoch_ || !table_) return;
    if (wakes_ == at) wakes_.reset();
    tick();
  });
}

void Coordinator::tick() {
  const TimePoint now = world_.now();
  world_.judge().before_tick(now);
  table_->tick(now);
  for (Effect& effect : table_->take_effects()) pass_on(std::move(effect));
  world_.judge().after_tick(now);
}

void Coordinator::pass_on(Effect effect) {
  break_something(effect);
  world_.say([&] { return told(effect); });
  world_.judge().effect(effect, world_.now());
  const auto answer = [&](WaiterId waiter, Answer with) {
    const auto caller = callers_.find(waiter);
    if (caller == callers_.end()) return;
    Process* const process = caller->second;
    callers_.erase(caller);
    world_.reply(*process, static_cast<uint64_t>(waiter), std::move(with));
  };
  if (auto* lease = std::get_if<LeaseReply>(&effect)) {
    answer(lease->waiter, std::move(lease->result));
  } else if (auto* drain = std::get_if<DrainReply>(&effect)) {
    answer(drain->waiter, std::move(drain->result));
  } else if (auto* decided = std::get_if<DecisionReply>(&effect)) {
    asked_.erase(decided->waiter);
    answer(decided->waiter, std::move(decided->result));
  } else if (auto* applied = std::get_if<AppliedReply>(&effect)) {
    answer(applied->waiter, std::move(applied->result));
  }
}

// -- canaries: between the table and everybody else, so that the table itself stays whole --

void Coordinator::break_something(Effect& effect) {
  if (auto* lease = std::get_if<LeaseReply>(&effect); lease != nullptr && lease->result) {
    granted_[lease->result->id] = {lease->target, *lease->result};
    if (canary_ == Canary::kLeaseOnReplaced) {
      if (replaced_ && replaced_->version != lease->result->version) {
        lease->result->version = replaced_->version;
        lease->result->sources = replaced_->sources;
      } else if (!replaced_) {
        replaced_ = *lease->result;
      }
    }
  }
  auto* decided = std::get_if<DecisionReply>(&effect);
  if (canary_ == Canary::kDecisionSplit && decided != nullptr && decided->result &&
      decided->result->commit && asked_.contains(decided->waiter)) {
    const uint64_t round = asked_.at(decided->waiter);
    if (split_ == round) {
      *decided->result = {.commit = false, .reason = "split"};
      split_ = 0;
    } else {
      split_ = round;
    }
  }
}

// As if the lease were no longer among those that a drain has to wait for.
void Coordinator::forget_a_lease(uint64_t version) {
  for (const auto& [id, granted] : granted_) {
    if (granted.second.version != version) continue;
    if (table_->release(granted.first, id, version, {}, world_.now())) {
      granted_.erase(id);
      return;
    }
  }
}

}  // namespace transfuse::sim

// Refits of an engine rank.
#include "sim/target.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "sim/coordinator.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/process.h"
#include "sim/source.h"
#include "sim/world.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

constexpr int kTries = 4;
constexpr int64_t kRoundMs = 700;

}  // namespace

Target::Target(World& world, std::string name, TargetPlan plan)
    : Process(world, std::move(name)), plan_(std::move(plan)) {}

Registration Target::registration() const {
  Registration wanted;
  wanted.role = MemberRole::kTarget;
  wanted.model = "policy";
  wanted.name = name();
  wanted.incarnation = incarnation();
  wanted.layout = {1, 2};
  wanted.group = plan_.group;
  wanted.group_size = plan_.group_size;
  return wanted;
}

Resume Target::resume() const {
  return {.landed = claims_,
          .voted_round = voted_round_,
          .voted_version = voted_version_,
          .told_commit = told_commit_,
          .applied = applied_,
          .last_round = last_round_};
}

void Target::forget() {
  claims_ = 0;
  weights_.clear();
  in_commit_ = serves_ = false;
  lease_.reset();
  voted_round_ = voted_version_ = last_round_ = 0;
  told_commit_ = applied_ = false;
}

void Target::run() { pause_and_step(); }

void Target::pause_and_step() {
  world().seen_change(*this);
  in_commit_ = false;
  after_ms(10 + static_cast<int64_t>(world().random().below(150)), [this] { step(); });
}

void Target::step() {
  if (!plan_.group.empty()) look_at_group();
  if (!plan_.shadow) in_commit_ = true;  // refit() is called at the safe point and blocks
  VersionRequest wanted{.round_ms = kRoundMs};
  if (plan_.group.empty() && world().random().chance(0.5)) {
    wanted.kind = world().random().chance(0.7) ? VersionRequest::Kind::kAtLeast
                                               : VersionRequest::Kind::kExactly;
    wanted.version = claims_ + 1;
  }
  const Duration deadline = ms(50 + static_cast<int64_t>(world().random().below(400)));
  call(
      500,
      [this, member = member(), wanted, deadline](Coordinator& at,
                                                  WaiterId id) -> std::optional<Answer> {
        at.acquire(*this, id, member, wanted, deadline);
        return std::nullopt;
      },
      [this](const Answer& answer) {
        const auto* lease = std::get_if<Result<Lease>>(&answer);
        if (lease == nullptr || !*lease) return pause_and_step();
        leased(**lease);
      });
}

// -- reading: generations, chunks, generations again --

void Target::leased(const Lease& lease) {
  lease_ = lease;
  leases_.insert(lease.id);
  read_.clear();
  torn_ = false;
  last_round_ = lease.round;
  gave_up_ = false;
  if (voted_round_ != lease.round) {
    voted_round_ = 0;
    told_commit_ = applied_ = false;
  }
  read_generations(false);
}

void Target::read_generations(bool again) {
  const auto delay = [this] { return ms(1 + static_cast<int64_t>(world().random().below(25))); };
  after(delay(), [this, again] {
    bool equal = true;
    for (const MemberInfo& source : lease_->sources) {
      const Source* const process = world().source(source.incarnation);
      const bool same =
          process != nullptr && process->slots()[source.slot].generation == source.generation;
      if (process == nullptr || (!same && world().canary() != Canary::kGenerationIgnored)) {
        equal = false;
      }
    }
    if (!equal) {
      torn_ = again;
      return staged(false);
    }
    if (again) return staged(true);
    if (!plan_.shadow) {  // from the first byte on they hold no version
      claims_ = 0;
      serves_ = false;
    }
    read_chunk(0);
  });
}

void Target::read_chunk(size_t index) {
  const Duration delay = ms(1 + static_cast<int64_t>(world().random().below(40)));
  after(delay, [this, index] {
    for (const MemberInfo& source : lease_->sources) {
      const Source* const process = world().source(source.incarnation);
      if (process == nullptr) return staged(false);  // its memory is gone
      const Stamp& chunk = process->slots()[source.slot].chunks[index];
      read_[source.incarnation][index] = chunk;
      if (!plan_.shadow) weights_[source.incarnation][index] = chunk;
    }
    if (index + 1 < kChunks) return read_chunk(index + 1);
    read_generations(true);
  });
}

void Target::staged(bool good) {
  if (good) {
    world().judge().refit_succeeded(*lease_, read_);
  } else if (torn_) {
    ++world().counts().torn;
    for (const auto& [incarnation, chunks] : read_) {
      if (chunks[0] != chunks[1] || chunks[0].version != lease_->version) {
        ++world().counts().torn_in_fact;
        break;
      }
    }
  }
  LeaseEnd end = LeaseEnd::kUnchanged;
  const bool alone = lease_->round == 0;
  if (!plan_.shadow) {
    if (good && alone) put_in_place(lease_->version);
    if (claims_ == 0) end = LeaseEnd::kLost;
    if (good && alone) end = LeaseEnd::kLanded;
  }
  leases_.erase(lease_->id);
  const auto release = [member = member(), lease = *lease_, end](Coordinator& at, WaiterId) {
    return at.release(member, lease, {.end = end});
  };
  call(150, release, [](const Answer&) {});  // if it gets lost, beats without it end it
  if (!alone) return vote(good, kTries);
  if (!good || !plan_.shadow) {
    if (good) ++world().counts().refits;
    return pause_and_step();
  }
  ++world().counts().refits;
  after_ms(static_cast<int64_t>(world().random().below(60)), [this] {  // the safe point
    put_in_place(lease_->version);
    say_held(kTries);
    pause_and_step();
  });
}

// Inside a commit.
void Target::put_in_place(uint64_t version) {
  const bool before = std::exchange(in_commit_, true);
  if (plan_.shadow) weights_ = read_;
  if (!plan_.shadow) {
    std::erase_if(weights_, [&](const auto& part) { return !read_.contains(part.first); });
  }
  claims_ = last_claim_ = version;
  ++changes_;
  serves_ = false;
  world().seen_change(*this);
  in_commit_ = before;
}

void Target::say_held(int tries) {
  call(
      150,
      [member = member(), version = claims_](Coordinator& at, WaiterId) {
        return at.hold(member, version);
      },
      [this, tries, version = claims_](const Answer& answer) {
        const auto* held = std::get_if<Result<void>>(&answer);
        if (held == nullptr && tries > 0 && version == claims_) say_held(tries - 1);
      });
}

// -- a group --

void Target::vote(bool ready, int tries) {
  if (ready) {  // before it is sent: it may arrive though no answer does
    voted_round_ = lease_->round;
    voted_version_ = lease_->version;
    voted_epoch_ = world().coordinator().epoch();
    told_commit_ = applied_ = false;
  } else {
    gave_up_ = true;
  }
  call(
      150,
      [member = member(), round = lease_->round, ready](Coordinator& at, WaiterId) {
        return at.vote(member, round, ready);
      },
      [this, ready, tries](const Answer& answer) {
        const auto* voted = std::get_if<Result<void>>(&answer);
        if (voted == nullptr && tries > 0) {
          return after_ms(20, [=, this] { vote(ready, tries - 1); });
        }
        decide(kTries);
      });
}

void Target::decide(int tries) {
  call(
      300,
      [this, member = member(), round = lease_->round](Coordinator& at,
                                                       WaiterId id) -> std::optional<Answer> {
        at.decision(*this, id, member, round, ms(200));
        return std::nullopt;
      },
      [this, tries](const Answer& answer) {
        const auto* decision = std::get_if<Result<Decision>>(&answer);
        if (decision != nullptr && *decision) {
          world().judge().told(lease_->round, incarnation(), (*decision)->commit);
          if ((*decision)->commit && voted_epoch_ != world().coordinator().epoch()) {
            ++world().counts().recovered;
          }
          return decided((*decision)->commit);
        }
        if (tries > 0) return after_ms(20, [=, this] { decide(tries - 1); });
        // Its last word; then what was decided after all counts.
        if (!gave_up_) return vote(false, kTries);
        ++world().counts().unknown;
        pause_and_step();  // it keeps that it has voted, and serves nothing unless all hold it
      });
}

void Target::decided(bool commit) {
  if (!commit) {
    voted_round_ = 0;
    if (!plan_.shadow) say_held(kTries);
    return pause_and_step();
  }
  told_commit_ = voted_round_ == lease_->round;
  after_ms(static_cast<int64_t>(world().random().below(60)), [this] {  // the safe point
    put_in_place(lease_->version);
    applied_ = told_commit_;
    say_applied(kTries);
  });
}

void Target::say_applied(int tries) {
  call(
      400,
      [this, member = member(), round = lease_->round, version = lease_->version](
          Coordinator& at, WaiterId id) -> std::optional<Answer> {
        at.applied(*this, id, member, round, version, ms(300));
        return std::nullopt;
      },
      [this, tries](const Answer& answer) {
        const auto* applied = std::get_if<Result<void>>(&answer);
        if (applied != nullptr && *applied) {
          voted_round_ = 0;
          told_commit_ = applied_ = false;
        } else if (tries > 0) {
          return after_ms(20, [=, this] { say_applied(tries - 1); });
        }
        look_at_group();
        pause_and_step();
      });
}

void Target::look_at_group() {
  call(
      150,
      [group = plan_.group](Coordinator& at, WaiterId) -> std::optional<Answer> {
        uint64_t whole = 0;
        for (const GroupInfo& each : at.table().groups("")) {
          if (each.name == group && each.state == GroupState::kWhole) whole = each.version;
        }
        return Result<uint64_t>(whole);
      },
      [this, asked_at = changes_](const Answer& answer) {
        const auto* whole = std::get_if<Result<uint64_t>>(&answer);
        if (whole == nullptr || asked_at != changes_) return;
        serves_ = claims_ != 0 && **whole == claims_;
      });
}

}  // namespace transfuse::sim

// Steps of a trainer rank.
#include "sim/source.h"

#include <algorithm>
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
#include "sim/world.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

// Looks at whether the other ranks have finished the step.
constexpr int kPatience = 10;
constexpr int kPatienceInPeace = 100;

}  // namespace

Source::Source(World& world, std::string name, Job& job, uint32_t snapshots)
    : Process(world, std::move(name)), job_(job), snapshots_(snapshots) {
  forget();
}

Registration Source::registration() const {
  Registration wanted;
  wanted.role = MemberRole::kSource;
  wanted.model = "policy";
  wanted.name = name();
  wanted.source_count = job_.source_count;
  wanted.incarnation = incarnation();
  wanted.layout = {1, 2};
  return wanted;
}

Resume Source::resume() const {
  Resume told{.last_published = last_published_, .writing = open_ ? version_ : 0};
  for (uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.offered == 0) continue;
    told.offers.push_back({.version = slot.offered, .generation = slot.generation, .slot = i});
  }
  std::sort(told.offers.begin(), told.offers.end(),
            [](const Offer& a, const Offer& b) { return a.version < b.version; });
  return told;
}

void Source::forget() {
  slots_.assign(1 + snapshots_, Slot{});
  version_ = done_ = last_published_ = 0;
  open_ = false;
}

void Source::run() {
  for (Slot& slot : slots_) slot.generation.incarnation = incarnation();
  step();
}

void Source::step() {
  // A barrier, as training has one; but nobody waits for ever for a rank that died.
  const int patience = world().peace() ? kPatienceInPeace : kPatience;
  if (done_ != 0 && !world().all_finished(done_) && ++patience_ < patience) {
    return after_ms(20, [this] { step(); });
  }
  patience_ = 0;
  // In peace slowly enough for every rank of a group to meet a version.
  const uint64_t step_ms =
      world().peace() ? 200 + world().random().below(300) : 10 + world().random().below(150);
  after_ms(static_cast<int64_t>(step_ms), [this] {
    version_ = std::max({done_ + 1, last_published_ + 1, job_.top});
    if (done_ == 0 && job_.top > 0 && world().someone_has_published(job_.top)) {
      version_ = job_.top + 1;  // restarted alone: the others are past that one
    }
    job_.top = std::max(job_.top, version_);
    open_ = false;
    when_leased_ = snapshots_ == 0 ? WhenLeased::kRevokeAtDeadline
                                   : static_cast<WhenLeased>(world().random().below(4));
    begin();
  });
}

std::optional<uint32_t> Source::free_slot() const {
  if (snapshots_ == 0) return slots_[0].offered == 0 ? std::optional<uint32_t>(0) : std::nullopt;
  for (uint32_t i = 1; i <= snapshots_; ++i) {
    if (slots_[i].offered == 0) return i;
  }
  return std::nullopt;
}

void Source::begin() {
  WriteRequest request{.version = version_, .replaces = {}, .when_leased = when_leased_};
  if (!free_slot()) {
    for (const Slot& slot : slots_) {
      if (slot.offered != 0) request.replaces.push_back(slot.offered);
    }
  }
  const Duration deadline = ms(20 + static_cast<int64_t>(world().random().below(300)));
  call(
      600,
      [this, member = member(), request, deadline](Coordinator& at,
                                                   WaiterId id) -> std::optional<Answer> {
        at.begin_write(*this, id, member, request, deadline);
        return std::nullopt;
      },
      [this](const Answer& answer) { begun(answer); });
}

void Source::begun(const Answer& answer) {
  const auto* drained = std::get_if<Result<DrainOutcome>>(&answer);
  if (drained == nullptr) return after_ms(30, [this] { begin(); });  // it may have happened
  if (!*drained) {
    const ErrorCode code = drained->error().code;
    // The number is used up, or may be tried again.
    if (code == ErrorCode::kVersionGone || code == ErrorCode::kAlreadyExists) return finish();
    return after_ms(30, [this] { begin(); });
  }
  open_ = true;
  const auto free = free_slot();
  slot_ = free.value_or(0);
  if (!free) {
    const uint64_t replaced = (*drained)->replaced;
    const auto at = std::find_if(slots_.begin(), slots_.end(),
                                 [&](const Slot& slot) { return slot.offered == replaced; });
    world().judge().expect(replaced != 0 && at != slots_.end(),
                           "begin_write() replaced what the source does not offer");
    if (at == slots_.end()) return;
    slot_ = static_cast<uint32_t>(at - slots_.begin());
  }
  write(slot_);
}

void Source::write(uint32_t index) {
  const uint64_t serial = world().new_id();
  Slot& slot = slots_[index];
  slot.offered = 0;
  ++slot.generation.counter;  // odd: it is being written
  const Stamp stamp{
      .incarnation = incarnation(), .run = job_.run, .version = version_, .serial = serial};
  const auto some_ms = [this] { return ms(1 + static_cast<int64_t>(world().random().below(20))); };
  after(some_ms(), [this, index, stamp, some_ms] {
    slots_[index].chunks[0] = stamp;
    after(some_ms(), [this, index, stamp] {
      Slot& written = slots_[index];
      written.chunks[1] = stamp;
      ++written.generation.counter;
      written_ = written.generation;
      world().judge().wrote(incarnation(), version_, stamp);
      if (!world().peace() && world().random().chance(0.05)) {
        call(
            200,
            [member = member(), version = version_](Coordinator& at, WaiterId) {
              return at.abort_version(member, version);
            },
            [this](const Answer&) { finish(); });
        return;
      }
      publish();
    });
  });
}

void Source::publish() {
  const Offer offer{.version = version_, .generation = written_, .slot = slot_};
  call(
      200,
      [member = member(), offer](Coordinator& at, WaiterId) { return at.publish(member, offer); },
      [this](const Answer& answer) {
        const auto* published = std::get_if<Result<void>>(&answer);
        if (published == nullptr) return after_ms(20, [this] { publish(); });
        // An answer that was lost: it is published.
        if (*published || published->error().code == ErrorCode::kAlreadyExists) {
          slots_[slot_].offered = version_;
          last_published_ = version_;
          return finish();
        }
        if (published->error().code == ErrorCode::kNotFound) {  // not a member for the moment
          return after_ms(50, [this] { publish(); });
        }
        finish();  // it is gone
      });
}

void Source::finish() {
  done_ = version_;
  version_ = 0;
  open_ = false;
  step();
}

}  // namespace transfuse::sim

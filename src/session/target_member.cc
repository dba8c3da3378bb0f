// Registration, and a rank's side of the decision.
#include "session/target_member.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "session/fetch.h"
#include "session/memory.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr int64_t kDecisionSliceMs = 100;  // how late a cancel() is seen
constexpr int64_t kAppliedSliceMs = 1000;  // each is an entry in the story of the version
constexpr int64_t kAppliedGraceMs = 100;
constexpr int64_t kGiveUpMs = 1000;  // after the deadline, to learn what was decided after all
constexpr auto kPause = std::chrono::milliseconds(20);  // while the coordinator is gone

// A wait for the group ended because its slice was over, or because the coordinator is away: the
// answer may still come.
bool may_still_come(ErrorCode code) {
  return code == ErrorCode::kUnavailable || code == ErrorCode::kDeadlineExceeded;
}

}  // namespace

TargetMember::TargetMember(Control& control, Layout layout, ReceiverOptions options,
                           std::unique_ptr<ServedWeights> weights, MemberId id)
    : control_(control),
      layout_(std::move(layout)),
      options_(std::move(options)),
      weights_(std::move(weights)),
      id_(id),
      owner_pid_(getpid()) {}

Result<std::unique_ptr<TargetMember>> TargetMember::open(Transport& transport, Control& control,
                                                         const Layout& layout, BoundMemory memory,
                                                         const ReceiverOptions& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto weights, ServedWeights::open(transport, control, layout, std::move(memory),
                                        {.fingerprint_threads = 0, .keep_tables_fresh = false}));
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.role = MemberRole::kTarget;
  registration.model = options.model;
  registration.name = options.name;
  registration.incarnation = weights->incarnation();
  registration.layout = layout.digest();
  registration.group = options.group;
  registration.group_size = options.group_size;
  TRANSFUSE_ASSIGN_OR_RETURN(registration.descriptor, weights->descriptor(options.token));
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId id, control.join(registration));
  if (auto serving = weights->serve(id); !serving) {
    (void)control.leave(id);  // what matters is why nothing can be served
    return Unexpected{std::move(serving).error()};
  }
  return std::unique_ptr<TargetMember>(
      new TargetMember(control, layout, options, std::move(weights), id));
}

bool TargetMember::in_forked_child() const { return getpid() != owner_pid_; }

Result<void> TargetMember::check_usable() const {
  if (in_forked_child()) {
    return Error{ErrorCode::kUnavailable,
                 fmt::format("receiver '{}' belongs to process {}; in the forked process {} it is "
                             "inert",
                             options_.name, owner_pid_, getpid())};
  }
  if (closed_) {
    return Error{ErrorCode::kUnavailable, fmt::format("receiver '{}' is closed", options_.name)};
  }
  return {};
}

Result<void> TargetMember::close() {
  if (closed_ || in_forked_child()) return {};
  closed_ = true;
  weights_->stop_serving();
  return control_.leave(id_);
}

Result<void> TargetMember::hold(uint64_t version, Deadline deadline) {
  return control_.hold(id_, version, deadline);
}

Result<void> TargetMember::give_up(const Fetched& fetched, std::string_view reason) {
  const Deadline deadline = Deadline::after_ms(kGiveUpMs);
  // Where the coordinator does not know the round any more, nothing of it can be decided.
  auto vote = control_.vote(id_, fetched.round, false, reason, deadline);
  if (!vote) return vote;
  const auto decision = control_.decision(id_, fetched.round, deadline);
  if (!decision || !decision->commit) return {};
  return Error{ErrorCode::kAlreadyExists,
               fmt::format("group '{}' has decided to commit version {}: commit() it first",
                           options_.group, fetched.version)};
}

Result<Decision> TargetMember::decide(const Fetched& fetched, Deadline deadline,
                                      const std::atomic<bool>& cancelled) {
  bool voted = fetched.voted;
  while (true) {
    const Deadline slice = deadline.earlier(Deadline::after_ms(kDecisionSliceMs));
    if (!voted) voted = control_.vote(id_, fetched.round, true, "", slice).has_value();
    auto decision = control_.decision(id_, fetched.round, slice);
    if (decision) return decision;
    const Error& error = decision.error();
    if (!may_still_come(error.code)) {
      return Error{ErrorCode::kGroupBroken,
                   fmt::format("what group '{}' decided about version {} cannot be learned: {}",
                               options_.group, fetched.version, error.message)};
    }
    if (cancelled || deadline.passed()) break;
    if (error.code == ErrorCode::kUnavailable) {
      std::this_thread::sleep_for(std::min<Duration>(kPause, deadline.remaining()));
    }
  }
  // Nothing was decided so far. If the others are, or were, to be told to commit after all, this
  // rank does so too.
  const Deadline last = Deadline::after_ms(kGiveUpMs);
  const std::string_view reason =
      cancelled ? "it was cancelled by its caller" : "its deadline passed";
  auto given_up = control_.vote(id_, fetched.round, false, reason, last);
  if (given_up) {
    auto decision = control_.decision(id_, fetched.round, last);
    if (decision) return decision;
    given_up = decision.error();
  }
  return Error{ErrorCode::kGroupBroken,
               fmt::format("what group '{}' decided about version {} cannot be learned by the "
                           "deadline: {}",
                           options_.group, fetched.version, given_up.error().message)};
}

Result<void> TargetMember::applied(const Fetched& fetched, Deadline deadline,
                                   const std::atomic<bool>& cancelled) {
  // The rank holds it, whatever the time: it is said at least once.
  deadline = Deadline(std::max(deadline.at(), Deadline::after_ms(kAppliedGraceMs).at()));
  while (true) {
    const Deadline slice = deadline.earlier(Deadline::after_ms(kAppliedSliceMs));
    auto outcome = control_.applied(id_, fetched.round, fetched.version, slice);
    if (outcome) return outcome;
    const Error& error = outcome.error();
    if (!may_still_come(error.code) || deadline.passed() || cancelled) {
      return Error{ErrorCode::kGroupBroken,
                   fmt::format("this rank ('{}') holds version {}, but it is not known that every "
                               "rank of group '{}' does: {}",
                               options_.name, fetched.version, options_.group, error.message)};
    }
    if (error.code == ErrorCode::kUnavailable) {
      std::this_thread::sleep_for(std::min<Duration>(kPause, deadline.remaining()));
    }
  }
}

Result<void> TargetMember::hold_all(uint64_t version, Deadline deadline,
                                    const std::atomic<bool>& cancelled) {
  deadline = Deadline(std::max(deadline.at(), Deadline::after_ms(kAppliedGraceMs).at()));
  auto told = hold(version, deadline);
  while (true) {
    std::string reason;
    if (told) {
      const auto whole = check_group(version);
      if (whole) return {};
      reason = whole.error().message;
    } else {
      reason = told.error().message;
    }
    if (deadline.passed() || cancelled) {
      return Error{ErrorCode::kGroupBroken,
                   fmt::format("this rank ('{}') holds version {} of a checkpoint, but it is not "
                               "known that every rank of group '{}' does: {}",
                               options_.name, version, options_.group, reason)};
    }
    std::this_thread::sleep_for(std::min<Duration>(kPause, deadline.remaining()));
    if (!told) told = hold(version, deadline);
  }
}

Result<GroupInfo> TargetMember::check_group(uint64_t version) {
  if (!in_group()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("receiver '{}' is in no group", options_.name)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(auto groups, control_.groups(options_.model));
  const auto found = std::ranges::find(groups, options_.group, &GroupInfo::name);
  if (found == groups.end()) {
    return Error{ErrorCode::kGroupBroken,
                 fmt::format("the coordinator does not know group '{}'", options_.group)};
  }
  if (found->state != GroupState::kWhole) {
    return Error{ErrorCode::kGroupBroken,
                 fmt::format("group '{}' is {}: {}", options_.group, group_state_name(found->state),
                             found->reason)};
  }
  if (found->version != version) {
    return Error{ErrorCode::kGroupBroken,
                 fmt::format("group '{}' holds version {}, this rank ('{}') {}", options_.group,
                             found->version, options_.name, version)};
  }
  return std::move(*found);
}

}  // namespace transfuse

// Groups of targets: rounds, votes, the one decision, and when every rank has applied it.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control/lease_table.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

namespace {

constexpr uint32_t kMaxGroupSize = 65536;
constexpr int64_t kMaxRoundMs = 86'400'000;
// For the ranks of a round whose coordinator died to register again.
constexpr Duration kRecovery = std::chrono::seconds(10);

}  // namespace

std::string_view group_state_name(GroupState state) {
  switch (state) {
    case GroupState::kForming:
      return "FORMING";
    case GroupState::kWhole:
      return "WHOLE";
    case GroupState::kSwitching:
      return "SWITCHING";
    case GroupState::kBroken:
      return "BROKEN";
  }
  check_failed(__FILE__, __LINE__, "a GroupState outside the enum");
}

// -- ranks that come and go --

Result<void> LeaseTable::check_group_join(const Registration& wanted, uint64_t replaced) const {
  if (wanted.group.empty() && wanted.group_size == 0) return {};
  if (wanted.role != MemberRole::kTarget || wanted.group.empty() || wanted.group_size == 0 ||
      wanted.group_size > kMaxGroupSize) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{} names group '{}' of {} ranks; a group is of targets, has a name and "
                    "1 to {} ranks",
                    wanted.name, wanted.group, wanted.group_size, kMaxGroupSize)};
  }
  const auto model = models_.find(wanted.model);
  if (model == models_.end()) return {};
  const auto group = model->second.groups.find(wanted.group);
  if (group == model->second.groups.end()) return {};
  std::string names;
  uint32_t count = 0;
  for (const auto& [name, id] : group->second.ranks) {
    if (id == replaced || members_.at(id).suspect) continue;
    ++count;
    names += (names.empty() ? "" : ", ") + name;
  }
  if (count == 0) return {};  // an engine that starts again may have another size
  if (group->second.size != wanted.group_size) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{} joins group {} as one of {} ranks, but its live ranks ({}) are of {}",
                    wanted.name, wanted.group, wanted.group_size, names, group->second.size)};
  }
  if (count < wanted.group_size) return {};
  return Error{ErrorCode::kAlreadyExists,
               fmt::format("{} cannot join group {}: its {} ranks are there already ({})",
                           wanted.name, wanted.group, wanted.group_size, names)};
}

LeaseTable::Group* LeaseTable::group_of(const Member& member) {
  const Registration& registration = member.registration;
  if (registration.group.empty()) return nullptr;
  auto& groups = models_.find(registration.model)->second.groups;
  const auto found = groups.find(registration.group);
  return found == groups.end() ? nullptr : &found->second;
}

void LeaseTable::join_group(Member& member, const std::optional<Resume>& resume, TimePoint now) {
  const Registration& registration = member.registration;
  const std::string& model = registration.model;
  Group& group = models_.find(model)->second.groups[registration.group];
  group.size = registration.group_size;
  group.ranks[registration.name] = member.id;
  if (resume) recover_round(member, group, *resume, now);
  settle_recovered(model, group, now);
  settle_group(model, group, now);
  serve_waiters(model, now);
}

// The coordinator that had the round is gone. What a rank was told is true for all.
void LeaseTable::recover_round(Member& member, Group& group, const Resume& resume, TimePoint now) {
  const Registration& registration = member.registration;
  const uint64_t id = resume.voted_round;
  // Of its own rounds this one knows more than a rank that was away.
  if (id == 0 || from_this_life(id)) return;
  if (!group.round && !group.finished.contains(id)) {
    group.round = Round{.id = id,
                        .version = resume.voted_version,
                        .run = run_of(member),
                        .deadline = now + kRecovery,
                        .recovered = true};
    rounds_[id] = {registration.model, registration.group};
    timers_.emplace(group.round->deadline, TimerKind::kRound, id);
  }
  const bool current = group.round && group.round->id == id;
  if (current) group.round->ready.insert(member.id);
  if (!resume.told_commit) return;
  if (current) {
    group.round->committed = true;
    if (resume.applied) {
      group.round->applied.insert(member.id);
      land(member, group.round->version, group.round->run);
    }
    note(registration.model, group.round->version, registration.name,
         fmt::format("was told COMMIT of round {:x} by a coordinator that is gone", id), now);
  }
  if (!group.finished.contains(id)) {
    record(group, id, {.commit = true, .reason = {}}, run_of(member));
  }
}

// Once every rank is back, a recovered round is as any other, or aborted if none was told COMMIT:
// then nobody has applied it. Where all hold its version, some may have been told and have
// finished.
void LeaseTable::settle_recovered(const std::string& model, Group& group, TimePoint now) {
  if (!group.round || !group.round->recovered || group.ranks.size() < group.size) return;
  if (group.round->committed) {
    for (const auto& [name, id] : group.ranks) {
      // It had voted once: COMMIT was told. It has finished with the round since.
      const bool finished = !group.round->ready.contains(id);
      if (finished && members_.at(id).landed == group.round->version) {
        group.round->applied.insert(id);
        land(members_.at(id), group.round->version, group.round->run);
      }
    }
    group.round->recovered = false;
    timers_.erase({group.round->deadline, TimerKind::kRound, group.round->id});
    return;
  }
  for (const auto& [name, id] : group.ranks) {
    if (members_.at(id).last_round <= group.round->id) continue;  // ids rise with every coordinator
    return lose_round(model, group,
                      fmt::format("rank {} has gone on to another round since, and does not know "
                                  "what was decided about version {}",
                                  name, group.round->version),
                      now);
  }
  if (holds(group, group.round->version)) {
    return lose_round(
        model, group,
        fmt::format("the coordinator was lost while the ranks, which hold version {}, "
                    "received it again",
                    group.round->version),
        now);
  }
  end_round(model, group,
            {.commit = false, .reason = "the coordinator was lost before it was known to any rank"},
            now);
}

// `member` is in no index of its model any more.
void LeaseTable::leave_group(const Member& member, std::string_view why, TimePoint now) {
  const Registration& registration = member.registration;
  const std::string& model = registration.model;
  auto& groups = models_.find(model)->second.groups;
  Group& group = groups.find(registration.group)->second;
  group.ranks.erase(registration.name);
  const std::string lost = fmt::format("rank {} was lost: {}", registration.name, why);
  if (group.was_whole || (group.round && group.round->committed)) {
    group.was_whole = true;
    group.trouble = lost;
  }
  if (group.round && group.round->committed) {
    lose_round(model, group, lost, now);
  } else if (group.round && group.round->recovered) {
    group.round->ready.erase(member.id);
  } else if (group.round) {
    end_round(model, group, {.commit = false, .reason = lost}, now);
  }
  const std::set<uint64_t> waiting = group.waiters;
  for (const uint64_t id : waiting) {
    if (waiters_.at(id).kind != WaiterKind::kApplied) continue;
    fail_waiter(
        id, Error{ErrorCode::kGroupBroken, fmt::format("group {}: {}", registration.group, lost)});
  }
  tell_change(model, registration.group, group);
  if (group.ranks.empty()) {
    if (group.round) lose_round(model, group, lost, now);
    groups.erase(registration.group);
  }
}

// Tells of a new state, or of a new version of a whole group.
void LeaseTable::tell_change(const std::string& model, const std::string& name, Group& group) {
  GroupInfo now = info(model, name, group);
  const std::pair seen{now.state, now.version};
  if (std::exchange(group.told, seen) == seen) return;
  effects_.emplace_back(GroupChanged{std::move(now)});
}

// -- rounds --

// False: the waiter has to wait.
bool LeaseTable::try_grant_in_group(uint64_t waiter_id, Group& group, TimePoint now) {
  const Waiter& waiter = waiters_.at(waiter_id);
  const Member& target = members_.at(waiter.member);
  const auto at = models_.find(target.registration.model);
  Model& model = at->second;
  if (group.round && group.round->committed && !group.round->applied.contains(target.id)) {
    // It could not learn what was decided, or failed to apply it: waiting would be for ever.
    lose_round(at->first, group,
               fmt::format("rank {} began again before it had applied version {}",
                           target.registration.name, group.round->version),
               now);
  }
  if (group.round && (group.round->committed || group.round->recovered)) return false;
  if (group.round) {
    const auto version = model.versions.find(group.round->version);
    const bool there = version != model.versions.end() && group.round->run == model.run &&
                       version->second.state == VersionState::kReady;
    if (!there) {
      end_round(at->first, group,
                {.commit = false,
                 .reason = fmt::format("version {} ended before every rank had it",
                                       group.round->version)},
                now);
    }
  }
  if (!group.round) {
    const auto number = choose(model, waiter.request);
    if (!number) {
      auto error = never(at->first, model, waiter.request);
      if (error) fail_waiter(waiter_id, *error);
      return error.has_value();
    }
    open_round(group, waiter, *number, now);
  }
  const uint64_t number = group.round->version;
  const VersionRequest& request = waiter.request;
  const bool fits = request.kind == VersionRequest::Kind::kNewest ||
                    (request.kind == VersionRequest::Kind::kExactly ? number == request.version
                                                                    : number >= request.version);
  if (!fits) {
    fail_waiter(waiter_id,
                Error{ErrorCode::kInvalidArgument,
                      fmt::format("{} asks for version {}, but the round of its group {} brings "
                                  "version {}: the ranks of a group ask for the same",
                                  target.registration.name, request.version,
                                  target.registration.group, number)});
    return true;
  }
  if (const Version& version = model.versions.at(number); !any_fits(version, request.demand)) {
    fail_waiter(waiter_id, no_fitting_source(at->first, number, version, request.demand));
    return true;
  }
  group.round->ready.erase(waiter.member);  // it starts again
  grant(waiter_id, number, group.round->id, now);
  return true;
}

void LeaseTable::open_round(Group& group, const Waiter& waiter, uint64_t version, TimePoint now) {
  const Registration& registration = members_.at(waiter.member).registration;
  const int64_t round_ms = std::clamp<int64_t>(waiter.request.round_ms, 1, kMaxRoundMs);
  const uint64_t id = new_id();
  group.round = Round{.id = id,
                      .version = version,
                      .run = run_of(members_.at(waiter.member)),
                      .deadline = now + std::chrono::milliseconds(round_ms)};
  rounds_[id] = {registration.model, registration.group};
  timers_.emplace(group.round->deadline, TimerKind::kRound, id);
  note(registration.model, version, registration.name,
       fmt::format("opened round {:x} of group {}", id, registration.group), now);
}

// Tells who waits for it.
void LeaseTable::record(Group& group, uint64_t round, Decision decision, uint64_t run) {
  const std::set<uint64_t> waiting = group.waiters;
  for (const uint64_t id : waiting) {
    const Waiter& waiter = waiters_.at(id);
    if (waiter.kind != WaiterKind::kDecision || waiter.round != round) continue;
    remove_waiter(id);
    effects_.emplace_back(DecisionReply{WaiterId{id}, decision});
  }
  group.finished[round] = {.decision = std::move(decision), .run = run};
  while (group.finished.size() > limits_.finished_rounds) {
    group.finished.erase(group.finished.begin());
  }
}

// A committed round stays open until all have applied it. The caller serves who waits for a lease.
void LeaseTable::end_round(const std::string& model, Group& group, Decision decision,
                           TimePoint now) {
  Round& round = *group.round;
  const uint64_t id = round.id;
  note(model, round.version, rounds_.at(id).second,
       decision.commit ? fmt::format("group: round {:x} COMMIT", id)
                       : fmt::format("group: round {:x} ABORT: {}", id, decision.reason),
       now);
  timers_.erase({round.deadline, TimerKind::kRound, id});
  round.committed = decision.commit;
  record(group, id, std::move(decision), round.run);
  if (round.committed) return tell_change(model, rounds_.at(id).second, group);
  rounds_.erase(id);
  group.round.reset();
}

// The round ends without a decision that is known, or without a rank that must apply it. The caller
// serves who waits for a lease.
void LeaseTable::lose_round(const std::string& model, Group& group, const std::string& why,
                            TimePoint now) {
  const Round round = *group.round;
  const std::string name = rounds_.at(round.id).second;
  note(model, round.version, name, fmt::format("group: BROKEN: {}", why), now);
  timers_.erase({round.deadline, TimerKind::kRound, round.id});
  rounds_.erase(round.id);
  group.round.reset();
  group.was_whole = true;
  group.trouble = why;
  const std::set<uint64_t> waiting = group.waiters;
  for (const uint64_t waiter : waiting) {
    if (waiters_.at(waiter).round != round.id) continue;
    fail_waiter(waiter, Error{ErrorCode::kGroupBroken, fmt::format("group {}: {}", name, why)});
  }
  tell_change(model, name, group);
}

void LeaseTable::expire_round(uint64_t id, TimePoint now) {
  const auto [model, name] = rounds_.at(id);
  Group& group = models_.find(model)->second.groups.find(name)->second;
  if (group.round->recovered) {
    lose_round(model, group,
               "the coordinator was lost, and not every rank has come back to say whether it was "
               "told the decision, or to apply it",
               now);
    return serve_waiters(model, now);
  }
  std::string missing;
  for (const auto& [rank, member] : group.ranks) {
    if (!group.round->ready.contains(member)) missing += (missing.empty() ? "" : ", ") + rank;
  }
  if (group.ranks.size() < group.size) {
    missing += fmt::format("{}{} of {} ranks that are not there", missing.empty() ? "" : ", ",
                           group.size - group.ranks.size(), group.size);
  }
  end_round(model, group,
            {.commit = false, .reason = fmt::format("its time ran out without {}", missing)}, now);
  serve_waiters(model, now);
}

Result<void> LeaseTable::vote(uint64_t target, uint64_t round, bool ready, std::string_view reason,
                              TimePoint now) {
  const Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return no_member(target);
  const Registration& registration = member->registration;
  Group* const group = group_of(*member);
  if (group == nullptr) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} votes, but is in no group", registration.name)};
  }
  if (!group->round || group->round->id != round) {
    if (group->finished.contains(round) || !ready) return {};  // decided: decision() tells
    return Error{ErrorCode::kNotFound,
                 fmt::format("round {:x} of group {} is not known", round, registration.group)};
  }
  if (group->round->committed) return {};
  if (!ready) {
    // It had voted for what the last coordinator may have committed, and told another rank.
    if (group->round->recovered && group->round->ready.contains(target)) return {};
    end_round(registration.model, *group,
              {.commit = false,
               .reason = fmt::format("rank {}: {}", registration.name, reason.substr(0, 1024))},
              now);
    serve_waiters(registration.model, now);
    return {};
  }
  group->round->ready.insert(target);
  note(registration.model, group->round->version, registration.name, "voted ready", now);
  commit_if_all_ready(registration.model, *group, now);
  return {};
}

void LeaseTable::commit_if_all_ready(const std::string& model, Group& group, TimePoint now) {
  if (group.round->recovered || group.ranks.size() != group.size) return;
  for (const auto& [name, member] : group.ranks) {
    if (!group.round->ready.contains(member)) return;
  }
  end_round(model, group, {.commit = true, .reason = {}}, now);
}

void LeaseTable::decision(WaiterId waiter, uint64_t target, uint64_t round, TimePoint deadline,
                          TimePoint now) {
  const auto refuse = [&](Error error) {
    effects_.emplace_back(DecisionReply{waiter, std::move(error)});
  };
  const Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return refuse(no_member(target));
  Group* const group = group_of(*member);
  if (group == nullptr) {
    return refuse(Error{ErrorCode::kInvalidArgument,
                        fmt::format("{} is in no group", member->registration.name)});
  }
  const auto finished = group->finished.find(round);
  if (finished != group->finished.end()) {
    effects_.emplace_back(DecisionReply{waiter, finished->second.decision});
    return;
  }
  if (!group->round || group->round->id != round) {
    return refuse(Error{ErrorCode::kGroupBroken,
                        fmt::format("the decision of round {:x} of group {} is not known: the "
                                    "coordinator that had it is gone, or it is long ago",
                                    round, member->registration.group)});
  }
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kDecision,
                        .member = target,
                        .started = now,
                        .deadline = deadline,
                        .round = round});
  group->waiters.insert(id);
}

void LeaseTable::applied(WaiterId waiter, uint64_t target, uint64_t round, uint64_t version,
                         TimePoint deadline, TimePoint now) {
  const auto refuse = [&](Error error) {
    effects_.emplace_back(AppliedReply{waiter, std::move(error)});
  };
  Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return refuse(no_member(target));
  Group* const group = group_of(*member);
  if (group == nullptr || version == 0) {
    return refuse(Error{ErrorCode::kInvalidArgument,
                        fmt::format("{} has applied version {} in a round, but is in no group",
                                    member->registration.name, version)});
  }
  if (group->round && group->round->id == round && group->round->committed) {
    group->round->applied.insert(target);
    land(*member, version, group->round->run);
  } else if (const auto ended = group->finished.find(round); ended != group->finished.end()) {
    land(*member, version, ended->second.run);
  } else if (member->landed != version) {
    land(*member, version, run_of(*member));
  }
  note(member->registration.model, version, member->registration.name, "applied", now);
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kApplied,
                        .member = target,
                        .started = now,
                        .deadline = deadline,
                        .request = {VersionRequest::Kind::kExactly, version},
                        .round = round});
  group->waiters.insert(id);
  if (group->ranks.size() < group->size && (!group->round || group->round->id != round)) {
    return fail_waiter(
        id, Error{ErrorCode::kGroupBroken,
                  fmt::format("group {}: {}", member->registration.group,
                              group->trouble.empty() ? "a rank is missing" : group->trouble)});
  }
  settle_group(member->registration.model, *group, now);
}

bool LeaseTable::holds(const Group& group, uint64_t version) const {
  if (version == 0 || group.ranks.size() != group.size) return false;
  const uint64_t run = members_.at(group.ranks.begin()->second).landed_run;
  return std::all_of(group.ranks.begin(), group.ranks.end(), [&](const auto& rank) {
    const Member& member = members_.at(rank.second);
    return member.landed == version && member.landed_run == run;
  });
}

std::string LeaseTable::who_holds_not(const Group& group, uint64_t version) const {
  uint64_t run = 0;
  for (const auto& [name, id] : group.ranks) run = std::max(run, members_.at(id).landed_run);
  const bool switching = group.round && group.round->committed && group.round->version == version;
  std::string out;
  for (const auto& [name, id] : group.ranks) {
    const Member& member = members_.at(id);
    const bool applied = !switching || group.round->applied.contains(id);
    if (member.landed == version && member.landed_run == run && applied) continue;
    out += fmt::format("{}rank {} holds {}{}", out.empty() ? "" : ", ", name,
                       member.landed == 0 ? "no version" : fmt::format("version {}", member.landed),
                       member.landed == version ? " as it was before" : "");
  }
  if (group.ranks.size() < group.size) {
    out += fmt::format("{}{} of {} ranks are missing", out.empty() ? "" : ", ",
                       group.size - group.ranks.size(), group.size);
  }
  return out;
}

// After any change of what ranks hold.
void LeaseTable::settle_group(const std::string& model, Group& group, TimePoint now) {
  if (group.ranks.empty()) return;
  if (group.round) {
    std::erase_if(group.round->applied, [&](uint64_t id) {  // it has gone back since
      return members_.at(id).landed != group.round->version;
    });
  }
  const Member& first = members_.at(group.ranks.begin()->second);
  const uint64_t version = first.landed;
  if (!holds(group, version)) return tell_change(model, first.registration.group, group);
  const bool switching = group.round && group.round->committed;
  if (switching && (group.round->version != version || group.round->applied.size() < group.size)) {
    return;
  }
  group.was_whole = true;
  group.trouble.clear();
  const std::set<uint64_t> waiting = group.waiters;
  for (const uint64_t id : waiting) {
    const Waiter& waiter = waiters_.at(id);
    if (waiter.kind != WaiterKind::kApplied || waiter.request.version != version) continue;
    remove_waiter(id);
    effects_.emplace_back(AppliedReply{WaiterId{id}, Result<void>()});
  }
  if (switching) {
    rounds_.erase(group.round->id);
    timers_.erase({group.round->deadline, TimerKind::kRound, group.round->id});
    group.round.reset();
  }
  tell_change(model, first.registration.group, group);
  if (switching) serve_waiters(model, now);
}

GroupInfo LeaseTable::info(const std::string& model, const std::string& name,
                           const Group& group) const {
  GroupInfo info{.model = model, .name = name, .size = group.size};
  for (const auto& [rank, id] : group.ranks) {
    info.ranks.push_back({.name = rank, .version = members_.at(id).landed});
  }
  if (group.round) info.round = group.round->id;
  const bool complete = group.ranks.size() == group.size;
  if (group.round && group.round->committed && complete) {
    // Before the versions held: a rank may have switched and not said so yet.
    info.state = GroupState::kSwitching;
    info.reason = who_holds_not(group, group.round->version);
    return info;
  }
  const uint64_t version = info.ranks.empty() ? 0 : info.ranks.front().version;
  if (holds(group, version)) {
    info.state = GroupState::kWhole;
    info.version = version;
    return info;
  }
  const bool mixed = complete && std::any_of(info.ranks.begin(), info.ranks.end(),
                                             [](const GroupRank& r) { return r.version != 0; });
  if (group.was_whole || mixed) info.state = GroupState::kBroken;
  uint64_t wanted = group.round ? group.round->version : 0;
  for (const GroupRank& rank : info.ranks) wanted = std::max(wanted, rank.version);
  const std::string now = wanted == 0 ? "no rank holds a version" : who_holds_not(group, wanted);
  info.reason = group.trouble.empty() ? now : fmt::format("{}; {}", group.trouble, now);
  return info;
}

std::vector<GroupInfo> LeaseTable::groups(std::string_view model) const {
  std::vector<GroupInfo> out;
  for (const auto& [name, each] : models_) {
    if (!model.empty() && name != model) continue;
    for (const auto& [group_name, group] : each.groups)
      out.push_back(info(name, group_name, group));
  }
  return out;
}

}  // namespace transfuse

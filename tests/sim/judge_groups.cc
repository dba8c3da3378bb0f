// The model of groups: one version and one decision for all ranks of a round.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "control/lease_table.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/judge.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

std::vector<const Judge::Member*> Judge::ranks(const std::string& group) const {
  std::vector<const Member*> out;
  for (const auto& [id, member] : members_) {
    if (member.registration.group == group && !group.empty()) out.push_back(&member);
  }
  return out;
}

void Judge::see_round(const Waiter& waiter, const Member& target, const Lease& lease,
                      TimePoint now) {
  const Registration& registration = target.registration;
  const auto [at, opened] = rounds_.try_emplace(lease.round);
  Round& round = at->second;
  if (opened) {
    round.version = lease.version;
    round.group = registration.group;
    round.size = registration.group_size;
    round.deadline = now + ms(waiter.wanted.round_ms);
  }
  expect(round.version == lease.version, "I8: ranks of one round got different versions");
  expect(round.group == registration.group, "a round of another group");
  expect(!round.recorded, "a lease in a round that is decided");
  round.ready.erase(registration.name);  // it begins again
}

void Judge::voted(uint64_t target, uint64_t round, bool ready) {
  const auto member = members_.find(target);
  const auto found = rounds_.find(round);
  if (member == members_.end() || found == rounds_.end() || !ready) return;
  found->second.ready.insert(member->second.registration.name);
}

void Judge::decision(WaiterId waiter, uint64_t target, uint64_t round, TimePoint deadline) {
  waiters_[static_cast<uint64_t>(waiter)] = {
      .kind = Kind::kDecision, .member = target, .deadline = deadline, .round = round};
}

void Judge::see_decision(const DecisionReply& reply) {
  const auto waiter = answered(reply.waiter);
  if (!waiter || !reply.result) return;
  const auto found = rounds_.find(waiter->round);
  expect(found != rounds_.end(), "a decision about a round that nobody opened");
  if (found == rounds_.end()) return;
  Round& round = found->second;
  const bool commit = reply.result->commit;
  expect(!round.recorded || *round.recorded == commit, "I8: two decisions about one round");
  expect(commit || !reply.result->reason.empty(), "I10: an ABORT without a reason");
  if (commit && !round.recorded) {
    expect(round.ready.size() == round.size, "I8: COMMIT before every rank had voted");
  }
  round.recorded = commit;
}

void Judge::told(uint64_t number, uint64_t incarnation, bool commit) {
  ++(commit ? counts_.commits : counts_.aborts);
  Round& round = rounds_[number];
  for (const auto& [other, was] : round.told) {
    expect(was == commit, "I8: ranks were told different decisions about one round");
  }
  round.told[incarnation] = commit;
}

void Judge::process_died(uint64_t incarnation) {
  for (auto& [id, round] : rounds_) round.told.erase(incarnation);
}

void Judge::applied(WaiterId waiter, uint64_t target, uint64_t round, uint64_t version,
                    TimePoint deadline) {
  waiters_[static_cast<uint64_t>(waiter)] = {.kind = Kind::kApplied,
                                             .member = target,
                                             .deadline = deadline,
                                             .round = round,
                                             .version = version};
  held(target, version);
}

void Judge::see_applied(const AppliedReply& reply) {
  const auto waiter = answered(reply.waiter);
  if (!waiter) return;
  if (!reply.result) {
    const Error& error = reply.result.error();
    expect(error.code != ErrorCode::kGroupBroken || error.message.find("rank") != std::string::npos,
           "I10: a BROKEN group does not say which rank is missing");
    return;
  }
  const auto member = members_.find(waiter->member);
  if (member == members_.end()) return expect(false, "applied() of nobody was answered");
  const Registration& registration = member->second.registration;
  const auto all = ranks(registration.group);
  expect(all.size() == registration.group_size, "applied() came back without every rank");
  for (const Member* rank : all) {
    expect(rank->landed == waiter->version, "applied() came back before every rank held it");
  }
  ++counts_.whole;
}

void Judge::check_groups(const LeaseTable& table, TimePoint now) {
  for (const GroupInfo& group : table.groups("")) {
    const auto all = ranks(group.name);
    expect(all.size() == group.ranks.size(), "the ranks of a group are miscounted");
    if (all.empty()) continue;
    const uint64_t version = all.front()->landed;
    const bool whole = version != 0 && all.size() == group.size &&
                       std::all_of(all.begin(), all.end(),
                                   [&](const Member* rank) { return rank->landed == version; });
    const auto round = rounds_.find(group.round);
    const bool known = group.round != 0 && round != rounds_.end();
    switch (group.state) {
      case GroupState::kWhole:
        expect(whole && group.version == version, "I8: WHOLE though ranks differ");
        expect(!known || round->second.recorded != true,
               "I8: WHOLE with the old version though COMMIT is recorded");
        break;
      case GroupState::kSwitching:
        expect(known && all.size() == group.size, "SWITCHING without a round, or a rank");
        expect(!known || round->second.ready.size() == round->second.size,
               "I8: SWITCHING before every rank had voted");
        break;
      case GroupState::kForming:
      case GroupState::kBroken:
        // Where the trainers may have counted from below, one number may stand for two versions.
        expect(!whole || recounted_, "a group that holds one version is not WHOLE");
        expect(!group.reason.empty(), "I10: a group that is not whole does not say why");
        break;
    }
    if (known && group.state != GroupState::kSwitching && round->second.recorded != true) {
      expect(round->second.deadline + kLate >= now,
             "I11: a round has no decision long after its time");
    }
    GroupState& before = states_[group.name];
    if (group.state == GroupState::kBroken && before != group.state) ++counts_.broken;
    before = group.state;
  }
}

}  // namespace transfuse::sim

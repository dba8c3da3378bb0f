// What the tests of groups share: an engine of two ranks, and what its ranks say.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "control/lease_table.h"
#include "control/table_fixture.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

// A source and an engine of two ranks.
class Group : public Table {
 protected:
  WaiterId ask_decision(uint64_t member, uint64_t round, int64_t deadline_ms = 1000) {
    const WaiterId waiter{++last_waiter_};
    table().decision(waiter, member, round, in_ms(deadline_ms), now_);
    return waiter;
  }
  WaiterId say_applied(uint64_t member, const Lease& lease, int64_t deadline_ms = 1000) {
    return say_applied(member, lease.round, lease.version, deadline_ms);
  }
  WaiterId say_applied(uint64_t member, uint64_t round, uint64_t version,
                       int64_t deadline_ms = 1000) {
    const WaiterId waiter{++last_waiter_};
    table().applied(waiter, member, round, version, in_ms(deadline_ms), now_);
    return waiter;
  }
  Result<void> vote(uint64_t member, uint64_t round, bool ready = true,
                    const std::string& reason = "") {
    return table().vote(member, round, ready, reason, now_);
  }
  Result<Decision> decided(WaiterId waiter) { return reply<DecisionReply>(waiter)->result; }
  Result<void> all_hold(WaiterId waiter) { return reply<AppliedReply>(waiter)->result; }
  GroupInfo group() {
    const auto groups = table().groups("policy");
    return groups.empty() ? GroupInfo{} : groups.front();
  }
  // Leases for all, staged: as receivers with a shadow do.
  Lease stage(const std::vector<uint64_t>& ranks, const VersionRequest& request = {}) {
    Lease last;
    for (const uint64_t rank : ranks) {
      last = lease(rank, request);
      EXPECT_TRUE(release(rank, last, LeaseEnd::kUnchanged));
    }
    return last;
  }
  // One whole change of version.
  void refit(const std::vector<uint64_t>& ranks) {
    const Lease staged = stage(ranks);
    for (const uint64_t rank : ranks) ASSERT_TRUE(vote(rank, staged.round));
    for (const uint64_t rank : ranks) {
      ASSERT_TRUE(decided(ask_decision(rank, staged.round))->commit);
    }
    for (const uint64_t rank : ranks) (void)say_applied(rank, staged);
    ASSERT_EQ(group().state, GroupState::kWhole);
    ASSERT_EQ(group().version, staged.version);
  }
  std::optional<Resume> voted(const Lease& lease, uint64_t landed, bool told_commit = false) {
    return Resume{.landed = landed,
                  .voted_round = lease.round,
                  .voted_version = lease.version,
                  .told_commit = told_commit,
                  .applied = told_commit && landed == lease.version};
  }

  uint64_t a_ = source("a");
  uint64_t r0_ = rank("r0");
  uint64_t r1_ = rank("r1");
};

}  // namespace transfuse

// Tests of groups of targets: rounds, votes, the one decision, lost ranks.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "control/group_fixture.h"
#include "control/lease_table.h"
#include "control/table_fixture.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using testing::Contains;
using testing::HasSubstr;
using enum VersionRequest::Kind;

TEST_F(Group, TheFirstRankOpensARoundAndEveryRankGetsItsVersion) {
  write_slot(a_, replacing(1, {}), 1);
  const Lease first = lease(r0_);
  write_slot(a_, replacing(2, {}), 2);
  const Lease second = lease(r1_);
  EXPECT_NE(first.round, 0u);
  EXPECT_EQ(second.round, first.round);
  EXPECT_EQ(second.version, 1u) << "not the newest: that of the round";
  EXPECT_EQ(lease(r0_).version, 1u) << "who asks again too";
  EXPECT_EQ(group().round, first.round);
  EXPECT_EQ(lease(target("alone")).round, 0u);
}

TEST_F(Group, RanksThatAskForDifferentVersionsAreTold) {
  write(a_, 1);
  (void)lease(r0_);
  const auto refused = reply<LeaseReply>(ask(r1_, {kAtLeast, 2}))->result;
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(refused.error().message, HasSubstr("the ranks of a group ask for the same"));
}

TEST_F(Group, TheRoundCommitsWhenEveryRankHasVotedAndIsWholeWhenAllHaveApplied) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  const WaiterId waits = ask_decision(r0_, staged.round);
  ASSERT_TRUE(vote(r0_, staged.round));
  EXPECT_EQ(reply<DecisionReply>(waits), nullptr);
  EXPECT_EQ(group().state, GroupState::kForming);
  ASSERT_TRUE(vote(r1_, staged.round));
  EXPECT_TRUE(decided(waits)->commit);
  EXPECT_TRUE(decided(ask_decision(r1_, staged.round))->commit);
  EXPECT_EQ(group().state, GroupState::kSwitching);

  const WaiterId first = say_applied(r0_, staged);
  EXPECT_EQ(reply<AppliedReply>(first), nullptr);
  EXPECT_EQ(group().state, GroupState::kSwitching);
  EXPECT_THAT(group().reason, HasSubstr("rank r1 holds no version"));
  const WaiterId second = say_applied(r1_, staged);
  EXPECT_TRUE(all_hold(first));
  EXPECT_TRUE(all_hold(second));
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
  EXPECT_EQ(group().round, 0u);
  EXPECT_EQ(held(r0_), 1u);
  EXPECT_TRUE(decided(ask_decision(r0_, staged.round))->commit) << "it is remembered";
}

TEST_F(Group, FromTheDecisionOnTheOldVersionIsNotServedAnyMore) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  const Lease staged = stage({r0_, r1_});
  EXPECT_EQ(group().state, GroupState::kWhole) << "it serves while it stages";
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  EXPECT_EQ(group().state, GroupState::kSwitching) << "a rank may have switched already";
  (void)say_applied(r0_, staged);
  (void)say_applied(r1_, staged);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 2u);
}

TEST_F(Group, TheSameVersionAgainIsACommitAsAnyOther) {
  write(a_, 1);
  refit({r0_, r1_});
  refit({r0_, r1_});
  EXPECT_EQ(table().stats().rounds, 0u);
}

// The trainers restart from a checkpoint and count from below: the same number, other weights.
TEST_F(Group, ANumberThatComesAgainIsAnotherVersion) {
  write(a_, 3);
  refit({r0_, r1_});
  const Lease before = lease(r0_);
  table().lose(a_, "killed", now_);
  a_ = source("a", 1, 8);
  write(a_, 3);
  const Lease staged = stage({r1_, r0_});
  EXPECT_NE(staged.round, before.round);
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  const WaiterId first = say_applied(r0_, staged);
  EXPECT_EQ(reply<AppliedReply>(first), nullptr) << "r1 holds the 3 from before";
  EXPECT_EQ(group().state, GroupState::kSwitching);
  EXPECT_THAT(group().reason, HasSubstr("rank r1 holds version 3 as it was before"));
  (void)lease(r1_);  // it gives up: the ranks hold different weights under one number
  EXPECT_EQ(group().state, GroupState::kBroken);
  refit({r0_, r1_});
}

TEST_F(Group, ARankThatCameBackSaysOfWhichRoundItsVersionIs) {
  write(a_, 3);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  (void)say_applied(r0_, staged);
  (void)say_applied(r1_, staged);
  table().lose(r1_, "silent", now_);
  table().lose(a_, "killed", now_);
  a_ = source("a", 1, 8);  // from here on 3 may be another version
  r1_ = rank("r1", 2, 7, voted(staged, 3, true));
  EXPECT_EQ(group().state, GroupState::kBroken) << "not known to be the same 3";
  EXPECT_TRUE(all_hold(say_applied(r1_, staged)));
  EXPECT_EQ(group().state, GroupState::kWhole);
}

// A publisher that is faster than the ranks are apart would otherwise abort every round.
TEST_F(Group, AVersionThatARankHasStillToGetIsTheLastToBeReplaced) {
  write_slot(a_, replacing(1, {}), 1);
  const Lease first = lease(r0_);
  ASSERT_TRUE(release(r0_, first, LeaseEnd::kUnchanged));
  write_slot(a_, replacing(2, {}), 2);
  write_slot(a_, replacing(3, {1, 2}), 2);
  EXPECT_EQ(version(1).state, VersionState::kReady);
  EXPECT_EQ(version(2).state, VersionState::kRetired);
  const Lease second = lease(r1_);
  EXPECT_EQ(second.version, 1u);
  ASSERT_TRUE(release(r1_, second, LeaseEnd::kUnchanged));
  ASSERT_TRUE(vote(r0_, first.round));
  ASSERT_TRUE(vote(r1_, first.round));
  write_slot(a_, replacing(4, {1, 3}), 1);
  EXPECT_EQ(version(1).state, VersionState::kRetired) << "once it is decided, it is as any other";
}

TEST_F(Group, OneVoteAgainstAbortsTheRoundForAllAndForGood) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  const WaiterId waits = ask_decision(r0_, staged.round);
  ASSERT_TRUE(vote(r1_, staged.round, false, "out of memory"));
  EXPECT_FALSE(decided(waits)->commit);
  EXPECT_THAT(decided(waits)->reason, HasSubstr("rank r1: out of memory"));
  ASSERT_TRUE(vote(r1_, staged.round)) << "too late: decision() says so";
  EXPECT_FALSE(decided(ask_decision(r1_, staged.round))->commit);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
  EXPECT_NE(lease(r0_).round, staged.round) << "the next one is another round";
}

TEST_F(Group, AVoteAgainstWhatIsCommittedChangesNothing) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  ASSERT_TRUE(vote(r0_, staged.round, false, "its deadline passed"));
  EXPECT_TRUE(decided(ask_decision(r0_, staged.round))->commit);
}

TEST_F(Group, ARoundWithoutADecisionEndsWithItsTime) {
  write(a_, 1);
  const VersionRequest request{.kind = kNewest, .version = 0, .round_ms = 200};
  const Lease staged = lease(r0_, request);
  ASSERT_TRUE(vote(r0_, staged.round));
  const WaiterId waits = ask_decision(r0_, staged.round);
  wait_ms(199);
  EXPECT_EQ(reply<DecisionReply>(waits), nullptr);
  wait_ms(1);
  EXPECT_FALSE(decided(waits)->commit);
  EXPECT_THAT(decided(waits)->reason, HasSubstr("its time ran out without r1"));
  EXPECT_EQ(group().round, 0u);
}

TEST_F(Group, AStalledDecisionEndsAtTheDeadlineOfWhoWaits) {
  write(a_, 1);
  const Lease staged = lease(r0_);
  const WaiterId waits = ask_decision(r0_, staged.round, 50);
  wait_ms(50);
  EXPECT_EQ(decided(waits).error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(decided(ask_decision(r0_, 77)).error().code, ErrorCode::kGroupBroken);
}

TEST_F(Group, WhoAsksAgainInARoundHasNotVoted) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  const Lease again = lease(r0_);
  ASSERT_TRUE(vote(r1_, staged.round));
  EXPECT_EQ(group().state, GroupState::kForming);
  ASSERT_TRUE(release(r0_, again, LeaseEnd::kUnchanged));
  ASSERT_TRUE(vote(r0_, staged.round));
  EXPECT_EQ(group().state, GroupState::kSwitching);
}

TEST_F(Group, ARoundWhoseVersionHasEndedIsAbortedByTheNextThatAsks) {
  write(a_, 1);
  const Lease staged = stage({r0_});
  const WaiterId waits = ask_decision(r0_, staged.round);
  write(a_, 2);
  const Lease next = lease(r1_);
  EXPECT_EQ(next.version, 2u);
  EXPECT_NE(next.round, staged.round);
  EXPECT_FALSE(decided(waits)->commit);
  EXPECT_THAT(decided(waits)->reason, HasSubstr("version 1 ended"));
}

TEST_F(Group, AVersionThatEndedAfterAllHadItMayStillBeCommitted) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  write(a_, 2);
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  EXPECT_TRUE(decided(ask_decision(r0_, staged.round))->commit);
}

TEST_F(Group, ARankThatWaitsForWhatTheRoundOfTheOthersDoesNotBringIsToldAtOnce) {
  write(a_, 1);
  const WaiterId patient = ask(r1_, {kAtLeast, 3});
  (void)lease(r0_);
  ASSERT_NE(reply<LeaseReply>(patient), nullptr);
  EXPECT_EQ(reply<LeaseReply>(patient)->result.error().code, ErrorCode::kInvalidArgument);
}

TEST_F(Group, RanksThatWaitForAVersionEnterOneRoundWhenItComes) {
  const WaiterId first = ask(r0_), second = ask(r1_);
  write(a_, 1);
  ASSERT_NE(reply<LeaseReply>(second), nullptr);
  EXPECT_EQ(reply<LeaseReply>(first)->result->round, reply<LeaseReply>(second)->result->round);
}

TEST_F(Group, AcquireWaitsWhileACommitIsNotAppliedByAll) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  (void)say_applied(r0_, staged);
  const WaiterId early = ask(r0_, {}, 100), later = ask(r0_, {}, 1000);
  wait_ms(100);
  EXPECT_EQ(reply<LeaseReply>(early)->result.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(reply<LeaseReply>(early)->result.error().message,
              HasSubstr("group engine: version 1 is committed, rank r1 holds no version"));
  EXPECT_EQ(reply<LeaseReply>(later), nullptr);
  (void)say_applied(r1_, staged);
  ASSERT_NE(reply<LeaseReply>(later), nullptr);
  EXPECT_NE(reply<LeaseReply>(later)->result->round, staged.round);
}

// It could not learn the decision by its deadline, and begins again: the round cannot be finished.
TEST_F(Group, ARankThatBeginsAgainInsteadOfApplyingMakesTheGroupBrokenAndCanRepairIt) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  const WaiterId waits = say_applied(r0_, staged);
  const Lease next = lease(r1_);
  EXPECT_NE(next.round, staged.round);
  EXPECT_EQ(all_hold(waits).error().code, ErrorCode::kGroupBroken);
  EXPECT_THAT(all_hold(waits).error().message, HasSubstr("rank r1"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_TRUE(decided(ask_decision(r1_, staged.round))->commit) << "recorded once and for all";
  refit({r0_, r1_});
}

TEST_F(Group, ARankLostBeforeTheDecisionAbortsTheRound) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  const WaiterId waits = ask_decision(r0_, staged.round);
  table().lose(r1_, "killed", now_);
  EXPECT_FALSE(decided(waits)->commit);
  EXPECT_THAT(decided(waits)->reason, HasSubstr("rank r1 was lost: killed"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("rank r1 was lost"));
}

TEST_F(Group, ARankLostAfterTheCommitBreaksTheGroupAndIsNamed) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  const WaiterId waits = say_applied(r0_, staged);
  table().lose(r1_, "killed", now_);
  EXPECT_EQ(all_hold(waits).error().code, ErrorCode::kGroupBroken);
  EXPECT_THAT(all_hold(waits).error().message, HasSubstr("rank r1 was lost: killed"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_EQ(all_hold(say_applied(r0_, staged)).error().code, ErrorCode::kGroupBroken);
  EXPECT_TRUE(decided(ask_decision(r0_, staged.round))->commit) << "it stays decided";
}

TEST_F(Group, ABrokenGroupIsWholeAgainWhenTheLostRankComesBackWithTheVersion) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  (void)say_applied(r0_, staged);
  table().lose(r1_, "stopped", now_);
  r1_ = rank("r1", 2, 7, voted(staged, 0));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_TRUE(decided(ask_decision(r1_, staged.round))->commit)
      << "a rank that was away learns what was decided, and nothing else";
  EXPECT_TRUE(all_hold(say_applied(r1_, staged)));
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_TRUE(group().reason.empty());
}

TEST_F(Group, ABrokenGroupIsRepairedByARoundWithTheRestartedRank) {
  write(a_, 1);
  refit({r0_, r1_});
  table().lose(r1_, "killed", now_);
  r1_ = rank("r1", 2, 8);
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("r1"));
  refit({r0_, r1_});
}

TEST_F(Group, HoldRepairsWhereEveryRankStillHasTheVersion) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  (void)say_applied(r0_, staged);
  (void)say_applied(r1_, staged);
  ASSERT_TRUE(table().hold(r0_, 1, now_));  // rollback()
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("rank r0 holds version 1"));
  ASSERT_TRUE(table().hold(r1_, 1, now_));
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
}

TEST_F(Group, AbortInPlaceLeavesNoVersionAndSaysSo) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  Lease staged;
  for (const uint64_t rank : {r0_, r1_}) {
    staged = lease(rank);
    ASSERT_TRUE(release(rank, staged, LeaseEnd::kLost));
  }
  EXPECT_EQ(group().state, GroupState::kBroken);
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round, false, "torn read"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_EQ(group().reason, "no rank holds a version");
  refit({r0_, r1_});
}

TEST_F(Group, AThirdRankOfTwoAndAnotherSizeAreRefused) {
  EXPECT_EQ(try_rank("r2").error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(try_rank("r2", 3).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(Group, AnEngineThatStartsAgainMayHaveAnotherSize) {
  write(a_, 1);
  refit({r0_, r1_});
  ASSERT_TRUE(table().leave(r0_, now_));
  ASSERT_TRUE(table().leave(r1_, now_));
  EXPECT_TRUE(table().groups("").empty());
  const std::vector<uint64_t> ranks{rank("r0", 3, 8), rank("r1", 3, 8), rank("r2", 3, 8)};
  refit(ranks);
}

TEST_F(Group, TheStoryOfAVersionNamesTheRoundTheVotesAndTheDecision) {
  write(a_, 1);
  refit({r0_, r1_});
  std::vector<std::string> story;
  for (const VersionEvent& event : table().history("policy", 1).value()) {
    story.push_back(event.who + ": " + event.what);
  }
  EXPECT_THAT(story, Contains(HasSubstr("r0: opened round")));
  EXPECT_THAT(story, Contains("r1: voted ready"));
  EXPECT_THAT(story, Contains(HasSubstr("COMMIT")));
  EXPECT_THAT(story, Contains("r0: applied"));
}

TEST_F(Group, NothingOfAGroupIsLeftWhenItsRanksHaveGone) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  (void)ask_decision(r0_, staged.round);
  ASSERT_TRUE(table().leave(r0_, now_));
  ASSERT_TRUE(table().leave(r1_, now_));
  ASSERT_TRUE(table().leave(a_, now_));
  wait_ms(60000);
  EXPECT_EQ(table().stats(), TableStats{});
}

}  // namespace
}  // namespace transfuse

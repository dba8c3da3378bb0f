// Tests of groups whose coordinator dies between the votes and the end.
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

using testing::HasSubstr;
using enum VersionRequest::Kind;

class Restarted : public Group {
 protected:
  void SetUp() override {
    write(a_, 1);
    refit({r0_, r1_});
    write(a_, 2);
    staged_ = stage({r0_, r1_});
    restart();
    a_ = try_join(MemberRole::kSource, "a", 7, 1,
                  Resume{.id = a_, .last_published = 2, .offers = {offer_of(2)}})
             .value();
  }
  Lease staged_;
};

TEST_F(Restarted, ACommitThatOneRankWasToldIsTrueForAll) {
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  const WaiterId waits = ask_decision(r0_, staged_.round);
  EXPECT_EQ(reply<DecisionReply>(waits), nullptr) << "the other may have been told";
  r1_ = rank("r1", 2, 7, voted(staged_, 1, true));
  ASSERT_NE(reply<DecisionReply>(waits), nullptr);
  EXPECT_TRUE(decided(waits)->commit);
  EXPECT_EQ(group().state, GroupState::kSwitching);
  (void)say_applied(r0_, staged_);
  EXPECT_TRUE(all_hold(say_applied(r1_, staged_)));
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 2u);
  refit({r0_, r1_});
}

TEST_F(Restarted, ACommitThatOneRankHasAppliedIsTrueForAll) {
  r1_ = rank("r1", 2, 7, voted(staged_, 2, true));
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  EXPECT_TRUE(decided(ask_decision(r0_, staged_.round))->commit);
  EXPECT_TRUE(all_hold(say_applied(r0_, staged_)));
  EXPECT_EQ(group().state, GroupState::kWhole);
}

TEST_F(Restarted, ARankThatHoldsTheNumberFromBeforeHasNotAppliedIt) {
  r1_ = rank("r1", 2, 7, voted(staged_, 2, true));
  r0_ = rank("r0", 2, 7, voted(staged_, 2));  // 2 of the trainers before they restarted
  EXPECT_EQ(group().state, GroupState::kSwitching);
  EXPECT_TRUE(all_hold(say_applied(r0_, staged_)));
  EXPECT_EQ(group().state, GroupState::kWhole);
}

TEST_F(Restarted, RanksThatHaveAppliedAreWholeThoughTrainersRestartedWhileTheyCameBack) {
  r1_ = rank("r1", 2, 7, Resume{.landed = 2, .last_round = staged_.round});
  table().lose(a_, "killed", now_);
  a_ = source("a", 1, 8);
  r0_ = rank("r0", 2, 7, voted(staged_, 2, true));
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().round, 0u);
}

TEST_F(Group, ARankThatGoesBackBeforeAllHaveAppliedBlocksNobody) {
  write(a_, 1);
  refit({r0_, r1_});
  write(a_, 2);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  (void)say_applied(r0_, staged);
  ASSERT_TRUE(table().hold(r0_, 1, now_));  // rollback()
  (void)say_applied(r1_, staged);
  EXPECT_EQ(group().state, GroupState::kSwitching);
  EXPECT_THAT(group().reason, HasSubstr("rank r0 holds version 1"));
  EXPECT_NE(lease(r0_).round, staged.round);
  refit({r0_, r1_});
}

TEST_F(Restarted, WhatNoRankWasToldIsAborted) {
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  const WaiterId waits = ask_decision(r0_, staged_.round);
  r1_ = rank("r1", 2, 7, voted(staged_, 1));
  EXPECT_FALSE(decided(waits)->commit);
  EXPECT_FALSE(decided(ask_decision(r1_, staged_.round))->commit);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
  refit({r0_, r1_});
}

TEST_F(Group, ACommitOfWhatAllHoldAlreadyIsNotAbortedByARestart) {
  write(a_, 1);
  refit({r0_, r1_});
  const Lease staged = stage({r0_, r1_});  // the same again; r1 is told, has finished, and forgets
  restart();
  r0_ = rank("r0", 2, 7, voted(staged, 1));
  r1_ = rank("r1", 2, 7, Resume{.landed = 1});
  EXPECT_EQ(decided(ask_decision(r0_, staged.round)).error().code, ErrorCode::kGroupBroken);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(table().stats().rounds, 0u);
}

TEST_F(Restarted, ARankThatGivesUpCannotAbortWhatAnotherMayHaveBeenTold) {
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  ASSERT_TRUE(vote(r0_, staged_.round, false, "its deadline passed"));
  const WaiterId waits = ask_decision(r0_, staged_.round, 100);
  EXPECT_EQ(reply<DecisionReply>(waits), nullptr);
  r1_ = rank("r1", 2, 7, voted(staged_, 2, true));
  EXPECT_TRUE(decided(waits)->commit);
}

TEST_F(Restarted, ARankThatHadNotVotedProvesThatNothingWasDecided) {
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  r1_ = rank("r1", 2, 7, Resume{.landed = 1});
  EXPECT_FALSE(decided(ask_decision(r0_, staged_.round))->commit);
  refit({r0_, r1_});
}

TEST_F(Restarted, ARankThatHasGoneOnMayHaveBeenToldAndForgotten) {
  r1_ = rank("r1", 2, 7, Resume{.landed = 2, .last_round = staged_.round + 1});
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  const auto decision = decided(ask_decision(r0_, staged_.round));
  EXPECT_EQ(decision.error().code, ErrorCode::kGroupBroken);
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("rank r1 has gone on to another round"));
  refit({r0_, r1_});
}

TEST_F(Restarted, WithoutEveryRankTheDecisionIsNotKnownAndTheGroupBroken) {
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  const WaiterId waits = ask_decision(r0_, staged_.round, 60000);
  for (int i = 0; i < 5; ++i) {
    beat({a_, r0_});
    wait_ms(2000);
  }
  ASSERT_NE(reply<DecisionReply>(waits), nullptr);
  EXPECT_EQ(decided(waits).error().code, ErrorCode::kGroupBroken);
  EXPECT_THAT(decided(waits).error().message, HasSubstr("not every rank has come back"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  r1_ = rank("r1", 2, 8);
  refit({r0_, r1_});
}

TEST_F(Restarted, ACommitThatIsKnownIsNotAppliedForEverByARankThatNeverComesBack) {
  r0_ = rank("r0", 2, 7, voted(staged_, 2, true));
  const WaiterId waits = say_applied(r0_, staged_, 60000);
  const WaiterId next = ask(r0_, {}, 60000);
  for (int i = 0; i < 5; ++i) {
    beat({a_, r0_});
    wait_ms(2000);
  }
  ASSERT_NE(reply<AppliedReply>(waits), nullptr);
  EXPECT_EQ(all_hold(waits).error().code, ErrorCode::kGroupBroken);
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_NE(reply<LeaseReply>(next), nullptr);
}

TEST_F(Restarted, ACommitThatIsToldLateIsTrueThoughAnotherRoundIsOpen) {
  r1_ = rank("r1", 2, 7, voted(staged_, 2, true));
  const WaiterId waits = say_applied(r1_, staged_, 100);
  wait_ms(100);
  EXPECT_EQ(all_hold(waits).error().code, ErrorCode::kDeadlineExceeded);
  r0_ = rank("r0", 2, 7, voted(staged_, 1));
  EXPECT_TRUE(decided(ask_decision(r0_, staged_.round))->commit);
}

TEST_F(Restarted, RanksThatHoldDifferentVersionsAreBroken) {
  r0_ = rank("r0", 2, 7, Resume{.landed = 2});
  r1_ = rank("r1", 2, 7, Resume{.landed = 1});
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("rank r1 holds version 1"));
  refit({r0_, r1_});
}

TEST_F(Restarted, AWholeGroupIsWholeAgainAtOnce) {
  r0_ = rank("r0", 2, 7, Resume{.landed = 1});
  EXPECT_NE(group().state, GroupState::kWhole);
  r1_ = rank("r1", 2, 7, Resume{.landed = 1});
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
}

// Not a restart: the coordinator lives, and knows better than a rank that was silent.
TEST_F(Group, ARankThatComesBackToTheSameCoordinatorReopensNoRound) {
  write(a_, 1);
  const Lease staged = stage({r0_, r1_});
  ASSERT_TRUE(vote(r0_, staged.round));
  ASSERT_TRUE(vote(r1_, staged.round));
  EXPECT_TRUE(decided(ask_decision(r0_, staged.round))->commit);
  table().lose(r1_, "silent", now_);
  r1_ = rank("r1", 2, 7, voted(staged, 0));
  EXPECT_TRUE(decided(ask_decision(r1_, staged.round))->commit) << "not aborted by its return";

  table().lose(r1_, "silent", now_);
  const VersionRequest brief{.kind = kNewest, .version = 0, .round_ms = 1};
  for (int i = 0; i < 6; ++i) {
    (void)lease(r0_, brief);
    wait_ms(1);
  }
  r1_ = rank("r1", 2, 7, voted(staged, 0));
  EXPECT_EQ(decided(ask_decision(r1_, staged.round)).error().code, ErrorCode::kGroupBroken)
      << "forgotten, and nothing is made up";
}

}  // namespace
}  // namespace transfuse

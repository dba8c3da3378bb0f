// Groups over gRPC: ranks that are processes, and a coordinator that dies between the phases.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <cstdint>
#include <memory>
#include <string>

#include "rpc/member_process.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// A trainer here, and an engine of two ranks, each a process of its own.
class RpcGroup : public CoordinatorTest {
 protected:
  void SetUp() override {
    control_ = connect();
    source_ = join_as(*control_, MemberRole::kSource, "trainer0").value();
    for (int rank = 0; rank < 2; ++rank) ranks_[rank] = start_rank(rank);
  }

  std::unique_ptr<Process> start_rank(int rank) {
    auto process = member();
    EXPECT_EQ(process->line(), "ok");
    EXPECT_EQ(process->ask("join target rank" + std::to_string(rank) + " 1 2"), "ok");
    return process;
  }
  void publish(uint64_t version) { ASSERT_TRUE(write_version(*control_, source_, version)); }
  void stage(uint64_t version) {
    const std::string number = std::to_string(version);
    for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("acquire " + number), "ok " + number);
    for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("staged"), "ok");
  }
  void apply(uint64_t version) {
    for (const auto& rank : ranks_) rank->send("apply " + std::to_string(version));
    for (const auto& rank : ranks_) ASSERT_EQ(rank->line(), "ok");
  }
  // A whole round.
  void switch_to(uint64_t version) {
    stage(version);
    for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("vote 1"), "ok");
    for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("decide"), "commit");
    apply(version);
  }
  void kill_coordinator() { ASSERT_EQ(::kill(static_cast<pid_t>(coordinator().pid), SIGKILL), 0); }
  GroupInfo group() {
    const auto groups = control_->groups("policy");
    EXPECT_TRUE(groups) << groups.error().to_string();
    EXPECT_EQ(groups->size(), 1u);
    return groups->empty() ? GroupInfo{} : groups->front();
  }

  std::unique_ptr<Control> control_;
  MemberId source_{};
  std::unique_ptr<Process> ranks_[2];
};

TEST_F(RpcGroup, RanksOfTwoProcessesSwitchTogether) {
  publish(1);
  switch_to(1);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
  publish(2);
  switch_to(2);
  EXPECT_EQ(group().version, 2u);
  const auto history = control_->history("policy", 2);
  ASSERT_TRUE(history) << history.error().to_string();
  std::string story;
  for (const VersionEvent& event : *history) story += event.who + " " + event.what + "; ";
  EXPECT_THAT(story, HasSubstr("trainer0 published"));
  EXPECT_THAT(story, HasSubstr("rank1 voted ready"));
  EXPECT_THAT(story, HasSubstr("COMMIT"));
}

TEST_F(RpcGroup, ARankThatIsKilledBeforeItsVoteAbortsTheRoundForTheOther) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  ASSERT_EQ(ranks_[0]->ask("vote 1"), "ok");
  ranks_[0]->send("decide");
  ranks_[1]->kill(SIGKILL);
  EXPECT_THAT(ranks_[0]->line(), StartsWith("abort: rank rank1 was lost"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  EXPECT_THAT(group().reason, HasSubstr("rank1"));
}

TEST_F(RpcGroup, ARankThatIsKilledAfterTheDecisionBreaksTheGroupUntilItIsBack) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("vote 1"), "ok");
  for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("decide"), "commit");
  ranks_[0]->send("apply 2");
  ranks_[1]->kill(SIGKILL);
  const std::string answer = ranks_[0]->line();
  EXPECT_THAT(answer, HasSubstr("GROUP_BROKEN"));
  EXPECT_THAT(answer, HasSubstr("rank1"));
  EXPECT_EQ(group().state, GroupState::kBroken);
  ranks_[1] = start_rank(1);
  switch_to(2);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 2u);
}

TEST_F(RpcGroup, ACoordinatorThatDiesBeforeTheDecisionAbortsTheRound) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  ASSERT_EQ(ranks_[0]->ask("vote 1"), "ok");
  kill_coordinator();
  EXPECT_THAT(ranks_[0]->ask("decide"), StartsWith("abort: the coordinator was lost"));
  switch_to(2);
  EXPECT_EQ(group().version, 2u);
}

TEST_F(RpcGroup, ADecisionThatOneRankHasLearnedOutlivesTheCoordinator) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("vote 1"), "ok");
  ASSERT_EQ(ranks_[0]->ask("decide"), "commit");
  kill_coordinator();
  EXPECT_EQ(ranks_[1]->ask("decide"), "commit");
  apply(2);
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 2u);
}

TEST_F(RpcGroup, ADecisionThatNobodyHasLearnedIsAnAbortForAll) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("vote 1"), "ok");
  kill_coordinator();
  for (const auto& rank : ranks_) {
    EXPECT_THAT(rank->ask("decide"), StartsWith("abort: the coordinator was lost"));
  }
  EXPECT_EQ(group().state, GroupState::kWhole);
  EXPECT_EQ(group().version, 1u);
}

TEST_F(RpcGroup, ARankAndTheCoordinatorThatDieTogetherLeaveNoMixedGroup) {
  publish(1);
  switch_to(1);
  publish(2);
  stage(2);
  for (const auto& rank : ranks_) ASSERT_EQ(rank->ask("vote 1"), "ok");
  ASSERT_EQ(ranks_[1]->ask("decide"), "commit");
  ranks_[1]->kill(SIGKILL);
  kill_coordinator();
  // The only rank that knew is gone: the other must not guess.
  ranks_[0]->send("decide");
  const std::string answer = ranks_[0]->line();
  EXPECT_THAT(answer, HasSubstr("GROUP_BROKEN"));
  ranks_[1] = start_rank(1);
  switch_to(2);
  EXPECT_EQ(group().state, GroupState::kWhole);
}

}  // namespace
}  // namespace transfuse

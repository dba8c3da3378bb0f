// The ranks of one engine: all hold a version, or none does, or it is said that the group is
// broken.
#include <algorithm>
#include <chrono>
#include <future>
#include <string>
#include <thread>

#include <gtest/gtest.h>
#include "session/refit_world.h"
#include "transport/local/faulty.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

class Group : public ::testing::Test {
 protected:
  static constexpr size_t kRanks = 2;

  Group() : transport_(testing::value_or_fail(open_local_transport(), "transport")) {
    for (auto& faulty : faulty_) {
      faulty = testing::value_or_fail(open_faulty_local_transport({}), "faulty transport");
    }
    options_.into = ReceiveInto::kShadow;
    options_.no_progress_ms = 200;
    options_.plan.chunk_bytes = 2048;
    options_.group = "engine";
    options_.group_size = kRanks;
    trainer_ = std::make_unique<Trainer>(*transport_, *control_, layouts("fsdp:dp=1,dtype=f32")[0],
                                         "trainer0", 1);
  }

  void start_rank(size_t rank) {
    ranks_[rank].reset();
    ranks_[rank] = std::make_unique<Engine>(*faulty_[rank], *control_, layouts("vllm:tp=2")[rank],
                                            "rank" + std::to_string(rank), options_);
  }
  // Every rank holds version 1.
  void start() {
    for (size_t rank = 0; rank < kRanks; ++rank) start_rank(rank);
    trainer_->publish(1);
    refit_all(1);
  }
  Receiver& receiver(size_t rank) { return *ranks_[rank]->receiver; }
  std::future<Result<RefitReport>> refit(size_t rank, int64_t deadline_ms = 10000) {
    return std::async(std::launch::async,
                      [this, rank, deadline_ms] { return ranks_[rank]->refit({}, deadline_ms); });
  }
  std::future<Result<RefitReport>> commit(size_t rank, int64_t deadline_ms = 10000) {
    return std::async(std::launch::async, [this, rank, deadline_ms] {
      return receiver(rank).commit(Deadline::after_ms(deadline_ms));
    });
  }
  void refit_all(uint64_t version) {
    auto first = refit(0);
    auto second = refit(1);
    for (auto* pending : {&first, &second}) {
      auto report = pending->get();
      ASSERT_TRUE(report) << report.error().to_string();
      EXPECT_EQ(report->version, version);
    }
    expect_whole(version);
  }
  void expect_whole(uint64_t version) {
    for (size_t rank = 0; rank < kRanks; ++rank) {
      expect_held(rank, version);
      auto group = receiver(rank).check_group();
      ASSERT_TRUE(group) << group.error().to_string();
      EXPECT_EQ(group->state, GroupState::kWhole);
      EXPECT_EQ(group->version, version);
    }
  }
  void expect_held(size_t rank, uint64_t version) {
    EXPECT_EQ(receiver(rank).version(), version);
    EXPECT_EQ(ranks_[rank]->parameters.wrong_elements(version), 0) << "rank " << rank;
  }
  void stage(size_t rank, int64_t deadline_ms = 10000) {
    ASSERT_TRUE(receiver(rank).stage({}, Deadline::after_ms(deadline_ms)));
  }
  void stage_all() {
    for (size_t rank = 0; rank < kRanks; ++rank) stage(rank);
    for (size_t rank = 0; rank < kRanks; ++rank) {
      auto staged = receiver(rank).wait_staged(soon());
      ASSERT_TRUE(staged) << staged.error().to_string();
    }
  }
  static Deadline soon() { return Deadline::after_ms(10000); }
  void inject(size_t rank, Fault fault, uint64_t count, uint64_t first = 0) {
    FaultPlan plan;
    for (uint64_t i = first; i < first + count; ++i) {
      plan.script.push_back({.submit_index = faulty_[rank]->submit_count() + i, .fault = fault});
    }
    faulty_[rank]->set_plan(plan);
  }

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<FaultyTransport> faulty_[kRanks];
  std::unique_ptr<Control> control_ = open_local_control();
  ReceiverOptions options_;
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<Engine> ranks_[kRanks];
};

TEST_F(Group, EveryRankCommitsTheSameVersion) {
  start();
  for (uint64_t version = 2; version <= 10; ++version) {
    trainer_->publish(version);
    refit_all(version);
  }
}

TEST_F(Group, EveryRankReceivesTheSameVersionInPlace) {
  options_.into = ReceiveInto::kInPlace;
  start();
  for (uint64_t version = 2; version <= 10; ++version) {
    trainer_->publish(version);
    refit_all(version);
  }
}

TEST_F(Group, CommitAfterStagingWaitsOnlyForTheOtherRanks) {
  start();
  trainer_->publish(2);
  stage_all();
  trainer_->publish(3);  // both have left version 2 at its source already
  auto first = commit(0);
  auto second = commit(1);
  EXPECT_TRUE(first.get());
  EXPECT_TRUE(second.get());
  expect_whole(2);
}

TEST_F(Group, NoRankCommitsIfTheTransferOfOneFails) {
  start();
  trainer_->publish(2);
  inject(1, Fault::kLie, 100000);
  stage(0);
  stage(1, 3000);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto healthy = commit(0);
  ASSERT_FALSE(receiver(1).wait_staged(soon()));
  EXPECT_FALSE(receiver(1).commit(soon()));
  auto aborted = healthy.get();
  ASSERT_FALSE(aborted);
  EXPECT_EQ(aborted.error().code, ErrorCode::kCancelled);
  EXPECT_NE(aborted.error().message.find("rank1"), std::string::npos) << aborted.error().message;
  expect_whole(1);
  EXPECT_EQ(receiver(0).staged().state, StageState::kFailed);

  faulty_[1]->set_plan({});
  refit_all(2);
}

TEST_F(Group, RefitOfAHealthyRankWaitsForTheNextRoundOfTheOthers) {
  start();
  trainer_->publish(2);
  inject(1, Fault::kLie, 100000);
  auto healthy = refit(0, 20000);
  const Deadline voted_by = soon();
  while (receiver(0).staged().state != StageState::kReady) {
    ASSERT_FALSE(voted_by.passed());
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  auto failed = refit(1, 2000).get();
  ASSERT_FALSE(failed);
  expect_held(1, 1);
  faulty_[1]->set_plan({});
  auto again = refit(1, 20000).get();
  ASSERT_TRUE(again) << again.error().to_string();
  auto report = healthy.get();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_GE(report->attempts, 2u);
  EXPECT_FALSE(report->steps.empty());
  expect_whole(2);
}

TEST_F(Group, RankThatLeavesBeforeItVotesAbortsAndItsReturnRepairs) {
  start();
  trainer_->publish(2);
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto waiting = commit(0);
  ranks_[1]->receiver.reset();
  auto aborted = waiting.get();
  ASSERT_FALSE(aborted);
  EXPECT_EQ(aborted.error().code, ErrorCode::kCancelled);
  EXPECT_NE(aborted.error().message.find("rank1"), std::string::npos) << aborted.error().message;
  expect_held(0, 1);
  auto group = receiver(0).check_group();
  ASSERT_FALSE(group);
  EXPECT_EQ(group.error().code, ErrorCode::kGroupBroken);
  EXPECT_NE(group.error().message.find("rank1"), std::string::npos) << group.error().message;
  start_rank(1);
  refit_all(2);
}

TEST_F(Group, RankThatLeavesBetweenDecisionAndCommitBreaksTheGroupAndItsReturnRepairs) {
  start();
  trainer_->publish(2);
  stage_all();
  ranks_[1]->receiver.reset();  // both have voted: the decision is recorded
  auto broken = receiver(0).commit(soon());
  ASSERT_FALSE(broken);
  EXPECT_EQ(broken.error().code, ErrorCode::kGroupBroken);
  auto group = receiver(0).check_group();
  ASSERT_FALSE(group);
  EXPECT_EQ(group.error().code, ErrorCode::kGroupBroken);
  start_rank(1);
  EXPECT_FALSE(receiver(1).check_group());
  refit_all(2);
}

TEST_F(Group, RefitAppliesWhatWasDecidedWithoutWaitingForANewRankToHoldIt) {
  start();
  trainer_->publish(2);
  stage_all();
  start_rank(
      1);  // another process in its place: it holds nothing, and never will hold this round's
  refit_all(2);
}

TEST_F(Group, CommitOfOneRankSaysWhoHasNotCommitted) {
  start();
  trainer_->publish(2);
  stage_all();
  auto alone = receiver(0).commit(Deadline::after_ms(150));
  ASSERT_FALSE(alone);
  EXPECT_EQ(alone.error().code, ErrorCode::kGroupBroken);
  EXPECT_NE(alone.error().message.find("rank1 holds version 1"), std::string::npos)
      << alone.error().message;
  expect_held(0, 2);
  EXPECT_EQ(receiver(0).check_group().error().code, ErrorCode::kGroupBroken);
  auto late = receiver(1).commit(soon());  // decided is decided
  ASSERT_TRUE(late) << late.error().to_string();
  expect_whole(2);
}

TEST_F(Group, DecidedVersionIsCommittedBeforeAnotherOneIsStaged) {
  start();
  trainer_->publish(2);
  stage_all();
  trainer_->publish(3);
  auto early = receiver(0).stage({}, soon());
  ASSERT_FALSE(early);
  EXPECT_EQ(early.error().code, ErrorCode::kAlreadyExists);
  auto first = commit(0);
  auto second = commit(1);
  EXPECT_TRUE(first.get());
  EXPECT_TRUE(second.get());
  refit_all(3);
}

TEST_F(Group, RankThatStagesAgainGivesTheRoundUp) {
  start();
  trainer_->publish(2);
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  trainer_->publish(3);
  stage_all();
  auto first = commit(0);
  auto second = commit(1);
  EXPECT_TRUE(first.get());
  EXPECT_TRUE(second.get());
  expect_whole(3);
}

TEST_F(Group, DeadlineOfOneRankEndsTheRoundForAllAndTheVersionBeforeStays) {
  start();
  trainer_->publish(2);
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto given_up = receiver(0).commit(Deadline::after_ms(100));
  ASSERT_FALSE(given_up);
  EXPECT_EQ(given_up.error().code, ErrorCode::kCancelled);
  EXPECT_NE(given_up.error().message.find("deadline"), std::string::npos)
      << given_up.error().message;
  expect_whole(1);
  refit_all(2);
}

TEST_F(Group, CancelledCommitGivesTheRoundUp) {
  start();
  trainer_->publish(2);
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto waiting = commit(0, 60000);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  receiver(0).cancel();
  auto cancelled = waiting.get();
  ASSERT_FALSE(cancelled);
  EXPECT_EQ(cancelled.error().code, ErrorCode::kCancelled);
  expect_whole(1);
  refit_all(2);
}

TEST_F(Group, RoundThatNobodyCompletesEndsByItself) {
  options_.round_ms = 200;
  start();
  trainer_->publish(2);
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto ended = receiver(0).commit(soon());
  ASSERT_FALSE(ended);
  EXPECT_EQ(ended.error().code, ErrorCode::kCancelled);
  EXPECT_NE(ended.error().message.find("rank1"), std::string::npos) << ended.error().message;
  expect_whole(1);
}

TEST_F(Group, AbortInPlaceLeavesNoVersionAndSaysSo) {
  options_.into = ReceiveInto::kInPlace;
  start();
  trainer_->publish(2);
  inject(1, Fault::kLie, 100000, 1);  // its first read is that of the generation
  auto healthy = refit(0, 3000);
  EXPECT_FALSE(refit(1, 1500).get());
  auto aborted = healthy.get();
  ASSERT_FALSE(aborted);
  EXPECT_EQ(aborted.error().code, ErrorCode::kCancelled);
  EXPECT_NE(aborted.error().message.find("no version"), std::string::npos)
      << aborted.error().message;
  for (size_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(receiver(rank).version(), 0u);
    EXPECT_EQ(receiver(rank).check_group().error().code, ErrorCode::kGroupBroken);
  }
  faulty_[1]->set_plan({});
  refit_all(2);
}

TEST_F(Group, RollbackOfEveryRankMakesTheGroupWholeAgain) {
  options_.keep_previous = true;
  start();
  trainer_->publish(2);
  refit_all(2);
  ASSERT_TRUE(receiver(0).rollback(soon()));
  EXPECT_EQ(receiver(0).check_group().error().code, ErrorCode::kGroupBroken);
  EXPECT_EQ(receiver(1).check_group().error().code, ErrorCode::kGroupBroken);
  ASSERT_TRUE(receiver(1).rollback(soon()));
  expect_whole(1);
  trainer_->publish(3);
  refit_all(3);
}

TEST_F(Group, RankThatClosesWithAStageUnderWayLeavesTheOthersTheirVersion) {
  start();
  trainer_->publish(2);
  ASSERT_TRUE(
      receiver(1).stage({}, Deadline::after_ms(600000), {.max_gigabytes_per_second = 1e-6}));
  stage(0);
  ASSERT_TRUE(receiver(0).wait_staged(soon()));
  auto waiting = commit(0);
  ranks_[1]->receiver.reset();
  auto aborted = waiting.get();
  ASSERT_FALSE(aborted);
  EXPECT_EQ(aborted.error().code, ErrorCode::kCancelled);
  expect_held(0, 1);
}

TEST_F(Group, RandomFaultsNeverLeaveRanksWithDifferentVersions) {
  start();
  FaultPlan plan;
  plan.delay_ms = 2;
  for (const Fault fault : {Fault::kDelay, Fault::kDrop, Fault::kCorrupt, Fault::kLie,
                            Fault::kLateWrite, Fault::kPartial}) {
    plan.chance[static_cast<size_t>(fault)] = 0.02;
  }
  for (size_t rank = 0; rank < kRanks; ++rank) {
    plan.seed = 20261121 + rank;
    faulty_[rank]->set_plan(plan);
  }
  uint64_t held = 1;
  int succeeded = 0;
  for (uint64_t version = 2; version < 14; ++version) {
    trainer_->publish(version);
    auto first = refit(0, 2000);
    auto second = refit(1, 2000);
    const auto report = first.get();
    const auto other = second.get();
    // Whether or not a rank ran out of time while it waited to hear from the other one.
    held = std::max(held, receiver(0).version());
    if (report || other) {
      ASSERT_EQ(held, version);
      ++succeeded;
    }
    ASSERT_NO_FATAL_FAILURE(expect_whole(held));
  }
  EXPECT_GT(succeeded, 0);
}

}  // namespace
}  // namespace transfuse

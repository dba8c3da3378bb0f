// Refits over a transport that misbehaves by a seeded plan: a correct retry or a typed error, never
// a false success.
#include <algorithm>
#include <future>
#include <thread>

#include <gtest/gtest.h>
#include "session/refit_world.h"
#include "transport/local/faulty.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

class FaultyRefit : public ::testing::Test {
 protected:
  FaultyRefit()
      : source_transport_(testing::value_or_fail(open_local_transport(), "transport")),
        faulty_(testing::value_or_fail(open_faulty_local_transport({}), "faulty transport")) {
    options_.no_progress_ms = 150;
    options_.plan.chunk_bytes = 2048;
  }

  void start(std::string_view trainers, std::string_view engine) {
    const auto all = layouts(trainers);
    for (size_t i = 0; i < all.size(); ++i) {
      trainers_.push_back(std::make_unique<Trainer>(
          *source_transport_, *control_, all[i], std::string("trainer").append(std::to_string(i)),
          static_cast<uint32_t>(all.size())));
      trainers_.back()->publish(1);
    }
    engine_ =
        std::make_unique<Engine>(*faulty_, *control_, layouts(engine)[0], "engine0", options_);
  }
  // From the next read on.
  void inject(Fault fault, uint64_t first, uint64_t count = 1) {
    FaultPlan plan;
    for (uint64_t i = 0; i < count; ++i) {
      plan.script.push_back({.submit_index = faulty_->submit_count() + first + i, .fault = fault});
    }
    faulty_->set_plan(plan);
  }
  void expect_right(const Result<RefitReport>& report) {
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(engine_->parameters.wrong_elements(report->version), 0) << report->to_text();
  }

  std::unique_ptr<Transport> source_transport_;
  std::unique_ptr<FaultyTransport> faulty_;
  std::unique_ptr<Control> control_ = open_local_control();
  ReceiverOptions options_;
  std::vector<std::unique_ptr<Trainer>> trainers_;
  std::unique_ptr<Engine> engine_;
};

// Reads 0 and 1 of a refit from two sources are generation reads; weights follow.
constexpr uint64_t kFirstWeights = 2;

TEST_F(FaultyRefit, DroppedReadIsFoundByMissingProgressAndReadAgain) {
  start("fsdp:dp=2", "vllm:tp=2");
  inject(Fault::kDrop, kFirstWeights + 1);
  const auto report = engine_->refit();
  expect_right(report);
  EXPECT_EQ(faulty_->fault_count(Fault::kDrop), 1u);
  ASSERT_FALSE(report->steps.empty());
  EXPECT_EQ(report->steps[0].code, ErrorCode::kDeadlineExceeded);
  EXPECT_NE(report->steps[0].what.find(": retry"),
            std::string::npos);  // I12: the same source again
  EXPECT_GT(report->reread_bytes, 0u);
  EXPECT_LT(report->reread_bytes, report->size_bytes);  // only what is missing
}

TEST_F(FaultyRefit, DroppedGenerationReadIsNoCancellationAndTheRefitGoesOn) {
  start("fsdp:dp=1", "hf");
  inject(Fault::kDrop, 0);
  const auto report = engine_->refit();
  expect_right(report);
  EXPECT_EQ(faulty_->fault_count(Fault::kDrop), 1u);
  ASSERT_FALSE(report->steps.empty());
  EXPECT_EQ(report->steps[0].code, ErrorCode::kDeadlineExceeded) << report->to_text();
}

TEST_F(FaultyRefit, CorruptedChunkIsCaughtNamedAndReadAgain) {
  start("fsdp:dp=2", "vllm:tp=2");
  inject(Fault::kCorrupt, kFirstWeights);
  const auto report = engine_->refit();
  expect_right(report);
  ASSERT_EQ(report->steps.size(), 1u);
  EXPECT_EQ(report->steps[0].code, ErrorCode::kFingerprintMismatch);
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
}

TEST_F(FaultyRefit, TransportThatMovedNothingAndSaysSuccessIsCaught) {
  start("fsdp:dp=2", "vllm:tp=2");
  inject(Fault::kLie, kFirstWeights);
  const auto report = engine_->refit();
  expect_right(report);
  ASSERT_EQ(report->steps.size(), 1u);
  EXPECT_EQ(report->steps[0].code, ErrorCode::kFingerprintMismatch);
}

TEST_F(FaultyRefit, TransportThatAlwaysLiesEndsInATypedErrorAndNoVersion) {
  start("fsdp:dp=1", "hf");
  inject(Fault::kLie, 1, 10000);
  const auto report = engine_->refit({}, 5000);
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(engine_->receiver->version(), 0u);
}

TEST_F(FaultyRefit, I11_LateWriteCannotReachMemoryThatARetryFilled) {
  start("fsdp:dp=2", "vllm:tp=2");
  inject(Fault::kLateWrite, kFirstWeights);
  const auto report = engine_->refit();
  expect_right(report);
  EXPECT_EQ(faulty_->stats().poisoned_bytes, 0u);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(engine_->parameters.wrong_elements(1), 0);
  EXPECT_EQ(faulty_->stats().tickets, 0u);
}

TEST_F(FaultyRefit, T15_DeadReplicaIsReplacedAndOnlyItsUnprovedBytesAreReadAgain) {
  start("fsdp:dp=1,replicas=2", "hf");
  inject(Fault::kDie, kFirstWeights + 2);
  const auto report = engine_->refit();
  expect_right(report);
  ASSERT_FALSE(report->steps.empty());
  EXPECT_EQ(report->steps[0].code, ErrorCode::kUnavailable);
  EXPECT_LT(report->reread_bytes, report->size_bytes * 3 / 4);
  EXPECT_EQ(report->attempts, 1u);
}

TEST_F(FaultyRefit, OnlySourceThatDiesIsATypedErrorWithinTheDeadline) {
  start("fsdp:dp=1", "hf");
  inject(Fault::kDie, kFirstWeights);
  const auto report = engine_->refit({}, 1500);
  ASSERT_FALSE(report);
  EXPECT_EQ(engine_->receiver->version(), 0u);
  EXPECT_FALSE(engine_->receiver->last_report().steps.empty());
}

TEST_F(FaultyRefit, PartialReadIsFinishedByAnotherSource) {
  start("fsdp:dp=1,replicas=2", "hf");
  inject(Fault::kPartial, kFirstWeights);
  expect_right(engine_->refit());
}

TEST_F(FaultyRefit, I8_WriteDuringTheReadIsATornReadAndTheNextVersionArrives) {
  start("fsdp:dp=1", "hf");
  inject(Fault::kDelay, 1, 3);
  FaultPlan plan;
  plan.delay_ms = 300;
  for (uint64_t i = 1; i < 4; ++i) {
    plan.script.push_back({.submit_index = faulty_->submit_count() + i, .fault = Fault::kDelay});
  }
  faulty_->set_plan(plan);
  trainers_.clear();
  trainers_.push_back(std::make_unique<Trainer>(*source_transport_, *control_,
                                                layouts("fsdp:dp=1")[0], "trainer0", 1, 20));
  trainers_[0]->publish(2);
  auto reading = std::async(std::launch::async, [&] { return engine_->refit(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  trainers_[0]->publish(3);  // waits 20 ms for the reader, then revokes it
  const auto report = reading.get();
  expect_right(report);
  EXPECT_EQ(report->version, 3u);
  EXPECT_GE(report->attempts, 2u);
}

TEST_F(FaultyRefit, RandomFaultsNeverEndInAFalseSuccess) {
  start("fsdp:dp=2,replicas=2", "vllm:tp=2");
  FaultPlan plan;
  plan.seed = 20261121;
  plan.delay_ms = 2;
  for (const Fault fault : {Fault::kDelay, Fault::kDrop, Fault::kCorrupt, Fault::kLie,
                            Fault::kLateWrite, Fault::kPartial}) {
    plan.chance[static_cast<size_t>(fault)] = 0.01;
  }
  faulty_->set_plan(plan);
  int succeeded = 0;
  for (uint64_t version = 2; version < 32; ++version) {
    for (auto& trainer : trainers_) trainer->publish(version);
    engine_->parameters.poison(std::byte{0xEE});
    const auto report = engine_->refit({}, 4000);
    if (!report) {
      EXPECT_EQ(engine_->receiver->version(), 0u);
      continue;
    }
    ++succeeded;
    ASSERT_EQ(report->version, version);
    ASSERT_EQ(engine_->parameters.wrong_elements(version), 0) << report->to_text();
  }
  EXPECT_GT(succeeded, 15);
  EXPECT_EQ(faulty_->stats().tickets, 0u);
}

}  // namespace
}  // namespace transfuse

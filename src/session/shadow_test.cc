// Staging into a shadow: the engine's parameters change in commit() and rollback(), and only there.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <thread>

#include <gtest/gtest.h>
#include "session/refit_world.h"
#include "transfuse/verify.h"
#include "transport/local/faulty.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

class ShadowRefit : public ::testing::Test {
 protected:
  ShadowRefit()
      : transport_(testing::value_or_fail(open_local_transport(), "transport")),
        faulty_(testing::value_or_fail(open_faulty_local_transport({}), "faulty transport")) {
    options_.into = ReceiveInto::kShadow;
    options_.no_progress_ms = 200;
    options_.plan.chunk_bytes = 2048;
    start_trainers("fsdp:dp=2,dtype=f32");
  }

  void start_trainers(std::string_view spec) {
    const auto all = layouts(spec);
    for (size_t i = 0; i < all.size(); ++i) {
      trainers_.push_back(std::make_unique<Trainer>(
          *transport_, *control_, all[i], std::string("trainer").append(std::to_string(i)),
          static_cast<uint32_t>(all.size())));
    }
  }
  void publish(uint64_t version) {
    for (auto& trainer : trainers_) trainer->publish(version);
  }
  // An engine whose memory has padding, and which holds `version` already.
  void start_engine(uint64_t version) {
    engine_ =
        std::make_unique<Engine>(*faulty_, *control_, layouts("vllm:tp=2")[1], "engine0", options_);
    if (version == 0) return;
    publish(version);
    auto report = engine_->refit();
    ASSERT_TRUE(report) << report.error().to_string();
    ASSERT_EQ(engine_->parameters.wrong_elements(version), 0);
  }
  Receiver& receiver() { return *engine_->receiver; }
  void inject(Fault fault, uint64_t count) {
    FaultPlan plan;
    plan.delay_ms = 300;
    for (uint64_t i = 0; i < count; ++i) {
      plan.script.push_back({.submit_index = faulty_->submit_count() + i, .fault = fault});
    }
    faulty_->set_plan(plan);
  }
  static Deadline soon() { return Deadline::after_ms(10000); }
  std::vector<std::byte> bytes() {
    std::vector<std::byte> all;
    for (const auto& buffer : engine_->parameters.buffers()) {
      all.insert(all.end(), buffer.begin(), buffer.end());
    }
    return all;
  }
  void expect_padding_is_zero() {
    const Layout& layout = engine_->parameters.layout();
    ASSERT_FALSE(layout.fills().empty());
    for (const Fill& fill : layout.fills()) {
      const auto& buffer = engine_->parameters.buffers()[fill.parameter];
      const auto begin = buffer.begin() + fill.element_offset * 2;
      EXPECT_TRUE(std::all_of(begin, begin + fill.length.product() * 2,
                              [](std::byte byte) { return byte == std::byte{0}; }));
    }
  }
  uint64_t held_by_coordinator() {
    for (const MemberInfo& member : control_->members("model").value()) {
      if (member.name == "engine0") return member.version;
    }
    return UINT64_MAX;
  }

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<FaultyTransport> faulty_;
  std::unique_ptr<Control> control_ = open_local_control();
  ReceiverOptions options_;
  std::vector<std::unique_ptr<Trainer>> trainers_;
  std::unique_ptr<Engine> engine_;
};

TEST_F(ShadowRefit, I9_NoByteOfTheParametersChangesBeforeTheCommitAndAllInIt) {
  start_engine(1);
  const std::vector<std::byte> before = bytes();
  publish(2);
  std::atomic<bool> serving{true};
  std::atomic<int> changed{0};
  std::thread engine([&] {
    while (serving) changed += bytes() != before;
  });
  ASSERT_TRUE(receiver().stage({}, soon(), {.max_gigabytes_per_second = 0.0005}));
  auto staged = receiver().wait_staged(soon());
  serving = false;
  engine.join();
  ASSERT_TRUE(staged) << staged.error().to_string();
  EXPECT_EQ(changed, 0);
  EXPECT_EQ(bytes(), before);
  EXPECT_EQ(receiver().version(), 1u);
  EXPECT_EQ(held_by_coordinator(), 1u);
  EXPECT_EQ(staged->state, StageState::kReady);
  EXPECT_EQ(staged->version, 2u);
  EXPECT_EQ(staged->landed_bytes, staged->size_bytes);

  auto report = receiver().commit(soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 2u);
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
  EXPECT_EQ(receiver().version(), 2u);
  EXPECT_EQ(held_by_coordinator(), 2u);
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
  expect_padding_is_zero();
  EXPECT_EQ(receiver().staged().state, StageState::kNone);
  EXPECT_EQ(receiver().commit(soon()).error().code, ErrorCode::kNotFound);
}

TEST_F(ShadowRefit, RefitIsStageAndCommit) {
  start_engine(0);
  for (uint64_t version = 1; version <= 20; ++version) {
    publish(version);
    auto report = engine_->refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, version);
    EXPECT_EQ(report->attempts, 1u);
    EXPECT_EQ(report->planned, version == 1);
    ASSERT_EQ(engine_->parameters.wrong_elements(version), 0);
    expect_padding_is_zero();
  }
}

TEST_F(ShadowRefit, FailedStageLeavesTheVersionThatWasThereAndSaysWhy) {
  start_engine(1);
  const std::vector<std::byte> before = bytes();
  publish(2);
  inject(Fault::kLie, 100000);
  ASSERT_TRUE(receiver().stage({}, Deadline::after_ms(4000)));
  auto staged = receiver().wait_staged(soon());
  ASSERT_FALSE(staged);
  EXPECT_EQ(receiver().staged().state, StageState::kFailed);
  auto committed = receiver().commit(soon());
  ASSERT_FALSE(committed);
  EXPECT_EQ(committed.error().code, staged.error().code);
  EXPECT_EQ(committed.error().message, staged.error().message);
  EXPECT_FALSE(receiver().last_report().steps.empty());
  EXPECT_EQ(bytes(), before);
  EXPECT_EQ(receiver().version(), 1u);
  EXPECT_EQ(held_by_coordinator(), 1u);

  auto refit = engine_->refit({}, 1000);  // the same in one call
  ASSERT_FALSE(refit);
  EXPECT_EQ(bytes(), before);
  EXPECT_EQ(receiver().version(), 1u);

  faulty_->set_plan({});
  auto report = engine_->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
}

TEST_F(ShadowRefit, TrainerNeedNotWaitForTheCommit) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(receiver().stage({}, soon()));
  ASSERT_TRUE(receiver().wait_staged(soon()));
  for (const VersionInfo& version : control_->versions("model").value()) {
    EXPECT_EQ(version.leases, 0u) << version.version;
  }
  publish(3);  // version 2 is gone at its sources
  auto report = receiver().commit(soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 2u);
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
}

TEST_F(ShadowRefit, OneStageAtATimeAndAReadyOneIsReplaced) {
  start_engine(1);
  publish(2);
  inject(Fault::kDelay, 2);
  ASSERT_TRUE(receiver().stage({}, soon()));
  EXPECT_EQ(receiver().stage({}, soon()).error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(receiver().commit(soon()).error().code, ErrorCode::kNotFound);  // not ready
  EXPECT_EQ(receiver().wait_staged(Deadline::after_ms(1)).error().code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(receiver().staged().state, StageState::kMoving);
  ASSERT_TRUE(receiver().wait_staged(soon()));
  publish(3);
  ASSERT_TRUE(receiver().stage({}, soon()));
  ASSERT_TRUE(receiver().wait_staged(soon()));
  auto report = receiver().commit(soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 3u);
  EXPECT_EQ(engine_->parameters.wrong_elements(3), 0);
}

TEST_F(ShadowRefit, RollbackBringsTheVersionBeforeUntilTheShadowIsUsed) {
  options_.keep_previous = true;
  start_engine(1);
  EXPECT_EQ(receiver().rollback(soon()).error().code, ErrorCode::kNotFound);  // nothing before 1
  publish(2);
  ASSERT_TRUE(engine_->refit());
  ASSERT_EQ(engine_->parameters.wrong_elements(2), 0);
  expect_padding_is_zero();

  auto back = receiver().rollback(soon());
  ASSERT_TRUE(back) << back.error().to_string();
  EXPECT_EQ(*back, 1u);
  EXPECT_EQ(receiver().version(), 1u);
  EXPECT_EQ(held_by_coordinator(), 1u);
  EXPECT_EQ(engine_->parameters.wrong_elements(1), 0);
  EXPECT_EQ(receiver().rollback(soon()).error().code, ErrorCode::kNotFound);

  for (uint64_t version = 3; version <= 5; ++version) {
    publish(version);
    ASSERT_TRUE(engine_->refit());
    ASSERT_EQ(engine_->parameters.wrong_elements(version), 0);
    expect_padding_is_zero();
  }
  ASSERT_TRUE(receiver().stage({}, soon()));
  EXPECT_EQ(receiver().rollback(soon()).error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(receiver().wait_staged(soon()));
}

TEST_F(ShadowRefit, WithoutKeepPreviousThereIsNoWayBack) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(engine_->refit());
  auto back = receiver().rollback(soon());
  ASSERT_FALSE(back);
  EXPECT_EQ(back.error().code, ErrorCode::kNotFound);
  EXPECT_NE(back.error().message.find("keep_previous"), std::string::npos);
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
}

TEST_F(ShadowRefit, ProgressUnderACapNeverFallsAndEndsWithEveryByte) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(receiver().stage({}, soon(), {.max_gigabytes_per_second = 0.0002}));
  uint64_t last = 0;
  while (true) {
    const StageProgress now = receiver().staged();
    EXPECT_GE(now.landed_bytes, last);
    EXPECT_LE(now.landed_bytes, now.size_bytes);
    last = now.landed_bytes;
    if (now.state != StageState::kMoving) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const StageProgress end = receiver().staged();
  EXPECT_EQ(end.state, StageState::kReady);
  EXPECT_EQ(end.landed_bytes, end.size_bytes);
  auto report = receiver().commit(soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->size_bytes, end.size_bytes);
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
}

TEST_F(ShadowRefit, CancelEndsAStageAndTheNextOneRuns) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(
      receiver().stage({}, Deadline::after_ms(60000), {.max_gigabytes_per_second = 0.000001}));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  receiver().cancel();
  auto staged = receiver().wait_staged(soon());
  ASSERT_FALSE(staged);
  EXPECT_EQ(staged.error().code, ErrorCode::kCancelled);
  EXPECT_EQ(engine_->parameters.wrong_elements(1), 0);
  ASSERT_TRUE(engine_->refit());
  EXPECT_EQ(engine_->parameters.wrong_elements(2), 0);
}

TEST_F(ShadowRefit, DeadlineEndsACappedStage) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(receiver().stage({}, Deadline::after_ms(200), {.max_gigabytes_per_second = 1e-6}));
  auto staged = receiver().wait_staged(soon());
  ASSERT_FALSE(staged);
  EXPECT_EQ(staged.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(receiver().version(), 1u);
}

TEST_F(ShadowRefit, I11_ReceiverEndsWithAStageUnderWay) {
  start_engine(1);
  publish(2);
  ASSERT_TRUE(
      receiver().stage({}, Deadline::after_ms(600000), {.max_gigabytes_per_second = 0.000001}));
  engine_->receiver.reset();
  EXPECT_EQ(engine_->parameters.wrong_elements(1), 0);
  EXPECT_EQ(held_by_coordinator(), UINT64_MAX);
  EXPECT_EQ(faulty_->stats().tickets, 0u);
  EXPECT_EQ(faulty_->stats().regions, 0u);
}

TEST_F(ShadowRefit, ClosedReceiverSaysSo) {
  start_engine(1);
  ASSERT_TRUE(receiver().close());
  EXPECT_EQ(receiver().stage({}, soon()).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(receiver().commit(soon()).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(receiver().rollback(soon()).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(receiver().wait_staged(soon()).error().code, ErrorCode::kUnavailable);
}

TEST_F(ShadowRefit, VerifyReadsTheParametersAndNotTheStage) {
  start_engine(1);
  ASSERT_TRUE(receiver().stage({}, soon()));  // version 1 once more
  ASSERT_TRUE(receiver().wait_staged(soon()));
  auto report = verify_model(*transport_, *control_, "model", soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->matches()) << report->to_text();
  publish(2);
  ASSERT_TRUE(engine_->refit());
  report = verify_model(*transport_, *control_, "model", soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->matches()) << report->to_text();
  engine_->parameters.buffers()[0][1] ^= std::byte{1};
  report = verify_model(*transport_, *control_, "model", soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_FALSE(report->matches());
}

TEST_F(ShadowRefit, InPlaceReceiverHasNothingToStageAndSaysSo) {
  options_.into = ReceiveInto::kInPlace;
  start_engine(1);
  for (const ErrorCode code :
       {receiver().stage({}, soon()).error().code, receiver().wait_staged(soon()).error().code,
        receiver().commit(soon()).error().code, receiver().rollback(soon()).error().code}) {
    EXPECT_EQ(code, ErrorCode::kUnsupported);
  }
  EXPECT_EQ(receiver().check_group().error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ShadowRefit, OptionsThatContradictEachOtherAreRefused) {
  const Layout layout = layouts("hf")[0];
  testing::Parameters parameters(layout);
  const auto open = [&](const ReceiverOptions& options) {
    return Receiver::open(*transport_, *control_, layout, parameters.memory(), options);
  };
  ReceiverOptions options;
  options.name = "engine0";
  options.keep_previous = true;
  EXPECT_EQ(open(options).error().code, ErrorCode::kInvalidArgument);
  options.keep_previous = false;
  options.group = "engine";
  EXPECT_EQ(open(options).error().code, ErrorCode::kInvalidArgument);
  options.group.clear();
  options.group_size = 2;
  EXPECT_EQ(open(options).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ShadowRefit, ParametersThatShareMemoryCannotBeExchanged) {
  const Layout layout = layouts("hf")[0];
  testing::Parameters parameters(layout);
  auto memory = parameters.memory();
  std::ranges::sort(memory, {}, &ParameterMemory::size_bytes);
  memory[0].data = memory[1].data + 2;
  ReceiverOptions options;
  options.name = "engine0";
  options.into = ReceiveInto::kShadow;
  options.keep_previous = true;
  auto opened = Receiver::open(*transport_, *control_, layout, memory, options);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, ErrorCode::kUnsupported);
  EXPECT_NE(opened.error().message.find(memory[0].name), std::string::npos);
}

TEST_F(ShadowRefit, ShadowWithoutRoomNamesTheBytesAndLeavesNothingBehind) {
  constexpr int64_t kCount = int64_t{1} << 52;  // more than an address space
  LayoutBuilder builder;
  const uint32_t tensor =
      builder.tensor({.name = "t", .dtype = Dtype::kBF16, .shape = Dims{kCount}});
  const uint32_t parameter =
      builder.parameter({.name = "p", .dtype = Dtype::kBF16, .element_count = kCount});
  builder.tile(tensor, Box::whole(Dims{kCount}), parameter, 0);
  const Layout layout = testing::value_or_fail(builder.build(), "layout");
  std::byte anything{};
  ReceiverOptions options;
  options.name = "engine0";
  options.into = ReceiveInto::kShadow;
  const TransportStats before = transport_->stats();
  auto opened = Receiver::open(
      *transport_, *control_, layout,
      {{.name = "p", .data = &anything, .size_bytes = uint64_t{kCount} * 2}}, options);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(opened.error().message.find(std::to_string(kCount * 2)), std::string::npos)
      << opened.error().message;
  EXPECT_EQ(transport_->stats(), before);
  EXPECT_EQ(held_by_coordinator(), UINT64_MAX);
}

TEST_F(ShadowRefit, I3_FiftyCommitsLeaveRegistrationsAsAfterTheSecond) {
  options_.keep_previous = true;
  start_engine(0);
  TransportStats second;
  for (uint64_t version = 1; version <= 50; ++version) {
    publish(version);
    ASSERT_TRUE(engine_->refit());
    TransportStats now = faulty_->stats();
    now.read_bytes = 0;
    if (version == 2) second = now;
    if (version > 2) {
      ASSERT_EQ(now, second) << "at version " << version;
    }
  }
}

TEST_F(ShadowRefit, RandomFaultsNeverTouchTheVersionThatIsServed) {
  start_engine(1);
  FaultPlan plan;
  plan.seed = 20261122;
  plan.delay_ms = 2;
  for (const Fault fault : {Fault::kDelay, Fault::kDrop, Fault::kCorrupt, Fault::kLie,
                            Fault::kLateWrite, Fault::kPartial}) {
    plan.chance[static_cast<size_t>(fault)] = 0.01;
  }
  faulty_->set_plan(plan);
  uint64_t held = 1;
  int succeeded = 0;
  for (uint64_t version = 2; version < 22; ++version) {
    publish(version);
    if (engine_->refit({}, 2000)) {
      held = version;
      ++succeeded;
    }
    ASSERT_EQ(receiver().version(), held);
    ASSERT_EQ(engine_->parameters.wrong_elements(held), 0);
  }
  EXPECT_GT(succeeded, 0);
}

}  // namespace
}  // namespace transfuse

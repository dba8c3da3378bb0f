// Snapshots that are copied and published behind the trainer: readers see a version when it is
// whole, the trainer what became of it.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "session/pretend_device.h"
#include "session/refit_world.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::PretendDevice;
using testing::Trainer;
using testing::value_or_fail;

constexpr VersionRequest exactly(uint64_t version) {
  return {.kind = VersionRequest::Kind::kExactly, .version = version};
}

class AsyncSnapshot : public ::testing::Test {
 protected:
  AsyncSnapshot()
      : device_(value_or_fail(open_local_transport(), "transport")),
        slow_(value_or_fail(open_local_transport(), "transport")),
        host_(value_or_fail(open_local_transport(), "transport")) {}

  static PublisherOptions options(int64_t drain_ms = 20000) {
    PublisherOptions options;
    options.name = "trainer0";
    options.drain_ms = drain_ms;
    options.fingerprint_threads = 2;
    options.snapshot_slots = 2;
    options.retention = Retention::kSnapshot;
    options.snapshot_async = true;
    return options;
  }
  Trainer& start(Transport& transport, const PublisherOptions& options,
                 std::string_view spec = "hf") {
    trainers_.push_back(
        std::make_unique<Trainer>(transport, *control_, layouts(spec).front(), options));
    return *trainers_.back();
  }
  static SnapshotProgress wait(Trainer& trainer) {
    return value_or_fail(trainer.publisher->wait_published(Deadline::after_ms(20000)), "snapshot");
  }
  VersionState state_of(uint64_t version) {
    for (const VersionInfo& each : value_or_fail(control_->versions("model"), "versions")) {
      if (each.version == version) return each.state;
    }
    ADD_FAILURE() << "version " << version << " is not known";
    return VersionState::kReady;
  }
  bool was_ready(uint64_t version) {
    const auto story = value_or_fail(control_->history("model", version), "history");
    return std::ranges::any_of(story, [](const auto& entry) { return entry.what == "READY"; });
  }
  static void expect_refit(Engine& engine, uint64_t version) {
    const auto report = engine.refit(exactly(version));
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
    EXPECT_TRUE(report->steps.empty()) << report->to_text();
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
  }

  PretendDevice device_;
  PretendDevice slow_;
  std::unique_ptr<Transport> host_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(AsyncSnapshot, PublishReturnsWhenTheCopyHasBegunAndReadersSeeTheVersionWhenItIsThere) {
  for (const SnapshotPlace place : {SnapshotPlace::kWithWeights, SnapshotPlace::kHost}) {
    trainers_.clear();
    control_ = open_local_control();
    PublisherOptions where = options();
    where.snapshot_place = place;
    Trainer& trainer = start(device_, where);
    Engine engine(device_, *control_, layouts("vllm:tp=2")[0]);
    trainer.publish(1);
    EXPECT_EQ(wait(trainer).state, SnapshotState::kPublished);
    expect_refit(engine, 1);
    device_.hold_copies();
    const auto published = trainer.try_publish(2);
    ASSERT_TRUE(published) << published.error().to_string();
    EXPECT_TRUE(published->copying);
    EXPECT_EQ(trainer.publisher->version(), 1U);
    const SnapshotProgress copying = trainer.publisher->snapshot();
    EXPECT_EQ(copying.state, SnapshotState::kCopying);
    EXPECT_EQ(copying.version, 2U);
    EXPECT_EQ(state_of(2), VersionState::kOpen);
    EXPECT_EQ(trainer.publisher->wait_published(Deadline::after_ms(30)).error().code,
              ErrorCode::kDeadlineExceeded);
    expect_refit(engine, 1);
    device_.let_go();
    EXPECT_EQ(wait(trainer).state, SnapshotState::kPublished);
    EXPECT_EQ(trainer.publisher->version(), 2U);
    expect_refit(engine, 2);
  }
}

TEST_F(AsyncSnapshot, BeginWriteReturnsWhenNothingReadsTheWeightsAnyMore) {
  Trainer& trainer = start(device_, options());
  Engine engine(device_, *control_, layouts("vllm:tp=2")[1]);
  for (uint64_t version = 1; version <= 5; ++version) {
    device_.hold_copies();
    trainer.publish(version);
    std::thread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      device_.let_go();
    });
    const auto begun = trainer.publisher->begin_write(version + 1);
    later.join();
    ASSERT_TRUE(begun) << begun.error().to_string();
    EXPECT_GT(begun->copy_waited_us, 0);
    EXPECT_EQ(trainer.publisher->snapshot().state, SnapshotState::kPublished);
    trainer.parameters.poison(std::byte{0x77});
    expect_refit(engine, version);
    ASSERT_TRUE(trainer.publisher->abort_write("the next one is written anew"));
    ++version;
  }
}

TEST_F(AsyncSnapshot, AWaitForTheCopyEndsAtItsDeadlineAndMayBeRepeated) {
  Trainer& trainer = start(device_, options(30));
  Engine engine(device_, *control_, layouts("hf")[0]);
  device_.hold_copies();
  trainer.publish(1);
  for (const Result<void>& refused :
       {Result<void>(trainer.publisher->begin_write(2).error()),
        Result<void>(trainer.publisher->set_retention(Retention::kInPlace).error()),
        Result<void>(trainer.publisher->publish(1).error())}) {
    EXPECT_EQ(refused.error().code, ErrorCode::kDeadlineExceeded);
    EXPECT_NE(refused.error().message.find("version 1"), std::string::npos);
  }
  device_.let_go();
  wait(trainer);
  expect_refit(engine, 1);
  trainer.publish(2);
  wait(trainer);
  expect_refit(engine, 2);
}

TEST_F(AsyncSnapshot, AFailedCopyIsToldOnceByTheNextCallAndTheVersionMayBePublishedAgain) {
  Trainer& trainer = start(device_, options());
  Engine engine(device_, *control_, layouts("hf")[0]);
  trainer.publish(1);
  wait(trainer);
  ASSERT_TRUE(trainer.publisher->begin_write(2));
  trainer.parameters.write(2);
  device_.fail_next();
  ASSERT_TRUE(trainer.publisher->publish(2));
  const auto next = trainer.publisher->begin_write(3);
  ASSERT_FALSE(next);
  EXPECT_EQ(next.error().code, ErrorCode::kUnavailable);
  EXPECT_NE(next.error().message.find("version 2 of publisher 'trainer0' was not published"),
            std::string::npos);
  EXPECT_EQ(trainer.publisher->snapshot().state, SnapshotState::kFailed);
  EXPECT_EQ(trainer.publisher->wait_published(Deadline::after_ms(10)).error().code,
            ErrorCode::kUnavailable);
  EXPECT_EQ(state_of(2), VersionState::kOpen);
  EXPECT_EQ(trainer.publisher->begin_write(3).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(trainer.publisher->publish(2));
  wait(trainer);
  expect_refit(engine, 2);
  // Or it is given up.
  ASSERT_TRUE(trainer.publisher->begin_write(3));
  device_.fail_next();
  ASSERT_TRUE(trainer.publisher->publish(3));
  ASSERT_TRUE(trainer.publisher->abort_write("its copy failed"));
  EXPECT_EQ(state_of(3), VersionState::kAborted);
  EXPECT_EQ(trainer.publisher->snapshot().state, SnapshotState::kNone);
  trainer.publish(4);
  wait(trainer);
  expect_refit(engine, 4);
}

TEST_F(AsyncSnapshot, AVersionThatIsGivenUpWhileItIsCopiedIsNeverSeen) {
  Trainer& trainer = start(device_, options());
  Engine engine(device_, *control_, layouts("hf")[0]);
  trainer.publish(1);
  wait(trainer);
  device_.hold_copies();
  trainer.publish(2);
  ASSERT_TRUE(trainer.publisher->abort_write("the loss was not a number"));
  device_.let_go();
  EXPECT_EQ(state_of(2), VersionState::kAborted);
  EXPECT_FALSE(was_ready(2));
  EXPECT_EQ(trainer.publisher->version(), 1U);
  EXPECT_EQ(device_.stats().tickets, 0U);
  expect_refit(engine, 1);
  trainer.publish(3);
  wait(trainer);
  EXPECT_EQ(trainer.publisher->abort_write("too late").error().code, ErrorCode::kInvalidArgument);
  expect_refit(engine, 3);
}

TEST_F(AsyncSnapshot, CloseWaitsForTheCopyAndGivesItUpAtTheDeadline) {
  PublisherOptions other = options();
  other.source_count = 2;
  other.name = "replica";
  Trainer& replica = start(device_, other);  // keeps versions alive
  for (const bool in_time : {true, false}) {
    const uint64_t version = in_time ? 1 : 2;
    PublisherOptions closing = options(in_time ? 20000 : 20);
    closing.source_count = 2;
    Trainer& trainer = start(device_, closing);
    replica.publish(version);
    wait(replica);
    device_.hold_copies();
    trainer.publish(version);
    std::thread later([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      if (in_time) device_.let_go();
    });
    const auto closed = trainer.publisher->close();
    later.join();
    device_.let_go();
    EXPECT_EQ(was_ready(version), in_time);
    EXPECT_EQ(closed.has_value(), in_time);
    if (in_time) continue;
    EXPECT_EQ(closed.error().code, ErrorCode::kDeadlineExceeded);
    EXPECT_EQ(state_of(version), VersionState::kAborted);
  }
}

TEST_F(AsyncSnapshot, CloseReturnsWhyTheLastCopyFailed) {
  Engine engine(device_, *control_, layouts("hf")[0]);  // the model is remembered
  Trainer& trainer = start(device_, options());
  device_.fail_next();
  trainer.publish(1);
  EXPECT_EQ(trainer.publisher->close().error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(state_of(1), VersionState::kAborted);
}

TEST_F(AsyncSnapshot, APublisherThatIsDestroyedWaitsForNoCopy) {
  Engine engine(device_, *control_, layouts("hf")[0]);  // the model is remembered
  Trainer& trainer = start(device_, options(3600 * 1000));
  device_.hold_copies();
  trainer.publish(1);
  trainers_.clear();
  device_.let_go();
  EXPECT_FALSE(was_ready(1));
}

TEST_F(AsyncSnapshot, ARevisionThatTheWeightsDoNotHaveIsToldByTheNextCall) {
  PublisherOptions summing = options();
  summing.compute_revision = true;
  Trainer& trainer = start(device_, summing);
  ASSERT_TRUE(trainer.publisher->begin_write(1));
  const Digest other{.high = 1, .low = 2};
  ASSERT_TRUE(trainer.publisher->publish(1, {.metadata = {}, .revision = other}));
  EXPECT_EQ(trainer.publisher->begin_write(2).error().code, ErrorCode::kFingerprintMismatch);
  EXPECT_FALSE(was_ready(1));
  ASSERT_TRUE(trainer.publisher->publish(1));
  wait(trainer);
  EXPECT_TRUE(was_ready(1));
}

TEST_F(AsyncSnapshot, AVersionThatAnotherSourceSkipsMeanwhileIsSkipped) {
  const auto all = layouts("fsdp:dp=2,dtype=f32");
  for (size_t i = 0; i < 2; ++i) {
    PublisherOptions skips = options();
    skips.name = "trainer" + std::to_string(i);
    skips.source_count = 2;
    skips.when_leased = WhenLeased::kSkip;
    trainers_.push_back(std::make_unique<Trainer>(device_, *control_, all[i], skips));
  }
  device_.hold_copies();
  trainers_[0]->publish(1);
  ASSERT_TRUE(trainers_[1]->publisher->begin_write(1));
  ASSERT_TRUE(trainers_[1]->publisher->abort_write("this step is not to be seen"));
  device_.let_go();
  EXPECT_EQ(wait(*trainers_[0]).state, SnapshotState::kSkipped);
  Engine engine(device_, *control_, layouts("vllm:tp=1")[0]);
  for (auto& trainer : trainers_) trainer->publish(2);
  expect_refit(engine, 2);
}

TEST_F(AsyncSnapshot, ASourceThatIsAStepAheadDoesNotEndTheVersionThatAnotherOneStillCopies) {
  const auto all = layouts("fsdp:dp=2,dtype=f32");
  for (size_t i = 0; i < 2; ++i) {
    PublisherOptions one = options();
    one.name = "trainer" + std::to_string(i);
    one.source_count = 2;
    one.snapshot_slots = 1;
    trainers_.push_back(
        std::make_unique<Trainer>(i == 0 ? device_ : slow_, *control_, all[i], one));
  }
  slow_.hold_copies();
  for (auto& trainer : trainers_) trainer->publish(1);
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    slow_.let_go();
  });
  const auto ahead = trainers_[0]->try_publish(2);
  later.join();
  ASSERT_TRUE(ahead) << ahead.error().to_string();
  EXPECT_GT(ahead->waited_us, 0);
  EXPECT_TRUE(was_ready(1));
  trainers_[1]->publish(2);
  for (auto& trainer : trainers_) wait(*trainer);
  EXPECT_TRUE(was_ready(2));
}

TEST_F(AsyncSnapshot, InTheHostTheRateBoundsTheCopyAndItsProgressIsSeen) {
  PublisherOptions slow = options();
  const Layout layout = layouts("hf")[0];
  slow.snapshot_gigabytes_per_second = static_cast<double>(layout.parameter_bytes()) / 1e9 * 4;
  Trainer& trainer = start(*host_, slow);  // a quarter of a second
  Engine engine(*host_, *control_, layouts("vllm:tp=2")[0]);
  trainer.publish(1);
  uint64_t last = 0;
  int steps = 0;
  for (SnapshotProgress now = trainer.publisher->snapshot(); now.state == SnapshotState::kCopying;
       now = trainer.publisher->snapshot()) {
    ASSERT_LE(last, now.copied_bytes);
    steps += last != now.copied_bytes;
    last = now.copied_bytes;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const SnapshotProgress done = wait(trainer);
  EXPECT_EQ(done.copied_bytes, layout.parameter_bytes());
  EXPECT_EQ(done.size_bytes, layout.parameter_bytes());
  EXPECT_GT(steps, 1);
  EXPECT_GE(done.elapsed_us, 100000) << "all but the last parameter, at the rate";
  expect_refit(engine, 1);
}

TEST_F(AsyncSnapshot, ACopyInTheHostIsCancelledBetweenItsPieces) {
  PublisherOptions slow = options(10);
  slow.snapshot_gigabytes_per_second = 1e-6;  // the smallest piece takes seconds
  Trainer& trainer = start(*host_, slow);
  trainer.publish(1);
  EXPECT_EQ(trainer.publisher->begin_write(2).error().code, ErrorCode::kDeadlineExceeded);
  ASSERT_TRUE(trainer.publisher->abort_write("too slow"));
  EXPECT_EQ(state_of(1), VersionState::kAborted);
  trainer.publish(2);
  EXPECT_EQ(trainer.publisher->close().error().code, ErrorCode::kDeadlineExceeded);
}

TEST_F(AsyncSnapshot, NeedsSlots) {
  testing::Parameters parameters(layouts("hf")[0]);
  PublisherOptions none = options();
  none.snapshot_slots = 0;
  none.retention = Retention::kInPlace;
  const auto refused =
      Publisher::open(device_, *control_, layouts("hf")[0], parameters.memory(), none);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(refused.error().message.find("snapshot_async"), std::string::npos);
}

TEST_F(AsyncSnapshot, RetentionChangesBetweenVersionsAndInPlaceIsPublishedAtOnce) {
  Trainer& trainer = start(device_, options());
  Engine engine(device_, *control_, layouts("vllm:tp=2")[0]);
  for (uint64_t version = 1; version <= 6; ++version) {
    const bool in_place = version % 2 == 0;
    ASSERT_TRUE(
        trainer.publisher->set_retention(in_place ? Retention::kInPlace : Retention::kSnapshot));
    const auto published = trainer.try_publish(version);
    ASSERT_TRUE(published) << published.error().to_string();
    EXPECT_EQ(published->copying, !in_place);
    EXPECT_LE(trainer.publisher->version(), version);
    expect_refit(engine, version);
  }
}

// Two sources and two targets, each at its own pace: what lands is one version, and time goes on.
TEST_F(AsyncSnapshot, I8_ManyVersionsAreReadAsTheyWereWhileTheTrainersGoOn) {
  for (Transport* transport : {static_cast<Transport*>(&device_), host_.get()}) {
    trainers_.clear();
    control_ = open_local_control();
    const auto all = layouts("fsdp:dp=2,dtype=f32");
    for (size_t i = 0; i < 2; ++i) {
      PublisherOptions one = options();
      one.name = "trainer" + std::to_string(i);
      one.source_count = 2;
      one.when_leased = WhenLeased::kWait;
      trainers_.push_back(std::make_unique<Trainer>(*transport, *control_, all[i], one));
    }
    std::atomic<bool> stop{false};
    std::vector<std::thread> reading;
    for (const int rank : {0, 1}) {
      reading.emplace_back([&, rank] {
        Engine engine(*transport, *control_, layouts("vllm:tp=2")[static_cast<size_t>(rank)],
                      "engine" + std::to_string(rank));
        uint64_t last = 0;
        while (!stop) {
          // The newest that is there may be an older one: what nobody reads makes room first.
          const auto report = engine.refit(
              {.kind = VersionRequest::Kind::kAtLeast, .version = std::max<uint64_t>(last, 1)},
              20000);
          ASSERT_TRUE(report) << report.error().to_string();
          ASSERT_LE(last, report->version);
          last = report->version;
          ASSERT_EQ(engine.parameters.wrong_elements(last), 0);
        }
      });
    }
    for (uint64_t version = 1; version <= 40; ++version) {
      for (auto& trainer : trainers_) trainer->publish(version);
    }
    for (auto& trainer : trainers_) EXPECT_EQ(wait(*trainer).state, SnapshotState::kPublished);
    stop = true;
    for (auto& thread : reading) thread.join();
  }
}

}  // namespace
}  // namespace transfuse

// Snapshots: the trainer goes on while readers read, and what they read is exactly what was leased.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gtest/gtest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#include "session/refit_world.h"
#include "session/source_link.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

constexpr VersionRequest exactly(uint64_t version) {
  return {.kind = VersionRequest::Kind::kExactly, .version = version};
}

// A target that holds a lease and reads nothing.
class Reader {
 public:
  Reader(Control& control, const std::string& name) : control_(control) {
    const Layout nothing = testing::value_or_fail(LayoutBuilder().build(), "layout");
    EXPECT_TRUE(control_.put_layout(nothing));
    Registration registration;
    registration.role = MemberRole::kTarget;
    registration.model = "model";
    registration.name = name;
    registration.incarnation = 7;
    registration.layout = nothing.digest();
    member_ = testing::value_or_fail(control_.join(registration), "reader");
  }
  ~Reader() {
    release();
    EXPECT_TRUE(control_.leave(member_));
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  const Lease& lease(uint64_t version) {
    lease_ = testing::value_or_fail(
        control_.acquire(member_, exactly(version), Deadline::after_ms(5000)), "lease");
    return *lease_;
  }
  void release() {
    if (!lease_) return;
    EXPECT_TRUE(control_.release(lease_->id, {}, Deadline::after_ms(5000)));
    lease_.reset();
  }
  bool was_revoked() {
    const auto event = control_.next_event(member_, Deadline::after_ms(2000));
    return event && event->has_value() && (*event)->kind == MemberEvent::Kind::kRevoked;
  }

 private:
  Control& control_;
  MemberId member_{};
  std::optional<Lease> lease_;
};

class Snapshot : public ::testing::Test {
 protected:
  Snapshot() : transport_(testing::value_or_fail(open_local_transport(), "transport")) {}

  static PublisherOptions options(uint32_t slots, WhenLeased when_leased, int64_t drain_ms = 5000) {
    PublisherOptions options;
    options.drain_ms = drain_ms;
    options.fingerprint_threads = 2;
    options.snapshot_slots = slots;
    options.retention = Retention::kSnapshot;
    options.when_leased = when_leased;
    return options;
  }
  void start_trainers(std::string_view spec, PublisherOptions options) {
    const auto all = layouts(spec);
    options.source_count = static_cast<uint32_t>(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
      options.name = "trainer" + std::to_string(i);
      trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, all[i], options));
    }
  }
  void publish(uint64_t version) {
    for (auto& trainer : trainers_) trainer->publish(version);
  }
  VersionState state_of(uint64_t version) {
    const auto versions = testing::value_or_fail(control_->versions("model"), "versions");
    const auto found = std::ranges::find(versions, version, &VersionInfo::version);
    EXPECT_NE(found, versions.end());
    return found->state;
  }
  void expect_refit(Engine& engine, uint64_t version) {
    const auto report = engine.refit(exactly(version));
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, version);
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
    EXPECT_TRUE(report->steps.empty()) << report->to_text();
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
  }

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(Snapshot, TrainingGoesOnAndALeasedVersionIsReadAsItWas) {
  start_trainers("fsdp:dp=2,dtype=f32", options(2, WhenLeased::kWait));
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[0]);
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  for (uint64_t version = 2; version <= 10; ++version) {
    publish(version);
    expect_refit(engine, version);
    // Half a step further, without asking anybody.
    for (auto& trainer : trainers_) trainer->parameters.write(1000 + version);
    expect_refit(engine, 1);
    expect_refit(engine, version);
  }
}

TEST_F(Snapshot, SlotThatNobodyReadsIsTakenBeforeALeasedOne) {
  start_trainers("fsdp:dp=1", options(2, WhenLeased::kWait, 0));
  Reader reader(*control_, "reader");
  publish(1);
  publish(2);
  reader.lease(1);
  publish(3);  // in the slot of 2
  EXPECT_EQ(state_of(1), VersionState::kReady);
  EXPECT_EQ(state_of(2), VersionState::kRetired);
  reader.release();
  reader.lease(3);
  publish(4);
  EXPECT_EQ(state_of(1), VersionState::kRetired);
  EXPECT_EQ(state_of(3), VersionState::kReady);
}

TEST_F(Snapshot, WaitEndsAtTheDeadlineWithReadersLeftAloneAndPublishMayBeCalledAgain) {
  start_trainers("fsdp:dp=1", options(1, WhenLeased::kWait, 50));
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  const auto waited = trainers_[0]->try_publish(2);
  ASSERT_FALSE(waited);
  EXPECT_EQ(waited.error().code, ErrorCode::kDeadlineExceeded);
  expect_refit(engine, 1);
  reader.release();
  const auto published = trainers_[0]->publisher->publish(2);
  ASSERT_TRUE(published) << published.error().to_string();
  EXPECT_EQ(published->revoked, 0u);
  expect_refit(engine, 2);
}

TEST_F(Snapshot, WaitEndsWhenTheReaderIsDone) {
  start_trainers("fsdp:dp=1", options(1, WhenLeased::kWait, 20000));
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  std::thread done([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    reader.release();
  });
  const auto published = trainers_[0]->try_publish(2);
  done.join();
  ASSERT_TRUE(published) << published.error().to_string();
  EXPECT_GT(published->waited_us, 0);
  EXPECT_EQ(published->revoked, 0u);
}

TEST_F(Snapshot, I4_SlotIsOverwrittenOnlyAfterItsReadersWereRevoked) {
  for (const WhenLeased when : {WhenLeased::kRevokeAtDeadline, WhenLeased::kRevoke}) {
    trainers_.clear();
    start_trainers("fsdp:dp=1", options(2, when, when == WhenLeased::kRevoke ? 60000 : 50));
    Engine engine(*transport_, *control_, layouts("hf")[0]);
    Reader first(*control_, "first");
    Reader second(*control_, "second");
    publish(1);
    publish(2);
    first.lease(1);
    second.lease(2);
    const auto published = trainers_[0]->try_publish(3);
    ASSERT_TRUE(published) << published.error().to_string();
    EXPECT_EQ(published->revoked, 1u);
    if (when == WhenLeased::kRevokeAtDeadline) {
      EXPECT_GE(published->waited_us, 50000);
    }
    EXPECT_TRUE(first.was_revoked()) << "of the oldest";
    EXPECT_EQ(state_of(1), VersionState::kRetired);
    expect_refit(engine, 2);  // its reader is left alone
    expect_refit(engine, 3);
  }
}

TEST_F(Snapshot, SkippedVersionIsNeverSeenAndTheNextOneIs) {
  start_trainers("fsdp:dp=1", options(1, WhenLeased::kSkip));
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  for (const uint64_t version : {uint64_t{2}, uint64_t{3}}) {
    const auto skipped = trainers_[0]->try_publish(version);
    ASSERT_TRUE(skipped) << skipped.error().to_string();
    EXPECT_TRUE(skipped->skipped);
    EXPECT_EQ(state_of(version), VersionState::kAborted);
    EXPECT_EQ(trainers_[0]->publisher->version(), 1u);
    expect_refit(engine, 1);
  }
  EXPECT_EQ(engine.refit(exactly(2), 1000).error().code, ErrorCode::kVersionGone);
  reader.release();
  publish(4);
  expect_refit(engine, 4);
}

TEST_F(Snapshot, SourcesAgreeOnASkippedVersionWhoeverComesFirst) {
  const auto all = layouts("fsdp:dp=2,dtype=f32");
  PublisherOptions one = options(1, WhenLeased::kSkip);
  one.source_count = 2;
  one.name = "trainer0";
  PublisherOptions two = one;
  two.snapshot_slots = 2;
  two.name = "trainer1";
  trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, all[0], one));
  trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, all[1], two));
  Engine engine(*transport_, *control_, layouts("vllm:tp=1")[0]);
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  // Who has room comes second: it learns that the version is skipped.
  for (size_t i = 0; i < 2; ++i) {
    const auto skipped = trainers_[i]->try_publish(2);
    ASSERT_TRUE(skipped) << skipped.error().to_string();
    EXPECT_TRUE(skipped->skipped);
  }
  // Who has room comes first: what it has offered is gone afterwards.
  const auto offered = trainers_[1]->try_publish(3);
  ASSERT_TRUE(offered) << offered.error().to_string();
  EXPECT_FALSE(offered->skipped);
  const auto skipped = trainers_[0]->try_publish(3);
  ASSERT_TRUE(skipped) << skipped.error().to_string();
  EXPECT_TRUE(skipped->skipped);
  EXPECT_EQ(state_of(3), VersionState::kAborted);
  expect_refit(engine, 1);
  reader.release();
  for (uint64_t version = 4; version <= 8; ++version) {
    publish(version);
    expect_refit(engine, version);
  }
}

TEST_F(Snapshot, SourceWithAnotherPolicyIsToldThatAVersionIsGoneAndGoesOn) {
  const auto all = layouts("fsdp:dp=2,dtype=f32");
  PublisherOptions skips = options(1, WhenLeased::kSkip);
  skips.source_count = 2;
  skips.name = "trainer0";
  PublisherOptions in_place = skips;
  in_place.retention = Retention::kInPlace;
  in_place.name = "trainer1";
  in_place.drain_ms = 0;
  trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, all[0], skips));
  trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, all[1], in_place));
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  Reader reader(*control_, "reader");
  publish(1);
  reader.lease(1);
  EXPECT_TRUE(trainers_[0]->try_publish(2)->skipped);
  EXPECT_EQ(trainers_[1]->try_publish(2).error().code, ErrorCode::kVersionGone);
  reader.release();
  publish(3);
  expect_refit(engine, 3);
}

TEST_F(Snapshot, RetentionIsChangedBetweenVersions) {
  PublisherOptions both = options(2, WhenLeased::kWait, 50);
  both.retention = Retention::kInPlace;
  start_trainers("fsdp:dp=1", both);
  Publisher& publisher = *trainers_[0]->publisher;
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  Reader reader(*control_, "reader");
  const std::vector<Retention> order = {
      Retention::kInPlace,  Retention::kSnapshot, Retention::kSnapshot, Retention::kInPlace,
      Retention::kSnapshot, Retention::kInPlace,  Retention::kInPlace,  Retention::kSnapshot};
  uint64_t version = 0;
  for (const Retention retention : order) {
    ASSERT_TRUE(publisher.set_retention(retention));
    publish(++version);
    expect_refit(engine, version);
    EXPECT_EQ(publisher.version(), version);
  }

  // From a snapshot to in place: nobody is waited for, and the snapshot is read during the write.
  reader.lease(version);
  ASSERT_TRUE(publisher.set_retention(Retention::kInPlace));
  const auto begun = publisher.begin_write(version + 1);
  ASSERT_TRUE(begun) << begun.error().to_string();
  EXPECT_EQ(begun->revoked, 0u);
  EXPECT_EQ(publisher.set_retention(Retention::kSnapshot).error().code,
            ErrorCode::kInvalidArgument);
  trainers_[0]->parameters.write(version + 1);
  expect_refit(engine, version);
  ASSERT_TRUE(publisher.publish(version + 1));
  expect_refit(engine, ++version);
  reader.release();

  // From in place to a snapshot: readers of the weights are drained, now as before.
  reader.lease(version);
  ASSERT_TRUE(publisher.set_retention(Retention::kSnapshot));
  const auto drained = publisher.begin_write(version + 1);
  ASSERT_TRUE(drained) << drained.error().to_string();
  EXPECT_EQ(drained->revoked, 1u);
  EXPECT_EQ(publisher.version(), 0u);
  trainers_[0]->parameters.write(version + 1);
  ASSERT_TRUE(publisher.publish(version + 1));
  expect_refit(engine, ++version);
}

TEST_F(Snapshot, AbortedWriteLeavesTheVersionBeforeReadable) {
  start_trainers("fsdp:dp=1", options(1, WhenLeased::kWait));
  Publisher& publisher = *trainers_[0]->publisher;
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  publish(1);
  ASSERT_TRUE(publisher.begin_write(2));
  trainers_[0]->parameters.write(2);
  ASSERT_TRUE(publisher.abort_write("the loss was not a number"));
  EXPECT_EQ(state_of(2), VersionState::kAborted);
  EXPECT_EQ(publisher.version(), 1u);
  expect_refit(engine, 1);
  publish(3);
  expect_refit(engine, 3);
}

TEST_F(Snapshot, CallsOutOfOrderAreRefused) {
  start_trainers("fsdp:dp=1", options(1, WhenLeased::kWait));
  Publisher& publisher = *trainers_[0]->publisher;
  EXPECT_EQ(publisher.publish(1).error().code, ErrorCode::kInvalidArgument);
  publish(5);
  EXPECT_EQ(publisher.begin_write(5).error().code, ErrorCode::kAlreadyExists);
  ASSERT_TRUE(publisher.begin_write(6));
  EXPECT_EQ(publisher.begin_write(7).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(publisher.publish(7).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(publisher.publish(6));
}

TEST_F(Snapshot, OptionsThatCannotBeAreRefused) {
  const Layout layout = layouts("hf")[0];
  testing::Parameters parameters(layout);
  for (const uint32_t slots : {0u, 64u}) {
    PublisherOptions wrong = options(slots, WhenLeased::kWait);
    wrong.name = "trainer0";
    const auto opened = Publisher::open(*transport_, *control_, layout, parameters.memory(), wrong);
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, ErrorCode::kInvalidArgument);
    EXPECT_NE(opened.error().message.find(std::to_string(slots)), std::string::npos);
  }
  Trainer in_place(*transport_, *control_, layout, "trainer0", 1);
  EXPECT_EQ(in_place.publisher->set_retention(Retention::kSnapshot).error().code,
            ErrorCode::kInvalidArgument);
}

TEST_F(Snapshot, RoomForAllSlotsIsCheckedBeforeAnythingIsAllocated) {
  constexpr int64_t kElements = int64_t{1} << 40;  // 4 TiB: addresses only
  LayoutBuilder builder;
  const uint32_t tensor =
      builder.tensor({.name = "w", .dtype = Dtype::kF32, .shape = Dims{kElements}});
  builder.tile(tensor, Box::whole(Dims{kElements}),
               builder.parameter({.name = "w", .dtype = Dtype::kF32, .element_count = kElements}),
               0);
  const Layout layout = testing::value_or_fail(builder.build(), "layout");
  constexpr uint64_t kBytes = uint64_t{kElements} * 4;
  void* const addresses =
      mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (addresses == MAP_FAILED) GTEST_SKIP() << "no address space of 4 TiB";
  PublisherOptions large = options(2, WhenLeased::kWait);
  large.name = "trainer0";
  const auto opened = Publisher::open(
      *transport_, *control_, layout,
      {{.name = "w", .data = static_cast<std::byte*>(addresses), .size_bytes = kBytes}}, large);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(snapshot_bytes(layout, 2), 2 * kBytes);
  for (const std::string& word : {std::to_string(2 * kBytes), std::string("in_place")}) {
    EXPECT_NE(opened.error().message.find(word), std::string::npos) << opened.error().message;
  }
  EXPECT_EQ(transport_->stats().regions, 0u);
  munmap(addresses, kBytes);
}

TEST_F(Snapshot, VerifyComparesWithTheSnapshotAndNotWithTheWeights) {
  start_trainers("fsdp:dp=2,dtype=f32", options(2, WhenLeased::kWait));
  Engine good(*transport_, *control_, layouts("vllm:tp=2")[0], "engine0");
  Engine bad(*transport_, *control_, layouts("vllm:tp=2")[1], "engine1");
  publish(1);
  ASSERT_TRUE(good.refit());
  publish(2);
  ASSERT_TRUE(bad.refit());
  for (auto& trainer : trainers_) trainer->parameters.write(99);
  auto report = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->matches()) << report->to_text();

  const auto norm = bad.parameters.layout().find_parameter("model.norm.weight");
  ASSERT_TRUE(norm);
  bad.parameters.buffers()[*norm][3] ^= std::byte{0x10};
  report = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(report) << report.error().to_string();
  ASSERT_EQ(report->targets.size(), 2u);
  EXPECT_TRUE(report->targets[0].matches());
  ASSERT_EQ(report->targets[1].mismatches.size(), 1u) << report->to_text();
  EXPECT_EQ(report->targets[1].mismatches[0].tensor, "model.norm.weight");
}

TEST_F(Snapshot, I8_TornSlotIsFoundByItsGenerationAndOthersAreNotDisturbed) {
  start_trainers("fsdp:dp=1", options(2, WhenLeased::kRevoke));
  const Layout layout = layouts("fsdp:dp=1")[0];
  Reader first(*control_, "first");
  Reader second(*control_, "second");
  publish(1);
  const MemberInfo one = first.lease(1).sources.at(0);
  publish(2);
  const MemberInfo two = second.lease(2).sources.at(0);
  ASSERT_NE(one.slot, two.slot);
  const Deadline deadline = Deadline::after_ms(5000);
  auto link = testing::value_or_fail(
      MemberLink::open(*transport_, *control_, one, layout, MemoryPlace::kHost, deadline), "link");
  EXPECT_EQ(link->read_generation(one.slot, deadline).value(), one.generation);
  publish(3);  // over 1
  EXPECT_NE(link->read_generation(one.slot, deadline).value(), one.generation);
  EXPECT_EQ(link->read_generation(two.slot, deadline).value(), two.generation);
  EXPECT_EQ(link->read_generation(0, deadline).value().counter % 2, 1u) << "never offered";

  // I13: a slot that the coordinator made up.
  EXPECT_EQ(link->read_generation(3, deadline).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(link->where(0, 3, deadline).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(link->where(0, UINT32_MAX, deadline).error().code, ErrorCode::kCorrupt);
}

TEST_F(Snapshot, I8_ReadersThatAreRevokedAllTheTimeNeverSeeAMixedVersion) {
  start_trainers("fsdp:dp=2,dtype=f32", options(1, WhenLeased::kRevoke));
  ReceiverOptions receiving;
  receiving.plan.chunk_bytes = 2048;
  receiving.max_attempts = 1000;
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[0], "engine0", receiving);
  publish(1);
  std::atomic<bool> stop{false};
  std::thread training([&] {
    for (uint64_t version = 2; !stop; ++version) {
      publish(version);
      std::this_thread::sleep_for(std::chrono::milliseconds(version % 4));
    }
  });
  int arrived = 0;
  int again = 0;
  for (int i = 0; i < 100; ++i) {
    const auto report = engine.refit({}, 400);
    if (!report) continue;
    ++arrived;
    again += report->attempts > 1;
    EXPECT_EQ(engine.parameters.wrong_elements(report->version), 0) << report->to_text();
  }
  stop = true;
  training.join();
  const auto last = engine.refit();
  ASSERT_TRUE(last) << last.error().to_string();
  EXPECT_EQ(engine.parameters.wrong_elements(last->version), 0);
  std::printf("%d of 100 refits arrived, %d of them by another attempt\n", arrived, again);
}

uint64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  uint64_t total = 0;
  uint64_t resident = 0;
  file >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

TEST_F(Snapshot, I3_AThousandPublishesLeaveRegistrationsAndMemoryAsTheyWere) {
  start_trainers("fsdp:dp=1", options(3, WhenLeased::kWait));
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[0]);
  TransportStats warm;
  uint64_t warm_bytes = 0;
  for (uint64_t version = 1; version <= 1000; ++version) {
    ASSERT_TRUE(trainers_[0]->publisher->begin_write(version));
    const auto published = trainers_[0]->publisher->publish(version);
    ASSERT_TRUE(published) << published.error().to_string();
    if (version % 3 == 0) {
      ASSERT_TRUE(engine.refit());
    }
    TransportStats now = transport_->stats();
    now.read_bytes = 0;
    if (version == 200) {
      warm = now;
      warm_bytes = resident_bytes();
    }
    if (version > 200) {
      ASSERT_EQ(now, warm) << "at version " << version;
    }
  }
  EXPECT_LT(resident_bytes(), warm_bytes + (uint64_t{4} << 20));
}

// In a process of its own: the default stack size is for good.
TEST_F(Snapshot, PublisherWithoutThreadsIsATypedErrorAndItsNameIsFree) {
  const auto attempt = [] {
    auto transport = testing::value_or_fail(open_local_transport(), "transport");
    auto control = open_local_control();
    const Layout layout = layouts("hf")[0];
    testing::Parameters parameters(layout);
    PublisherOptions named = options(1, WhenLeased::kWait);
    named.name = "trainer0";
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    const size_t usual = [&] {
      size_t size = 0;
      pthread_getattr_default_np(&attributes);
      pthread_attr_getstacksize(&attributes, &size);
      return size;
    }();
    pthread_attr_setstacksize(&attributes, size_t{1} << 55);  // beyond any address space
    if (pthread_setattr_default_np(&attributes) != 0) _exit(3);
    const auto refused = Publisher::open(*transport, *control, layout, parameters.memory(), named);
    if (refused || refused.error().code != ErrorCode::kResourceExhausted) _exit(4);
    pthread_attr_setstacksize(&attributes, usual);
    if (pthread_setattr_default_np(&attributes) != 0) _exit(5);
    _exit(Publisher::open(*transport, *control, layout, parameters.memory(), named) ? 0 : 6);
  };
  EXPECT_EXIT(attempt(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace transfuse

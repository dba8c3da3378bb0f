// Publishers and receivers whose memory lies on a device: everything that touches it goes through
// the transport.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "session/pretend_device.h"
#include "session/refit_world.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::PretendDevice;
using testing::Trainer;
using testing::value_or_fail;

class DeviceSession : public ::testing::Test {
 protected:
  DeviceSession()
      : device_(value_or_fail(open_local_transport(), "transport")),
        host_(value_or_fail(open_local_transport(), "transport")) {}

  void start_trainers(Transport& transport, std::string_view spec, uint32_t slots = 0) {
    const auto all = layouts(spec);
    for (size_t i = 0; i < all.size(); ++i) {
      PublisherOptions options;
      options.name = "trainer" + std::to_string(i);
      options.source_count = static_cast<uint32_t>(all.size());
      options.fingerprint_threads = 1;
      options.snapshot_slots = slots;
      if (slots > 0) options.retention = Retention::kSnapshot;
      trainers_.push_back(std::make_unique<Trainer>(transport, *control_, all[i], options));
    }
  }
  void publish(uint64_t version) {
    for (auto& trainer : trainers_) trainer->publish(version);
  }
  static void expect_refit(Engine& engine, uint64_t version) {
    auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, version);
    EXPECT_EQ(report->attempts, 1U);
    EXPECT_EQ(report->reread_bytes, 0U);
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
  }

  PretendDevice device_;
  std::unique_ptr<Transport> host_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(DeviceSession, AllReadsOfOneSourceAreOneRequest) {
  start_trainers(device_, "fsdp:dp=3,dtype=f32");
  for (const Layout& layout : layouts("vllm:tp=2")) {
    Engine engine(device_, *control_, layout);
    const uint64_t version = trainers_[0]->publisher->version() + 1;
    publish(version);
    const uint64_t before = device_.joined_requests();
    expect_refit(engine, version);
    EXPECT_EQ(device_.joined_requests() - before, 3U);
  }
}

TEST_F(DeviceSession, VersionsFollowOneAnotherInPlaceAndInSnapshots) {
  for (const uint32_t slots : {0U, 2U}) {
    trainers_.clear();
    control_ = open_local_control();
    start_trainers(device_, "fsdp:dp=2,dtype=f32", slots);
    Engine engine(device_, *control_, layouts("vllm:tp=2")[1]);
    for (uint64_t version = 1; version <= 6; ++version) {
      publish(version);
      expect_refit(engine, version);
    }
  }
  EXPECT_GT(device_.own_requests(), 0U);
}

TEST_F(DeviceSession, SnapshotsMayLieInTheHostAndTakeNothingOfTheDevice) {
  device_.set_room(0);
  PublisherOptions options;
  options.name = "trainer0";
  options.retention = Retention::kSnapshot;
  options.snapshot_slots = 2;
  options.snapshot_place = SnapshotPlace::kHost;
  Trainer trainer(device_, *control_, layouts("hf")[0], options);
  // Whoever reads such a snapshot needs no device.
  Engine on_host(*host_, *control_, layouts("vllm:tp=2")[1], "on_host");
  Engine on_device(device_, *control_, layouts("vllm:tp=2")[0], "on_device");
  for (uint64_t version = 1; version <= 4; ++version) {
    trainer.publish(version);
    expect_refit(on_host, version);
    expect_refit(on_device, version);
  }
}

TEST_F(DeviceSession, TheCopyOfASnapshotMakesTheSumsOfReadersThatAreKnown) {
  for (const SnapshotPlace place : {SnapshotPlace::kWithWeights, SnapshotPlace::kHost}) {
    control_ = open_local_control();
    PublisherOptions options;
    options.name = "trainer0";
    options.retention = Retention::kSnapshot;
    options.snapshot_slots = 2;
    options.snapshot_place = place;
    Trainer trainer(device_, *control_, layouts("hf")[0], options);
    PretendDevice elsewhere(value_or_fail(open_local_transport(), "transport"));
    Engine one(elsewhere, *control_, layouts("vllm:tp=2")[0], "one");
    Engine two(elsewhere, *control_, layouts("vllm:tp=2")[1], "two");
    trainer.publish(1);
    expect_refit(one, 1);
    expect_refit(two, 1);
    for (uint64_t version = 2; version <= 4; ++version) {
      const uint64_t before = device_.own_requests();
      const uint64_t summed = device_.summed_copies();
      trainer.publish(version);
      expect_refit(one, version);
      expect_refit(two, version);
      EXPECT_EQ(device_.own_requests() - before, 1U) << "nothing is left to be summed";
      EXPECT_GT(device_.summed_copies(), summed);
    }
  }
}

TEST_F(DeviceSession, WhatTheCopyOfASnapshotCannotSumIsSummedAfterwards) {
  start_trainers(device_, "fsdp:dp=1,dtype=f32", 2);
  PretendDevice elsewhere(value_or_fail(open_local_transport(), "transport"));
  // Casts; and parameters of which another table has sums already.
  Engine casting(elsewhere, *control_, layouts("hf")[0], "casting");
  Engine first(elsewhere, *control_, layouts("fsdp:dp=2,dtype=f32")[0], "first");
  Engine whole(elsewhere, *control_, layouts("fsdp:dp=1,dtype=f32")[0], "whole");
  for (uint64_t version = 1; version <= 4; ++version) {
    publish(version);
    for (Engine* engine : {&casting, &first, &whole}) expect_refit(*engine, version);
  }
  EXPECT_GT(device_.summed_copies(), 0U);
}

TEST_F(DeviceSession, ASumOfTheCopyFindsBytesThatDiffer) {
  start_trainers(device_, "hf", 1);
  Engine engine(device_, *control_, layouts("vllm:tp=1")[0]);
  publish(1);
  expect_refit(engine, 1);
  device_.spoil_next_copy();
  publish(2);
  const auto report = engine.refit({}, 2000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kFingerprintMismatch) << report.error().to_string();
  publish(3);
  expect_refit(engine, 3);
}

TEST_F(DeviceSession, ARateThatIsNoneIsRefused) {
  testing::Parameters parameters(layouts("hf")[0]);
  PublisherOptions options;
  options.name = "trainer0";
  for (const double rate : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    options.snapshot_gigabytes_per_second = rate;
    const auto refused =
        Publisher::open(device_, *control_, layouts("hf")[0], parameters.memory(), options);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST_F(DeviceSession, ShadowCommitsAndRollsBackOnTheDevice) {
  start_trainers(device_, "fsdp:dp=2,dtype=f32", 2);
  for (const bool keep_previous : {false, true}) {
    ReceiverOptions options;
    options.into = ReceiveInto::kShadow;
    options.keep_previous = keep_previous;
    Engine engine(device_, *control_, layouts("vllm:tp=2")[0], keep_previous ? "keeps" : "replaces",
                  options);
    const uint64_t version = trainers_[0]->publisher->version();
    publish(version + 1);
    expect_refit(engine, version + 1);
    publish(version + 2);
    expect_refit(engine, version + 2);
    const auto rolled = engine.receiver->rollback(Deadline::after_ms(5000));
    EXPECT_EQ(rolled.has_value(), keep_previous);
    if (!keep_previous) continue;
    EXPECT_EQ(engine.parameters.wrong_elements(version + 1), 0);
  }
}

TEST_F(DeviceSession, AHostThatKnowsNoDevicesIsReadAndCannotReadThem) {
  start_trainers(device_, "fsdp:dp=2,dtype=f32");
  {
    Engine in_host(*host_, *control_, layouts("hf")[0], "in_host");
    publish(1);
    const auto refused = in_host.refit({}, 500);  // it does not know what a device is
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported) << refused.error().to_string();
  }
  trainers_.clear();
  control_ = open_local_control();
  start_trainers(*host_, "fsdp:dp=2,dtype=f32");
  Engine on_device(device_, *control_, layouts("hf")[0], "on_device");
  publish(1);
  expect_refit(on_device, 1);
}

TEST_F(DeviceSession, RevisionIsThatOfTheSameWeightsInTheHost) {
  Digest revisions[2];
  for (Transport* transport : {static_cast<Transport*>(&device_), host_.get()}) {
    auto control = open_local_control();
    PublisherOptions options;
    options.name = "whole";
    options.compute_revision = true;
    Trainer trainer(*transport, *control, layouts("hf")[0], options);
    trainer.publish(1);
    ReceiverOptions receiver_options;
    Engine engine(*transport, *control, layouts("hf")[0], "engine", receiver_options);
    const auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    revisions[transport == host_.get()] = report->revision;
  }
  EXPECT_NE(revisions[0], Digest{});
  EXPECT_EQ(revisions[0], revisions[1]);
}

TEST_F(DeviceSession, ADeviceWithoutRoomRefusesSlotsAndShadows) {
  device_.set_room(1);
  PublisherOptions options;
  options.name = "trainer";
  options.snapshot_slots = 2;
  testing::Parameters parameters(layouts("hf")[0]);
  const auto refused =
      Publisher::open(device_, *control_, layouts("hf")[0], parameters.memory(), options);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(device_.stats().regions, 0U);
  ReceiverOptions shadow;
  shadow.name = "engine";
  shadow.into = ReceiveInto::kShadow;
  const auto no_shadow =
      Receiver::open(device_, *control_, layouts("hf")[0], parameters.memory(), shadow);
  ASSERT_FALSE(no_shadow);
  EXPECT_EQ(no_shadow.error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(device_.stats().regions, 0U);
}

TEST_F(DeviceSession, AFailureOfTheDeviceIsNoVersion) {
  start_trainers(device_, "hf", 2);
  publish(1);
  // The table of this plan exists, so that sums of the next version are not what fails.
  ReceiverOptions options;
  options.verify = Verify::kOff;
  Engine engine(device_, *control_, layouts("hf")[0], "engine", options);
  ASSERT_TRUE(engine.refit());
  ASSERT_TRUE(trainers_[0]->publisher->begin_write(2));
  trainers_[0]->parameters.write(2);
  device_.fail_next();
  const auto failed = trainers_[0]->publisher->publish(2);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.error().code, ErrorCode::kUnavailable);
  const auto report = engine.refit({.kind = VersionRequest::Kind::kAtLeast, .version = 2}, 300);
  EXPECT_FALSE(report);
  // It may be tried again.
  ASSERT_TRUE(trainers_[0]->publisher->publish(2));
  ASSERT_TRUE(engine.refit());
  EXPECT_EQ(engine.parameters.wrong_elements(2), 0);
}

TEST_F(DeviceSession, VerifiesWhatItHolds) {
  start_trainers(device_, "fsdp:dp=2,dtype=bf16");
  Engine engine(device_, *control_, layouts("vllm:tp=1")[0]);
  publish(1);
  expect_refit(engine, 1);
  engine.parameters.buffers()[0][0] ^= std::byte{1};
  publish(2);
  expect_refit(engine, 2);
}

TEST_F(DeviceSession, AnEngineThatSleepsIsNotComparedAndNotTouched) {
  start_trainers(device_, "fsdp:dp=2,dtype=bf16");
  PretendDevice asleep(value_or_fail(open_local_transport(), "transport"));
  Engine engine(asleep, *control_, layouts("vllm:tp=1")[0]);
  publish(1);
  expect_refit(engine, 1);
  asleep.sleep(true);
  auto report = verify_model(device_, *control_, "model", Deadline::after_ms(1000));
  ASSERT_TRUE(report) << report.error().to_string();
  ASSERT_EQ(report->targets.size(), 1U);
  EXPECT_FALSE(report->targets[0].not_compared.empty());
  asleep.sleep(false);
  publish(2);
  expect_refit(engine, 2);
  report = verify_model(device_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->matches()) << report->to_text();
}

}  // namespace
}  // namespace transfuse

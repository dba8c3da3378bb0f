// Whole refits between layouts, in one process: what arrives is right, and what cannot be right is
// an error.
#include <algorithm>
#include <chrono>
#include <future>
#include <thread>

#include <gtest/gtest.h>
#include "session/refit_world.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

class Refit : public ::testing::Test {
 protected:
  Refit() : transport_(testing::value_or_fail(open_local_transport(), "transport")) {}

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

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(Refit, EveryElementIsThatOfTheVersionForEveryTrainerAndEngineSharding) {
  for (const char* trainer :
       {"fsdp:dp=1,dtype=f32", "fsdp:dp=3,dtype=f32", "fsdp:dp=2,tp=2", "hf"}) {
    for (const char* engine : {"hf", "vllm:tp=1", "vllm:tp=2", "vllm:tp=4"}) {
      SCOPED_TRACE(std::string(trainer) + " -> " + engine);
      trainers_.clear();
      start_trainers(trainer);
      const uint64_t version = 1;
      publish(version);
      for (const Layout& layout : layouts(engine)) {
        Engine receiving(*transport_, *control_, layout);
        auto report = receiving.refit();
        ASSERT_TRUE(report) << report.error().to_string();
        EXPECT_EQ(report->version, version);
        EXPECT_EQ(receiving.parameters.wrong_elements(version), 0);
        EXPECT_EQ(report->verified_bytes, report->size_bytes);
      }
    }
  }
}

TEST_F(Refit, VersionsFollowOneAnotherWithoutPlanningAgain) {
  start_trainers("fsdp:dp=2,dtype=f32");
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[1]);
  for (uint64_t version = 1; version <= 20; ++version) {
    publish(version);
    auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, version);
    EXPECT_EQ(report->planned, version == 1);
    EXPECT_EQ(report->attempts, 1u);
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
    EXPECT_EQ(engine.receiver->version(), version);
  }
}

TEST_F(Refit, PaddedVocabularyIsZero) {
  start_trainers("fsdp:dp=2,dtype=f32");
  publish(1);
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[1]);
  ASSERT_TRUE(engine.refit());
  const Layout& layout = engine.parameters.layout();
  ASSERT_FALSE(layout.fills().empty());
  for (const Fill& fill : layout.fills()) {
    const auto& buffer = engine.parameters.buffers()[fill.parameter];
    const auto begin = buffer.begin() + fill.element_offset * 2;
    EXPECT_TRUE(std::all_of(begin, begin + fill.length.product() * 2,
                            [](std::byte byte) { return byte == std::byte{0}; }));
  }
}

TEST_F(Refit, ReplicasShareTheReaders) {
  start_trainers("fsdp:dp=2,replicas=2");
  publish(1);
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  auto report = engine.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  ASSERT_EQ(report->routes.size(), 4u);
  for (const RefitRoute& route : report->routes) {
    EXPECT_LT(route.size_bytes, report->size_bytes * 2 / 5) << route.source;
  }
  EXPECT_EQ(engine.parameters.wrong_elements(1), 0);
}

TEST_F(Refit, WaitsForAVersionAndSaysWhoHasNotPublished) {
  start_trainers("fsdp:dp=2");
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  trainers_[0]->publish(1);
  auto early = engine.refit({}, 100);
  ASSERT_FALSE(early);
  EXPECT_EQ(early.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_NE(early.error().message.find("trainer1"), std::string::npos) << early.error().message;
  EXPECT_EQ(engine.receiver->version(), 0u);

  auto waiting = std::async(std::launch::async, [&] { return engine.refit(); });
  trainers_[1]->publish(1);
  auto report = waiting.get();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(engine.parameters.wrong_elements(1), 0);
}

TEST_F(Refit, ExactVersionThatIsGoneIsSaidAndNothingIsWritten) {
  start_trainers("fsdp:dp=1");
  publish(1);
  publish(2);
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  auto report = engine.refit({.kind = VersionRequest::Kind::kExactly, .version = 1}, 2000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kVersionGone);
  for (const auto& buffer : engine.parameters.buffers()) {
    EXPECT_TRUE(std::ranges::all_of(buffer, [](std::byte b) { return b == std::byte{0xEE}; }));
  }
}

TEST_F(Refit, AtLeastTakesANewerVersion) {
  start_trainers("fsdp:dp=1");
  publish(7);
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  auto report = engine.refit({.kind = VersionRequest::Kind::kAtLeast, .version = 3});
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 7u);
}

TEST_F(Refit, I8_SourceThatWroteWithoutAskingIsNeverASuccess) {
  start_trainers("fsdp:dp=1");
  publish(1);
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  ASSERT_TRUE(engine.refit());
  // Bytes change under the published generation: only the fingerprint of the source can differ from
  // what is read, and the table of the version was summed before.
  trainers_[0]->parameters.write(99);
  auto report = engine.refit({}, 3000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kFingerprintMismatch);
  EXPECT_NE(report.error().message.find("tensor '"), std::string::npos) << report.error().message;
  EXPECT_EQ(engine.receiver->version(), 0u);
}

TEST_F(Refit, RestartedTrainerWithAnotherShardingIsPlannedAnew) {
  start_trainers("fsdp:dp=2");
  publish(1);
  Engine engine(*transport_, *control_, layouts("vllm:tp=1")[0]);
  ASSERT_TRUE(engine.refit());
  trainers_.clear();
  start_trainers("fsdp:dp=3");
  publish(2);
  auto report = engine.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->planned);
  EXPECT_EQ(report->version, 2u);
  EXPECT_EQ(engine.parameters.wrong_elements(2), 0);
}

TEST_F(Refit, LayoutsThatDoNotFitNameTensorAndReason) {
  start_trainers("fsdp:dp=1");
  publish(1);
  LayoutBuilder builder;
  const uint32_t tensor =
      builder.tensor({.name = "model.unheard_of", .dtype = Dtype::kBF16, .shape = Dims{4}});
  const uint32_t parameter =
      builder.parameter({.name = "p", .dtype = Dtype::kBF16, .element_count = 4});
  builder.tile(tensor, Box::whole(Dims{4}), parameter, 0);
  Engine engine(*transport_, *control_, testing::value_or_fail(builder.build(), "layout"));
  auto report = engine.refit({}, 2000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_NE(report.error().message.find("model.unheard_of"), std::string::npos);
}

TEST_F(Refit, CancelEndsAWaitingRefit) {
  start_trainers("fsdp:dp=1");
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  auto waiting = std::async(std::launch::async, [&] { return engine.refit({}, 60000); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  engine.receiver->cancel();
  auto report = waiting.get();
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kCancelled);
}

TEST_F(Refit, PublisherCallsOutOfOrderAreRefused) {
  start_trainers("fsdp:dp=1");
  Publisher& publisher = *trainers_[0]->publisher;
  EXPECT_EQ(publisher.publish(1).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(publisher.begin_write(5));
  EXPECT_EQ(publisher.begin_write(6).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(publisher.publish(6).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(publisher.publish(5));
  EXPECT_EQ(publisher.version(), 5u);
  EXPECT_EQ(publisher.begin_write(5).error().code, ErrorCode::kAlreadyExists);
}

TEST_F(Refit, AbortedVersionIsNeverSeen) {
  start_trainers("fsdp:dp=1");
  ASSERT_TRUE(trainers_[0]->publisher->begin_write(1));
  ASSERT_TRUE(trainers_[0]->publisher->abort_write("the loss was not a number"));
  Engine engine(*transport_, *control_, layouts("hf")[0]);
  EXPECT_FALSE(engine.refit({}, 100));
  publish(2);
  auto report = engine.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(engine.parameters.wrong_elements(2), 0);
}

TEST_F(Refit, MemoryIsMatchedByNameAndSize) {
  const Layout layout = layouts("hf")[0];
  testing::Parameters parameters(layout);
  PublisherOptions options;
  options.name = "trainer0";
  auto memory = parameters.memory();
  memory.pop_back();
  EXPECT_EQ(Publisher::open(*transport_, *control_, layout, memory, options).error().code,
            ErrorCode::kInvalidArgument);
  memory = parameters.memory();
  memory[0].size_bytes -= 2;
  auto small = Publisher::open(*transport_, *control_, layout, memory, options);
  ASSERT_FALSE(small);
  EXPECT_EQ(small.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_NE(small.error().message.find(memory[0].name), std::string::npos);
  memory = parameters.memory();
  std::ranges::reverse(memory);  // I2: the order says nothing
  EXPECT_TRUE(Publisher::open(*transport_, *control_, layout, memory, options));
}

TEST_F(Refit, I3_AHundredRefitsLeaveRegistrationsAsAfterTheSecond) {
  start_trainers("fsdp:dp=2,dtype=f32");
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[0]);
  TransportStats second;
  for (uint64_t version = 1; version <= 100; ++version) {
    publish(version);
    auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    TransportStats now = transport_->stats();
    now.read_bytes = 0;
    if (version == 2) second = now;
    if (version > 2) {
      ASSERT_EQ(now, second) << "at version " << version;
    }
  }
}

TEST_F(Refit, RareReaderGetsItsTableBackAfterTheSourceDroppedIt) {
  start_trainers("fsdp:dp=2,dtype=f32");
  Engine engine(*transport_, *control_, layouts("vllm:tp=2")[0]);
  publish(1);
  ASSERT_TRUE(engine.refit());
  for (uint64_t version = 2; version <= 80; ++version) publish(version);
  auto report = engine.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 80u);
  EXPECT_EQ(report->attempts, 1u);
  EXPECT_TRUE(report->steps.empty()) << report->to_text();  // I12: nobody is blamed
  EXPECT_EQ(engine.parameters.wrong_elements(80), 0);
}

TEST_F(Refit, VerifyFindsTheTensorThatAnEngineLost) {
  start_trainers("fsdp:dp=2,dtype=f32");
  publish(1);
  Engine good(*transport_, *control_, layouts("vllm:tp=2")[0], "engine0");
  Engine bad(*transport_, *control_, layouts("vllm:tp=2")[1], "engine1");
  ASSERT_TRUE(good.refit());
  ASSERT_TRUE(bad.refit());
  auto report = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->matches()) << report->to_text();

  const auto norm = bad.parameters.layout().find_parameter("model.norm.weight");
  ASSERT_TRUE(norm);
  bad.parameters.buffers()[*norm][3] ^= std::byte{0x10};
  report = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(report) << report.error().to_string();
  ASSERT_EQ(report->targets.size(), 2u);
  for (const TargetVerdict& verdict : report->targets) {
    ASSERT_TRUE(verdict.not_compared.empty()) << verdict.not_compared;
    ASSERT_EQ(verdict.mismatches.size(), verdict.target == "engine1" ? 1u : 0u);
    if (verdict.target == "engine1") {
      EXPECT_EQ(verdict.mismatches[0].tensor, "model.norm.weight");
    }
  }
}

}  // namespace
}  // namespace transfuse

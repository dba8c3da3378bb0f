// Refits from sources of which some do not fit: who is read, who is named, and what is compared.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "session/known_weights.h"
#include "session/refit_world.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"

namespace transfuse {
namespace {

using testing::Engine;
using ::testing::HasSubstr;
using testing::layouts;
using testing::Parameters;
using testing::Trainer;

Demand accepting(std::string kind) { return {.kinds = {std::move(kind)}}; }

Demand at_least(uint64_t step) {
  return {.require = {
              {.key = "step", .kind = Requirement::Kind::kAtLeast, .value = std::to_string(step)}}};
}

class DemandingRefit : public ::testing::Test {
 protected:
  DemandingRefit() : transport_(testing::value_or_fail(open_local_transport(), "transport")) {}

  static PublisherOptions options(std::string name, uint32_t count, Metadata metadata = {}) {
    PublisherOptions options;
    options.name = std::move(name);
    options.source_count = count;
    options.fingerprint_threads = 1;
    options.metadata = std::move(metadata);
    return options;
  }
  Trainer& add(const Layout& layout, const PublisherOptions& options) {
    trainers_.push_back(std::make_unique<Trainer>(*transport_, *control_, layout, options));
    return *trainers_.back();
  }
  // Of `kind`, "" says none.
  static Layout of_kind(const Layout& layout, std::string_view kind) {
    return layout.with_kind(kind).value();
  }
  // Replicas of the whole model, of one kind each.
  void replicas(const std::vector<std::string>& kinds) {
    for (const std::string& kind : kinds) {
      add(of_kind(layouts("hf")[0], kind), options("replica" + std::to_string(trainers_.size()),
                                                   static_cast<uint32_t>(kinds.size())));
    }
  }
  static void publish(Trainer& trainer, uint64_t version, const VersionWords& words = {}) {
    ASSERT_TRUE(trainer.publisher->begin_write(version));
    trainer.parameters.write(version);
    const auto published = trainer.publisher->publish(version, words);
    ASSERT_TRUE(published) << published.error().to_string();
  }
  void publish(uint64_t version, const VersionWords& words = {}) {
    for (auto& trainer : trainers_) publish(*trainer, version, words);
  }
  std::unique_ptr<Engine> engine(const Demand& demand, std::string_view spec = "vllm:tp=2",
                                 std::string name = "engine0") {
    ReceiverOptions options;
    options.demand = demand;
    return std::make_unique<Engine>(*transport_, *control_, layouts(spec)[0], std::move(name),
                                    options);
  }
  static std::string steps(const RefitReport& report) {
    std::string text;
    for (const RefitStep& step : report.steps) {
      text.append(error_code_name(step.code)).append(" ").append(step.source).append(" ");
      text.append(step.what).append("\n");
    }
    return text;
  }

  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(DemandingRefit, OnlyTheReplicaThatFitsIsReadAndTheOtherIsNamedWithTheReason) {
  replicas({"cutlass_fp8", "hf_raw"});
  const auto engine = this->engine(accepting("hf_raw"));
  for (uint64_t version = 1; version <= 3; ++version) {
    publish(version);
    const auto report = engine->refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(engine->parameters.wrong_elements(version), 0);
    EXPECT_EQ(report->planned, version == 1) << "who does not fit costs no plan";
    ASSERT_EQ(report->routes.size(), 1U);
    EXPECT_EQ(report->routes[0].source, "replica1");
    ASSERT_EQ(report->steps.size(), 1U) << steps(*report);
    EXPECT_EQ(report->steps[0].code, ErrorCode::kNoFittingSource);
    EXPECT_EQ(report->steps[0].source, "replica0");
    EXPECT_THAT(report->steps[0].what, HasSubstr("its kind is 'cutlass_fp8', accepted: hf_raw"));
  }
}

// Its layout could never be read into this target: it must not stand in the way of the other.
TEST_F(DemandingRefit, ASourceThatDoesNotFitNeedNotEvenBeReadable) {
  LayoutBuilder builder;
  builder.kind("deepgemm_fp8");
  const Layout whole = layouts("hf")[0];
  for (const TensorSpec& tensor : whole.tensors()) {
    const auto parameter =
        builder.parameter({.name = tensor.name, .dtype = Dtype::kF32, .element_count = 4});
    builder.tile(builder.tensor({tensor.name, Dtype::kF8E4M3, {4}}), Box::whole({4}), parameter, 0);
  }
  add(builder.build().value(), options("packed", 2));
  add(of_kind(whole, "hf_raw"), options("raw", 2));
  publish(1);
  const auto unwary = engine({}, "hf", "unwary");
  EXPECT_EQ(unwary->refit().error().code, ErrorCode::kLayoutMismatch);
  const auto engine = this->engine(accepting("hf_raw"), "hf");
  const auto report = engine->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(engine->parameters.wrong_elements(1), 0);
}

TEST_F(DemandingRefit, WhereCoverageLacksTheErrorNamesTensorSourceAndReason) {
  const auto shards = layouts("fsdp:dp=2,dtype=f32");
  add(of_kind(shards[0], "hf_raw"), options("trainer0", 2));
  add(of_kind(shards[1], "trtllm"), options("trainer1", 2));
  publish(1);
  const auto engine = this->engine(accepting("hf_raw"));
  const auto report = engine->refit({}, 3000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kNoFittingSource);
  EXPECT_THAT(report.error().message, HasSubstr("tensor 'lm_head.weight' [51:64, 0:24]"));
  EXPECT_THAT(report.error().message,
              HasSubstr("source 'trainer1' holds it, but its kind is 'trt"));
  EXPECT_EQ(engine->receiver->version(), 0U);
  EXPECT_THAT(steps(engine->receiver->last_report()), HasSubstr("trainer1"));
}

TEST_F(DemandingRefit, WhereNothingFitsTheErrorAtTheDeadlineNamesEverySource) {
  replicas({"cutlass_fp8", ""});
  publish(1);
  const auto engine = this->engine(accepting("hf_raw"));
  const auto report = engine->refit({}, 600);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kNoFittingSource);
  EXPECT_THAT(report.error().message, HasSubstr("'replica0': its kind is 'cutlass_fp8'"));
  EXPECT_THAT(report.error().message, HasSubstr("'replica1': it states no kind"));
  const auto exactly = engine->refit({.kind = VersionRequest::Kind::kExactly, .version = 1});
  EXPECT_EQ(exactly.error().code, ErrorCode::kNoFittingSource);
}

TEST_F(DemandingRefit, MetadataOfAVersionIsWaitedForReportedAndCostsNoPlan) {
  Trainer& trainer = add(layouts("hf")[0], options("trainer0", 1, {{"run", "x"}}));
  const auto engine = this->engine(at_least(30));
  std::atomic<bool> done{false};
  std::thread training([&] {
    for (uint64_t version = 1; version <= 3; ++version) {
      publish(trainer, version, {.metadata = {{"step", std::to_string(version * 10)}}});
    }
    done = true;
  });
  auto report = engine->refit();
  training.join();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(done);
  EXPECT_EQ(report->version, 3U);
  EXPECT_EQ(report->metadata, (Metadata{{"run", "x"}, {"step", "30"}}));
  EXPECT_THAT(report->to_json(), HasSubstr(R"("step":"30")"));
  publish(trainer, 4, {.metadata = {{"step", "40"}}});
  report = engine->refit();
  ASSERT_TRUE(report);
  EXPECT_FALSE(report->planned);
  EXPECT_EQ(report->metadata.at("step"), "40");
  // A refit may demand more than its receiver does.
  const auto more = engine->refit({.demand = at_least(50)}, 400);
  ASSERT_FALSE(more);
  EXPECT_THAT(more.error().message, HasSubstr("'step' is '40', at least 50 is demanded"));
  EXPECT_TRUE(engine->refit());
}

TEST_F(DemandingRefit, WhatIsDemandedOfTensorsIsReadFromTheLayoutOfTheSource) {
  const Layout whole = layouts("hf")[0];
  const auto with_scales = [&](const std::string& scales) {
    LayoutBuilder builder;
    for (const ParameterSpec& parameter : whole.parameters()) builder.parameter(parameter);
    for (const Tile& tile : whole.tiles()) {
      const TensorSpec& tensor = whole.tensors()[tile.tensor];
      const auto handle = builder.tensor(tensor);
      if (tensor.name.find("mlp") != std::string::npos) {
        builder.metadata(handle, {{"scales", scales}});
      }
      builder.tile(handle, tile.box, builder.parameter(whole.parameters()[tile.parameter]),
                   tile.element_offset, tile.element_strides);
    }
    return builder.build().value();
  };
  add(with_scales("f32"), options("a", 2));
  add(with_scales("ue8m0"), options("b", 2));
  publish(1);
  const auto demand = [](std::string tensors) {
    return Demand{.require = {{.key = "scales", .value = "ue8m0", .tensors = std::move(tensors)}}};
  };
  const auto engine = this->engine(demand("*.mlp.*"));
  const auto report = engine->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  ASSERT_EQ(report->routes.size(), 1U);
  EXPECT_EQ(report->routes[0].source, "b");
  EXPECT_THAT(steps(*report), HasSubstr("a version 1: tensor 'model.layers.0.mlp"));
  const auto all = this->engine(demand("*"), "vllm:tp=2", "engine1");
  EXPECT_EQ(all->refit({}, 3000).error().code, ErrorCode::kNoFittingSource);
}

// -- revisions --

TEST_F(DemandingRefit, ReplicasThatHoldOneContentStateOneRevision) {
  for (const char* const name : {"a", "b"}) {
    PublisherOptions computing = options(name, 2);
    computing.compute_revision = true;
    // Fused otherwise, but the same bytes.
    add(layouts(trainers_.empty() ? "hf" : "vllm:tp=1")[0], computing);
  }
  publish(1);
  const auto engine = this->engine({});
  auto report = engine->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  const Digest first = report->revision;
  EXPECT_EQ(first, revision_of(layouts("hf")[0], trainers_[0]->parameters.memory()).value());
  EXPECT_EQ(control_->versions("model").value().back().revision, first);
  EXPECT_THAT(report->to_json(), HasSubstr(first.to_string()));
  publish(2);
  report = engine->refit({.demand = {.revision = first}}, 400);
  ASSERT_FALSE(report);
  EXPECT_THAT(report.error().message, HasSubstr(first.to_string() + " is demanded"));
  report = engine->refit();
  ASSERT_TRUE(report);
  EXPECT_NE(report->revision, first);
  EXPECT_FALSE(report->planned);
}

TEST_F(DemandingRefit, ReplicasThatHoldDifferentBytesAreFoundBeforeAnyMoves) {
  for (const char* const name : {"a", "b"}) {
    PublisherOptions computing = options(name, 2);
    computing.compute_revision = true;
    add(layouts("hf")[0], computing);
  }
  publish(*trainers_[0], 1);
  ASSERT_TRUE(trainers_[1]->publisher->begin_write(1));
  trainers_[1]->parameters.write(1);
  trainers_[1]->parameters.buffers()[3][5] ^= std::byte{1};  // one bit
  ASSERT_TRUE(trainers_[1]->publisher->publish(1));
  const auto engine = this->engine({});
  const auto report = engine->refit({}, 3000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kFingerprintMismatch);
  EXPECT_THAT(report.error().message, HasSubstr("'a' states revision"));
  EXPECT_EQ(engine->receiver->last_report().source_bytes, 0U);
  EXPECT_EQ(control_->versions("model").value().back().revision, Digest{});
  // Who knows which one is right says so.
  const Digest right = revision_of(layouts("hf")[0], trainers_[0]->parameters.memory()).value();
  const auto chosen = engine->refit({.demand = {.revision = right}});
  ASSERT_TRUE(chosen) << chosen.error().to_string();
  EXPECT_EQ(chosen->routes.size(), 1U);
  EXPECT_EQ(engine->parameters.wrong_elements(1), 0);
}

TEST_F(DemandingRefit, AStatedRevisionThatTheWeightsDoNotHaveIsNotPublished) {
  PublisherOptions computing = options("a", 1);
  computing.compute_revision = true;
  computing.snapshot_slots = 1;
  computing.retention = Retention::kSnapshot;
  Trainer& trainer = add(layouts("hf")[0], computing);
  ASSERT_TRUE(trainer.publisher->begin_write(1));
  trainer.parameters.write(1);
  const Digest wrong{.high = 1, .low = 2};
  const auto refused = trainer.publisher->publish(1, {.revision = wrong});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kFingerprintMismatch);
  EXPECT_THAT(refused.error().message, HasSubstr(wrong.to_string()));
  const Digest right = revision_of(layouts("hf")[0], trainer.parameters.memory()).value();
  const auto published = trainer.publisher->publish(1, {.revision = right});
  ASSERT_TRUE(published) << published.error().to_string();
  EXPECT_EQ(engine({})->refit()->revision, right);
}

TEST_F(DemandingRefit, ARevisionOfPartsIsRefusedWithTheNameOfATensor) {
  PublisherOptions computing = options("a", 2);
  computing.compute_revision = true;
  const Layout shard = layouts("fsdp:dp=2")[0];
  Parameters parameters(shard);
  const auto opened =
      Publisher::open(*transport_, *control_, shard, parameters.memory(), computing);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_THAT(opened.error().message, HasSubstr("lm_head.weight"));
}

TEST_F(DemandingRefit, TheRevisionOfAVersionDoesNotDependOnItsSharding) {
  const Layout whole = layouts("hf")[0];
  Parameters all(whole);
  all.write(1);
  const Digest expected = revision_of(whole, all.memory()).value();
  for (const char* const spec :
       {"hf", "fsdp:dp=3", "fsdp:dp=2,tp=2", "vllm:tp=2", "vllm:tp=4", "fsdp:dp=2,replicas=2"}) {
    trainers_.clear();
    const auto shards = layouts(spec);
    for (size_t i = 0; i < shards.size(); ++i) {
      add(shards[i], options("t" + std::to_string(i), static_cast<uint32_t>(shards.size())));
    }
    publish(1);
    const auto found =
        version_revision(*transport_, *control_, "model", 0, Deadline::after_ms(10000));
    ASSERT_TRUE(found) << spec << found.error().to_string();
    EXPECT_EQ(found->version, 1U);
    EXPECT_EQ(found->computed, expected) << spec;
    EXPECT_EQ(found->stated, Digest{});
  }
}

TEST_F(DemandingRefit, I13_WhatIsSaidAndDemandedIsBounded) {
  const Metadata large{{"k", std::string(kMaxMetadataValueBytes + 1, 'v')}};
  const Layout layout = layouts("hf")[0];
  Parameters parameters(layout);
  EXPECT_EQ(
      Publisher::open(*transport_, *control_, layout, parameters.memory(), options("a", 1, large))
          .error()
          .code,
      ErrorCode::kInvalidArgument);
  Trainer& trainer = add(layout, options("a", 1));
  ASSERT_TRUE(trainer.publisher->begin_write(1));
  EXPECT_EQ(trainer.publisher->publish(1, {.metadata = large}).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_TRUE(trainer.publisher->publish(1));
  ReceiverOptions receiving;
  receiving.name = "engine0";
  receiving.demand = {
      .require = {{.key = "step", .kind = Requirement::Kind::kAtLeast, .value = "many"}}};
  EXPECT_EQ(
      Receiver::open(*transport_, *control_, layout, parameters.memory(), receiving).error().code,
      ErrorCode::kInvalidArgument);
  const auto engine = this->engine({});
  EXPECT_EQ(engine->refit({.demand = receiving.demand}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(engine->refit());
}

}  // namespace
}  // namespace transfuse

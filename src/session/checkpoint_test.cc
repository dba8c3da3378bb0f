// Refits that end with a checkpoint, because no peer can serve: I8, I12.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "session/known_weights.h"
#include "session/refit_world.h"
#include "session/stored_weights.h"
#include "transfuse/checkpoint.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::testing {
namespace {

using ::testing::HasSubstr;

class CheckpointRefit : public ::testing::TestWithParam<ReceiveInto> {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    transport_ = value_or_fail(open_local_transport({.threads = 2}), "transport");
    control_ = open_local_control();
  }
  void TearDown() override {
    trainers_.clear();
    std::filesystem::remove_all(folder_);
  }

  // The weights of `version` in the layout `spec`.
  Checkpoint write(const std::string& name, const std::string& spec, uint64_t version,
                   uint64_t recorded) const {
    const std::filesystem::path path = folder_ / name;
    std::filesystem::create_directory(path);
    std::ofstream(path / "config.json") << kSmallConfig;
    const auto ranks = layouts(spec);
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      Parameters parameters(ranks[rank]);
      parameters.write(version);
      const bool whole = spec.starts_with("hf");
      write_rank(
          path / (whole ? "model.safetensors" : "rank" + std::to_string(rank) + ".safetensors"),
          parameters, recorded);
    }
    return {.path = path.string(), .spec = spec};
  }
  ReceiverOptions options(const Checkpoint& checkpoint, int64_t wait_ms = 50) const {
    ReceiverOptions options;
    options.into = GetParam();
    options.checkpoint = checkpoint;
    options.checkpoint_wait_ms = wait_ms;
    return options;
  }
  std::unique_ptr<Engine> engine(const ReceiverOptions& options, const std::string& spec = "vllm",
                                 const std::string& name = "engine0", size_t rank = 0) {
    return std::make_unique<Engine>(*transport_, *control_, layouts(spec)[rank], name, options);
  }
  Trainer& add_trainer(const std::string& spec = "hf") {
    const Layout layout = layouts(spec)[0];
    return *trainers_.emplace_back(
        std::make_unique<Trainer>(*transport_, *control_, layout, "trainer0", 1));
  }
  uint64_t known_version(const std::string& name) const {
    for (const MemberInfo& member : control_->members("").value()) {
      if (member.name == name) return member.version;
    }
    return 0;
  }
  static std::string steps(const RefitReport& report) {
    std::string text;
    for (const RefitStep& step : report.steps) text += step.source + ": " + step.what + "\n";
    return text;
  }

  std::filesystem::path folder_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_;
  std::vector<std::unique_ptr<Trainer>> trainers_;
};
INSTANTIATE_TEST_SUITE_P(Into, CheckpointRefit,
                         ::testing::Values(ReceiveInto::kInPlace, ReceiveInto::kShadow),
                         [](const auto& test) {
                           return test.param == ReceiveInto::kInPlace ? "InPlace" : "Shadow";
                         });

TEST_P(CheckpointRefit, I12_FirstWeightsComeFromACheckpointWhereNobodyPublishes) {
  int number = 0;
  for (const char* spec : {"hf", "hf:dtype=f32", "fsdp:dp=3,dtype=f32", "vllm:tp=2",
                           "megatron:tp=2,pp=2", "fsdp:dp=2,replicas=2"}) {
    for (const Verify verify : {Verify::kFull, Verify::kOff}) {
      SCOPED_TRACE(spec);
      const std::string name = "engine" + std::to_string(++number);
      auto given = options(write(name, spec, 7, 7));
      given.verify = verify;
      auto target = engine(given, "vllm:tp=2", name, 1);
      const auto report = target->refit();
      ASSERT_TRUE(report) << report.error().to_string();
      EXPECT_EQ(report->version, 7u);
      EXPECT_EQ(target->receiver->version(), 7u);
      EXPECT_EQ(target->parameters.wrong_elements(7), 0);
      EXPECT_EQ(known_version(name), 7u) << "the coordinator is told";
      EXPECT_EQ(report->checkpoint, given.checkpoint->path);
      EXPECT_EQ(report->verified_bytes, verify == Verify::kFull ? report->size_bytes : 0);
      ASSERT_FALSE(report->routes.empty());
      for (const RefitRoute& route : report->routes) {
        EXPECT_EQ(route.transport, "file");
        EXPECT_EQ(route.route, "pread");
        EXPECT_THAT(route.source, HasSubstr(given.checkpoint->path));
      }
      EXPECT_THAT(steps(*report), HasSubstr("no source has joined"));
      EXPECT_THAT(steps(*report),
                  HasSubstr("next: checkpoint " + given.checkpoint->path + " (version 7)"));
    }
  }
}

TEST_P(CheckpointRefit, PeersComeFirst) {
  add_trainer().publish(1);
  auto target = engine(options(write("c", "hf", 7, 7)));
  const auto report = target->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 1u);
  EXPECT_EQ(report->checkpoint, "");
  EXPECT_TRUE(report->steps.empty()) << steps(*report);
  EXPECT_EQ(target->parameters.wrong_elements(1), 0);
}

TEST_P(CheckpointRefit, APublisherThatIsGoneIsFollowedByItsCheckpoint) {
  add_trainer().publish(3);
  auto target = engine(options(write("c", "fsdp:dp=2,dtype=f32", 4, 4)));
  ASSERT_TRUE(target->refit());
  trainers_.clear();
  const auto report = target->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 4u);
  EXPECT_EQ(target->parameters.wrong_elements(4), 0);
  // And when there is one again, it is read.
  add_trainer().publish(5);
  const auto after = target->refit();
  ASSERT_TRUE(after) << after.error().to_string();
  EXPECT_EQ(after->version, 5u);
  EXPECT_EQ(after->checkpoint, "");
  EXPECT_EQ(target->parameters.wrong_elements(5), 0);
}

TEST_P(CheckpointRefit, NothingGoesBackToOlderWeightsUnasked) {
  add_trainer().publish(8);
  auto target = engine(options(write("c", "hf", 5, 5)));
  ASSERT_TRUE(target->refit());
  trainers_.clear();
  const auto refused = target->refit({}, 400);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(steps(target->receiver->last_report()),
              HasSubstr("not used: it holds version 5, the target holds 8 already"));
  EXPECT_EQ(target->receiver->version(), 8u);
  EXPECT_EQ(target->parameters.wrong_elements(8), 0);
  const auto asked = target->refit({.kind = VersionRequest::Kind::kExactly, .version = 5});
  ASSERT_TRUE(asked) << asked.error().to_string();
  EXPECT_EQ(target->parameters.wrong_elements(5), 0);
}

TEST_P(CheckpointRefit, ACheckpointThatDoesNotFitCutsNoWaitShort) {
  Trainer& trainer = add_trainer();
  auto target = engine(options(write("c", "hf", 5, 5), 20));
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(600));
    trainer.publish(6);
  });
  const auto report = target->refit({.kind = VersionRequest::Kind::kAtLeast, .version = 6});
  later.join();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 6u);
  EXPECT_EQ(report->checkpoint, "");
  EXPECT_THAT(steps(*report), HasSubstr("not used: it holds version 5, at least 6 was asked for"));
  EXPECT_EQ(target->parameters.wrong_elements(6), 0);
}

TEST_P(CheckpointRefit, TheVersionIsGivenOrRecordedAndNeverGuessed) {
  Checkpoint silent = write("silent", "hf", 2, 0);
  Checkpoint recorded = write("recorded", "hf", 3, 3);
  const auto refused = [&](const Checkpoint& checkpoint, const std::string& name) {
    auto target = engine(options(checkpoint), "vllm", name);
    const auto outcome = target->refit({}, 300);
    EXPECT_FALSE(outcome);
    EXPECT_EQ(target->receiver->version(), 0u);
    return steps(target->receiver->last_report());
  };
  EXPECT_THAT(refused(silent, "a"), HasSubstr("given or recorded in its files, found neither"));
  recorded.version = 4;
  EXPECT_THAT(refused(recorded, "b"), HasSubstr("expected version 4, its files record version 3"));
  silent.version = 2;
  auto target = engine(options(silent), "vllm", "c");
  const auto report = target->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 2u);
}

TEST_P(CheckpointRefit, PeersWithoutTheLayoutAreFollowedByTheCheckpoint) {
  LayoutBuilder builder;  // of another model
  const auto t = builder.tensor({"other.weight", Dtype::kBF16, {4}});
  builder.tile(t, Box::whole({4}), builder.parameter({"other.weight", Dtype::kBF16, 4}), 0);
  Trainer other(*transport_, *control_, builder.build().value(), "trainer0", 1);
  other.publish(1);
  auto target = engine(options(write("c", "hf", 7, 7)));
  const auto report = target->refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 7u);
  ASSERT_EQ(report->steps.size(), 1u);
  EXPECT_EQ(report->steps[0].code, ErrorCode::kLayoutMismatch);
  EXPECT_THAT(report->steps[0].what, HasSubstr("next: checkpoint"));
}

TEST_P(CheckpointRefit, ACheckpointThatLiesIsNamedAndThePeersErrorStays) {
  const Checkpoint bad = write("c", "hf", 7, 7);
  const std::filesystem::path file = std::filesystem::path(bad.path) / "model.safetensors";
  auto target = engine(options(bad));
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 2);
  const auto refused = target->refit({}, 300);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(steps(target->receiver->last_report()), HasSubstr("truncated or its header lies"));
  // Mended, it serves the same receiver.
  write("c", "hf", 7, 7);
  EXPECT_TRUE(target->refit());
  EXPECT_EQ(target->parameters.wrong_elements(7), 0);
}

// Another checkpoint takes the place of the one before all the time, by rename and in place: what
// is reported is what is there.
TEST_P(CheckpointRefit, I8_ACheckpointThatIsReplacedMeanwhileIsNeverMixed) {
  const Checkpoint checkpoint = write("c", "vllm:tp=2", 1, 1);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (uint64_t version = 2; !stop; ++version) {
      write("next", "vllm:tp=2", version, version);
      for (const char* file : {"rank0.safetensors", "rank1.safetensors"}) {
        const auto from = folder_ / "next" / file;
        if (version % 2 == 0) {
          std::filesystem::rename(from, folder_ / "c" / file);
        } else {
          std::filesystem::copy_file(from, folder_ / "c" / file,
                                     std::filesystem::copy_options::overwrite_existing);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(25));
    }
  });
  auto given = options(checkpoint, 1);
  given.plan.chunk_bytes = 2048;
  given.verify = Verify::kOff;  // what is found is found by the files' identity
  auto target = engine(given);
  int landed = 0;
  for (int round = 0; round < 25; ++round) {
    const auto report = target->refit({}, 2000);
    if (!report) {
      EXPECT_THAT(report.error().code,
                  ::testing::AnyOf(ErrorCode::kTornRead, ErrorCode::kCorrupt, ErrorCode::kNotFound,
                                   ErrorCode::kLayoutMismatch, ErrorCode::kDeadlineExceeded))
          << report.error().to_string();
      continue;
    }
    ++landed;
    ASSERT_EQ(target->parameters.wrong_elements(report->version), 0) << report->to_text();
  }
  stop = true;
  writer.join();
  EXPECT_GT(landed, 0);
  const auto last = target->refit({}, 20000);
  ASSERT_TRUE(last) << last.error().to_string();
  EXPECT_EQ(target->parameters.wrong_elements(last->version), 0);
}

TEST_P(CheckpointRefit, ForTwoHundredRefitsNothingPilesUp) {
  auto target = engine(options(write("c", "fsdp:dp=2", 7, 7), 1));
  const auto open_files = [] {
    const std::filesystem::directory_iterator folder("/proc/self/fd");
    return std::distance(begin(folder), end(folder));
  };
  std::ptrdiff_t before = 0;
  for (int round = 0; round < 200; ++round) {
    const auto report = target->refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->planned, round == 0);
    if (round == 1) before = open_files();
  }
  EXPECT_EQ(open_files(), before);
  EXPECT_EQ(target->parameters.wrong_elements(7), 0);
}

TEST_P(CheckpointRefit, RanksOfAGroupThatHoldNothingLoadItTogether) {
  auto given = options(write("c", "hf", 7, 7));
  given.group = "engine";
  given.group_size = 2;
  auto first = engine(given, "vllm:tp=2", "rank0", 0);
  auto second = engine(given, "vllm:tp=2", "rank1", 1);
  const auto refit_both = [&](int64_t deadline_ms) {
    Result<RefitReport> other = RefitReport{};
    std::thread rank([&] { other = second->refit({}, deadline_ms); });
    auto own = first->refit({}, deadline_ms);
    rank.join();
    return std::pair(std::move(own), std::move(other));
  };
  const auto [own, other] = refit_both(10000);
  ASSERT_TRUE(own) << own.error().to_string();
  ASSERT_TRUE(other) << other.error().to_string();
  const auto group = first->receiver->check_group();
  ASSERT_TRUE(group) << group.error().to_string();
  EXPECT_EQ(group->version, 7u);
  EXPECT_EQ(first->parameters.wrong_elements(7), 0);
  EXPECT_EQ(second->parameters.wrong_elements(7), 0);
  // From here on they change together, or not at all.
  write("c", "hf", 9, 9);
  const auto [one, two] = refit_both(400);
  EXPECT_FALSE(one);
  EXPECT_FALSE(two);
  EXPECT_THAT(steps(first->receiver->last_report()), HasSubstr("change version 7 only together"));
  EXPECT_TRUE(first->receiver->check_group());
  EXPECT_EQ(first->parameters.wrong_elements(7), 0);
  // Peers take over.
  add_trainer().publish(8);
  const auto [a, b] = refit_both(10000);
  EXPECT_TRUE(a);
  EXPECT_TRUE(b);
  EXPECT_EQ(second->parameters.wrong_elements(8), 0);
}

TEST_P(CheckpointRefit, ARankThatIsAloneWithACheckpointMayNotServe) {
  auto given = options(write("c", "hf", 7, 7));
  given.group = "engine";
  given.group_size = 2;
  auto first = engine(given, "vllm:tp=2", "rank0", 0);
  const auto report = first->refit({}, 500);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kGroupBroken);
  EXPECT_THAT(report.error().message, HasSubstr("1 of 2 ranks are missing"));
  EXPECT_FALSE(first->receiver->check_group());
}

// Something happens to the file while it is read, slowly.
class CheckpointStage : public ::testing::TestWithParam<Verify> {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    file_ = folder_ / "model.safetensors";
    std::ofstream(folder_ / "config.json") << kSmallConfig;
    write(file_, 7);
    transport_ = value_or_fail(open_local_transport({.threads = 2}), "transport");
    control_ = open_local_control();
    ReceiverOptions options;
    options.into = ReceiveInto::kShadow;
    options.verify = GetParam();
    options.plan.chunk_bytes = 256;
    options.checkpoint = Checkpoint{.path = folder_.string()};
    options.checkpoint_wait_ms = 1;
    engine_ =
        std::make_unique<Engine>(*transport_, *control_, layouts("vllm")[0], "engine0", options);
    ASSERT_TRUE(engine_->refit());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static void write(const std::filesystem::path& path, uint64_t version) {
    Parameters weights(layouts("hf")[0]);
    weights.write(version);
    write_rank(path, weights, version);
  }
  // Returns when some of it has come, and the rest has not.
  void stage_half() const {
    ASSERT_TRUE(engine_->receiver->stage({}, Deadline::after_ms(60000),
                                         {.max_gigabytes_per_second = 4e-5}));
    while (engine_->receiver->staged().state == StageState::kMoving &&
           engine_->receiver->staged().landed_bytes < 4096) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ASSERT_EQ(engine_->receiver->staged().state, StageState::kMoving);
  }
  Result<StageProgress> outcome() const {
    return engine_->receiver->wait_staged(Deadline::after_ms(60000));
  }
  std::string steps() const {
    std::string text;
    for (const RefitStep& step : engine_->receiver->last_report().steps) text += step.what + "\n";
    return text;
  }
  void expect_next_version_whole() const {
    const auto staged = outcome();
    ASSERT_TRUE(staged) << staged.error().to_string();
    EXPECT_EQ(staged->version, 8u);
    EXPECT_THAT(steps(), HasSubstr("while it was read"));
    EXPECT_THAT(steps(), HasSubstr("open the checkpoint again"));
    ASSERT_TRUE(engine_->receiver->commit(Deadline::after_ms(10000)));
    EXPECT_EQ(engine_->parameters.wrong_elements(8), 0);
  }

  std::filesystem::path folder_;
  std::filesystem::path file_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<Engine> engine_;
};
INSTANTIATE_TEST_SUITE_P(Verification, CheckpointStage,
                         ::testing::Values(Verify::kFull, Verify::kOff), [](const auto& test) {
                           return test.param == Verify::kFull ? "Full" : "Off";
                         });

TEST_P(CheckpointStage, AFileThatIsCutMidwayIsATornReadAndTheParametersStay) {
  stage_half();
  std::filesystem::resize_file(file_, 4000);
  const auto staged = outcome();
  ASSERT_FALSE(staged);
  EXPECT_EQ(staged.error().code, ErrorCode::kCorrupt) << "opened again, it is truncated";
  EXPECT_THAT(steps(), HasSubstr("cut while it was read"));
  EXPECT_EQ(engine_->receiver->version(), 7u);
  EXPECT_EQ(engine_->parameters.wrong_elements(7), 0);
}

TEST_P(CheckpointStage, I8_AFileThatIsWrittenMidwayIsReadAgainFromTheBegin) {
  stage_half();
  write(file_, 8);
  expect_next_version_whole();
}

TEST_P(CheckpointStage, I8_AFileThatIsReplacedMidwayIsReadAgainFromTheBegin) {
  stage_half();
  write(folder_ / "next", 8);
  std::filesystem::rename(folder_ / "next", file_);
  expect_next_version_whole();
}

}  // namespace
}  // namespace transfuse::testing

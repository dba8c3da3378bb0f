// Conversions between layouts on disk, and all the ways in which they may not happen.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "files/file_fixture.h"
#include "files/folder_writer.h"
#include "files/mover.h"
#include "files/reading.h"
#include "files/safetensors.h"
#include "files/side.h"
#include "files/stored_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::testing {
namespace {

using Convert = FilesTest;
using ::testing::HasSubstr;

void expect_same_tensors(const std::string& folder, const std::vector<HandMade>& tensors) {
  for (const HandMade& tensor : tensors) {
    EXPECT_EQ(tensor_bytes(std::filesystem::path(folder) / "model.safetensors", tensor.name),
              tensor.bytes)
        << tensor.name;
  }
}

TEST_F(Convert, AnyChainOfLayoutsEndsWithTheBytesItBeganWith) {
  const auto tensors = model(config_json());
  write_hf("start", tensors);
  const std::vector<std::string> chain = {
      "hf",        "fsdp:dp=3",  "vllm:tp=2", "fsdp:dp=2,tp=2,replicas=2",
      "vllm:tp=4", "fsdp:dp=64", "vllm:tp=1", "hf"};
  std::string source = "start";
  for (size_t i = 1; i < chain.size(); ++i) {
    const std::string target = "step" + std::to_string(i);
    const auto report = convert_checkpoint(request(chain[i - 1], source, chain[i], target));
    ASSERT_TRUE(report) << chain[i] << ": " << report.error().to_string();
    EXPECT_EQ(report->tensor_count, tensors.size());
    EXPECT_EQ(report->fingerprints.size(), tensors.size());
    source = target;
  }
  expect_same_tensors((folder_ / source).string(), tensors);
  EXPECT_EQ(read_file(folder_ / source / "config.json"), config_json());
  // No temporary folder is left.
  for (const std::string& name : names()) EXPECT_FALSE(name.starts_with(".")) << name;
}

TEST_F(Convert, MegatronStagesAndExpertsGoToEnginesAndBack) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> chains = {
      {config_json(),
       {"hf", "megatron:tp=2,pp=2", "vllm:tp=4", "megatron:tp=4", "fsdp:dp=3", "hf"}},
      {moe_config_json(4),
       {"hf", "megatron:tp=2,pp=2,ep=3,etp=1", "vllm:tp=2", "megatron:pp=2,vpp=2,layers=1/1/1/1",
        "vllm:tp=2,ep", "hf"}}};
  for (const auto& [config, chain] : chains) {
    const auto tensors = model(config);
    write_hf("start", tensors);
    std::string source = "start";
    for (size_t i = 1; i < chain.size(); ++i) {
      const std::string target = "step" + std::to_string(i);
      auto step = request(chain[i - 1], source, chain[i], target);
      step.config_json = config;
      const auto report = convert_checkpoint(step);
      ASSERT_TRUE(report) << chain[i] << ": " << report.error().to_string();
      source = target;
    }
    expect_same_tensors((folder_ / source).string(), tensors);
    for (const std::string& name : names()) std::filesystem::remove_all(folder_ / name);
  }
}

TEST_F(Convert, OtherNamesOfAFrameworkAreReadWithoutBeingTold) {
  const auto tensors = model(moe_config_json());
  write_hf("start", tensors);
  for (const std::string options :
       {"norms=separate", "experts=sequential", "norms=separate,experts=sequential"}) {
    auto write = request("hf", "start", "megatron:tp=2,ep=3,etp=1," + options, "ranks");
    auto read = request("megatron:tp=2,ep=3,etp=1", "ranks", "hf", "end");
    for (ConvertRequest* step : {&write, &read}) {
      step->config_json = moe_config_json();
      step->replace_target = true;
      const auto report = convert_checkpoint(*step);
      ASSERT_TRUE(report) << options << ": " << report.error().to_string();
    }
    expect_same_tensors((folder_ / "end").string(), tensors);
  }
}

TEST_F(Convert, OlderNamesOfAnEnginesExpertsAreRead) {
  write_hf("start", model(moe_config_json()));
  auto out = request("hf", "start", "vllm:tp=2", "ranks");
  out.config_json = moe_config_json();
  ASSERT_TRUE(convert_checkpoint(out));
  for (const char* rank : {"rank0.safetensors", "rank1.safetensors"}) {
    const std::string file = read_file(folder_ / "ranks" / rank);
    uint64_t length = 0;
    std::copy_n(file.data(), sizeof length, reinterpret_cast<char*>(&length));
    std::string header = file.substr(8, length);
    const std::string newer = ".experts.routed_experts.w";
    ASSERT_NE(header.find(newer), std::string::npos);
    for (size_t at = header.find(newer); at != std::string::npos; at = header.find(newer)) {
      header.replace(at, newer.size(), ".experts.w");
    }
    write_file(folder_ / "ranks" / rank, safetensors(header, file.substr(8 + length)));
  }
  auto back = request("vllm:tp=2", "ranks", "hf", "end");
  back.config_json = moe_config_json();
  const auto report = convert_checkpoint(back);
  ASSERT_TRUE(report) << report.error().to_string();
  for (const HandMade& tensor : model(moe_config_json())) {
    EXPECT_EQ(tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name), tensor.bytes)
        << tensor.name;
  }
}

TEST_F(Convert, ExpertsOfAnEngineAreAStackInItsFiles) {
  write_hf("start", model(moe_config_json()));
  auto step = request("hf", "start", "vllm:tp=2", "ranks");
  step.config_json = moe_config_json();
  ASSERT_TRUE(convert_checkpoint(step));
  const auto listing = list_checkpoint((folder_ / "ranks").string());
  ASSERT_TRUE(listing);
  int stacks = 0;
  for (const StoredTensor& tensor : listing->tensors) {
    if (tensor.name.ends_with("w13_weight")) {
      EXPECT_EQ(tensor.shape, (Dims{3, 8, 16}));
      ++stacks;
    }
    if (tensor.name.ends_with("w2_weight")) {
      EXPECT_EQ(tensor.shape, (Dims{3, 16, 4}));
    }
  }
  EXPECT_EQ(stacks, 4);
}

TEST_F(Convert, CopiesOfExpertsByAMapFillTheStacksOfAnEngineAndComeBackOnce) {
  const auto tensors = model(moe_config_json());
  write_hf("start", tensors);
  const std::string map = (folder_ / "map.json").string();
  std::ofstream(map)
      << R"({"version": 5, "physical_to_logical_map": [[2, 0, 0, 1], [1, 1, 2, 0]]})";
  for (const std::string& engine : {"sglang:tp=4,ep=2,redundant=1,expert_map=" + map,
                                    "vllm:tp=2,ep,redundant=1,expert_map=" + map}) {
    auto write = request("hf", "start", engine, "ranks");
    auto read = request(engine, "ranks", "hf", "end");
    for (ConvertRequest* step : {&write, &read}) {
      step->config_json = moe_config_json();
      step->replace_target = true;
      const auto report = convert_checkpoint(*step);
      ASSERT_TRUE(report) << engine << ": " << report.error().to_string();
    }
    expect_same_tensors((folder_ / "end").string(), tensors);
    const auto listing = list_checkpoint((folder_ / "ranks").string());
    ASSERT_TRUE(listing);
    for (const StoredTensor& tensor : listing->tensors) {
      if (!tensor.name.ends_with("w13_weight")) continue;
      EXPECT_EQ(tensor.shape[0], 2) << tensor.name;
    }
  }
}

TEST_F(Convert, ExpertMapsThatCannotBeReadAreNamed) {
  write_hf("start", model(moe_config_json()));
  const std::string map = (folder_ / "map.json").string();
  auto step = request("hf", "start", "sglang:expert_map=" + map, "ranks");
  step.config_json = moe_config_json();
  const auto missing = convert_checkpoint(step);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().code, ErrorCode::kNotFound);
  EXPECT_THAT(missing.error().message, HasSubstr(map));
  for (const auto& [json, text] : {std::pair{"[[0, 1", "expected a list of layers"},
                                   std::pair{"[[0, 1, 1], [0, 1, 2]]", "holds expert 2"}}) {
    std::ofstream(map) << json;
    const auto bad = convert_checkpoint(step);
    ASSERT_FALSE(bad) << json;
    EXPECT_EQ(bad.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(bad.error().message, HasSubstr(text));
    EXPECT_FALSE(std::filesystem::exists(folder_ / "ranks"));
  }
}

TEST_F(Convert, RankFilesHoldWhatTheFrameworkWouldAndPaddingIsZero) {
  const auto tensors = model(config_json());
  write_hf("start", tensors);
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", "vllm:tp=2", "ranks")));
  const auto listing = list_checkpoint((folder_ / "ranks").string());
  ASSERT_TRUE(listing);
  ASSERT_EQ(listing->files.size(), 2u);
  const auto find = [&](const std::string& name) -> const std::string& {
    return std::find_if(tensors.begin(), tensors.end(),
                        [&](const HandMade& t) { return t.name == name; })
        ->bytes;
  };
  // 70 rows padded to 128: rank 1 holds rows 64 to 69 and 58 of zeros.
  const size_t row = 24 * 2;
  EXPECT_EQ(tensor_bytes(folder_ / "ranks" / "rank1.safetensors", "model.embed_tokens.weight"),
            find("model.embed_tokens.weight").substr(64 * row) + std::string(58 * row, '\0'));
  // q, k and v of the second half of the heads.
  const std::string layer = "model.layers.1.self_attn.";
  EXPECT_EQ(tensor_bytes(folder_ / "ranks" / "rank1.safetensors", layer + "qkv_proj.weight"),
            find(layer + "q_proj.weight").substr(16 * row) +
                find(layer + "k_proj.weight").substr(8 * row) +
                find(layer + "v_proj.weight").substr(8 * row));
  for (const StoredTensor& tensor : listing->tensors) {
    if (tensor.name == layer + "qkv_proj.weight") {
      EXPECT_EQ(tensor.shape, (Dims{32, 24}));
    }
  }
}

TEST_F(Convert, RanksWithoutRowsHaveZeroRowTensors) {
  write_hf("start", model(config_json()));
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", "fsdp:dp=9", "ranks")));
  const auto listing = list_checkpoint((folder_ / "ranks").string());
  ASSERT_TRUE(listing);
  // 8 elements in 9 chunks: the last rank has none.
  const auto last =
      std::find_if(listing->tensors.begin(), listing->tensors.end(), [&](const StoredTensor& t) {
        return t.file == 8 && t.name == "model.layers.0.self_attn.q_norm.weight";
      });
  ASSERT_NE(last, listing->tensors.end());
  EXPECT_EQ(last->shape, Dims{0});
  EXPECT_EQ(listing->files.size(), 9u);
}

TEST_F(Convert, ShardsAreIndexedAndReadBack) {
  const auto tensors = model(config_json());
  write_hf("start", tensors);
  auto to_shards = request("hf", "start", "hf", "shards");
  to_shards.shard_bytes = 4000;
  const auto report = convert_checkpoint(to_shards);
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_GT(report->target_file_count, 3u);
  const auto listing = list_checkpoint((folder_ / "shards").string());
  ASSERT_TRUE(listing) << listing.error().message;
  EXPECT_EQ(listing->files.size(), report->target_file_count);
  ASSERT_TRUE(convert_checkpoint(request("hf", "shards", "hf", "one")));
  expect_same_tensors((folder_ / "one").string(), tensors);
}

TEST_F(Convert, FloatsAreRoundedWhereTheTargetIsNarrowerAndWidenExactly) {
  const auto tensors = model(config_json("float32"), 4);
  write_hf("start", tensors);
  auto narrow = request("hf", "start", "vllm:tp=2,dtype=bf16", "ranks");
  narrow.config_json = config_json("float32");
  ASSERT_TRUE(convert_checkpoint(narrow));
  auto back = request("vllm:tp=2,dtype=bf16", "ranks", "hf:dtype=bf16", "end");
  back.config_json = config_json("float32");
  ASSERT_TRUE(convert_checkpoint(back));
  for (const HandMade& tensor : tensors) {
    const std::string found = tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name);
    ASSERT_EQ(found.size() * 2, tensor.bytes.size());
    for (size_t i = 0; i < found.size() / 2; ++i) {
      uint32_t bits = 0;
      uint16_t rounded = 0;
      std::memcpy(&bits, tensor.bytes.data() + 4 * i, 4);
      std::memcpy(&rounded, found.data() + 2 * i, 2);
      const bool nan = (bits & 0x7F800000) == 0x7F800000 && (bits & 0x7FFFFF) != 0;
      const uint32_t low = bits & 0xFFFF;
      const uint32_t up = low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1) != 0) ? 1 : 0;
      ASSERT_EQ(rounded, nan ? 0x7FC0 : (bits >> 16) + up) << tensor.name << " " << i;
    }
  }
  back.from = "vllm:tp=2,dtype=bf16";
  back.to = "hf:dtype=f32";
  back.target = (folder_ / "wide").string();
  ASSERT_TRUE(convert_checkpoint(back));
  for (const HandMade& tensor : tensors) {
    const std::string half = tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name);
    const std::string wide = tensor_bytes(folder_ / "wide" / "model.safetensors", tensor.name);
    ASSERT_EQ(wide.size(), half.size() * 2);
    for (size_t i = 0; i < half.size(); i += 2) {
      ASSERT_EQ(wide.substr(2 * i, 4), std::string(2, '\0') + half.substr(i, 2)) << tensor.name;
    }
  }
  back.to = "hf:dtype=f16";
  back.target = (folder_ / "other").string();
  EXPECT_EQ(convert_checkpoint(back).error().code, ErrorCode::kLayoutMismatch);
}

TEST_F(Convert, StackedExpertsAreReadAsSingleOnes) {
  const auto tensors = model(moe_config_json());
  std::vector<HandMade> stacked;
  for (int layer = 0; layer < 2; ++layer) {
    const std::string stem = "model.layers." + std::to_string(layer) + ".mlp.experts.";
    HandMade gate_up{stem + "gate_up_proj", "BF16", {3, 16, 16}, {}};
    HandMade down{stem + "down_proj", "BF16", {3, 16, 8}, {}};
    for (int expert = 0; expert < 3; ++expert) {
      const auto add = [&](HandMade& to, const std::string& matrix) {
        const std::string name = fmt::format("{}{}.{}.weight", stem, expert, matrix);
        to.bytes += std::find_if(tensors.begin(), tensors.end(), [&](const HandMade& t) {
                      return t.name == name;
                    })->bytes;
      };
      add(gate_up, "gate_proj");
      add(gate_up, "up_proj");
      add(down, "down_proj");
    }
    stacked.push_back(gate_up);
    stacked.push_back(down);
  }
  for (const HandMade& tensor : tensors) {
    if (tensor.name.find(".experts.") == std::string::npos) stacked.push_back(tensor);
  }
  write_hf("stacked", stacked);
  auto unstack = request("hf", "stacked", "hf", "single");
  unstack.config_json = moe_config_json();
  const auto report = convert_checkpoint(unstack);
  ASSERT_TRUE(report) << report.error().to_string();
  expect_same_tensors((folder_ / "single").string(), tensors);
}

class BadCheckpoint : public FilesTest {
 protected:
  // What a conversion says of `tensors`; it leaves nothing.
  std::string refusal(const std::vector<HandMade>& tensors, const std::string& from = "hf") {
    const std::string source = write_hf("bad", tensors);
    const auto report = convert_checkpoint(request(from, "bad", "vllm:tp=2", "out"));
    EXPECT_EQ(names(), std::vector<std::string>{"bad"});
    if (report) return "accepted";
    EXPECT_EQ(report.error().code, ErrorCode::kLayoutMismatch) << report.error().message;
    return report.error().message;
  }
};

TEST_F(BadCheckpoint, WhatDoesNotFitTheConfigIsNamedAndNothingIsWritten) {
  const auto good = model(config_json());
  const std::string name = "model.layers.1.mlp.down_proj.weight";
  const auto at = static_cast<size_t>(
      std::find_if(good.begin(), good.end(), [&](const HandMade& t) { return t.name == name; }) -
      good.begin());
  const auto expect_words = [&](const std::string& message, const std::vector<std::string>& words) {
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
    }
  };
  auto lacking = good;
  lacking.erase(lacking.begin() + static_cast<ptrdiff_t>(at));
  expect_words(refusal(lacking), {name, "missing", "[24, 40]"});
  auto more = good;
  more.push_back({"model.extra", "BF16", {1}, "12"});
  expect_words(refusal(more), {"model.extra", "not expected", "expected 25 tensors, found 26"});
  auto other_dtype = good;
  other_dtype[at].dtype = "F16";
  expect_words(refusal(other_dtype), {name, "expected dtype bf16", "found F16", "dtype=f16"});
  auto other_shape = good;
  std::swap(other_shape[at].shape[0], other_shape[at].shape[1]);
  expect_words(refusal(other_shape), {name, "expected shape [24, 40]", "found [40, 24]"});
}

TEST_F(Convert, FilesOfRanksMustBeAsManyAsTheSpecSays) {
  write_hf("start", model(config_json()));
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", "fsdp:dp=3", "ranks")));
  const auto fewer = convert_checkpoint(request("fsdp:dp=2", "ranks", "hf", "end"));
  EXPECT_EQ(fewer.error().code, ErrorCode::kLayoutMismatch) << fewer.error().message;
  EXPECT_NE(fewer.error().message.find("2 ranks"), std::string::npos);
  // The right number, but of another layout.
  const auto other = convert_checkpoint(request("vllm:tp=3", "ranks", "hf", "end"));
  EXPECT_FALSE(other);
  std::filesystem::remove(folder_ / "ranks" / "rank1.safetensors");
  const auto hole = convert_checkpoint(request("fsdp:dp=3", "ranks", "hf", "end"));
  EXPECT_EQ(hole.error().code, ErrorCode::kNotFound);
  EXPECT_NE(hole.error().message.find("rank1.safetensors"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "end"));
}

TEST_F(Convert, AnExistingTargetIsReplacedOnlyWhereAskedAndOnlyIfItIsACheckpoint) {
  const auto tensors = model(config_json());
  write_hf("start", tensors);
  auto again = request("hf", "start", "hf", "end");
  ASSERT_TRUE(convert_checkpoint(again));
  const auto refused = convert_checkpoint(again);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kAlreadyExists);
  again.replace_target = true;
  again.to = "fsdp:dp=2";
  ASSERT_TRUE(convert_checkpoint(again));
  EXPECT_TRUE(std::filesystem::exists(folder_ / "end" / "rank1.safetensors"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "end" / "model.safetensors"));
  // In place: the source itself may be what is replaced.
  auto in_place = request("fsdp:dp=2", "end", "hf", "end");
  in_place.replace_target = true;
  ASSERT_TRUE(convert_checkpoint(in_place));
  expect_same_tensors((folder_ / "end").string(), tensors);
  write_file(folder_ / "end" / "thesis.tex", "years of work");
  const auto foreign = convert_checkpoint(again);
  ASSERT_FALSE(foreign);
  EXPECT_EQ(foreign.error().code, ErrorCode::kInvalidArgument);
  EXPECT_TRUE(std::filesystem::exists(folder_ / "end" / "thesis.tex"));
  EXPECT_EQ(names(), (std::vector<std::string>{"end", "start"}));
}

TEST_F(Convert, LeftoversOfTheDeadAreRemovedThoseOfTheLivingAreNot) {
  write_hf("start", model(config_json()));
  std::filesystem::create_directory(folder_ / ".end.partial-1");
  std::filesystem::create_directory(folder_ / ".end.partial-2");
  const UniqueFd living(::open((folder_ / ".end.partial-2").c_str(), O_RDONLY | O_DIRECTORY));
  ASSERT_EQ(::flock(living.get(), LOCK_EX), 0);
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", "fsdp:dp=2", "end")));
  EXPECT_EQ(names(), (std::vector<std::string>{".end.partial-2", "end", "start"}));
}

// What this process mounts from now on is seen by nobody else and goes with it.
bool enter_own_mounts() {
  if (unshare(CLONE_NEWNS) != 0) {
    const std::string user = "0 " + std::to_string(getuid()) + " 1";
    const std::string group = "0 " + std::to_string(getgid()) + " 1";
    if (unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
    write_file("/proc/self/setgroups", "deny");
    write_file("/proc/self/uid_map", user);
    write_file("/proc/self/gid_map", group);
  }
  return mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0;
}

TEST_F(Convert, AFullDiskIsATypedErrorAndLeavesNothing) {
  write_hf("start", model(config_json()));
  std::filesystem::create_directory(folder_ / "disk");
  const auto full = request("hf", "start", "fsdp:dp=3", "disk/end");
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {  // 0: as it should be, 1: not, 2: no such file system here
    if (!enter_own_mounts()) _exit(2);
    const std::string disk = (folder_ / "disk").string();
    if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=20k") != 0) _exit(2);
    const auto report = convert_checkpoint(full);
    const bool typed = !report && report.error().code == ErrorCode::kResourceExhausted;
    if (!typed)
      std::fprintf(stderr, "%s\n", report ? "accepted" : report.error().to_string().c_str());
    _exit(typed && std::filesystem::is_empty(disk) ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  if (WEXITSTATUS(status) == 2) GTEST_SKIP() << "this host lets no test mount a small disk";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_F(Convert, AFileThatChangesWhileItIsReadIsATornRead) {
  const std::string folder = write_hf("start", model(config_json()));
  auto file = OpenFile::open(folder + "/model.safetensors");
  ASSERT_TRUE(file);
  EXPECT_TRUE(file->check_unchanged());
  std::filesystem::resize_file(folder + "/model.safetensors", 100);
  const auto changed = file->check_unchanged();
  ASSERT_FALSE(changed);
  EXPECT_EQ(changed.error().code, ErrorCode::kTornRead);
}

// By the kernel, through the buffer with a cast, and piece by piece: a mapping would end the
// process.
TEST_F(Convert, ASourceThatIsCutMidwayIsATornReadAndLeavesNothing) {
  std::string config = config_json();
  config.replace(config.find("\"hidden_size\": 24"), 17, "\"hidden_size\": 512");
  config.replace(config.find("\"vocab_size\": 70"), 16, "\"vocab_size\": 7000");
  struct Case {
    std::string from, to;
    uint32_t element_bytes;
  };
  for (const Case& each : {Case{"hf", "hf", 2}, Case{"hf:dtype=f32", "hf:dtype=bf16", 4},
                           Case{"hf", "vllm:tp=2", 2}}) {
    SCOPED_TRACE(each.from + " -> " + each.to);
    const std::string source = write_hf("start", model(config, each.element_bytes));
    auto cut = request(each.from, "start", each.to, "end");
    cut.config_json = config;
    cut.threads = 1;
    bool done = false;
    cut.progress = [&](uint64_t moved, uint64_t total) {
      if (done || moved == total) return;
      done = true;
      std::filesystem::resize_file(source + "/model.safetensors", 4096);
    };
    const auto outcome = convert_checkpoint(cut);
    EXPECT_TRUE(done);
    ASSERT_FALSE(outcome);
    EXPECT_EQ(outcome.error().code, ErrorCode::kTornRead);
    EXPECT_NE(outcome.error().message.find("cut while it was read"), std::string::npos)
        << outcome.error().message;
    EXPECT_EQ(names(), std::vector<std::string>{"start"});
    std::filesystem::remove_all(source);
  }
}

TEST_F(Convert, AVersionIsRecordedCarriedOnAndNeverMadeUp) {
  write_hf("start", model(config_json()));
  const auto version_of = [&](const std::string& name) {
    return list_checkpoint((folder_ / name).string()).value().versions;
  };
  EXPECT_EQ(version_of("start"), std::vector<uint64_t>{0});
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", "hf", "none")));
  EXPECT_EQ(version_of("none"), std::vector<uint64_t>{0});
  auto numbered = request("hf", "start", "vllm:tp=2", "ranks");
  numbered.version = 41;
  ASSERT_TRUE(convert_checkpoint(numbered));
  EXPECT_EQ(version_of("ranks"), (std::vector<uint64_t>{41, 41}));
  ASSERT_TRUE(convert_checkpoint(request("vllm:tp=2", "ranks", "hf", "back")));
  EXPECT_EQ(version_of("back"), std::vector<uint64_t>{41});

  // Files of different versions are no checkpoint.
  numbered.version = 42;
  numbered.target = (folder_ / "later").string();
  ASSERT_TRUE(convert_checkpoint(numbered));
  std::filesystem::copy(folder_ / "later" / "rank1.safetensors",
                        folder_ / "ranks" / "rank1.safetensors",
                        std::filesystem::copy_options::overwrite_existing);
  const auto mixed = convert_checkpoint(request("vllm:tp=2", "ranks", "hf", "mixed"));
  ASSERT_FALSE(mixed);
  EXPECT_EQ(mixed.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(mixed.error().message.find("records version 41"), std::string::npos);
}

// Dtypes of all kinds, a number, a tensor with fewer rows than ranks: nothing that a config says.
TEST_F(Convert, ModelsOfUnknownArchitecturesAreConvertedByTheirOwnTensors) {
  std::vector<HandMade> tensors = {{"a.scale", "F32", {}, "1234"},
                                   {"b.weight", "F32", {3, 2}, std::string(24, 'b')},
                                   {"c.weight", "BF16", {7, 2}, std::string(28, 'c')},
                                   {"d.weight", "F8_E4M3", {5, 4, 1}, std::string(20, 'd')}};
  for (HandMade& tensor : tensors) {
    for (size_t i = 0; i < tensor.bytes.size(); ++i) tensor.bytes[i] ^= static_cast<char>(i);
  }
  const std::string source = write_hf("start", tensors);
  const std::string unknown = R"({"model_type": "mamba9"})";
  for (const std::string& config : {std::string(), unknown}) {
    SCOPED_TRACE(config);
    if (!config.empty()) write_file(folder_ / "start" / "config.json", config);
    auto out = request("hf", "start", "fsdp:dp=4", "ranks");
    out.config_json.clear();
    const auto there = convert_checkpoint(out);
    ASSERT_TRUE(there) << there.error().to_string();
    EXPECT_EQ(read_catalog((folder_ / "ranks").string(), "fsdp:dp=4").value(),
              read_catalog(source).value());
    auto back = request("fsdp:dp=4", "ranks", "hf", "end");
    back.config_json = config;
    const auto again = convert_checkpoint(back);
    ASSERT_TRUE(again) << again.error().to_string();
    for (const HandMade& tensor : tensors) {
      EXPECT_EQ(tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name), tensor.bytes)
          << tensor.name;
    }
    EXPECT_EQ(std::filesystem::exists(folder_ / "end" / "config.json"), !config.empty());
    std::filesystem::remove_all(folder_ / "ranks");
    std::filesystem::remove_all(folder_ / "end");
    auto engine = request("hf", "start", "vllm:tp=2", "ranks");
    engine.config_json = config;
    const auto refused = convert_checkpoint(engine);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
    EXPECT_NE(refused.error().message.find("hf and fsdp without tp work"), std::string::npos)
        << refused.error().message;
    const auto from = convert_checkpoint(request("megatron:tp=2", "start", "hf", "ranks"));
    EXPECT_FALSE(from);
  }
  EXPECT_EQ(names(), std::vector<std::string>{"start"});
  const auto megatron = read_catalog(source, "megatron:tp=2");
  ASSERT_FALSE(megatron);
  EXPECT_EQ(megatron.error().code, ErrorCode::kUnsupported);
}

TEST_F(Convert, ACatalogOfShardsThatContradictEachOtherIsRefused) {
  std::filesystem::create_directory(folder_ / "ranks");
  const HandMade first{"w", "BF16", {2, 3}, std::string(12, 'x')};
  write_file(folder_ / "ranks" / "rank0.safetensors", safetensors(std::vector{first}));
  for (const HandMade& second : {HandMade{"w", "F16", {1, 3}, std::string(6, 'x')},
                                 HandMade{"w", "BF16", {1, 4}, std::string(8, 'x')},
                                 HandMade{"w", "BF16", {3}, std::string(6, 'x')}}) {
    write_file(folder_ / "ranks" / "rank1.safetensors", safetensors(std::vector{second}));
    const auto catalog = read_catalog((folder_ / "ranks").string(), "fsdp:dp=2");
    ASSERT_FALSE(catalog);
    EXPECT_EQ(catalog.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(catalog.error().message.find("rank1.safetensors: tensor w"), std::string::npos);
  }
}

TEST_F(Convert, OneWrongByteInAReplicaIsFoundByItsRank) {
  write_hf("start", model(config_json()));
  const std::string spec = "fsdp:dp=2,replicas=2";
  ASSERT_TRUE(convert_checkpoint(request("hf", "start", spec, "ranks")));
  const auto config = parse_model_config(config_json()).value();
  const auto source = open_side(config, "hf", (folder_ / "start").string()).value();
  const auto compare = [&] {
    const auto target = open_side(config, spec, (folder_ / "ranks").string()).value();
    const auto reading = plan_reading(target.ranks[3].layout, source, 1 << 20).value();
    return compare_fingerprints(reading, target, 3, 2);
  };
  EXPECT_TRUE(compare());
  std::string bytes = read_file(folder_ / "ranks" / "rank3.safetensors");
  bytes[bytes.size() - 5] = static_cast<char>(bytes[bytes.size() - 5] ^ 0x10);
  write_file(folder_ / "ranks" / "rank3.safetensors", bytes);
  const auto outcome = compare();
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().code, ErrorCode::kFingerprintMismatch);
}

// A target whose parameter takes a tensor apart, in pieces of `width` elements with as many zeros
// between them.
class Scattered : public FilesTest, public ::testing::WithParamInterface<int64_t> {};

TEST_P(Scattered, PiecesOfAnyWidthLandInTheirPlaces) {
  const int64_t width = GetParam();
  const int64_t rows = 3000;
  HandMade tensor{"t", "BF16", {rows, width}, {}};
  for (int64_t i = 0; i < rows * width * 2; ++i) {
    tensor.bytes.push_back(static_cast<char>(1 + (i * 7 + i / 251) % 255));
  }
  const std::string folder = write_hf("start", {tensor});
  const auto layout_of = [&](int64_t stride) {
    LayoutBuilder builder;
    const Dims shape = {rows, width};
    const auto p =
        builder.parameter({.name = "t", .dtype = Dtype::kBF16, .element_count = rows * stride});
    builder.tile(builder.tensor({"t", Dtype::kBF16, shape}), Box::whole(shape), p, 0, {stride, 1});
    if (stride > width) builder.fill(p, width, {rows, stride - width}, {stride, 1});
    return builder.build().value();
  };
  ReadableSide source;
  source.files.push_back(OpenFile::open(folder + "/model.safetensors").value());
  source.ranks.push_back(match_rank(layout_of(width), source.files).value());
  const Layout target = layout_of(2 * width);
  auto writer = FolderWriter::open((folder_ / "end").string(), false).value();
  std::vector<FileEntry> entries = {
      {.name = "t", .dtype = Dtype::kBF16, .shape = {rows, 2 * width}}};
  const std::string head = lay_out(entries).value();
  const auto file =
      writer.add_tensors("model.safetensors", head, head.size() + entries[0].size_bytes()).value();
  const std::vector<WritablePlace> places = {{&file, entries[0].offset_bytes}};
  const Reading reading = plan_reading(target, source, 1 << 16).value();
  Mover mover(2);
  ASSERT_TRUE(mover.move(reading, places, {}));
  ASSERT_TRUE(writer.finish());
  ASSERT_TRUE(writer.commit());
  std::string expected;
  const auto row_bytes = static_cast<size_t>(width) * 2;
  for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
    expected += tensor.bytes.substr(row * row_bytes, row_bytes) + std::string(row_bytes, '\0');
  }
  EXPECT_EQ(tensor_bytes(folder_ / "end" / "model.safetensors", "t"), expected);
}

INSTANTIATE_TEST_SUITE_P(Widths, Scattered, ::testing::Values(1, 3, 64, 2048, 2100));

TEST_F(Convert, AnUnfinishedFolderHoldsNoReadableFile) {
  auto writer = FolderWriter::open((folder_ / "end").string(), false).value();
  std::vector<FileEntry> entries = {{.name = "t", .dtype = Dtype::kBF16, .shape = {4}}};
  const std::string head = lay_out(entries).value();
  ASSERT_TRUE(writer.add_tensors("model.safetensors", head, head.size() + 8));
  EXPECT_FALSE(list_checkpoint(writer.temporary()));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "end"));
  ASSERT_TRUE(writer.finish());
  EXPECT_TRUE(list_checkpoint(writer.temporary()));
}

}  // namespace
}  // namespace transfuse::testing

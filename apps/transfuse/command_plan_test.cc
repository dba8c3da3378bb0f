// `transfuse plan` as users run it: the real executable on a real config.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

namespace transfuse {
namespace {

class PlanCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    // The real numbers of Qwen3-4B, but for four layers.
    std::ofstream(folder_ / "config.json") << R"({
      "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
      "intermediate_size": 9728, "num_hidden_layers": 4, "num_attention_heads": 32,
      "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
      "tie_word_embeddings": true, "torch_dtype": "bfloat16"})";
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  // Exit code; stdout goes to output_.
  int plan(const std::string& arguments) {
    const std::string line = std::string(TRANSFUSE_EXECUTABLE) + " plan --config " +
                             (folder_ / "config.json").string() + " " + arguments + " 2>&1";
    FILE* pipe = popen(line.c_str(), "r");
    if (pipe == nullptr) return -1;
    output_.clear();
    std::array<char, 4096> buffer;
    for (size_t size = 0; (size = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
      output_.append(buffer.data(), size);
    }
    const int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  std::filesystem::path folder_;
  std::string output_;
};

TEST_F(PlanCommand, TableNamesEveryTargetAndTheBound) {
  ASSERT_EQ(plan("--from fsdp:dp=4 --to vllm:tp=2"), 0) << output_;
  for (const char* word : {"fsdp.3", "vllm.0", "vllm.1", "bound:", "received", "plan KiB"}) {
    EXPECT_NE(output_.find(word), std::string::npos) << word << "\n" << output_;
  }
}

TEST_F(PlanCommand, JsonSumsAgreeWithThePlans) {
  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2 --json"), 0) << output_;
  const auto body = nlohmann::json::parse(output_);
  ASSERT_EQ(body["plans"].size(), 2u);
  const uint64_t moved = body["plans"][0]["size_bytes"].get<uint64_t>() +
                         body["plans"][1]["size_bytes"].get<uint64_t>();
  EXPECT_EQ(body["traffic"]["total_bytes"].get<uint64_t>(), moved);  // bf16 on both sides
}

TEST_F(PlanCommand, MemoryOfEveryChoiceIsSaidForEveryRank) {
  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2 --json"), 0) << output_;
  const auto memory = nlohmann::json::parse(output_)["memory"];
  ASSERT_EQ(memory["sources"].size(), 2u);
  ASSERT_EQ(memory["targets"].size(), 2u);
  uint64_t snapshots = 0;
  for (const auto& source : memory["sources"]) {
    const auto in_place = source["in_place_bytes"].get<uint64_t>();
    const auto one = source["snapshot_1_bytes"].get<uint64_t>();
    const auto two = source["snapshot_2_bytes"].get<uint64_t>();
    EXPECT_GT(in_place, 0u);  // fingerprints
    EXPECT_GT(one, uint64_t{100} << 20);
    EXPECT_EQ(two - one, one - in_place);
    snapshots += one - 2 * in_place;
  }
  uint64_t shadows = 0;
  for (const auto& target : memory["targets"]) {
    EXPECT_EQ(target["in_place_bytes"].get<uint64_t>(), 0u);
    shadows += target["shadow_bytes"].get<uint64_t>();
  }
  // Both sides hold the model once, in bf16; the engine has its norms twice.
  EXPECT_NEAR(static_cast<double>(snapshots), static_cast<double>(shadows), 1e6);

  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2"), 0) << output_;
  for (const char* word : {"MiB beside the weights", "snapshot_2", "shadow", "fsdp.1"}) {
    EXPECT_NE(output_.find(word), std::string::npos) << word << "\n" << output_;
  }
}

TEST_F(PlanCommand, AnEngineMayBeSglang) {
  ASSERT_EQ(plan("--from megatron:tp=2,pp=2 --to sglang:tp=4,dp=2,pp=2 --json"), 0) << output_;
  EXPECT_EQ(nlohmann::json::parse(output_)["plans"].size(), 8u);
  EXPECT_EQ(plan("--from hf --to sglang:expert_map=" + (folder_ / "none.json").string()), 1);
  EXPECT_NE(output_.find("NOT_FOUND"), std::string::npos) << output_;
}

TEST_F(PlanCommand, SvgIsWrittenAsOneDocument) {
  const std::string file = (folder_ / "plan.svg").string();
  ASSERT_EQ(plan("--from fsdp:dp=4 --to vllm:tp=2 --svg " + file), 0) << output_;
  std::ifstream stream(file);
  const std::string svg{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  EXPECT_EQ(svg.rfind("<svg ", 0), 0u);
  EXPECT_NE(svg.find("busiest link"), std::string::npos);
}

TEST_F(PlanCommand, LayoutsThatDoNotFitEndWithThreeAndTheReason) {
  EXPECT_EQ(plan("--from fsdp:dp=2,dtype=bf16 --to vllm:tp=2,dtype=f16"), 3) << output_;
  EXPECT_NE(output_.find("expects f16"), std::string::npos) << output_;
}

TEST_F(PlanCommand, AWrongSpecIsATypedError) {
  EXPECT_EQ(plan("--from fsdp:dp=zero --to vllm:tp=2"), 1) << output_;
  EXPECT_NE(output_.find("INVALID_ARGUMENT"), std::string::npos) << output_;
  EXPECT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2 --svg " + folder_.string()), 1) << output_;
}

}  // namespace
}  // namespace transfuse

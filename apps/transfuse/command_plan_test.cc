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
  const auto host = [](const nlohmann::json& rank, const char* choice) {
    EXPECT_EQ(rank[choice]["device_bytes"].get<uint64_t>(), 0u);
    return rank[choice]["host_bytes"].get<uint64_t>();
  };
  uint64_t snapshots = 0;
  for (const auto& source : memory["sources"]) {
    const uint64_t in_place = host(source, "in_place");
    const uint64_t one = host(source, "snapshot_1");
    const uint64_t two = host(source, "snapshot_2");
    EXPECT_GT(in_place, 0u);  // fingerprints
    EXPECT_GT(one, uint64_t{100} << 20);
    EXPECT_EQ(two - one, one - in_place);
    EXPECT_FALSE(source.contains("host_1")) << "that is where they are";
    snapshots += one - 2 * in_place;
  }
  uint64_t shadows = 0;
  for (const auto& target : memory["targets"]) {
    EXPECT_EQ(host(target, "in_place"), 0u);
    EXPECT_EQ(host(target, "keep_previous"), host(target, "shadow"));
    shadows += host(target, "shadow");
  }
  // Both sides hold the model once, in bf16; the engine has its norms twice.
  EXPECT_NEAR(static_cast<double>(snapshots), static_cast<double>(shadows), 1e6);

  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2"), 0) << output_;
  for (const char* word : {"MiB beside the weights", "snapshot_2", "shadow", "fsdp.1"}) {
    EXPECT_NE(output_.find(word), std::string::npos) << word << "\n" << output_;
  }
  EXPECT_EQ(output_.find("GPU"), std::string::npos) << output_;
}

TEST_F(PlanCommand, MemoryOfGpusIsSaidApartFromThatOfTheHost) {
  const std::string both = "--source-device cuda --target-device cuda";
  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2 --json " + both), 0) << output_;
  const auto memory = nlohmann::json::parse(output_)["memory"];
  constexpr uint64_t kWeights = uint64_t{700} << 20;  // about what a rank holds of four layers
  constexpr uint64_t kSmall = uint64_t{16} << 20;
  constexpr uint64_t kStaging = uint64_t{64} << 20;
  const auto expect = [](const nlohmann::json& need, uint64_t device, uint64_t host) {
    const auto on_device = need["device_bytes"].get<uint64_t>();
    const auto in_host = need["host_bytes"].get<uint64_t>();
    EXPECT_GE(on_device, device);
    EXPECT_LT(on_device, device + device / 4 + kSmall);
    EXPECT_GE(in_host, host);
    EXPECT_LT(in_host, host + host / 4 + kSmall);
  };
  for (const auto& source : memory["sources"]) {
    expect(source["in_place"], 0, 0);
    expect(source["snapshot_1"], kWeights, 0);
    expect(source["snapshot_2"], 2 * kWeights, 0);
    expect(source["host_1"], 0, kWeights + kStaging);
    expect(source["host_2"], 0, 2 * kWeights + kStaging);
  }
  for (const auto& target : memory["targets"]) {
    expect(target["in_place"], 0, 0);
    expect(target["shadow"], kWeights, 0);
    expect(target["keep_previous"], 2 * kWeights, 0);  // 1 GiB is held at most
  }
  ASSERT_EQ(plan("--from fsdp:dp=2 --to vllm:tp=2 " + both), 0) << output_;
  for (const char* word : {"GPU MiB beside the weights", "host MiB", "host_2"}) {
    EXPECT_NE(output_.find(word), std::string::npos) << word << "\n" << output_;
  }
}

TEST_F(PlanCommand, AReaderAcrossHostAndGpuPinsItsStagingBuffers) {
  constexpr uint64_t kStaging = uint64_t{64} << 20;
  for (const std::string places : {"--source-device cuda", "--target-device cuda"}) {
    ASSERT_EQ(plan("--from hf --to hf --json " + places), 0) << output_;
    const auto need = nlohmann::json::parse(output_)["memory"]["targets"][0]["in_place"];
    const auto in_host = need["host_bytes"].get<uint64_t>();
    EXPECT_GE(in_host, kStaging);
    EXPECT_LT(in_host, kStaging + kStaging / 4);
    const bool launches = places == "--target-device cuda";  // over what it has pinned
    EXPECT_EQ(need["device_bytes"].get<uint64_t>() > 0, launches);
  }
  EXPECT_NE(plan("--from hf --to hf --source-device tpu"), 0) << output_;
  EXPECT_NE(output_.find("--source-device"), std::string::npos) << output_;
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

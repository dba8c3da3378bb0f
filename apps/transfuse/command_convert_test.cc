// `transfuse convert` and `transfuse inspect` as users run them, and as a SIGKILL leaves them.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <ios>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

namespace transfuse {
namespace {

namespace fs = std::filesystem;

class ConvertCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  // A checkpoint of zeros in a sparse file: the header is real, the data takes no disk.
  void make_source(int vocabulary) {
    fs::create_directory(folder_ / "m");
    std::ofstream(folder_ / "m" / "config.json")
        << R"({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 512,
      "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
      "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": )"
        << vocabulary << "}";
    ASSERT_EQ(run("inspect hf --json --config " + path("m/config.json")), 0) << output_;
    nlohmann::json header = nlohmann::json::object();
    uint64_t at = 0;
    const auto listed = nlohmann::json::parse(output_);
    for (const auto& tensor : listed["tensors"]) {
      const uint64_t end = at + tensor["size_bytes"].get<uint64_t>();
      header[tensor["name"].get<std::string>()] = {
          {"dtype", "BF16"}, {"shape", tensor["shape"]}, {"data_offsets", {at, end}}};
      at = end;
    }
    const std::string text = header.dump();
    const auto length = std::bit_cast<std::array<char, 8>>(uint64_t{text.size()});
    std::ofstream(folder_ / "m" / "model.safetensors", std::ios::binary)
        << std::string(length.begin(), length.end()) << text;
    fs::resize_file(folder_ / "m" / "model.safetensors", 8 + text.size() + at);
  }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::string convert(const std::string& from, const std::string& source, const std::string& to,
                      const std::string& target) const {
    return "convert --config " + path("m/config.json") + " --from " + from + " " + path(source) +
           " --to " + to + " " + path(target);
  }

  // Exit code; stdout goes to output_.
  int run(const std::string& arguments) {
    const std::string line = std::string(TRANSFUSE_EXECUTABLE) + " " + arguments + " 2>/dev/null";
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

  std::vector<std::string> hidden() const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with(".")) found.push_back(name);
    }
    return found;
  }

  fs::path folder_;
  std::string output_;
};

TEST_F(ConvertCommand, JsonSaysWhatWasMovedAndThatBothSidesAgree) {
  make_source(1000);
  ASSERT_EQ(run(convert("hf", "m", "vllm:tp=2", "v") + " --verify --json"), 0) << output_;
  const auto body = nlohmann::json::parse(output_);
  EXPECT_EQ(body["tensor_count"], 25);
  EXPECT_EQ(body["target_file_count"], 2);
  EXPECT_EQ(body["source_fingerprint"], body["target_fingerprint"]);
  EXPECT_EQ(body["fingerprints"].size(), 25u);
  // Zeros in another place are another sum.
  EXPECT_NE(body["fingerprints"]["lm_head.weight"], body["fingerprints"]["model.norm.weight"]);
}

TEST_F(ConvertCommand, InspectSaysTheSameOfALayoutAndOfItsFiles) {
  make_source(1000);
  ASSERT_EQ(run(convert("hf", "m", "vllm:tp=2", "v")), 0);
  ASSERT_EQ(run("inspect --json " + path("v")), 0);
  const auto files = nlohmann::json::parse(output_);
  ASSERT_EQ(run("inspect --json vllm:tp=2 --config " + path("m/config.json")), 0);
  const auto ranks = nlohmann::json::parse(output_);
  EXPECT_EQ(files["all"]["size_bytes"], ranks["all"]["size_bytes"]);
  EXPECT_EQ(files["all"]["tensor_count"], ranks["all"]["tensor_count"]);
  EXPECT_EQ(files["files"]["rank1.safetensors"]["size_bytes"],
            ranks["ranks"]["vllm.1"]["size_bytes"]);
  // 1000 rows padded to 1024: 24 rows of the embedding and of the output, on the last rank.
  EXPECT_EQ(ranks["all"]["fill_bytes"], 2 * 24 * 1024 * 2);
  for (size_t i = 0; i < files["tensors"].size(); ++i) {
    EXPECT_EQ(files["tensors"][i]["shape"], ranks["tensors"][i]["shape"]);
  }
  ASSERT_EQ(run("inspect " + path("m/model.safetensors")), 0);
  EXPECT_NE(output_.find("lm_head.weight"), std::string::npos);
  EXPECT_NE(output_.find("all"), std::string::npos);
  EXPECT_EQ(run("inspect " + path("none")), 1);
}

TEST_F(ConvertCommand, FailuresAreTypedAndTheTargetStaysAsItWas) {
  make_source(1000);
  ASSERT_EQ(run(convert("hf", "m", "hf", "h")), 0);
  EXPECT_EQ(run(convert("hf", "m", "fsdp:dp=2", "h") + " --json"), 1);
  EXPECT_EQ(nlohmann::json::parse(output_)["error"]["code"], "ALREADY_EXISTS");
  EXPECT_TRUE(fs::exists(folder_ / "h" / "model.safetensors"));
  EXPECT_EQ(run(convert("hf", "m", "fsdp:dp=2", "h") + " --force"), 0);
  EXPECT_TRUE(fs::exists(folder_ / "h" / "rank1.safetensors"));
  EXPECT_EQ(run(convert("hf", "m", "vllm:tp=3", "x") + " --json"), 1);
  EXPECT_EQ(nlohmann::json::parse(output_)["error"]["code"], "INVALID_ARGUMENT");
  EXPECT_FALSE(fs::exists(folder_ / "x"));
  EXPECT_EQ(run("convert --from hf --to hf"), 2);
  EXPECT_TRUE(hidden().empty());
}

TEST_F(ConvertCommand, AKillInTheMiddleLeavesNothingUnderTheNameAndTheNextRunCleansUp) {
  make_source(60000);  // 250 MB: long enough to be caught
  int caught = 0;
  for (const int delay_ms : {0, 5, 20, 60}) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      const std::string config = path("m/config.json");
      const std::string source = path("m");
      const std::string target = path("out");
      execl(TRANSFUSE_EXECUTABLE, "transfuse", "convert", "--config", config.c_str(), "--from",
            "hf", source.c_str(), "--to", "fsdp:dp=2", target.c_str(), nullptr);
      _exit(127);
    }
    int status = 0;
    while (hidden().empty() && waitpid(child, &status, WNOHANG) == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status)) {
      ++caught;
      EXPECT_FALSE(fs::exists(folder_ / "out")) << "after " << delay_ms << " ms";
      EXPECT_FALSE(hidden().empty());
    }
    fs::remove_all(folder_ / "out");  // of a run that was faster than the kill
  }
  EXPECT_GT(caught, 0);
  ASSERT_EQ(run(convert("hf", "m", "fsdp:dp=2", "out") + " --verify"), 0);
  EXPECT_TRUE(hidden().empty());
  EXPECT_EQ(run("inspect " + path("out")), 0);
}

}  // namespace
}  // namespace transfuse

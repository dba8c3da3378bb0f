// For tests: a folder of its own for each, safetensors files put together by hand, small models.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::testing {

inline void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}
inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
// Length, header, data: whatever they say.
inline std::string safetensors(const std::string& header, const std::string& data) {
  const auto length = std::bit_cast<std::array<char, 8>>(uint64_t{header.size()});
  return std::string(length.begin(), length.end()) + header + data;
}

struct HandMade {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
inline std::string safetensors(const std::vector<HandMade>& tensors) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  std::string data;
  for (const HandMade& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  return safetensors(header.dump(), data);
}

// The bytes of one tensor of a file, found by hand.
inline std::string tensor_bytes(const std::filesystem::path& path, const std::string& name) {
  const std::string file = read_file(path);
  uint64_t length = 0;
  std::copy_n(file.data(), sizeof length, reinterpret_cast<char*>(&length));
  const auto header = nlohmann::json::parse(file.substr(8, length));
  const auto offsets = header.at(name).at("data_offsets");
  const auto begin = offsets[0].get<uint64_t>();
  return file.substr(8 + length + begin, offsets[1].get<uint64_t>() - begin);
}

class FilesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  // Odd vocabulary, more query heads than key heads, an intermediate size that three do not divide.
  static std::string config_json(const std::string& dtype = "bfloat16") {
    return R"({"model_type": "qwen3", "hidden_size": 24, "intermediate_size": 40,
      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
      "vocab_size": 70, "tie_word_embeddings": false, "torch_dtype": ")" +
           dtype + "\"}";
  }
  static std::string moe_config_json(int layers = 2) {
    return R"({"model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 40,
      "moe_intermediate_size": 8, "num_experts": 3, "num_hidden_layers": )" +
           std::to_string(layers) + R"(,
      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 70,
      "tie_word_embeddings": false, "torch_dtype": "bfloat16"})";
  }

  // Every tensor of the published checkpoint, wide to narrow and by name, with bytes that differ
  // everywhere.
  static std::vector<HandMade> model(const std::string& config, uint32_t element_bytes = 2) {
    std::vector<HandMade> tensors;
    uint64_t state = 1;
    auto catalog = make_catalog(parse_model_config(config).value()).value();
    std::sort(catalog.begin(), catalog.end(),
              [](const TensorSpec& a, const TensorSpec& b) { return a.name < b.name; });
    for (const TensorSpec& spec : catalog) {
      const auto values = spec.shape.values();
      HandMade& tensor = tensors.emplace_back(HandMade{
          spec.name, element_bytes == 4 ? "F32" : "BF16", {values.begin(), values.end()}, {}});
      for (int64_t i = 0; i < spec.shape.product() * element_bytes; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        tensor.bytes.push_back(static_cast<char>(state >> 56));
      }
    }
    return tensors;
  }
  std::string write_hf(const std::string& name, const std::vector<HandMade>& tensors) {
    std::filesystem::create_directory(folder_ / name);
    write_file(folder_ / name / "model.safetensors", safetensors(tensors));
    return (folder_ / name).string();
  }

  ConvertRequest request(const std::string& from, const std::string& source, const std::string& to,
                         const std::string& target) const {
    ConvertRequest request;
    request.config_json = config_json();
    request.from = from;
    request.to = to;
    request.source = (folder_ / source).string();
    request.target = (folder_ / target).string();
    request.threads = 2;
    request.verify = true;
    return request;
  }
  // Names in the test's folder, hidden ones too.
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      found.push_back(entry.path().filename().string());
    }
    std::sort(found.begin(), found.end());
    return found;
  }

  std::filesystem::path folder_;
};

}  // namespace transfuse::testing

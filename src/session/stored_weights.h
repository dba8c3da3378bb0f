// For tests: known weights in safetensors files.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "session/known_weights.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"

namespace transfuse::testing {

// That of small_model().
inline constexpr const char* kSmallConfig = R"({"model_type": "qwen3", "hidden_size": 24,
  "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8,
  "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 101, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16"})";

// The parameters of one rank as a safetensors file, written without any code of src/files.
inline void write_rank(const std::filesystem::path& path, Parameters& parameters, uint64_t recorded,
                       const Metadata& words = {}) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  if (recorded > 0) header["__metadata__"]["transfuse.version"] = std::to_string(recorded);
  for (const auto& [key, value] : words) header["__metadata__"]["transfuse." + key] = value;
  const std::vector<Dims> shapes = parameter_shapes(parameters.layout());
  std::string data;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const ParameterSpec& spec = parameters.layout().parameters()[i];
    const auto bytes = parameters.buffers()[i];
    header[spec.name] = {{"dtype", spec.dtype == Dtype::kF32      ? "F32"
                                   : spec.dtype == Dtype::kF8E4M3 ? "F8_E4M3"
                                                                  : "BF16"},
                         {"shape", shapes[i].values()},
                         {"data_offsets", {data.size(), data.size() + bytes.size()}}};
    data.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  const std::string text = header.dump();
  const auto length = std::bit_cast<std::array<char, 8>>(uint64_t{text.size()});
  std::ofstream(path, std::ios::binary)
      << std::string(length.begin(), length.end()) << text << data;
}

}  // namespace transfuse::testing

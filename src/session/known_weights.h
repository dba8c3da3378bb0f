// For tests: weights of which every element of every version can be recomputed independently.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <list>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"

namespace transfuse::testing {

// Grouped KV heads, an odd vocabulary, untied: everything that a plan of a dense model can trip
// over, in a few kilobytes.
inline ModelConfig small_model() {
  ModelConfig config;
  config.architecture = "qwen3";
  config.hidden_size = 24;
  config.intermediate_size = 40;
  config.num_hidden_layers = 2;
  config.num_attention_heads = 8;
  config.num_key_value_heads = 2;
  config.head_dim = 6;
  config.vocab_size = 101;
  config.dtype = Dtype::kBF16;
  return config;
}

// The value of every catalog element of every version.
inline float element_value(uint64_t version, std::string_view tensor, int64_t linear_index) {
  Random random(version * 1000003u + fingerprint_key(tensor) + static_cast<uint64_t>(linear_index));
  return static_cast<float>(static_cast<int64_t>(random.next() % 2000003) - 1000001) * 0.001f;
}

// The memory of one process, f32 or bf16: one buffer per parameter, its own or in memory that it is
// given. Used from one thread.
class Parameters {
 public:
  explicit Parameters(Layout layout) : layout_(std::move(layout)) {
    for (const ParameterSpec& parameter : layout_.parameters()) {
      buffers_.emplace_back(own_.emplace_back(parameter_bytes(parameter)));
    }
  }
  // `memory` has at least size_bytes(layout) and outlives this.
  Parameters(Layout layout, std::span<std::byte> memory) : layout_(std::move(layout)) {
    size_t begin = 0;
    for (const ParameterSpec& parameter : layout_.parameters()) {
      buffers_.push_back(memory.subspan(begin, parameter_bytes(parameter)));
      begin += padded_bytes(parameter);
    }
  }
  Parameters(const Parameters&) = delete;
  Parameters& operator=(const Parameters&) = delete;

  static uint64_t size_bytes(const Layout& layout) {
    uint64_t sum = 0;
    for (const ParameterSpec& parameter : layout.parameters()) sum += padded_bytes(parameter);
    return sum;
  }
  const Layout& layout() const { return layout_; }
  std::vector<std::span<std::byte>>& buffers() { return buffers_; }
  std::vector<ParameterMemory> memory() {
    std::vector<ParameterMemory> memory;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      memory.push_back({.name = layout_.parameters()[i].name,
                        .data = buffers_[i].data(),
                        .size_bytes = buffers_[i].size()});
    }
    return memory;
  }
  void poison(std::byte value) {
    for (auto& buffer : buffers_) std::ranges::fill(buffer, value);
  }

  // Calls visit(tensor, linear index, address, dtype) for every element of every tile.
  template <typename Visit>
  void for_each(Visit visit) {
    for (const Tile& tile : layout_.tiles()) {
      const TensorSpec& tensor = layout_.tensors()[tile.tensor];
      const Dims strides = row_major_strides(tensor.shape);
      const Dtype dtype = layout_.parameters()[tile.parameter].dtype;
      const int64_t count = tile.box.element_count();
      for (int64_t i = 0; i < count; ++i) {
        int64_t rest = i, linear = 0, offset = tile.element_offset;
        for (int d = tile.box.length.rank() - 1; d >= 0; --d) {
          const int64_t at = rest % tile.box.length[d];
          rest /= tile.box.length[d];
          linear += (tile.box.offset[d] + at) * strides[d];
          offset += at * tile.element_strides[d];
        }
        visit(tensor, linear, buffers_[tile.parameter].data() + offset * dtype_size_bytes(dtype),
              dtype);
      }
    }
  }
  void write(uint64_t version) {
    for_each([&](const TensorSpec& tensor, int64_t linear, std::byte* at, Dtype dtype) {
      const auto bits = std::bit_cast<uint32_t>(element_value(version, tensor.name, linear));
      if (dtype == Dtype::kF32) {
        std::memcpy(at, &bits, sizeof bits);
      } else {
        const uint16_t narrow = f32_bits_to_bf16(bits);
        std::memcpy(at, &narrow, sizeof narrow);
      }
    });
  }
  // Elements that are not those of `version`.
  int64_t wrong_elements(uint64_t version) {
    int64_t wrong = 0;
    for_each([&](const TensorSpec& tensor, int64_t linear, std::byte* at, Dtype dtype) {
      const auto bits = std::bit_cast<uint32_t>(element_value(version, tensor.name, linear));
      if (dtype == Dtype::kF32) {
        wrong += std::memcmp(at, &bits, sizeof bits) != 0;
      } else {
        const uint16_t narrow = f32_bits_to_bf16(bits);
        wrong += std::memcmp(at, &narrow, sizeof narrow) != 0;
      }
    });
    return wrong;
  }

 private:
  static uint64_t parameter_bytes(const ParameterSpec& parameter) {
    return static_cast<uint64_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype);
  }
  static uint64_t padded_bytes(const ParameterSpec& parameter) {
    return (parameter_bytes(parameter) + 63) / 64 * 64;
  }

  const Layout layout_;
  std::list<std::vector<std::byte>> own_;
  std::vector<std::span<std::byte>> buffers_;
};

}  // namespace transfuse::testing

// For tests: trainers and one engine in one process, over any transport, on real model layouts.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "gtest/gtest.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

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

// The value of every catalog element of every version: any byte can be recomputed independently.
inline float element_value(uint64_t version, std::string_view tensor, int64_t linear_index) {
  Random random(version * 1000003u + fingerprint_key(tensor) + static_cast<uint64_t>(linear_index));
  return static_cast<float>(static_cast<int64_t>(random.next() % 2000003) - 1000001) * 0.001f;
}

// The memory of one process: one buffer per parameter.
class Parameters {
 public:
  explicit Parameters(Layout layout) : layout_(std::move(layout)) {
    for (const ParameterSpec& parameter : layout_.parameters()) {
      buffers_.emplace_back(static_cast<size_t>(parameter.element_count) *
                            dtype_size_bytes(parameter.dtype));
    }
  }
  const Layout& layout() const { return layout_; }
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
  std::vector<std::vector<std::byte>>& buffers() { return buffers_; }

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
      EXPECT_EQ(dtype, Dtype::kBF16);
      const uint16_t expected =
          f32_bits_to_bf16(std::bit_cast<uint32_t>(element_value(version, tensor.name, linear)));
      uint16_t found = 0;
      std::memcpy(&found, at, sizeof found);
      wrong += found != expected;
    });
    return wrong;
  }

 private:
  Layout layout_;
  std::vector<std::vector<std::byte>> buffers_;
};

template <typename T>
T value_or_fail(Result<T> result, const char* what) {
  if (!result) {
    ADD_FAILURE() << what << ": " << result.error().to_string();
    std::abort();
  }
  return std::move(result).value();
}

struct Trainer {
  Trainer(Transport& transport, Control& control, const Layout& layout, std::string name,
          uint32_t count, int64_t drain_ms = 5000)
      : parameters(layout) {
    PublisherOptions options;
    options.name = std::move(name);
    options.source_count = count;
    options.drain_ms = drain_ms;
    options.fingerprint_threads = 1;
    publisher = value_or_fail(
        Publisher::open(transport, control, layout, parameters.memory(), options), "publisher");
  }
  void publish(uint64_t version) {
    ASSERT_TRUE(publisher->begin_write(version));
    parameters.write(version);
    auto published = publisher->publish(version);
    ASSERT_TRUE(published) << published.error().to_string();
  }
  Parameters parameters;
  std::unique_ptr<Publisher> publisher;
};

struct Engine {
  Engine(Transport& transport, Control& control, const Layout& layout, std::string name = "engine0",
         ReceiverOptions options = {})
      : parameters(layout) {
    options.name = std::move(name);
    parameters.poison(std::byte{0xEE});
    receiver = value_or_fail(
        Receiver::open(transport, control, layout, parameters.memory(), options), "receiver");
  }
  Result<RefitReport> refit(VersionRequest request = {}, int64_t deadline_ms = 10000) {
    return receiver->refit(request, Deadline::after_ms(deadline_ms));
  }
  Parameters parameters;
  std::unique_ptr<Receiver> receiver;
};

inline std::vector<Layout> layouts(std::string_view spec) {
  return value_or_fail(
      make_layouts(small_model(), value_or_fail(parse_parallel_spec(spec), "spec")), "layouts");
}

}  // namespace transfuse::testing

// Model configurations by their published shapes, and the synthetic layouts.
#include "workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::bench {
namespace {

constexpr std::string_view kEqualTensors = "equal tensors";  // of no family

// The attention alone of a wider model is more than a small total.
int64_t narrow_hidden_size(uint64_t total_bytes) {
  constexpr uint64_t kSmallBytes = uint64_t{128} << 20;
  return total_bytes < kSmallBytes ? 64 : 512;
}

}  // namespace

ModelConfig qwen3_4b(int64_t layers) {
  ModelConfig config;
  config.architecture = "qwen3";
  config.hidden_size = 2560;
  config.intermediate_size = 9728;
  config.num_hidden_layers = layers;
  config.num_attention_heads = 32;
  config.num_key_value_heads = 8;
  config.head_dim = 128;
  config.vocab_size = 151936;
  config.tie_word_embeddings = true;
  return config;
}

ModelConfig qwen3_30b_a3b() {
  ModelConfig config;
  config.architecture = "qwen3_moe";
  config.hidden_size = 2048;
  config.intermediate_size = 6144;
  config.moe_intermediate_size = 768;
  config.num_hidden_layers = 48;
  config.num_attention_heads = 32;
  config.num_key_value_heads = 4;
  config.head_dim = 128;
  config.num_experts = 128;
  config.vocab_size = 151936;
  return config;
}

ModelConfig narrow_qwen3_4b(uint64_t total_bytes) {
  ModelConfig config = qwen3_4b();
  config.hidden_size = narrow_hidden_size(total_bytes);
  config.head_dim = 32;
  config.vocab_size = 8192;
  // Bytes of a layer are 2 x hidden x (heads + 3 x intermediate); solved for the intermediate size.
  const auto heads =
      config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads);
  const auto words = static_cast<int64_t>(total_bytes / 2) - config.vocab_size * config.hidden_size;
  const int64_t per_layer = words / config.num_hidden_layers / config.hidden_size - heads;
  config.intermediate_size = std::max<int64_t>(per_layer / 3 / 64 * 64, 64);
  return config;
}

ModelConfig narrow_qwen3_30b_a3b(uint64_t total_bytes) {
  ModelConfig config = qwen3_30b_a3b();
  config.hidden_size = narrow_hidden_size(total_bytes);
  config.head_dim = 32;
  config.vocab_size = 8192;
  const auto heads =
      config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads);
  const auto words =
      static_cast<int64_t>(total_bytes / 2) - 2 * config.vocab_size * config.hidden_size;
  const int64_t per_layer = words / config.num_hidden_layers / config.hidden_size - heads;
  config.moe_intermediate_size = std::max<int64_t>(per_layer / 3 / config.num_experts, 8);
  return config;
}

ModelConfig equal_tensors(int64_t count, uint64_t tensor_bytes) {
  ModelConfig config;
  config.architecture = kEqualTensors;
  config.num_hidden_layers = count;
  config.hidden_size = 1024;
  config.intermediate_size = static_cast<int64_t>(tensor_bytes / 2) / config.hidden_size;
  return config;
}

Result<Layout> layout_of(const ModelConfig& config, std::string_view spec, int64_t rank) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parsed, parse_parallel_spec(spec));
  if (config.architecture != kEqualTensors) return make_layout(config, parsed, rank);
  LayoutBuilder builder;
  const Dims shape{config.intermediate_size, config.hidden_size};
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    const std::string name = fmt::format("tensor{}", i);
    const Box whole = Box::whole(shape);
    const uint32_t tensor = builder.tensor({name, Dtype::kBF16, shape});
    const uint32_t parameter = builder.parameter({name, Dtype::kBF16, whole.element_count()});
    builder.tile(tensor, whole, parameter, 0);
  }
  return builder.build();
}

Result<std::vector<Layout>> layouts_of(const ModelConfig& config, std::string_view spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parsed, parse_parallel_spec(spec));
  return make_layouts(config, parsed);
}

namespace {

// Shapes of a published 1T model of this class, with grouped KV heads in place of latent attention.
struct TrillionShape {
  int64_t layers = 61;
  int64_t experts = 384;
  int64_t hidden = 7168;
  int64_t expert_intermediate = 2048;
  int64_t vocabulary = 163840;
  int64_t query_rows = 8192;
  int64_t key_rows = 1024;
};

constexpr int64_t kStages = 8;
constexpr int64_t kEngineRanks = 8;

// Adds whole tensors, or a share of their rows, one parameter each.
class TensorShares {
 public:
  void add(const std::string& name, Dims shape, int64_t shard, int64_t shard_count) {
    const uint32_t tensor = builder_.tensor({name, Dtype::kBF16, shape});
    const int64_t rows = (shape[0] + shard_count - 1) / shard_count;
    Box box = Box::whole(shape);
    box.offset[0] = std::min(shard * rows, shape[0]);
    box.length[0] = std::min(rows, shape[0] - box.offset[0]);
    if (box.element_count() == 0) return;
    const uint32_t parameter = builder_.parameter({name, Dtype::kBF16, box.element_count()});
    builder_.tile(tensor, box, parameter, 0);
  }
  Result<Layout> build() { return builder_.build(); }

 private:
  LayoutBuilder builder_;
};

// Everything but the experts of one layer: 9 tensors.
void add_dense_part(TensorShares& layout, const TrillionShape& shape, int64_t layer, int64_t shard,
                    int64_t shard_count) {
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  const auto add = [&](std::string_view name, Dims dims) {
    layout.add(prefix + std::string(name), dims, shard, shard_count);
  };
  add("self_attn.q_proj.weight", {shape.query_rows, shape.hidden});
  add("self_attn.k_proj.weight", {shape.key_rows, shape.hidden});
  add("self_attn.v_proj.weight", {shape.key_rows, shape.hidden});
  add("self_attn.o_proj.weight", {shape.hidden, shape.query_rows});
  add("self_attn.q_norm.weight", {128});
  add("self_attn.k_norm.weight", {128});
  add("mlp.gate.weight", {shape.experts, shape.hidden});
  add("input_layernorm.weight", {shape.hidden});
  add("post_attention_layernorm.weight", {shape.hidden});
}

void add_experts(TensorShares& layout, const TrillionShape& shape, int64_t layer, int64_t first,
                 int64_t count) {
  for (int64_t expert = first; expert < first + count; ++expert) {
    const std::string prefix = fmt::format("model.layers.{}.mlp.experts.{}.", layer, expert);
    layout.add(prefix + "gate_proj.weight", {shape.expert_intermediate, shape.hidden}, 0, 1);
    layout.add(prefix + "up_proj.weight", {shape.expert_intermediate, shape.hidden}, 0, 1);
    layout.add(prefix + "down_proj.weight", {shape.hidden, shape.expert_intermediate}, 0, 1);
  }
}

void add_ends(TensorShares& layout, const TrillionShape& shape, int64_t shard, int64_t count) {
  layout.add("model.embed_tokens.weight", {shape.vocabulary, shape.hidden}, shard, count);
  layout.add("lm_head.weight", {shape.vocabulary, shape.hidden}, shard, count);
  layout.add("model.norm.weight", {shape.hidden}, shard, count);
}

}  // namespace

Result<LayoutPair> one_trillion_class(bool tiny) {
  TrillionShape shape;
  int64_t ranks = 32;  // of a stage
  if (tiny) {
    shape.layers = 8;
    shape.experts = 16;
    ranks = 2;
  }
  LayoutPair pair;
  const int64_t layers_per_stage = (shape.layers + kStages - 1) / kStages;
  for (int64_t stage = 0; stage < kStages; ++stage) {
    const int64_t begin = stage * layers_per_stage;
    const int64_t end = std::min(begin + layers_per_stage, shape.layers);
    for (int64_t rank = 0; rank < ranks; ++rank) {
      TensorShares source;
      const int64_t experts = shape.experts / ranks;
      for (int64_t layer = begin; layer < end; ++layer) {
        add_dense_part(source, shape, layer, rank, ranks);
        add_experts(source, shape, layer, rank * experts, experts);
      }
      if (stage == 0) add_ends(source, shape, rank, ranks);
      TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, source.build());
      pair.sources.push_back(std::move(layout));
    }
  }
  TensorShares target;
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    add_dense_part(target, shape, layer, 0, 1);
    add_experts(target, shape, layer, 0, shape.experts / kEngineRanks);
  }
  add_ends(target, shape, 0, 1);
  TRANSFUSE_ASSIGN_OR_RETURN(pair.target, target.build());
  return pair;
}

}  // namespace transfuse::bench

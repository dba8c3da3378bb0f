// Layouts of model families from an HF config.json and a parallelism spec; no torch, no GPU.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {

// What a family's catalog and layouts need to know of a config.json. All counts; see shared symbols
// in docs/layouts.md.
struct ModelConfig {
  std::string architecture;  // "qwen3", "qwen3_moe"
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t moe_intermediate_size = 0;  // 0: dense
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t num_experts = 0;  // 0: dense
  bool tie_word_embeddings = false;
  Dtype dtype = Dtype::kBF16;
};

// Fails with kInvalidArgument naming the field, or kUnsupported naming the architecture and what
// works all the same.
Result<ModelConfig> parse_model_config(std::string_view json);

// The tensors of the published checkpoint, by HF name.
Result<Catalog> make_catalog(const ModelConfig& config);

// Parallelism of one side as the CLI spells it: "hf", "fsdp:dp=4", "fsdp:dp=2,tp=2", "vllm:tp=2".
// Values are sizes, not ranks.
struct ParallelSpec {
  std::string family;  // "hf", "fsdp", "vllm"
  int64_t tp = 1;
  int64_t dp = 1;              // shards (FSDP) of one replica
  int64_t replicas = 1;        // HSDP
  Dtype dtype = Dtype::kBF16;  // of the parameters; "dtype=f32"
  int64_t rank_count() const { return tp * dp * replicas; }
};
Result<ParallelSpec> parse_parallel_spec(std::string_view text);

// One layout per rank, in the family's own rank order. Fails with kInvalidArgument where a size
// does not divide.
Result<std::vector<Layout>> make_layouts(const ModelConfig& config, const ParallelSpec& spec);
// One rank only. `rank` counts within the spec, as the caller's own groups say (never the world
// rank).
Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec, int64_t rank);

// FSDP2/DTensor placement of one tensor. `mesh_shape[i]` devices on mesh axis i; coordinate[i] is
// this rank's place on it.
enum class PlacementKind : uint8_t { kReplicate, kShard, kStridedShard };
struct Placement {
  PlacementKind kind = PlacementKind::kReplicate;
  int dim = 0;
  int64_t split_factor = 1;  // kStridedShard only: the number of shards of the axis to its right
                             // that was applied first
};
// The box of the global tensor that this rank holds (possibly empty), torch.chunk semantics. Fails
// with kUnsupported where the local shard is not one box, kInvalidArgument where the numbers
// contradict each other.
Result<Box> dtensor_box(const Dims& global_shape, std::span<const Placement> placements,
                        std::span<const int64_t> mesh_shape, std::span<const int64_t> coordinate);

}  // namespace transfuse

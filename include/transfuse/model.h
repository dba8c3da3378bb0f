// Layouts of model families from an HF config.json and a parallelism spec; no torch, no GPU.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {

// What a family's catalog and layouts need to know of a config.json. All counts; see shared symbols
// in docs/layouts.md.
struct ModelConfig {
  std::string architecture;  // "model_type": "llama", "deepseek_v3", ...
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
  Dtype dtype = Dtype::kBF16;  // of most tensors; some families have others beside them
  // 0 or false where a family has no such thing.
  int64_t dense_layers = 0;     // "first_k_dense_replace": before the first layer with experts
  int64_t shared_experts = 0;   // "n_shared_experts": their widths together are one MLP's
  int64_t mtp_layers = 0;       // "num_nextn_predict_layers", after the decoder's
  bool attention_bias = false;  // on q, k and v
  bool qk_norm = false;         // "use_qk_norm"
  bool noaux_routing = false;   // "topk_method" is "noaux_tc"
  int64_t q_lora_rank = 0;      // this and the next four: multi-head latent attention
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t scale_block_rows = 0;     // f8 weights with one f32 scale for so many rows ...
  int64_t scale_block_columns = 0;  // ... and columns
  bool packed_experts = false;      // experts in mxfp4: 32 elements in 16 bytes and a scale
  int64_t shared_expert_intermediate_size = 0;
  int64_t linear_key_heads = 0;  // this and the next five: linear attention
  int64_t linear_value_heads = 0;
  int64_t linear_key_head_dim = 0;
  int64_t linear_value_head_dim = 0;
  int64_t linear_conv_kernel = 0;
  std::vector<bool> linear_layers = {};  // "layer_types": which have it; empty: none
};

// Fails with kInvalidArgument naming the field, or kUnsupported naming the architecture and what
// works all the same.
Result<ModelConfig> parse_model_config(std::string_view json);

// The tensors of the published checkpoint, by HF name.
Result<Catalog> make_catalog(const ModelConfig& config);

// "mtp=all", "mtp=shared", "mtp=none": what is held of layers that predict further tokens;
// "shared": not their copies of the embedding and the output.
enum class MtpTensors : uint8_t { kAll, kShared, kNone };

// "shared=split", "shared=whole", "shared=fused": experts that every token visits are cut like
// other MLPs, whole on every rank, or one more expert in every rank's stack.
enum class SharedExperts : uint8_t { kSplit, kWhole, kFused };

// Which logical expert every physical place holds, where an engine keeps copies of busy experts
// (EPLB): [layer][place], all decoder layers or those with experts. Rank e of E has the places from
// e * places / E on. Every rank of an engine takes one map of one version.
struct ExpertMap {
  int64_t version = 0;  // the engine's own count
  std::vector<std::vector<int64_t>> physical_to_logical = {};
};
// {"version": 3, "physical_to_logical_map": [[0, 1, ...], ...]}, or the list alone (version 0).
// Fails with kInvalidArgument naming what is wrong; whether it fits a model, make_layout says.
Result<ExpertMap> parse_expert_map(std::string_view json);

// Parallelism of one side as the CLI spells it: "hf", "fsdp:dp=2,tp=2", "vllm:tp=4,ep",
// "sglang:tp=4,ep=2", "megatron:tp=2,pp=2,ep=4". Values are sizes, not ranks. docs/layouts.md,
// "Specs", says which option means what to which family.
struct ParallelSpec {
  std::string family;  // "hf", "fsdp", "vllm", "sglang", "megatron"
  int64_t tp = 1;
  // Shards (FSDP) of one replica; Megatron: replicas of a stage; SGLang: of attention within tp.
  int64_t dp = 1;
  int64_t replicas = 1;  // of everything (HSDP)
  // Of the parameters; "dtype=f32". Those of tensors with a dtype of their own keep it.
  Dtype dtype = Dtype::kBF16;
  int64_t pp = 1;
  int64_t vpp = 1;                   // chunks of layers a pipeline stage
  int64_t cp = 1;                    // context parallelism: repeats dense weights
  int64_t ep = 1;                    // Megatron, SGLang: ranks that share the experts
  int64_t etp = 0;                   // tensor parallelism of one expert; 0: as tp, SGLang: tp / ep
  int64_t first = 0;                 // layers of the first pipeline stage; 0: as the others
  int64_t last = 0;                  // layers of the last pipeline stage; 0: as the others
  std::vector<int64_t> layers = {};  // of every chunk of every stage in the order of execution
  int64_t vocab_divisor = 128;       // Megatron pads to a multiple of this times tp
  bool expert_parallel = false;      // vLLM "ep": whole experts over all its tp x dp ranks
  bool round_robin = false;          // vLLM "placement=round_robin"
  bool up_before_gate = false;       // vLLM "w13=up_gate": the halves swapped
  bool separate_norms = false;       // Megatron "norms=separate": not inside the linear after them
  bool sequential_experts = false;   // Megatron "experts=sequential": one module per expert
  // Megatron: the embedding (the loss) counts as a layer of the first (the last) chunk.
  bool account_for_embedding = false;
  bool account_for_loss = false;
  // Megatron: rows of the vocabulary with padding, of all ranks together; 0: by vocab_divisor.
  int64_t padded_vocab = 0;
  bool stacked_experts = false;    // HF, FSDP "experts=stacked": as transformers 5 holds them
  bool out_norm_plus_one = false;  // Megatron "out_norm=plus_one": docs/layouts.md, "Arithmetic"
  MtpTensors mtp = MtpTensors::kAll;
  bool whole_dense = false;  // SGLang "dense=whole": MLPs without experts (moe_dense_tp_size=1)
  // SGLang "lm_head=attention": cut over the ranks of attention (enable_dp_lm_head).
  bool output_by_attention = false;
  SharedExperts shared = SharedExperts::kSplit;  // SGLang
  int64_t redundant = 0;             // vLLM, SGLang: physical experts beyond one of each
  std::string expert_map_path = {};  // vLLM, SGLang "expert_map=FILE": to be read into expert_map
  ExpertMap expert_map = {};         // empty: place p holds expert p % experts
  // Of a checked spec (parse_parallel_spec); 0 where the family is unknown.
  int64_t rank_count() const;
};
Result<ParallelSpec> parse_parallel_spec(std::string_view text);

// A rank's place in every group of its framework. All 0 where there is only one.
struct ParallelRanks {
  int64_t tp = 0;
  int64_t pp = 0;
  int64_t dp = 0;
  int64_t cp = 0;
  int64_t etp = 0;  // of experts
  int64_t ep = 0;
  int64_t edp = 0;  // replica of the experts
  bool operator==(const ParallelRanks&) const = default;
};
// The framework's own order of ranks. `rank` counts within the spec; replicas come last.
Result<ParallelRanks> parallel_ranks(const ParallelSpec& spec, int64_t rank);

// One layout per rank, in the family's own rank order. Fails with kInvalidArgument where a size
// does not divide.
Result<std::vector<Layout>> make_layouts(const ModelConfig& config, const ParallelSpec& spec);
// One rank only. `rank` counts within the spec (never the world rank).
Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec, int64_t rank);
// The same for a process that knows its ranks from its own groups.
Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec,
                           const ParallelRanks& ranks);

// The same for a model of which nothing is known but its tensors: whole (hf), or dim 0 of each cut
// by torch.chunk (fsdp without tp). kUnsupported, with what works all the same, for every other
// family. `dtype`: of all parameters; nullopt: each as in the catalog. spec.dtype does not count.
Result<Layout> make_layout(const Catalog& catalog, const ParallelSpec& spec, int64_t rank,
                           std::optional<Dtype> dtype = std::nullopt);
Result<std::vector<Layout>> make_layouts(const Catalog& catalog, const ParallelSpec& spec,
                                         std::optional<Dtype> dtype = std::nullopt);

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

// FSDP1 cuts flattened parameters wherever a shard ends. The boxes of the elements [begin, end) of
// a row-major tensor; one after another, each row-major, they are these elements in order.
Result<std::vector<Box>> flat_range_boxes(const Dims& shape, int64_t begin, int64_t end);

}  // namespace transfuse

// What a model family declares (its tensors and their roles) and what a framework makes of it. A
// new family or framework is one file and one row in registry.cc; docs/layouts.md says where.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// What a tensor, or a matrix in it, is for. A bias has the role of its weight.
enum class Role : uint8_t {
  kEmbedding,
  kOutput,  // lm_head
  kFinalNorm,
  kAttentionNorm,        // before attention
  kLinearAttentionNorm,  // before linear attention
  kLatentAttentionNorm,  // before multi-head latent attention
  kAfterAttentionNorm,
  kQuery,
  kKey,
  kValue,
  kQueryNorm,
  kKeyNorm,
  kAttentionOutput,
  kSinks,        // one number a query head
  kLinearQkvz,   // linear attention: queries, keys, values and output gates of every key head
  kLinearBa,     // what each value head forgets and keeps, of every key head
  kLinearConv,   // of queries, keys and values over neighbouring tokens
  kLinearDecay,  // one number a value head, as is the next
  kLinearStep,
  kLinearNorm,
  kLinearOutput,
  kQueryDown,  // latent attention: to the latent vector, its norm, and up to the heads
  kQueryDownNorm,
  kQueryUp,
  kKeyValueDown,
  kKeyValueDownNorm,
  kKeyValueUp,
  kMlpNorm,      // before an MLP
  kExpertsNorm,  // before a router and its experts
  kAfterMlpNorm,
  kGate,  // of an MLP; of an expert where the tensor has one
  kUp,
  kDown,
  kGateUp,  // gate and up of an expert row by row in turns
  kRouter,
  kRouterBias,  // corrects the choice of experts
  kSharedGate,  // of the experts that every token visits
  kSharedUp,
  kSharedDown,
  kSharedRouter,
  kMtpEmbedding,  // of a layer that predicts a further token: copies of the model's own
  kMtpOutput,
  kMtpEmbeddingNorm,
  kMtpHiddenNorm,
  kMtpProjection,
  kMtpFinalNorm,
};

// What the name of a scale has after that of its weight.
inline constexpr std::string_view kScaleSuffix = "_scale_inv";

// How tensor parallelism cuts a matrix.
enum class Split : uint8_t {
  kReplicated,  // whole on every rank: norms, routers
  kColumn,      // dim 0, output features
  kHeads,       // dim 0, whole attention heads; an engine repeats them where ranks outnumber heads
  kRow,         // dim 1, input features
  kVocabulary,  // dim 0, padded by the engine
};
Split split_of(Role role);

enum class Content : uint8_t {
  kWeight,
  kBias,         // one dimension
  kScale,        // one number for every block of a weight
  kPackedScale,  // of a weight that holds several elements in one: rows and columns of its own
};

// Several matrices may take turns in the rows of a matrix, `turns` rows of each: an engine keeps
// them as they are or takes them apart.
using Turns = std::vector<int64_t>;

// A logical matrix [output features, input features] or vector [output features], or consecutive
// rows of one, and where it lies in a published tensor. Frameworks cut and concatenate logical
// matrices; only slices.cc knows how those lie in tensors.
struct Piece {
  Role role = Role::kFinalNorm;
  int64_t expert = -1;    // a matrix of this expert; -1: of no expert
  Dims shape;             // of the whole matrix; of a scale: of its weight
  int64_t first_row = 0;  // of the rows that lie here
  int64_t row_count = 0;
  Dims origin;               // the tensor's index of (first_row, 0)
  int row_dimension = 0;     // of the tensor, along which the matrix's rows follow each other
  int column_dimension = 1;  // later dimensions than both belong to the column
  // Of one matrix out of those that take turns: its rows are `turn_rows` from `turn_begin` on of
  // every `period` rows of the tensor. 0: they follow each other.
  int64_t period = 0;
  int64_t turn_begin = 0;
  int64_t turn_rows = 0;
  int64_t turn = 0;  // its number among them
};

// One tensor of a checkpoint and all that the frameworks need to know of it.
struct ModelTensor {
  std::string name;  // as published
  Dims shape;        // as published
  Role role = Role::kFinalNorm;
  Content content = Content::kWeight;
  std::optional<Dtype> dtype = std::nullopt;  // nullopt: the model's
  int64_t layer = -1;                         // -1: outside the decoder layers
  int64_t expert = -1;
  Dims weight_shape = {};          // of a scale
  Dims block = {};                 // of a scale: rows and columns that share one
  std::vector<Piece> pieces = {};  // empty: the tensor is one matrix, of `role` and `expert`
  Turns turns = {};                // in every piece; empty: a piece is one matrix
};
// The matrices that take turns in a piece, or the piece itself.
std::vector<Piece> apart(const ModelTensor& tensor, const Piece& piece);
// Rows of a piece that no cut may separate.
int64_t rows_together(const ModelTensor& tensor, const Piece& piece);
// The only piece of a tensor without any.
Piece whole_piece(const ModelTensor& tensor);
// Calls visit(piece) for every piece until one fails.
template <typename Visit>
Result<void> for_each_piece(const ModelTensor& tensor, const Visit& visit) {
  if (tensor.pieces.empty()) return visit(whole_piece(tensor));
  for (const Piece& piece : tensor.pieces) TRANSFUSE_RETURN_IF_ERROR(visit(piece));
  return {};
}

// A field that changes the tensors in a way not described here: any other JSON value is refused.
struct RequiredValue {
  std::string_view field;
  std::string_view json;
};
// A field of config.json that is a count: of at least 1, or 0 where it may be missing.
struct SizeField {
  const char* name;
  int64_t ModelConfig::* member;
  bool required = true;
  int64_t fallback = 0;  // where it is missing
  int64_t most = int64_t{1} << 30;
};
// True where the field has the value `on`.
struct SwitchField {
  const char* name;
  bool ModelConfig::* member;
  std::string_view on = "true";
};

// Part of a parameter's name, and what a module's own class has in its place.
struct Rename {
  std::string_view from;
  std::string_view to;
};
// What an engine's own class of a family does in its own way.
struct EngineTraits {
  // Embedding, final norm and output are on every pipeline stage, not only where they are used.
  bool outer_tensors_on_every_stage = false;
  bool final_norm_on_last_stage = false;  // all the same
  bool ties = true;                       // has no output of its own where the config ties it
  bool repeats_heads = true;              // of keys and values, where they are fewer than ranks
  bool equal_expert_ranges = false;       // its loader has no other placement of experts
  std::span<const Role> f32_roles = {};   // held in f32 whatever the model's dtype is
  std::span<const Rename> renames = {};
  // Tensors that the class does not have. Null: it has all.
  bool (*lacks)(const ModelConfig&, Role) = nullptr;
};

struct ModelFamily {
  std::string_view architecture;       // "model_type" of config.json
  std::string_view model_class;        // the only entry of "architectures"
  int64_t default_head_dim = 0;        // where config.json has none; 0: hidden_size / heads
  bool default_tied = false;           // where config.json does not say "tie_word_embeddings"
  const char* expert_count = nullptr;  // the field; nullptr: a family without experts
  bool block_scales = false;           // "quantization_config" may say f8 weights with block scales
  bool packed_experts = false;         // "quantization_config" may say mxfp4 experts
  // Every so many layers one has full attention, the others have linear; 0: all have full.
  int64_t default_attention_interval = 0;
  std::span<const SizeField> sizes;  // besides those that every family has
  std::span<const SwitchField> switches = {};
  std::span<const RequiredValue> required_values;
  std::vector<ModelTensor> (*tensors)(const ModelConfig&) = nullptr;
  std::span<const Rename> module_renames = {};  // in the modules of transformers 5
  EngineTraits vllm = {};
};
extern const ModelFamily kLlama;
extern const ModelFamily kQwen2;
extern const ModelFamily kQwen3;
extern const ModelFamily kQwen3Moe;
extern const ModelFamily kMixtral;
extern const ModelFamily kGemma3;
extern const ModelFamily kGlm4Moe;
extern const ModelFamily kDeepseekV3;
extern const ModelFamily kGptOss;
extern const ModelFamily kQwen3Next;

std::span<const ModelFamily* const> model_families();
// kUnsupported, with the families that work.
Result<const ModelFamily*> find_model_family(std::string_view architecture);

// kInvalidArgument naming the field. Bounds every number, so that later arithmetic cannot overflow.
Result<void> check_model_config(const ModelConfig& config);
// `config` checked and its tensors declared.
struct Model {
  ModelConfig config;
  const ModelFamily* family = nullptr;
  std::vector<ModelTensor> tensors;
  int64_t expert_count() const { return family->expert_count == nullptr ? 0 : config.num_experts; }
  bool is_mtp(const ModelTensor& tensor) const { return tensor.layer >= config.num_hidden_layers; }
  TensorSpec published(const ModelTensor& tensor) const;
  // As modules of transformers 5 do: there is nothing to stack.
  bool files_stack_experts() const;
};
// Of the parameter that holds the tensor, where a framework has no opinion of its own.
Dtype held_dtype(const ModelTensor& tensor, const ParallelSpec& spec);
// False for tensors that the spec's "mtp" leaves out.
bool is_held(const Model& model, const ModelTensor& tensor, const ParallelSpec& spec);
std::string renamed(std::string name, std::span<const Rename> renames);
Result<Model> make_model(const ModelConfig& config);

// One side of a refit: how a framework holds a model.
struct Framework {
  std::string_view name;  // ParallelSpec::family
  // What a spec may set besides replicas and dtype, which are every framework's.
  std::span<const std::string_view> options;
  std::span<const std::string_view> flags = {};  // options that take no value
  // Of one replica, at most kTooManyRanks.
  int64_t (*rank_count)(const ParallelSpec&) = nullptr;
  // `rank` is below rank_count().
  ParallelRanks (*ranks)(const ParallelSpec&, int64_t rank) = nullptr;
  // Contradictions between options, each in range by itself. Null: there are none.
  Result<void> (*check)(const ParallelSpec&) = nullptr;
  Result<Layout> (*make_layout)(const Model&, const ParallelSpec&, const ParallelRanks&) = nullptr;
};
extern const Framework kHf;
extern const Framework kFsdp;
extern const Framework kVllm;
extern const Framework kSglang;
extern const Framework kMegatron;

std::span<const Framework* const> frameworks();
// kInvalidArgument, with the frameworks that exist.
Result<const Framework*> find_framework(std::string_view name);
// Sizes are in range and the framework has them.
Result<void> check_parallel_spec(const ParallelSpec& spec);
// Of a checked spec: every rank is below the size of its group.
Result<void> check_ranks(const ParallelSpec& spec, const ParallelRanks& ranks);
inline constexpr int64_t kMaxRanks = int64_t{1} << 16;
inline constexpr int64_t kTooManyRanks = kMaxRanks + 1;
// The product of positive sizes, or kTooManyRanks.
int64_t bounded_product(std::initializer_list<int64_t> sizes);

// Pipeline stages: the layers of every chunk of every stage. Execution goes through the stages once
// per chunk.
struct Pipeline {
  int64_t stages = 1;
  std::vector<int64_t> layers;  // [chunk * stages + stage]
};
// A decoder layer's place. `layer` counts within the chunk.
struct StagePlace {
  int64_t stage = 0;
  int64_t chunk = 0;
  int64_t layer = 0;
};
std::vector<StagePlace> places_of_layers(const Pipeline& pipeline);
// The explicit list of a spec, checked against the model.
Result<Pipeline> explicit_pipeline(const ParallelSpec& spec, const ModelConfig& config);

}  // namespace transfuse

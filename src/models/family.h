// What a model family declares (its tensors and their roles) and what a framework makes of it. A
// new family or framework is one file and one row in registry.cc; docs/layouts.md says where.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// What a tensor is for. A bias has the role of its weight and one dimension.
enum class Role : uint8_t {
  kEmbedding,
  kOutput,  // lm_head
  kFinalNorm,
  kAttentionNorm,  // before attention
  kQuery,
  kKey,
  kValue,
  kQueryNorm,
  kKeyNorm,
  kAttentionOutput,
  kMlpNorm,  // before the MLP or the experts
  kRouter,
  kGate,
  kUp,
  kDown,
};

// How tensor parallelism cuts a tensor.
enum class Split : uint8_t {
  kReplicated,  // whole on every rank: norms, routers
  kColumn,      // dim 0, output features
  kHeads,       // dim 0, whole attention heads; an engine repeats them where ranks outnumber heads
  kRow,         // dim 1, input features
  kVocabulary,  // dim 0, padded by the engine
};
Split split_of(Role role);

// One tensor of a checkpoint and all that the frameworks need to know of it.
struct ModelTensor {
  std::string name;  // as published
  Dims shape;
  Role role = Role::kFinalNorm;
  int64_t layer = -1;   // -1: outside the decoder layers
  int64_t expert = -1;  // one matrix of this expert; -1: of no expert
  bool is_bias() const { return name.ends_with(".bias"); }
};

// A field that changes the tensors in a way not described here: any other JSON value is refused.
struct RequiredValue {
  std::string_view field;
  std::string_view json;
};

struct ModelFamily {
  std::string_view architecture;  // "model_type" of config.json
  std::string_view model_class;   // the only entry of "architectures"
  int64_t default_head_dim = 0;   // where config.json has none; 0: hidden_size / heads
  bool mixture_of_experts = false;
  // An engine's class of this family makes embedding, final norm and output on every pipeline
  // stage, not only where they are used.
  bool outer_tensors_on_every_stage = false;
  std::span<const RequiredValue> required_values;
  int64_t (*tensor_count)(const ModelConfig&) = nullptr;
  std::vector<ModelTensor> (*tensors)(const ModelConfig&) = nullptr;
};
extern const ModelFamily kLlama;
extern const ModelFamily kQwen2;
extern const ModelFamily kQwen3;
extern const ModelFamily kQwen3Moe;

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
  int64_t expert_count() const { return family->mixture_of_experts ? config.num_experts : 0; }
};
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

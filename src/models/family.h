// What a model family declares (its tensors and their roles) and what a framework makes of it. A
// new family or framework is one file and one row in registry.cc; docs/layouts.md says where.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// How tensor parallelism cuts a tensor.
enum class Split : uint8_t {
  kReplicated,  // whole on every rank: norms, routers
  kColumn,      // dim 0, output features
  kHeads,       // dim 0, whole attention heads; an engine repeats them where ranks outnumber heads
  kRow,         // dim 1, input features
  kVocabulary,  // dim 0, padded by the engine
};

// One tensor of a checkpoint and all that the frameworks need to know of it.
struct ModelTensor {
  std::string name;  // as published
  Dims shape;
  Split split = Split::kReplicated;
  int64_t heads = 0;            // kHeads: dim 0 is this many heads
  std::string fused_into = {};  // an engine's fused parameter; its parts follow in declared order
  bool expert = false;          // one matrix of one expert
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
  std::span<const RequiredValue> required_values;
  int64_t (*tensor_count)(const ModelConfig&) = nullptr;
  std::vector<ModelTensor> (*tensors)(const ModelConfig&) = nullptr;
};
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
  std::vector<ModelTensor> tensors;
};
Result<Model> make_model(const ModelConfig& config);

// One side of a refit: how a framework holds a model.
struct Framework {
  std::string_view name;  // ParallelSpec::family
  bool has_tp = false;    // a spec may set tp; replicas and dtype are every framework's
  bool has_dp = false;
  // Of rank `rank` of one replica; replicas are equal.
  Result<Layout> (*make_layout)(const Model&, const ParallelSpec&, int64_t rank) = nullptr;
};
extern const Framework kHf;
extern const Framework kFsdp;
extern const Framework kVllm;

std::span<const Framework* const> frameworks();
// kInvalidArgument, with the frameworks that exist.
Result<const Framework*> find_framework(std::string_view name);
// Sizes are in range and the framework has them.
Result<void> check_parallel_spec(const ParallelSpec& spec);

}  // namespace transfuse

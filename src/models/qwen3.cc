// Qwen3 and Qwen3-MoE: norms on q and k, no biases.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

// Biases add tensors; a quantised checkpoint has other tensors altogether.
constexpr std::array<RequiredValue, 2> kDenseRequired = {
    {{"attention_bias", "false"}, {"quantization_config", "null"}}};
// The other two make some layers dense.
constexpr std::array<RequiredValue, 4> kMoeRequired = {{{"attention_bias", "false"},
                                                        {"quantization_config", "null"},
                                                        {"decoder_sparse_step", "1"},
                                                        {"mlp_only_layers", "[]"}}};
constexpr std::array<SizeField, 1> kDenseSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size}}};
constexpr std::array<SizeField, 2> kMoeSizes = {
    {{"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
     {"intermediate_size", &ModelConfig::intermediate_size, false}}};

}  // namespace

// Qwen3Config of transformers 4.57 takes head_dim = 128 where config.json has none; Qwen3MoeConfig
// has no such field and its model divides.
constinit const ModelFamily kQwen3 = {
    .architecture = "qwen3",
    .model_class = "Qwen3ForCausalLM",
    .default_head_dim = 128,
    .sizes = kDenseSizes,
    .required_values = kDenseRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, {.qk_norm = true}); },
};

constinit const ModelFamily kQwen3Moe = {
    .architecture = "qwen3_moe",
    .model_class = "Qwen3MoeForCausalLM",
    .expert_count = "num_experts",
    .sizes = kMoeSizes,
    .required_values = kMoeRequired,
    .tensors =
        [](const ModelConfig& c) { return decoder_tensors(c, {.qk_norm = true, .experts = true}); },
    .vllm = {.outer_tensors_on_every_stage = true},
};

}  // namespace transfuse

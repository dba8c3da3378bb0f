// Qwen3 and Qwen3-MoE: norms on q and k, no biases.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kDense{.qk_norm = true};
constexpr DecoderTraits kMoe{.qk_norm = true, .experts = true};

// Biases add tensors; a quantised checkpoint has other tensors altogether.
constexpr std::array<RequiredValue, 2> kDenseRequired = {
    {{"attention_bias", "false"}, {"quantization_config", "null"}}};
// The other two make some layers dense.
constexpr std::array<RequiredValue, 4> kMoeRequired = {{{"attention_bias", "false"},
                                                        {"quantization_config", "null"},
                                                        {"decoder_sparse_step", "1"},
                                                        {"mlp_only_layers", "[]"}}};

}  // namespace

// Qwen3Config of transformers 4.57 takes head_dim = 128 where config.json has none; Qwen3MoeConfig
// has no such field and its model divides.
constinit const ModelFamily kQwen3 = {
    .architecture = "qwen3",
    .model_class = "Qwen3ForCausalLM",
    .default_head_dim = 128,
    .required_values = kDenseRequired,
    .tensor_count = [](const ModelConfig& c) { return decoder_tensor_count(c, kDense); },
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kDense); },
};

constinit const ModelFamily kQwen3Moe = {
    .architecture = "qwen3_moe",
    .model_class = "Qwen3MoeForCausalLM",
    .mixture_of_experts = true,
    .outer_tensors_on_every_stage = true,
    .required_values = kMoeRequired,
    .tensor_count = [](const ModelConfig& c) { return decoder_tensor_count(c, kMoe); },
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kMoe); },
};

}  // namespace transfuse

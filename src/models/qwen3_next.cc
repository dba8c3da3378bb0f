// Qwen3-Next: most layers attend linearly, the others have output gates; routed experts and a gated
// shared one; layers that predict further tokens in a module of their own.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kTraits{.output_gate = true,
                                .qk_norm = true,
                                .experts = true,
                                .shared_expert = true,
                                .mtp_module = true};

// The last two make some layers dense.
constexpr std::array<RequiredValue, 4> kRequired = {{{"attention_bias", "false"},
                                                     {"quantization_config", "null"},
                                                     {"decoder_sparse_step", "1"},
                                                     {"mlp_only_layers", "[]"}}};
// Published files have one layer for further tokens and no field for it; engines take it so.
constexpr std::array<SizeField, 9> kSizes = {
    {{"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
     {"shared_expert_intermediate_size", &ModelConfig::shared_expert_intermediate_size},
     {"linear_num_key_heads", &ModelConfig::linear_key_heads},
     {"linear_num_value_heads", &ModelConfig::linear_value_heads},
     {"linear_key_head_dim", &ModelConfig::linear_key_head_dim},
     {"linear_value_head_dim", &ModelConfig::linear_value_head_dim},
     {"linear_conv_kernel_dim", &ModelConfig::linear_conv_kernel},
     {"intermediate_size", &ModelConfig::intermediate_size, false},
     {"num_nextn_predict_layers", &ModelConfig::mtp_layers, false, 1, 1}}};
constexpr std::array<Role, 1> kVllmF32 = {Role::kLinearDecay};

}  // namespace

// Qwen3NextConfig of transformers 4.57: head_dim = 256, full attention every fourth layer.
constinit const ModelFamily kQwen3Next = {
    .architecture = "qwen3_next",
    .model_class = "Qwen3NextForCausalLM",
    .default_head_dim = 256,
    .expert_count = "num_experts",
    .default_attention_interval = 4,
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kTraits); },
    .vllm = {.outer_tensors_on_every_stage = true,
             .final_norm_on_last_stage = true,
             .ties = false,
             .f32_roles = kVllmF32},
};

}  // namespace transfuse

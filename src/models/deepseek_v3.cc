// DeepSeek-V3: latent attention, dense layers first, then shared and routed experts; layers that
// predict further tokens; bf16, or f8 with block scales.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kTraits{.latent_attention = true, .experts = true, .router_bias = true};

constexpr std::array<RequiredValue, 2> kRequired = {
    {{"attention_bias", "false"}, {"moe_layer_freq", "1"}}};
constexpr std::array<SizeField, 10> kSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size},
     {"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
     {"q_lora_rank", &ModelConfig::q_lora_rank},
     {"kv_lora_rank", &ModelConfig::kv_lora_rank},
     {"qk_nope_head_dim", &ModelConfig::qk_nope_head_dim},
     {"qk_rope_head_dim", &ModelConfig::qk_rope_head_dim},
     {"v_head_dim", &ModelConfig::v_head_dim},
     {"first_k_dense_replace", &ModelConfig::dense_layers, false},
     {"n_shared_experts", &ModelConfig::shared_experts, false},
     {"num_nextn_predict_layers", &ModelConfig::mtp_layers, false}}};
constexpr std::array<SwitchField, 1> kSwitches = {
    {{"topk_method", &ModelConfig::noaux_routing, "\"noaux_tc\""}}};

}  // namespace

// vLLM's class makes the bias of the router only where the config names the method that uses it;
// transformers 5 leaves that field out of the files that it writes.
constinit const ModelFamily kDeepseekV3 = {
    .architecture = "deepseek_v3",
    .model_class = "DeepseekV3ForCausalLM",
    .expert_count = "n_routed_experts",
    .block_scales = true,
    .sizes = kSizes,
    .switches = kSwitches,
    .required_values = kRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kTraits); },
    .vllm = {.lacks = [](const ModelConfig& c,
                         Role role) { return role == Role::kRouterBias && !c.noaux_routing; }},
};

}  // namespace transfuse

// GLM-4.5: dense layers first, then shared and routed experts; biases and q and k norms as the
// config says; layers that predict further tokens.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr std::array<RequiredValue, 1> kRequired = {{{"quantization_config", "null"}}};
constexpr std::array<SizeField, 5> kSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size},
     {"moe_intermediate_size", &ModelConfig::moe_intermediate_size},
     {"first_k_dense_replace", &ModelConfig::dense_layers, false},
     {"n_shared_experts", &ModelConfig::shared_experts, false},
     {"num_nextn_predict_layers", &ModelConfig::mtp_layers, false}}};
constexpr std::array<SwitchField, 2> kSwitches = {
    {{"attention_bias", &ModelConfig::attention_bias}, {"use_qk_norm", &ModelConfig::qk_norm}}};
constexpr std::array<Role, 1> kVllmF32 = {Role::kRouter};

}  // namespace

constinit const ModelFamily kGlm4Moe = {
    .architecture = "glm4_moe",
    .model_class = "Glm4MoeForCausalLM",
    .expert_count = "n_routed_experts",
    .sizes = kSizes,
    .switches = kSwitches,
    .required_values = kRequired,
    .tensors =
        [](const ModelConfig& c) {
          return decoder_tensors(c, {.qkv_bias = c.attention_bias,
                                     .qk_norm = c.qk_norm,
                                     .experts = true,
                                     .router_bias = true});
        },
    .vllm = {.f32_roles = kVllmF32},
};

}  // namespace transfuse

// Gemma 3, text: norms before and after attention and MLP, on q and k; tied embeddings.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr std::array<RequiredValue, 2> kRequired = {
    {{"attention_bias", "false"}, {"quantization_config", "null"}}};
constexpr std::array<SizeField, 1> kSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size}}};

}  // namespace

// Gemma3TextConfig of transformers 4.57: head_dim = 256, and tied where config.json does not say.
constinit const ModelFamily kGemma3 = {
    .architecture = "gemma3_text",
    .model_class = "Gemma3ForCausalLM",
    .default_head_dim = 256,
    .default_tied = true,
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors =
        [](const ModelConfig& c) {
          return decoder_tensors(c, {.qk_norm = true, .norms_after = true});
        },
    .vllm = {.outer_tensors_on_every_stage = true},
};

}  // namespace transfuse

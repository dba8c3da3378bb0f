// Qwen2 and Qwen2.5: biases on q, k and v.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

// A quantised checkpoint has other tensors altogether. The biases are no field of Qwen2Config.
constexpr std::array<RequiredValue, 1> kRequired = {{{"quantization_config", "null"}}};
constexpr std::array<SizeField, 1> kSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size}}};

}  // namespace

constinit const ModelFamily kQwen2 = {
    .architecture = "qwen2",
    .model_class = "Qwen2ForCausalLM",
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, {.qkv_bias = true}); },
};

}  // namespace transfuse

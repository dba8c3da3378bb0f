// Qwen2 and Qwen2.5: biases on q, k and v.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kTraits{.qkv_bias = true};

// A quantised checkpoint has other tensors altogether. The biases are no field of Qwen2Config.
constexpr std::array<RequiredValue, 1> kRequired = {{{"quantization_config", "null"}}};

}  // namespace

constinit const ModelFamily kQwen2 = {
    .architecture = "qwen2",
    .model_class = "Qwen2ForCausalLM",
    .required_values = kRequired,
    .tensor_count = [](const ModelConfig& c) { return decoder_tensor_count(c, kTraits); },
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kTraits); },
};

}  // namespace transfuse

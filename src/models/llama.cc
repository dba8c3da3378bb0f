// Llama 3.x: the plain decoder.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kTraits{};

// Biases add tensors; a quantised checkpoint has other tensors altogether.
constexpr std::array<RequiredValue, 3> kRequired = {
    {{"attention_bias", "false"}, {"mlp_bias", "false"}, {"quantization_config", "null"}}};

}  // namespace

constinit const ModelFamily kLlama = {
    .architecture = "llama",
    .model_class = "LlamaForCausalLM",
    .required_values = kRequired,
    .tensor_count = [](const ModelConfig& c) { return decoder_tensor_count(c, kTraits); },
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kTraits); },
};

}  // namespace transfuse

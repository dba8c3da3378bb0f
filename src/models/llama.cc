// Llama 3.x: the plain decoder.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

// Biases add tensors; a quantised checkpoint has other tensors altogether.
constexpr std::array<RequiredValue, 3> kRequired = {
    {{"attention_bias", "false"}, {"mlp_bias", "false"}, {"quantization_config", "null"}}};
constexpr std::array<SizeField, 1> kSizes = {
    {{"intermediate_size", &ModelConfig::intermediate_size}}};

}  // namespace

constinit const ModelFamily kLlama = {
    .architecture = "llama",
    .model_class = "LlamaForCausalLM",
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, {}); },
};

}  // namespace transfuse

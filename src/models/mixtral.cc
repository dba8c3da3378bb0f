// Mixtral: the plain decoder with experts that have names of their own.
#include <array>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr DecoderTraits kTraits{
    .experts = true, .experts_module = "block_sparse_moe", .expert_matrices = {"w1", "w3", "w2"}};

constexpr std::array<RequiredValue, 1> kRequired = {{{"quantization_config", "null"}}};
constexpr std::array<SizeField, 1> kSizes = {
    {{"intermediate_size", &ModelConfig::moe_intermediate_size}}};
constexpr std::array<Rename, 1> kModuleRenames = {{{".block_sparse_moe.", ".mlp."}}};

}  // namespace

constinit const ModelFamily kMixtral = {
    .architecture = "mixtral",
    .model_class = "MixtralForCausalLM",
    .expert_count = "num_local_experts",
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors = [](const ModelConfig& c) { return decoder_tensors(c, kTraits); },
    .module_renames = kModuleRenames,
    .vllm = {.outer_tensors_on_every_stage = true},
};

}  // namespace transfuse

// The model families and frameworks there are: one row each.
#include <array>
#include <span>
#include <string>
#include <string_view>

#include "models/family.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<const ModelFamily*, 10> kFamilies = {
    &kLlama,  &kQwen2,   &kQwen3,      &kQwen3Moe, &kMixtral,
    &kGemma3, &kGlm4Moe, &kDeepseekV3, &kGptOss,   &kQwen3Next};
constexpr std::array<const Framework*, 5> kFrameworks = {&kHf, &kFsdp, &kVllm, &kSglang,
                                                         &kMegatron};

template <typename Row>
std::string join(std::span<const Row* const> rows, std::string_view Row::* name) {
  std::string text;
  for (const Row* row : rows) {
    if (!text.empty()) text += ", ";
    text += row->*name;
  }
  return text;
}

}  // namespace

std::span<const ModelFamily* const> model_families() { return kFamilies; }

Result<const ModelFamily*> find_model_family(std::string_view architecture) {
  for (const ModelFamily* family : kFamilies) {
    if (family->architecture == architecture) return family;
  }
  return Error{ErrorCode::kUnsupported,
               "model_type \"" + std::string(architecture) +
                   "\" is not described here; there are " +
                   join(model_families(), &ModelFamily::architecture) +
                   ". For any other model, hf and fsdp layouts of a checkpoint's own tensors, "
                   "captured layouts, those taken from live modules, and tiles that the caller "
                   "gives work all the same"};
}

std::span<const Framework* const> frameworks() { return kFrameworks; }

Result<const Framework*> find_framework(std::string_view name) {
  for (const Framework* framework : kFrameworks) {
    if (framework->name == name) return framework;
  }
  return Error{ErrorCode::kInvalidArgument, "parallel spec: family \"" + std::string(name) +
                                                "\" is not known: expected one of " +
                                                join(frameworks(), &Framework::name)};
}

}  // namespace transfuse

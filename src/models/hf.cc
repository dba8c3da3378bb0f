// The layout of a Hugging Face model: every tensor whole, under its published name, or experts
// stacked as transformers 5 holds them.
#include <array>
#include <cstdint>
#include <string_view>

#include "models/family.h"
#include "models/stacked_experts.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 2> kOptions = {"experts", "mtp"};

Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& /*ranks*/) {
  if (spec.stacked_experts && !model.files_stack_experts()) {
    return stacked_experts_layout(model, spec, ParallelRanks{});
  }
  LayoutBuilder builder;
  for (const ModelTensor& tensor : model.tensors) {
    if (!is_held(model, tensor, spec)) continue;
    const auto t = builder.tensor(model.published(tensor));
    const auto p =
        builder.parameter({tensor.name, held_dtype(tensor, spec), tensor.shape.product()});
    builder.tile(t, Box::whole(tensor.shape), p, 0);
  }
  return builder.build();
}

}  // namespace

constinit const Framework kHf = {
    .name = "hf",
    .options = kOptions,
    .rank_count = [](const ParallelSpec&) { return int64_t{1}; },
    .ranks = [](const ParallelSpec&, int64_t) { return ParallelRanks{}; },
    .make_layout = make};

}  // namespace transfuse

// The layout of a Hugging Face model: every tensor whole, under its published name.
#include <cstdint>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& /*ranks*/) {
  LayoutBuilder builder;
  for (const ModelTensor& tensor : model.tensors) {
    const auto t = builder.tensor({tensor.name, model.config.dtype, tensor.shape});
    const auto p = builder.parameter({tensor.name, spec.dtype, tensor.shape.product()});
    builder.tile(t, Box::whole(tensor.shape), p, 0);
  }
  return builder.build();
}

}  // namespace

constinit const Framework kHf = {
    .name = "hf",
    .options = {},
    .rank_count = [](const ParallelSpec&) { return int64_t{1}; },
    .ranks = [](const ParallelSpec&, int64_t) { return ParallelRanks{}; },
    .make_layout = make};

}  // namespace transfuse

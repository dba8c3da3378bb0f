// Catalogs and layouts: joins what a family declares with what a framework makes of it.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

Split split_of(Role role) {
  switch (role) {
    case Role::kEmbedding:
    case Role::kOutput:
      return Split::kVocabulary;
    case Role::kQuery:
    case Role::kKey:
    case Role::kValue:
      return Split::kHeads;
    case Role::kGate:
    case Role::kUp:
      return Split::kColumn;
    case Role::kAttentionOutput:
    case Role::kDown:
      return Split::kRow;
    case Role::kFinalNorm:
    case Role::kAttentionNorm:
    case Role::kQueryNorm:
    case Role::kKeyNorm:
    case Role::kMlpNorm:
    case Role::kRouter:
      return Split::kReplicated;
  }
  check_failed(__FILE__, __LINE__, "a Role outside the enum");
}

Result<Model> make_model(const ModelConfig& config) {
  TRANSFUSE_RETURN_IF_ERROR(check_model_config(config));
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelFamily* family, find_model_family(config.architecture));
  Model model{.config = config, .family = family, .tensors = family->tensors(config)};
  TRANSFUSE_CHECK(static_cast<int64_t>(model.tensors.size()) == family->tensor_count(config));
  return model;
}

Result<Catalog> make_catalog(const ModelConfig& config) {
  TRANSFUSE_ASSIGN_OR_RETURN(Model model, make_model(config));
  Catalog catalog;
  catalog.reserve(model.tensors.size());
  for (ModelTensor& tensor : model.tensors) {
    catalog.push_back(TensorSpec{std::move(tensor.name), config.dtype, tensor.shape});
  }
  return catalog;
}

Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec,
                           const ParallelRanks& ranks) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  TRANSFUSE_RETURN_IF_ERROR(check_ranks(spec, ranks));
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  return framework->make_layout(model, spec, ranks);
}

Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec, int64_t rank) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelRanks ranks, parallel_ranks(spec, rank));
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  return framework->make_layout(model, spec, ranks);
}

Result<std::vector<Layout>> make_layouts(const ModelConfig& config, const ParallelSpec& spec) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  const int64_t replica_ranks = framework->rank_count(spec);
  std::vector<Layout> layouts;
  for (int64_t rank = 0; rank < spec.rank_count(); ++rank) {
    if (rank >= replica_ranks) {
      layouts.push_back(layouts[static_cast<size_t>(rank - replica_ranks)]);
      continue;
    }
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout,
                               framework->make_layout(model, spec, framework->ranks(spec, rank)));
    layouts.push_back(std::move(layout));
  }
  return layouts;
}

}  // namespace transfuse

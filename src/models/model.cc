// Catalogs and layouts: joins what a family declares with what a framework makes of it.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <string_view>
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
    case Role::kMtpEmbedding:
    case Role::kMtpOutput:
      return Split::kVocabulary;
    case Role::kQuery:
    case Role::kKey:
    case Role::kValue:
    case Role::kQueryUp:
    case Role::kKeyValueUp:
    case Role::kSinks:
      return Split::kHeads;
    case Role::kGate:
    case Role::kUp:
    case Role::kSharedGate:
    case Role::kSharedUp:
    case Role::kGateUp:
    case Role::kLinearQkvz:
    case Role::kLinearBa:
    case Role::kLinearConv:
    case Role::kLinearDecay:
    case Role::kLinearStep:
    case Role::kMtpProjection:
      return Split::kColumn;
    case Role::kAttentionOutput:
    case Role::kDown:
    case Role::kSharedDown:
    case Role::kLinearOutput:
      return Split::kRow;
    case Role::kFinalNorm:
    case Role::kAttentionNorm:
    case Role::kLinearAttentionNorm:
    case Role::kLatentAttentionNorm:
    case Role::kAfterAttentionNorm:
    case Role::kQueryNorm:
    case Role::kKeyNorm:
    case Role::kQueryDown:
    case Role::kQueryDownNorm:
    case Role::kKeyValueDown:
    case Role::kKeyValueDownNorm:
    case Role::kMlpNorm:
    case Role::kExpertsNorm:
    case Role::kAfterMlpNorm:
    case Role::kRouter:
    case Role::kRouterBias:
    case Role::kSharedRouter:
    case Role::kLinearNorm:
    case Role::kMtpEmbeddingNorm:
    case Role::kMtpHiddenNorm:
    case Role::kMtpFinalNorm:
      return Split::kReplicated;
  }
  check_failed(__FILE__, __LINE__, "a Role outside the enum");
}

Piece whole_piece(const ModelTensor& tensor) {
  const Dims& shape = tensor.content == Content::kScale ? tensor.weight_shape : tensor.shape;
  Piece piece{.role = tensor.role, .expert = tensor.expert, .shape = shape, .origin = {}};
  piece.row_count = shape[0];
  for (int d = 0; d < tensor.shape.rank(); ++d) piece.origin.push_back(0);
  return piece;
}

std::vector<Piece> apart(const ModelTensor& tensor, const Piece& piece) {
  if (tensor.turns.empty()) return {piece};
  TRANSFUSE_CHECK(piece.first_row == 0 && piece.row_count == piece.shape[0]);
  const int64_t period = std::accumulate(tensor.turns.begin(), tensor.turns.end(), int64_t{0});
  const int64_t repeats = piece.shape[0] / period;
  std::vector<Piece> matrices;
  int64_t begin = 0;
  for (const int64_t rows : tensor.turns) {
    Piece& matrix = matrices.emplace_back(piece);
    matrix.shape[0] = matrix.row_count = repeats * rows;
    matrix.turn = static_cast<int64_t>(matrices.size()) - 1;
    if (repeats == 1) {
      matrix.origin[piece.row_dimension] += begin;
    } else {
      matrix.period = period;
      matrix.turn_begin = begin;
      matrix.turn_rows = rows;
    }
    begin += rows;
  }
  return matrices;
}

int64_t rows_together(const ModelTensor& tensor, const Piece& piece) {
  if (piece.period > 0) return piece.turn_rows;
  const int64_t period = std::accumulate(tensor.turns.begin(), tensor.turns.end(), int64_t{0});
  return period > 0 && period < piece.shape[0] ? period : 1;
}

TensorSpec Model::published(const ModelTensor& tensor) const {
  return {tensor.name, tensor.dtype.value_or(config.dtype), tensor.shape};
}

bool Model::files_stack_experts() const {
  return std::ranges::any_of(tensors, [](const ModelTensor& t) { return !t.pieces.empty(); });
}

Dtype held_dtype(const ModelTensor& tensor, const ParallelSpec& spec) {
  return tensor.dtype.value_or(spec.dtype);
}

bool is_held(const Model& model, const ModelTensor& tensor, const ParallelSpec& spec) {
  if (!model.is_mtp(tensor) || spec.mtp == MtpTensors::kAll) return true;
  const bool copy = tensor.role == Role::kMtpEmbedding || tensor.role == Role::kMtpOutput;
  return spec.mtp == MtpTensors::kShared && !copy;
}

std::string renamed(std::string name, std::span<const Rename> renames) {
  for (const Rename& rename : renames) {
    const size_t at = name.find(rename.from);
    if (at != std::string::npos) name.replace(at, rename.from.size(), rename.to);
  }
  return name;
}

namespace {

// True if the layout has tiles of `tensor`, all of them in parameters of `dtype`.
bool held_in(const Layout& layout, uint32_t tensor, Dtype dtype) {
  const auto tiles = layout.tiles_of(tensor);
  return !tiles.empty() && std::ranges::all_of(tiles, [&](const Tile& tile) {
    return layout.parameters()[tile.parameter].dtype == dtype;
  });
}

// A layout that has fp8 weights and their scales says which belong together.
Result<Layout> with_scales(const Model& model, Result<Layout> layout) {
  if (!layout || model.config.scale_block_rows == 0) return layout;
  std::vector<Quantization> quantizations;
  for (const ModelTensor& tensor : model.tensors) {
    if (tensor.content != Content::kScale) continue;
    const std::string_view name = tensor.name;
    const auto weight = layout->find_tensor(name.substr(0, name.size() - kScaleSuffix.size()));
    const auto scales = layout->find_tensor(name);
    if (!weight || !scales || !held_in(*layout, *weight, Dtype::kF8E4M3) ||
        !held_in(*layout, *scales, Dtype::kF32)) {
      continue;
    }
    quantizations.push_back({.tensor = *weight,
                             .scales = *scales,
                             .block_rows = tensor.block[0],
                             .block_columns = tensor.block[1]});
  }
  return layout->with_quantizations(quantizations);
}

}  // namespace

Result<Model> make_model(const ModelConfig& config) {
  TRANSFUSE_RETURN_IF_ERROR(check_model_config(config));
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelFamily* family, find_model_family(config.architecture));
  return Model{.config = config, .family = family, .tensors = family->tensors(config)};
}

Result<Catalog> make_catalog(const ModelConfig& config) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  Catalog catalog;
  catalog.reserve(model.tensors.size());
  for (const ModelTensor& tensor : model.tensors) catalog.push_back(model.published(tensor));
  return catalog;
}

Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec,
                           const ParallelRanks& ranks) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  TRANSFUSE_RETURN_IF_ERROR(check_ranks(spec, ranks));
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  return with_scales(model, framework->make_layout(model, spec, ranks));
}

Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec, int64_t rank) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelRanks ranks, parallel_ranks(spec, rank));
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_ASSIGN_OR_RETURN(const Model model, make_model(config));
  return with_scales(model, framework->make_layout(model, spec, ranks));
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
    TRANSFUSE_ASSIGN_OR_RETURN(
        Layout layout,
        with_scales(model, framework->make_layout(model, spec, framework->ranks(spec, rank))));
    layouts.push_back(std::move(layout));
  }
  return layouts;
}

}  // namespace transfuse

// Modules of transformers 5: experts of a layer stacked in two tensors, everything else whole.
#include "models/stacked_experts.h"

#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "models/family.h"
#include "models/slices.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// What a rank holds of `rows` rows: FSDP2 cuts dim 0.
Result<Range> rows_of(int64_t rows, const ParallelSpec& spec, const ParallelRanks& ranks) {
  const std::array<Placement, 1> placements = {Placement{.kind = PlacementKind::kShard, .dim = 0}};
  const std::array<int64_t, 1> mesh = {spec.dp};
  const std::array<int64_t, 1> coordinate = {ranks.dp};
  TRANSFUSE_ASSIGN_OR_RETURN(const Box box, dtensor_box({rows}, placements, mesh, coordinate));
  return Range{box.offset[0], box.offset[0] + box.length[0]};
}

// Every matrix of an expert has a place of its own in its stack; those of other ranks add no rows.
Result<void> add_expert(Slices& slices, Destination to, const ModelTensor& tensor,
                        const Piece& piece, const Range& held) {
  const bool down = piece.role == Role::kDown;
  const std::string_view stem =
      std::string_view(to.parameter).substr(0, to.parameter.find(".experts.") + 9);
  to.parameter = fmt::format("{}{}", stem, down ? "down_proj" : "gate_up_proj");
  to.place = piece.expert * 2 + (piece.role == Role::kUp ? 1 : 0);
  Slice slice = whole_slice(piece);
  if (piece.expert < held.begin || piece.expert >= held.end) slice.rows = {};
  return slices.add(to, tensor, piece, slice);
}

}  // namespace

Result<Layout> stacked_experts_layout(const Model& model, const ParallelSpec& spec,
                                      const ParallelRanks& ranks) {
  if (model.expert_count() == 0 || model.config.scale_block_rows > 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} experts=stacked: expected a model with experts and without block "
                             "scales, found {}",
                             spec.family, model.config.architecture)};
  }
  if (spec.tp > 1) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} tp={},experts=stacked: expected tp=1: how tensor parallelism cuts "
                             "a stack is not described",
                             spec.family, spec.tp)};
  }
  Slices slices(model);
  for (const ModelTensor& tensor : model.tensors) {
    if (!is_held(model, tensor, spec)) continue;
    const Destination to{.parameter = renamed(tensor.name, model.family->module_renames),
                         .dtype = held_dtype(tensor, spec)};
    const Piece piece = whole_piece(tensor);
    const bool of_expert = piece.expert >= 0;
    TRANSFUSE_ASSIGN_OR_RETURN(
        const Range held, rows_of(of_expert ? model.expert_count() : piece.shape[0], spec, ranks));
    if (of_expert) {
      TRANSFUSE_RETURN_IF_ERROR(add_expert(slices, to, tensor, piece, held));
      continue;
    }
    Slice slice = whole_slice(piece);
    slice.rows = held;
    TRANSFUSE_RETURN_IF_ERROR(slices.add(to, tensor, piece, slice));
  }
  return slices.build();
}

}  // namespace transfuse

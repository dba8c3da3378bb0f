// FSDP2 layouts: torch.chunk on dim 0, after tensor parallelism where there is some.
#include <fmt/format.h>

#include <algorithm>
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

constexpr std::array<std::string_view, 4> kOptions = {"tp", "dp", "experts", "mtp"};

// On the mesh (dp, tp). FSDP2 cuts dim 0 of what tensor parallelism has left on the rank; where
// both cut dim 0, torch writes that as a strided shard (docs/layouts.md, "FSDP2").
std::array<Placement, 2> placements(Split split, int64_t tp) {
  const Placement shard{.kind = PlacementKind::kShard, .dim = 0};
  switch (split) {
    case Split::kReplicated:
      return {shard, Placement{}};
    case Split::kRow:
      return {shard, Placement{.kind = PlacementKind::kShard, .dim = 1}};
    case Split::kColumn:
    case Split::kHeads:
    case Split::kVocabulary:
      return {Placement{.kind = PlacementKind::kStridedShard, .dim = 0, .split_factor = tp}, shard};
  }
  check_failed(__FILE__, __LINE__, "a Split outside the enum");
}

// A bias has no columns to cut.
Split split_of_tensor(const ModelTensor& tensor) {
  // torch's plans for tensor parallelism leave linear attention alone.
  constexpr std::array<Role, 6> kWhole = {Role::kLinearQkvz, Role::kLinearBa,
                                          Role::kLinearConv, Role::kLinearDecay,
                                          Role::kLinearStep, Role::kLinearOutput};
  if (std::ranges::find(kWhole, tensor.role) != kWhole.end()) return Split::kReplicated;
  const Split split = split_of(tensor.role);
  const bool columns = split == Split::kRow && tensor.content == Content::kBias;
  return columns ? Split::kReplicated : split;
}

// Tensor parallelism cuts scales where it cuts their weight. (FSDP2 cuts either by itself.)
Result<void> check_scales(const ModelTensor& tensor, int64_t tp) {
  if (tensor.content != Content::kScale || tp == 1) return {};
  const Split split = split_of(tensor.role);
  if (split == Split::kReplicated) return {};
  const int dim = split == Split::kRow ? 1 : 0;
  const int64_t piece = (tensor.weight_shape[dim] + tp - 1) / tp;
  if (piece % tensor.block[dim] == 0) return {};
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("fsdp tp={}: {}: its weight is cut every {} of {} {}: expected a "
                           "multiple of {}, as one scale is of {} of them",
                           tp, tensor.name, piece, tensor.weight_shape[dim],
                           dim == 0 ? "rows" : "columns", tensor.block[dim], tensor.block[dim])};
}

// The parameter is what to_local() returns: the box, unpadded.
Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
  if (spec.stacked_experts && !model.files_stack_experts()) {
    return stacked_experts_layout(model, spec, ranks);
  }
  const std::array<int64_t, 2> mesh = {spec.dp, spec.tp};
  const std::array<int64_t, 2> coordinate = {ranks.dp, ranks.tp};
  LayoutBuilder builder;
  for (const ModelTensor& tensor : model.tensors) {
    if (!is_held(model, tensor, spec)) continue;
    TRANSFUSE_RETURN_IF_ERROR(check_scales(tensor, spec.tp));
    if (spec.tp > 1 && !tensor.pieces.empty()) {
      return Error{
          ErrorCode::kUnsupported,
          fmt::format("fsdp tp={}: {} holds all experts of a layer: how tensor parallelism "
                      "cuts it is not described, expected tp=1",
                      spec.tp, tensor.name)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(
        const Box box,
        dtensor_box(tensor.shape, placements(split_of_tensor(tensor), spec.tp), mesh, coordinate));
    const auto t = builder.tensor(model.published(tensor));
    const auto p = builder.parameter({tensor.name, held_dtype(tensor, spec), box.element_count()});
    builder.tile(t, box, p, 0);
  }
  return builder.build();
}

}  // namespace

constinit const Framework kFsdp = {
    .name = "fsdp",
    .options = kOptions,
    .rank_count = [](const ParallelSpec& s) { return bounded_product({s.dp, s.tp}); },
    .ranks = [](const ParallelSpec& s,
                int64_t rank) { return ParallelRanks{.tp = rank % s.tp, .dp = rank / s.tp}; },
    .make_layout = make};

}  // namespace transfuse

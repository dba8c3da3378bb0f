// FSDP2 layouts: torch.chunk on dim 0, after tensor parallelism where there is some.
#include <array>
#include <cstdint>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

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

// Ranks of one replica: tp fastest. The parameter is what to_local() returns: the box, unpadded.
Result<Layout> make(const Model& model, const ParallelSpec& spec, int64_t rank) {
  const std::array<int64_t, 2> mesh = {spec.dp, spec.tp};
  const std::array<int64_t, 2> coordinate = {rank / spec.tp, rank % spec.tp};
  LayoutBuilder builder;
  for (const ModelTensor& tensor : model.tensors) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        const Box box,
        dtensor_box(tensor.shape, placements(tensor.split, spec.tp), mesh, coordinate));
    const auto t = builder.tensor({tensor.name, model.config.dtype, tensor.shape});
    const auto p = builder.parameter({tensor.name, spec.dtype, box.element_count()});
    builder.tile(t, box, p, 0);
  }
  return builder.build();
}

}  // namespace

constinit const Framework kFsdp = {
    .name = "fsdp", .has_tp = true, .has_dp = true, .make_layout = make};

}  // namespace transfuse

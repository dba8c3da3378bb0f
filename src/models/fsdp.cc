// FSDP2 layouts: torch.chunk on dim 0, after tensor parallelism where there is some.
#include <array>
#include <cstdint>
#include <string_view>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 2> kOptions = {"tp", "dp"};

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

// The parameter is what to_local() returns: the box, unpadded.
Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
  const std::array<int64_t, 2> mesh = {spec.dp, spec.tp};
  const std::array<int64_t, 2> coordinate = {ranks.dp, ranks.tp};
  LayoutBuilder builder;
  for (const ModelTensor& tensor : model.tensors) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        const Box box,
        dtensor_box(tensor.shape, placements(split_of(tensor.role), spec.tp), mesh, coordinate));
    const auto t = builder.tensor({tensor.name, model.config.dtype, tensor.shape});
    const auto p = builder.parameter({tensor.name, spec.dtype, box.element_count()});
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

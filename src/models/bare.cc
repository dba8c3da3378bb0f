// Layouts of a model of which nothing is known but its tensors.
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Result<void> check_bare(const ParallelSpec& spec) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  if (spec.family == "hf" || (spec.family == "fsdp" && spec.tp == 1)) return {};
  return Error{
      ErrorCode::kUnsupported,
      fmt::format("layouts of \"{}\"{} need a model whose architecture is described here; of any "
                  "model hf and fsdp without tp work, which need its tensors alone, and so do "
                  "layouts that are captured or taken from live modules, and tiles that the "
                  "caller gives",
                  spec.family, spec.family == "fsdp" ? " with tp" : "")};
}

// A number instead of a tensor is whole everywhere, as torch leaves it.
Result<Box> box_of(const TensorSpec& tensor, const ParallelSpec& spec, int64_t rank) {
  if (spec.family == "hf" || tensor.shape.rank() == 0) return Box::whole(tensor.shape);
  const std::array<Placement, 1> placement = {{{.kind = PlacementKind::kShard, .dim = 0}}};
  const std::array<int64_t, 1> mesh = {spec.dp};
  const std::array<int64_t, 1> coordinate = {rank % spec.dp};
  return dtensor_box(tensor.shape, placement, mesh, coordinate);
}

}  // namespace

Result<Layout> make_layout(const Catalog& catalog, const ParallelSpec& spec, int64_t rank,
                           std::optional<Dtype> dtype) {
  TRANSFUSE_RETURN_IF_ERROR(check_bare(spec));
  if (rank < 0 || rank >= spec.rank_count()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("expected a rank below {}, found {}", spec.rank_count(), rank)};
  }
  LayoutBuilder builder;
  for (const TensorSpec& tensor : catalog) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Box box, box_of(tensor, spec, rank));
    builder.tile(builder.tensor(tensor), box,
                 builder.parameter({.name = tensor.name,
                                    .dtype = dtype.value_or(tensor.dtype),
                                    .element_count = box.element_count()}),
                 0);
  }
  return builder.build();
}

Result<std::vector<Layout>> make_layouts(const Catalog& catalog, const ParallelSpec& spec,
                                         std::optional<Dtype> dtype) {
  TRANSFUSE_RETURN_IF_ERROR(check_bare(spec));
  std::vector<Layout> layouts;
  for (int64_t rank = 0; rank < spec.rank_count(); ++rank) {
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, make_layout(catalog, spec, rank, dtype));
    layouts.push_back(std::move(layout));
  }
  return layouts;
}

}  // namespace transfuse

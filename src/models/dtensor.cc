// DTensor placements as boxes: torch.chunk per mesh axis, in the order in which the axes cut.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

Result<void> check_mesh(std::span<const Placement> placements, std::span<const int64_t> mesh_shape,
                        std::span<const int64_t> coordinate) {
  if (placements.size() != mesh_shape.size() || coordinate.size() != mesh_shape.size()) {
    return invalid(fmt::format("{} placements and {} coordinates for a mesh of {} axes",
                               placements.size(), coordinate.size(), mesh_shape.size()));
  }
  for (size_t i = 0; i < mesh_shape.size(); ++i) {
    if (mesh_shape[i] < 1 || coordinate[i] < 0 || coordinate[i] >= mesh_shape[i]) {
      return invalid(
          fmt::format("coordinate {} on mesh axis {} of size {}", coordinate[i], i, mesh_shape[i]));
    }
  }
  return {};
}

Result<void> check_placements(const Dims& shape, std::span<const Placement> placements) {
  for (size_t i = 0; i < placements.size(); ++i) {
    const Placement& p = placements[i];
    if (p.kind == PlacementKind::kReplicate) continue;
    if (p.dim < 0 || p.dim >= shape.rank()) {
      return invalid(fmt::format("the placement on mesh axis {} shards dimension {} of shape {}", i,
                                 p.dim, shape.to_string()));
    }
    if (p.kind == PlacementKind::kStridedShard && p.split_factor < 1) {
      return invalid(
          fmt::format("the placement on mesh axis {} has split factor {}: expected 1 or "
                      "more",
                      i, p.split_factor));
    }
  }
  for (const int64_t extent : shape.values()) {
    if (extent < 0) return invalid(fmt::format("the global shape is {}", shape.to_string()));
  }
  return {};
}

// Mesh axes that cut dimension `dim`, first cut first. Shard cuts before all axes to its right;
// _StridedShard(split_factor = s) cuts after as many of them as make s shards together.
Result<std::vector<size_t>> cutting_order(int dim, std::span<const Placement> placements,
                                          std::span<const int64_t> mesh_shape) {
  std::vector<size_t> order;
  for (size_t axis = placements.size(); axis-- > 0;) {
    const Placement& p = placements[axis];
    if (p.kind == PlacementKind::kReplicate || p.dim != dim || mesh_shape[axis] == 1) continue;
    const int64_t wanted = p.kind == PlacementKind::kStridedShard ? p.split_factor : 1;
    int64_t shards = 1;
    size_t before = 0;
    while (shards < wanted && before < order.size()) shards *= mesh_shape[order[before++]];
    if (shards != wanted) {
      return Error{ErrorCode::kUnsupported,
                   fmt::format("_StridedShard({}, split_factor={}) on mesh axis {}: the axes to "
                               "its right do not make {} shards of that dimension, so the local "
                               "shard is not one box",
                               dim, wanted, axis, wanted)};
    }
    order.insert(order.begin() + static_cast<std::ptrdiff_t>(before), axis);
  }
  return order;
}

}  // namespace

Result<Box> dtensor_box(const Dims& global_shape, std::span<const Placement> placements,
                        std::span<const int64_t> mesh_shape, std::span<const int64_t> coordinate) {
  TRANSFUSE_RETURN_IF_ERROR(check_mesh(placements, mesh_shape, coordinate));
  TRANSFUSE_RETURN_IF_ERROR(check_placements(global_shape, placements));
  Box box = Box::whole(global_shape);
  for (int dim = 0; dim < global_shape.rank(); ++dim) {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto order, cutting_order(dim, placements, mesh_shape));
    for (const size_t axis : order) {
      // torch.chunk: pieces of ceil(length / n), the last ones short or empty.
      const int64_t length = box.length[dim];
      const int64_t n = mesh_shape[axis];
      const int64_t piece = length / n + (length % n != 0 ? 1 : 0);
      const int64_t index = coordinate[axis];
      const int64_t begin =
          piece != 0 && index > length / piece ? length : std::min(index * piece, length);
      box.offset[dim] += begin;
      box.length[dim] = std::min(piece, length - begin);
    }
  }
  return box;
}

}  // namespace transfuse

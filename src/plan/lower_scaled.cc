// Pieces of fp8 matrices as runs: rows by columns, never folded or merged, so that a run knows its
// blocks.
#include <cstddef>
#include <cstdint>
#include <span>

#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "plan/intersect.h"
#include "plan/lower.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

// The scales of `piece` in `tile`, which holds them.
ScaleRun scales_in(const Bounds& piece, const BlockGrid& grid, const TensorSpec& tensor,
                   const Tile& tile) {
  ScaleRun run{.offset = tile.element_offset, .tensor = tile.tensor, .parameter = tile.parameter};
  for (int d = 0; d < 2; ++d) {
    run.block[d] = static_cast<uint32_t>(grid.block[d]);
    run.phase[d] = static_cast<uint32_t>(piece.low[d] % grid.block[d]);
  }
  if (tensor.shape.rank() != 2) return run;  // one scale
  run.index_stride[0] = tensor.shape[1];
  run.index_stride[1] = 1;
  const Bounds scales = grid.scales_of(piece);
  for (int d = 0; d < 2; ++d) {
    run.stride[d] = tile.element_strides[d];
    run.offset += (scales.low[d] - tile.box.offset[d]) * run.stride[d];
    run.linear_index += scales.low[d] * run.index_stride[d];
  }
  return run;
}

}  // namespace

uint32_t Lowering::add_scales(const ScaleRun& scales) {
  block_scales_.push_back(scales);
  return static_cast<uint32_t>(block_scales_.size());
}

// Everything but the scales.
void Lowering::set_matrix(const Bounds& piece, std::span<const HolderTile> holders, Run& run) {
  piece_holders_.resize(holders.size());
  locate(piece, holders, run);
  Strides3 target;
  Strides3 index;
  for (int d = 0; d < 2; ++d) {
    run.count[d + 1] = static_cast<uint32_t>(piece.high[d] - piece.low[d]);
    target.level[d + 1] = tile_->element_strides[d];
    index.level[d + 1] = index_strides_[d];
  }
  run.target_pattern = patterns_.intern(target);
  run.index_pattern = patterns_.intern(index);
  for (size_t h = 0; h < holders.size(); ++h) {
    const Dims& strides = holders[h].tile->element_strides;
    piece_holders_[h].source_pattern =
        patterns_.intern(Strides3{.level = {0, strides[0], strides[1]}});
  }
}

void Lowering::add_quantizing(const Bounds& piece, std::span<const HolderTile> holders,
                              const Layout& target, const Quantization& quantization,
                              const Tile& scales) {
  Run run;
  set_matrix(piece, holders, run);
  const BlockGrid grid(quantization, target.tensors()[quantization.tensor].shape);
  run.scales = add_scales(scales_in(piece, grid, target.tensors()[quantization.scales], scales));
  append(run);
}

void Lowering::add_dequantizing(const Bounds& piece, std::span<const HolderTile> holders,
                                std::span<const Layout> sources) {
  Run run;
  set_matrix(piece, holders, run);
  for (size_t h = 0; h < holders.size(); ++h) {
    const Layout& source = sources[holders[h].source];
    const Quantization q = source.quantization_of(holders[h].tile->tensor).value();
    const BlockGrid grid(q, source.tensors()[q.tensor].shape);
    const Tile* const tile = tile_of_scales(source, q.scales, grid.scales_of(piece));
    TRANSFUSE_CHECK(tile != nullptr);  // the comparison found it
    piece_holders_[h].scales =
        add_scales(scales_in(piece, grid, source.tensors()[q.scales], *tile));
  }
  append(run);
}

}  // namespace transfuse

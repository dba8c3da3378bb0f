// The blocks of an fp8 matrix that share a scale, and the boxes that consist of whole ones.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/bounds.h"
#include "transfuse/layout.h"

namespace transfuse {

// Of a tensor of two dimensions. Blocks at its end may be smaller.
struct BlockGrid {
  int64_t block[2] = {1, 1};
  int64_t end[2] = {0, 0};  // the tensor's shape

  BlockGrid(const Quantization& quantization, const Dims& shape)
      : block{quantization.block_rows, quantization.block_columns}, end{shape[0], shape[1]} {}

  bool cuts_at(int d, int64_t at) const { return at % block[d] != 0 && at != end[d]; }
  bool whole(const Bounds& box) const {
    return !cuts_at(0, box.low[0]) && !cuts_at(0, box.high[0]) && !cuts_at(1, box.low[1]) &&
           !cuts_at(1, box.high[1]);
  }
  // The whole blocks inside; may be empty (low >= high).
  Bounds shrunk(const Bounds& box) const {
    Bounds inside = box;
    for (int d = 0; d < 2; ++d) {
      inside.low[d] = (box.low[d] + block[d] - 1) / block[d] * block[d];
      if (cuts_at(d, box.high[d])) inside.high[d] = box.high[d] / block[d] * block[d];
    }
    return inside;
  }
  // The blocks that `box` touches, as a box of the scale tensor; and what they cover.
  Bounds scales_of(const Bounds& box) const {
    Bounds scales = box;
    for (int d = 0; d < 2; ++d) {
      scales.low[d] = box.low[d] / block[d];
      scales.high[d] = (box.high[d] + block[d] - 1) / block[d];
    }
    return scales;
  }
  Bounds elements_of(const Bounds& scales) const {
    Bounds box = scales;
    for (int d = 0; d < 2; ++d) {
      box.low[d] = scales.low[d] * block[d];
      box.high[d] = std::min(scales.high[d] * block[d], end[d]);
    }
    return box;
  }
};

// Where scale (row, column) of `box` (of the scale tensor) lies in `tile`; a tile of the one scale
// of a tensor may have any rank.
inline bool holds_scales(const Tile& tile, const Bounds& box) {
  if (tile.box.offset.rank() != 2) return true;
  for (int d = 0; d < 2; ++d) {
    if (box.low[d] < tile.box.offset[d] || box.high[d] > tile.box.offset[d] + tile.box.length[d]) {
      return false;
    }
  }
  return true;
}
// The first tile of `layout` that holds all of `box`, or null.
inline const Tile* tile_of_scales(const Layout& layout, uint32_t scales, const Bounds& box) {
  for (const Tile& tile : layout.tiles_of(scales)) {
    if (holds_scales(tile, box)) return &tile;
  }
  return nullptr;
}

}  // namespace transfuse

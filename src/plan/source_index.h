// Which tiles of which sources carry each tensor of the target: names are matched here, once.
#pragma once

#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {

// The tiles of one tensor in one source layout.
struct TileRange {
  const Tile* first = nullptr;
  uint32_t count = 0;
  uint32_t source = 0;  // index into the span of sources
};

struct ShapeConflict {
  uint32_t tensor = 0;         // of the target
  uint32_t source = 0;         // index into the span of sources
  uint32_t source_tensor = 0;  // of that source
};

// A tensor whose shapes differ only in how dimensions are split is compared in the shape that
// splits most (docs/decisions/0004-shapes-may-split.md). Points into the layouts, which must
// outlive it. Safe to use from any thread once built.
class SourceIndex {
 public:
  SourceIndex(const Layout& target, std::span<const Layout> sources);

  // The shape in which a tensor is compared, and the target's tiles in it.
  const Dims& shape(uint32_t tensor) const;
  std::span<const Tile> target_tiles(uint32_t tensor) const;
  // Sorted by source, in that shape; only sources whose shape agrees and that hold at least one
  // tile.
  std::span<const TileRange> of(uint32_t tensor) const {
    return std::span(ranges_).subspan(first_[tensor], first_[tensor + 1] - first_[tensor]);
  }
  // True if any source lists the name, with or without tiles.
  bool known(uint32_t tensor) const { return known_[tensor] != 0; }
  std::span<const ShapeConflict> shape_conflicts() const { return conflicts_; }

 private:
  // A tensor in another shape than the target's or a source's own.
  struct View {
    Dims shape;
    std::vector<Tile> target_tiles;
    std::deque<std::vector<Tile>> source_tiles;
  };
  void view_in_one_shape(uint32_t tensor, std::span<const Layout> sources);

  const Layout& target_;
  std::vector<uint32_t> view_of_;  // per tensor: index into views_ plus 1; empty: there are none
  std::deque<View> views_;
  std::vector<TileRange> ranges_;
  std::vector<uint32_t> first_;
  std::vector<uint8_t> known_;
  std::vector<ShapeConflict> conflicts_;
};

}  // namespace transfuse

// Which tiles of which sources carry each tensor of the target: names are matched here, once.
#pragma once

#include <cstdint>
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

// Points into the layouts, which must outlive it. Safe to use from any thread once built.
class SourceIndex {
 public:
  SourceIndex(const Layout& target, std::span<const Layout> sources);

  // Sorted by source; only sources whose shape agrees and that hold at least one tile.
  std::span<const TileRange> of(uint32_t tensor) const {
    return std::span(ranges_).subspan(first_[tensor], first_[tensor + 1] - first_[tensor]);
  }
  // True if any source lists the name, with or without tiles.
  bool known(uint32_t tensor) const { return known_[tensor] != 0; }
  std::span<const ShapeConflict> shape_conflicts() const { return conflicts_; }

 private:
  std::vector<TileRange> ranges_;
  std::vector<uint32_t> first_;
  std::vector<uint8_t> known_;
  std::vector<ShapeConflict> conflicts_;
};

}  // namespace transfuse

// One target tile cut into disjoint boxes, each with every source tile that holds all of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"

namespace transfuse {

struct HolderTile {
  const Tile* tile = nullptr;
  uint32_t source = 0;
};

// A box of the catalog tensor within the target tile, and where its holders are listed.
struct Cell {
  Bounds bounds;
  uint32_t first_holder = 0;
  uint32_t holder_count = 0;  // 0: a gap
};

// Keeps its buffers from tile to tile. Used from one thread.
class Intersection {
 public:
  // Cuts `target` by the tiles in `ranges` (all of its tensor). Each source layout appears at most
  // once among the holders of a cell, and in the order of `ranges`. With `grid`, a source holds
  // only the blocks of which it holds all, and cells consist of whole blocks.
  void build(const Tile& target, std::span<const TileRange> ranges,
             const BlockGrid* grid = nullptr);

  // Disjoint; together exactly the target tile, gaps included; ordered by their low corner.
  std::span<const Cell> cells() const { return cells_; }
  std::span<const HolderTile> holders_of(const Cell& cell) const {
    return std::span(holders_).subspan(cell.first_holder, cell.holder_count);
  }
  bool complete() const { return complete_; }  // no cell is a gap
  int rank() const { return rank_; }

  // Calls visit(cell, box) for every cell that shares elements with `window`.
  template <typename Visit>
  void for_each_in(const Bounds& window, Visit&& visit) const {
    Bounds piece;
    if (cells_.size() == 1) {
      visit(cells_[0], window);
      return;
    }
    for (size_t i = first_reaching(window); i < cells_.size(); ++i) {
      if (rank_ > 0 && cells_[i].bounds.low[axis_] >= window.high[axis_]) break;
      if (clip(cells_[i].bounds, window, rank_, piece)) visit(cells_[i], piece);
    }
  }

 private:
  struct Clipped {
    Bounds bounds;
    HolderTile holder;
  };
  void collect(const Tile& target, std::span<const TileRange> ranges, const BlockGrid* grid);
  void group_equal();
  bool disjoint() const;
  void split_overlapping();
  void add_gaps();
  void merge_neighbours();
  bool same_holders(const Cell& a, const Cell& b) const;
  void finish();
  size_t first_reaching(const Bounds& window) const;

  int rank_ = 0;
  int axis_ = 0;  // cells are sorted by low[axis_] first
  bool complete_ = false;
  Bounds whole_{};
  std::vector<Clipped> clipped_;
  std::vector<Cell> cells_;
  std::vector<HolderTile> holders_;
  std::vector<int64_t> reach_;  // reach_[i]: largest high[axis_] among cells 0..i
  std::vector<Cell> spare_cells_;
  std::vector<Bounds> rest_;
  std::vector<Bounds> rest_next_;
};

// Appends a \ b as at most 2 * rank disjoint boxes.
void subtract(const Bounds& a, const Bounds& b, int rank, std::vector<Bounds>& out);

}  // namespace transfuse

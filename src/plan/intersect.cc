// One target tile cut into disjoint boxes, each with every source tile that holds all of it.
#include "plan/intersect.h"

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <span>
#include <tuple>
#include <vector>
#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

std::strong_ordering compare_corners(const Bounds& a, const Bounds& b, int rank) {
  const auto low = std::lexicographical_compare_three_way(a.low, a.low + rank, b.low, b.low + rank);
  if (low != 0) return low;
  return std::lexicographical_compare_three_way(a.high, a.high + rank, b.high, b.high + rank);
}

// True if `a` and `b` together are one box, `b` following `a` along `axis`.
bool touches(const Bounds& a, const Bounds& b, int rank, int axis) {
  for (int d = 0; d < rank; ++d) {
    if (d == axis ? a.high[d] != b.low[d] : (a.low[d] != b.low[d] || a.high[d] != b.high[d])) {
      return false;
    }
  }
  return true;
}

}  // namespace

void subtract(const Bounds& a, const Bounds& b, int rank, std::vector<Bounds>& out) {
  Bounds common;
  if (!clip(a, b, rank, common)) {
    out.push_back(a);
    return;
  }
  Bounds rest = a;
  for (int d = 0; d < rank; ++d) {
    if (rest.low[d] < common.low[d]) {
      out.push_back(rest);
      out.back().high[d] = common.low[d];
      rest.low[d] = common.low[d];
    }
    if (common.high[d] < rest.high[d]) {
      out.push_back(rest);
      out.back().low[d] = common.high[d];
      rest.high[d] = common.high[d];
    }
  }
}

void Intersection::build(const Tile& target, std::span<const TileRange> ranges,
                         const BlockGrid* grid) {
  rank_ = target.box.offset.rank();
  axis_ = 0;
  whole_ = to_bounds(target.box);
  cells_.clear();
  holders_.clear();
  clipped_.clear();
  collect(target, ranges, grid);
  if (!clipped_.empty()) group_equal();
  if (cells_.size() > 1 && !disjoint()) {
    split_overlapping();
    merge_neighbours();
  }
  int64_t covered = 0;
  for (const Cell& cell : cells_) covered += volume(cell.bounds, rank_);
  complete_ = covered == volume(whole_, rank_);
  if (!complete_) add_gaps();
  if (cells_.size() > 1) finish();
}

void Intersection::collect(const Tile& target, std::span<const TileRange> ranges,
                           const BlockGrid* grid) {
  const Box& box = target.box;
  for (const TileRange& range : ranges) {
    for (const Tile* tile = range.first; tile != range.first + range.count; ++tile) {
      Clipped& added = clipped_.emplace_back();
      added.holder = {tile, range.source};
      Bounds& bounds = added.bounds;
      bool empty = false;
      for (int d = 0; d < rank_; ++d) {
        bounds.low[d] = std::max(box.offset[d], tile->box.offset[d]);
        bounds.high[d] =
            std::min(box.offset[d] + box.length[d], tile->box.offset[d] + tile->box.length[d]);
        empty = empty || bounds.low[d] >= bounds.high[d];
      }
      if (grid != nullptr && !empty) {
        bounds = grid->shrunk(bounds);
        empty = bounds.low[0] >= bounds.high[0] || bounds.low[1] >= bounds.high[1];
      }
      if (empty) clipped_.pop_back();
    }
  }
}

// Cells from clipped tiles with equal boxes, sorted by their low corner with `axis_` first.
void Intersection::group_equal() {
  const Bounds& first = clipped_[0].bounds;
  bool all_equal = true;
  for (const Clipped& c : clipped_) {
    if (equal(c.bounds, first, rank_)) continue;
    all_equal = false;
    const auto [mine, other] =
        std::mismatch(c.bounds.low, c.bounds.low + rank_, first.low, first.low + rank_);
    if (mine != c.bounds.low + rank_)
      axis_ = std::max(axis_, static_cast<int>(mine - c.bounds.low));
  }
  if (!all_equal && clipped_.size() > 1) {
    std::sort(clipped_.begin(), clipped_.end(), [this](const Clipped& a, const Clipped& b) {
      if (a.bounds.low[axis_] != b.bounds.low[axis_]) {
        return a.bounds.low[axis_] < b.bounds.low[axis_];
      }
      const auto corners = compare_corners(a.bounds, b.bounds, rank_);
      if (corners != 0) return corners < 0;
      return std::tie(a.holder.source, a.holder.tile) < std::tie(b.holder.source, b.holder.tile);
    });
  }
  for (const Clipped& c : clipped_) {
    if (cells_.empty() || !equal(cells_.back().bounds, c.bounds, rank_)) {
      cells_.push_back({c.bounds, static_cast<uint32_t>(holders_.size()), 0});
    }
    Cell& cell = cells_.back();
    // Tied copies: one source that holds the box twice is one holder.
    if (cell.holder_count > 0 && holders_.back().source == c.holder.source) continue;
    holders_.push_back(c.holder);
    ++cell.holder_count;
  }
}

bool Intersection::disjoint() const {
  Bounds unused;
  for (size_t i = 0; i < cells_.size(); ++i) {
    for (size_t j = i + 1; j < cells_.size(); ++j) {
      if (cells_[j].bounds.low[axis_] >= cells_[i].bounds.high[axis_]) break;
      if (clip(cells_[i].bounds, cells_[j].bounds, rank_, unused)) return false;
    }
  }
  return true;
}

// Adds the groups one by one; wherever one meets a cell, the common box becomes a cell of both.
void Intersection::split_overlapping() {
  spare_cells_.swap(cells_);
  cells_.clear();
  Bounds common;
  for (const Cell& group : spare_cells_) {
    rest_.assign(1, group.bounds);
    // Remainders of a split cell are appended, and so meet the rest of this group too.
    for (size_t i = 0; i < cells_.size() && !rest_.empty(); ++i) {
      for (size_t r = 0; r < rest_.size(); ++r) {
        if (!clip(rest_[r], cells_[i].bounds, rank_, common)) continue;
        const Cell old = cells_[i];
        rest_next_.clear();
        subtract(old.bounds, common, rank_, rest_next_);
        for (const Bounds& part : rest_next_) {
          cells_.push_back({part, old.first_holder, old.holder_count});
        }
        rest_next_.clear();
        subtract(rest_[r], common, rank_, rest_next_);
        rest_[r] = rest_.back();
        rest_.pop_back();
        rest_.insert(rest_.end(), rest_next_.begin(), rest_next_.end());

        Cell both{common, static_cast<uint32_t>(holders_.size()), 0};
        uint32_t a = old.first_holder;
        uint32_t b = group.first_holder;
        const uint32_t a_end = a + old.holder_count;
        const uint32_t b_end = b + group.holder_count;
        while (a < a_end || b < b_end) {
          const bool take_a = b == b_end || (a < a_end && holders_[a].source <= holders_[b].source);
          if (take_a && b < b_end && holders_[a].source == holders_[b].source) ++b;
          const HolderTile next = take_a ? holders_[a++] : holders_[b++];
          holders_.push_back(next);
          ++both.holder_count;
        }
        cells_[i] = both;
        break;  // what is left of this cell's box was appended
      }
    }
    for (const Bounds& part : rest_) {
      cells_.push_back({part, group.first_holder, group.holder_count});
    }
  }
}

void Intersection::add_gaps() {
  rest_.assign(1, whole_);
  for (const Cell& cell : cells_) {
    rest_next_.clear();
    for (const Bounds& part : rest_) subtract(part, cell.bounds, rank_, rest_next_);
    rest_.swap(rest_next_);
  }
  for (const Bounds& part : rest_) cells_.push_back({part, 0, 0});
}

bool Intersection::same_holders(const Cell& a, const Cell& b) const {
  const auto one = holders_of(a);
  const auto two = holders_of(b);
  return std::equal(one.begin(), one.end(), two.begin(), two.end(),
                    [](const HolderTile& x, const HolderTile& y) { return x.tile == y.tile; });
}

// Undoes cuts that separate nothing: splitting cuts further than the holders ask for.
void Intersection::merge_neighbours() {
  for (int axis = rank_ - 1; axis >= 0; --axis) {
    std::sort(cells_.begin(), cells_.end(), [&](const Cell& a, const Cell& b) {
      for (int d = 0; d < rank_; ++d) {
        if (d != axis && a.bounds.low[d] != b.bounds.low[d]) {
          return a.bounds.low[d] < b.bounds.low[d];
        }
      }
      return a.bounds.low[axis] < b.bounds.low[axis];
    });
    size_t kept = 0;
    for (size_t i = 1; i < cells_.size(); ++i) {
      if (touches(cells_[kept].bounds, cells_[i].bounds, rank_, axis) &&
          same_holders(cells_[kept], cells_[i])) {
        cells_[kept].bounds.high[axis] = cells_[i].bounds.high[axis];
      } else {
        cells_[++kept] = cells_[i];
      }
    }
    cells_.resize(kept + 1);
  }
}

void Intersection::finish() {
  const auto before = [this](const Cell& a, const Cell& b) {
    if (a.bounds.low[axis_] != b.bounds.low[axis_]) {
      return a.bounds.low[axis_] < b.bounds.low[axis_];
    }
    return compare_corners(a.bounds, b.bounds, rank_) < 0;
  };
  if (!std::is_sorted(cells_.begin(), cells_.end(), before)) {
    std::sort(cells_.begin(), cells_.end(), before);
  }
  reach_.clear();
  for (const Cell& cell : cells_) {
    const int64_t high = cell.bounds.high[axis_];
    reach_.push_back(reach_.empty() ? high : std::max(reach_.back(), high));
  }
}

size_t Intersection::first_reaching(const Bounds& window) const {
  const auto it = std::upper_bound(reach_.begin(), reach_.end(), window.low[axis_]);
  return static_cast<size_t>(it - reach_.begin());
}

}  // namespace transfuse

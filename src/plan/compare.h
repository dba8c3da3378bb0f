// One pass over a target and its sources that either hands out every tile with its holders or says
// what is wrong: compile() and diagnose() are the same judgement.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "plan/block_grid.h"
#include "plan/intersect.h"
#include "plan/scale_places.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

// Distinct by digest, sorted by digest.
std::vector<Layout> distinct_sources(std::span<const Layout> sources);

// A target tile and who holds what of it.
struct ComparedTile {
  const Tile& tile;
  const Dims& shape;  // of the tensor, as the tile and the cells have it
  const Intersection& cells;
  // Set where the tile is quantised on its way: how, and the tile of scales that come with it.
  const Quantization* quantization = nullptr;
  const Tile* scales = nullptr;
  bool dequantizes = false;  // every holder holds fp8 and its scales, and the tile does not
};

// Used from one thread.
class Comparison {
 public:
  using Visit = std::function<void(const ComparedTile& tile)>;

  // The layouts must outlive it. Stops at `limit` findings.
  Comparison(const Layout& target, std::span<const Layout> sources, size_t limit);

  // Calls `visit` for the target's tiles in canonical order for as long as nothing is wrong.
  std::vector<Finding> run(const Visit& visit);

 private:
  bool full() const { return findings_.size() >= limit_; }
  void find_shape_conflicts();
  void compare_tensor(uint32_t tensor, const Visit& visit);
  void prefetch_tiles(uint32_t tensor) const;
  void check_dtypes(const Tile& tile);
  // Whether a holder's fp8 is dequantised for `tile`; false where that cannot be.
  bool dequantizes(const Tile& tile, const HolderTile& holder) const;
  // Says why not, where not every holder of a cell is of one kind or holds its scales.
  bool check_dequantizing(const Tile& tile);
  void check_quantizing(const Tile& tile, const Quantization& quantization);
  void add_gap(const Tile& tile, const Cell& cell, const BlockGrid* grid);
  void add(FindingKind kind, const Tile& tile, const Bounds& bounds, std::string reason);

  const Layout& target_;
  std::span<const Layout> sources_;
  size_t limit_;
  SourceIndex index_;
  std::vector<std::span<const ParameterSpec>> source_parameters_;
  std::vector<uint8_t> conflicting_;  // per target tensor: no use in comparing boxes
  Intersection cells_;
  std::vector<Finding> findings_;
  ScalePlaces scale_places_;
};

}  // namespace transfuse

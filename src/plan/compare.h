// One pass over a target and its sources that either hands out every tile with its holders or says
// what is wrong: compile() and diagnose() are the same judgement.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "plan/intersect.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

// Distinct by digest, sorted by digest.
std::vector<Layout> distinct_sources(std::span<const Layout> sources);

// Used from one thread.
class Comparison {
 public:
  // `shape`: of the tensor, as the tile and the cells have it.
  using Visit = std::function<void(const Tile& tile, const Dims& shape, const Intersection& cells)>;

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
  void add(FindingKind kind, const Tile& tile, const Bounds& bounds, std::string reason);

  const Layout& target_;
  std::span<const Layout> sources_;
  size_t limit_;
  SourceIndex index_;
  std::vector<std::span<const ParameterSpec>> source_parameters_;
  std::vector<uint8_t> conflicting_;  // per target tensor: no use in comparing boxes
  Intersection cells_;
  std::vector<Finding> findings_;
};

}  // namespace transfuse

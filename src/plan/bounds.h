// Boxes as plain corner arrays whose rank the context knows: what the planner's inner loops work
// on.
#pragma once

#include <algorithm>
#include <cstdint>

#include "transfuse/layout.h"

namespace transfuse {

// [low[d], high[d]) for d < rank. Entries from rank on are unspecified.
struct Bounds {
  int64_t low[kMaxRank];
  int64_t high[kMaxRank];
};

inline Bounds to_bounds(const Box& box) {
  Bounds bounds;
  for (int d = 0; d < box.offset.rank(); ++d) {
    bounds.low[d] = box.offset[d];
    bounds.high[d] = box.offset[d] + box.length[d];
  }
  return bounds;
}

inline Box to_box(const Bounds& bounds, int rank) {
  Box box;
  for (int d = 0; d < rank; ++d) {
    box.offset.push_back(bounds.low[d]);
    box.length.push_back(bounds.high[d] - bounds.low[d]);
  }
  return box;
}

inline int64_t volume(const Bounds& bounds, int rank) {
  int64_t product = 1;
  for (int d = 0; d < rank; ++d) product *= bounds.high[d] - bounds.low[d];
  return product;
}

// False (and `out` unspecified) where they share no element.
inline bool clip(const Bounds& a, const Bounds& b, int rank, Bounds& out) {
  for (int d = 0; d < rank; ++d) {
    out.low[d] = std::max(a.low[d], b.low[d]);
    out.high[d] = std::min(a.high[d], b.high[d]);
    if (out.low[d] >= out.high[d]) return false;
  }
  return true;
}

inline bool equal(const Bounds& a, const Bounds& b, int rank) {
  return std::equal(a.low, a.low + rank, b.low) && std::equal(a.high, a.high + rank, b.high);
}

}  // namespace transfuse

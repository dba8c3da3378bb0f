// Cuts a target tile into boxes of near-equal bytes; depends on the target alone, so that chunk
// boundaries stay the same whoever serves them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plan/bounds.h"

namespace transfuse {

// Calls visit(box) for disjoint boxes that together are `whole`, in row-major order, each of at
// most `limit_bytes` (but at least one element). Cuts along the outermost dimension that allows it:
// a row is cut inside only where it alone exceeds the limit.
template <typename Visit>
void for_each_cut(const Bounds& whole, int rank, uint64_t element_bytes, uint64_t limit_bytes,
                  Visit&& visit) {
  // Dimensions before `axis` go one index at a time, `axis` in near-equal parts, the rest whole.
  uint64_t inner_bytes = element_bytes;
  int axis = rank;
  while (axis > 0) {
    const auto length = static_cast<uint64_t>(whole.high[axis - 1] - whole.low[axis - 1]);
    if (inner_bytes > limit_bytes / length) break;
    inner_bytes *= length;
    --axis;
  }
  if (axis == 0) {
    visit(whole);
    return;
  }
  --axis;
  const int64_t length = whole.high[axis] - whole.low[axis];
  const auto most = static_cast<int64_t>(std::max<uint64_t>(1, limit_bytes / inner_bytes));
  const int64_t parts = (length + most - 1) / most;
  const int64_t each = length / parts;
  const int64_t longer = length % parts;  // the first parts have one index more

  Bounds box = whole;
  for (int d = 0; d < axis; ++d) box.high[d] = box.low[d] + 1;
  while (true) {
    box.low[axis] = whole.low[axis];
    for (int64_t part = 0; part < parts; ++part) {
      box.high[axis] = box.low[axis] + each + (part < longer ? 1 : 0);
      visit(box);
      box.low[axis] = box.high[axis];
    }
    int d = axis - 1;
    for (; d >= 0; --d) {
      ++box.low[d];
      if (++box.high[d] <= whole.high[d]) break;
      box.low[d] = whole.low[d];
      box.high[d] = whole.low[d] + 1;
    }
    if (d < 0) return;
  }
}

}  // namespace transfuse

// Interleaved footprints (columns, every other row) compared as boxes in a mixed-radix number of
// the element's place.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "plan/bounds.h"
#include "plan/coverage.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

constexpr size_t kMaxPairwise = 4096;  // boxes that no cut separates: 8 million comparisons

// Places of a parameter written as digits: place = sum(digit[k] * steps[k]), each step a multiple
// of the next smaller. Digit k is below steps[k + 1] / steps[k]; the last is unbounded.
using Steps = std::vector<int64_t>;

std::optional<Steps> common_steps(std::span<const Footprint> cluster) {
  Steps steps{1};
  for (const Footprint& f : cluster) {
    for (int d = 0; d < f.lengths().rank(); ++d) {
      if (f.lengths()[d] > 1) steps.push_back(f.strides()[d]);
    }
    // Footprints of one cluster mostly share their strides.
    std::sort(steps.begin(), steps.end());
    steps.erase(std::unique(steps.begin(), steps.end()), steps.end());
    if (steps.size() > kMaxRank) return std::nullopt;
  }
  for (size_t k = 1; k < steps.size(); ++k) {
    if (steps[k] % steps[k - 1] != 0) return std::nullopt;
  }
  return steps;
}

// The footprint as a box of digits; nullopt where it is not one.
std::optional<Bounds> digit_box(const Footprint& f, int64_t origin, const Steps& steps) {
  int64_t lengths[kMaxRank];
  std::fill(lengths, lengths + kMaxRank, 1);
  for (int d = 0; d < f.lengths().rank(); ++d) {
    if (f.lengths()[d] == 1) continue;
    const auto step = std::lower_bound(steps.begin(), steps.end(), f.strides()[d]);
    int64_t& length = lengths[step - steps.begin()];
    if (length > 1) return std::nullopt;  // two dimensions with one stride: not injective
    length = f.lengths()[d];
  }
  Bounds box;
  int64_t place = f.min - origin;
  for (size_t k = 0; k < steps.size(); ++k) {
    const bool top = k + 1 == steps.size();
    const int64_t radix = top ? INT64_MAX : steps[k + 1] / steps[k];
    const int64_t digit = top ? place : place % radix;
    place = top ? 0 : place / radix;
    if (lengths[k] > radix - digit) {
      // A span over whole rows is those rows; anything else that leaves its row is no box.
      if (digit != 0 || lengths[k] % radix != 0 || lengths[k + 1] > 1) return std::nullopt;
      lengths[k + 1] = lengths[k] / radix;
      lengths[k] = radix;
    }
    box.low[k] = digit;
    box.high[k] = digit + lengths[k];
  }
  return box;
}

// True if no two of `boxes` share an element; false also where that would take too long to say.
bool disjoint(std::span<Bounds> boxes, int rank) {
  if (boxes.size() < 2) return true;
  for (int axis = 0; axis < rank; ++axis) {
    std::sort(boxes.begin(), boxes.end(),
              [axis](const Bounds& a, const Bounds& b) { return a.low[axis] < b.low[axis]; });
    bool cut = false;
    size_t begin = 0;
    int64_t reach = boxes[0].high[axis];
    for (size_t i = 1; i <= boxes.size(); ++i) {
      if (i < boxes.size() && boxes[i].low[axis] < reach) {
        reach = std::max(reach, boxes[i].high[axis]);
        continue;
      }
      if (i == boxes.size() && !cut) break;
      if (!disjoint(boxes.subspan(begin, i - begin), rank)) return false;
      if (i == boxes.size()) return true;
      cut = true;
      begin = i;
      reach = boxes[i].high[axis];
    }
  }
  if (boxes.size() > kMaxPairwise) return false;
  Bounds common;
  for (size_t i = 0; i < boxes.size(); ++i) {
    for (size_t j = i + 1; j < boxes.size(); ++j) {
      if (clip(boxes[i], boxes[j], rank, common)) return false;
    }
  }
  return true;
}

}  // namespace

// As many elements as places, none of them twice: every place once.
bool proved_exact_as_boxes(std::span<const Footprint> cluster) {
  int64_t last = 0;
  int64_t count = 0;
  for (const Footprint& f : cluster) {
    last = std::max(last, f.max);
    if (__builtin_add_overflow(count, f.element_count, &count)) return false;
  }
  if (count != last + 1 - cluster[0].min) return false;
  const std::optional<Steps> steps = common_steps(cluster);
  if (!steps) return false;
  std::vector<Bounds> boxes;
  boxes.reserve(cluster.size());
  for (const Footprint& f : cluster) {
    const std::optional<Bounds> box = digit_box(f, cluster[0].min, *steps);
    if (!box) return false;
    boxes.push_back(*box);
  }
  return disjoint(boxes, static_cast<int>(steps->size()));
}

}  // namespace transfuse

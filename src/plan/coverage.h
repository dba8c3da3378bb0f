// The proof that tiles and fills cover every element of every target parameter exactly once (I1).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

// Where one tile or fill lies in its parameter.
struct Footprint {
  int64_t min = 0;
  int64_t max = 0;  // last element, inclusive
  int64_t element_count = 0;
  const Tile* tile = nullptr;  // exactly one of tile and fill is set
  const Fill* fill = nullptr;
  bool dense = false;  // covers [min, max] exactly once

  const Dims& lengths() const { return tile != nullptr ? tile->box.length : fill->length; }
  const Dims& strides() const {
    return tile != nullptr ? tile->element_strides : fill->element_strides;
  }
  int64_t offset() const { return tile != nullptr ? tile->element_offset : fill->element_offset; }
};
Footprint footprint_of(const Tile& tile);
Footprint footprint_of(const Fill& fill);

// Appends what is wrong with the target's own parameters, at most until `findings` holds `limit`.
// Linear in tiles and fills where each is a dense span; interleaved ones are compared as boxes;
// what is neither is counted element by element.
void check_coverage(const Layout& target, size_t limit, std::vector<Finding>& findings);

// True if the footprints, whose spans overlap, are proved to cover [first min, last max] exactly
// once. False proves nothing.
bool proved_exact_as_boxes(std::span<const Footprint> cluster);

// Element by element: appends a finding for every range that is not covered and for every footprint
// that writes what an earlier one wrote. More than 2^30 elements (or 2^31 writes) are not
// counted but reported as a whole.
void count_elements(const ParameterSpec& parameter, std::span<const TensorSpec> tensors,
                    std::span<const Footprint> cluster, size_t limit,
                    std::vector<Finding>& findings);

// elements [low, high) of `parameter`, which nothing covers
Finding uncovered(const ParameterSpec& parameter, int64_t low, int64_t high);

}  // namespace transfuse

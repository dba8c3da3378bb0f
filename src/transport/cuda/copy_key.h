// What makes two requests the same work, so that what was made ready for one serves the other.
#pragma once

#include <cstdint>
#include <span>

#include "transfuse/copy.h"

namespace transfuse::cuda {

// A hash of 128 bits over every copy and the number of its source: two requests with one key are
// one (unequal ones collide with a chance of 2^-128 a pair).
struct CopyKey {
  uint64_t low = 0;
  uint64_t high = 0;
  bool operator==(const CopyKey&) const = default;
};

// `sources`, `scale_sources`: per copy. `sums`: whether fingerprints are taken from it at all.
CopyKey key_of(std::span<const StridedCopy> copies, std::span<const uint32_t> sources,
               std::span<const uint32_t> scale_sources, bool sums);

}  // namespace transfuse::cuda

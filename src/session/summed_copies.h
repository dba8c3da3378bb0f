// A copy of all parameters that also sums them: the copies are made of the runs that readers want
// sums of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "plan/copies.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"

namespace transfuse {

// The runs that layout number `own` of a plan holds.
struct HeldRuns {
  const CopyTable* copies = nullptr;
  uint32_t own = 0;
};

// Each byte of each parameter is written exactly once, by a run with a fingerprint or by a plain
// copy of bytes of no such run.
struct SummedCopies {
  // A sum that copies[copy] makes. What is the same in several tables has one copy.
  struct Sum {
    uint32_t copy = 0;
    uint32_t table = 0;  // of those given
    uint32_t held = 0;   // index into its held runs
  };
  std::vector<StridedCopy> copies;
  std::vector<Sum> sums;
};

// From `source(parameter)` to `target(parameter)`, addresses of this process. A run is summed by
// its copy where it moves bytes as they are, as rows of one length and distance in the parameter,
// and touches no run of a table before it (or before it in its own).
SummedCopies summed_copies(const Layout& layout, std::span<const HeldRuns> tables,
                           const std::function<const std::byte*(uint32_t)>& source,
                           const std::function<std::byte*(uint32_t)>& target);

}  // namespace transfuse

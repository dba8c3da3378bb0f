// What a Plan holds.
#pragma once

#include <cstdint>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

struct Plan::Content {
  Layout target;
  std::vector<Layout> sources;  // distinct by digest, sorted by digest
  PlanOptions options;
  Digest key;
  uint64_t size_bytes = 0;
  std::vector<Chunk> chunks;
  std::vector<Run> runs;
  std::vector<Holder> holders;
  std::vector<Strides3> patterns;
  std::vector<ScaleRun> block_scales;
};

}  // namespace transfuse

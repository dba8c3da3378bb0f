// Copies that real plans hardly have, and limited launches: one matrix, beside the copy engine.
#pragma once

#include <nlohmann/json.hpp>

#include "measure_gpu.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {

// A row for each that is asked for; prints them too.
Result<nlohmann::json> measure_shapes(const cuda::Device& source, const cuda::Device& target,
                                      const GpuOptions& options);

}  // namespace transfuse::bench

// Copies that quantise to fp8 with block scales, and back.
#pragma once

#include <nlohmann/json.hpp>

#include "measure_gpu.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {

// The matrices of Qwen3-4B (of 4 of its layers, if it is to be small) from `source` into `target`:
// one row for each pair of dtypes, beside a plain copy of the same bytes read.
Result<nlohmann::json> measure_scaled(const cuda::Device& source, const cuda::Device& target,
                                      const GpuOptions& options);

}  // namespace transfuse::bench

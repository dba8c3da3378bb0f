// Copies that quantise to fp8 with block scales, and back.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {

// The matrices of Qwen3-4B (`small`: of 4 of its layers) from `source` into `target`: one row for
// each pair of dtypes whose name contains `only`, beside a plain copy of the same bytes read.
Result<nlohmann::json> measure_scaled(const cuda::Device& source, const cuda::Device& target,
                                      bool small, std::string_view only);

}  // namespace transfuse::bench

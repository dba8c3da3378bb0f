// Copies that real plans hardly have, and limited launches: one matrix, beside the copy engine.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {

// A row for each whose name contains `only`; prints them too.
Result<nlohmann::json> measure_shapes(const cuda::Device& source, const cuda::Device& target,
                                      bool small, std::string_view only);

}  // namespace transfuse::bench

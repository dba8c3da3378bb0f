// What a GPU copies: plans of real models, odd matrices, and what goes between it and the host.
#pragma once

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "transfuse/result.h"

namespace transfuse::bench {

struct GpuOptions {
  int device = 0;      // copies go there: from the next one, where there is one, and from itself
  bool small = false;  // models of 4 layers, matrices of 64 MiB
  std::string only{};  // rows whose names contain it
  std::FILE* table = stdout;
};
// A row for each; prints them too. What has no room on the device is left out, and said.
Result<nlohmann::json> measure_gpu(const GpuOptions& options);

// Reads through the transport, from memory of the host into that of the device and back.
Result<nlohmann::json> measure_staged(const GpuOptions& options);

}  // namespace transfuse::bench

// `transfuse bench --device` where there is a GPU and little else: needs neither gRPC nor the CLI.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "measure_gpu.h"
#include "transfuse/result.h"

namespace {

using transfuse::Error;
using transfuse::ErrorCode;
using transfuse::Result;

Result<void> run(const transfuse::bench::GpuOptions& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(const nlohmann::json rows, transfuse::bench::measure_gpu(options));
  const char* const path = std::getenv("TRANSFUSE_GPU_JSON");
  if (path == nullptr) return {};
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) {
    return Error{ErrorCode::kInvalidArgument, fmt::format("cannot write {}", path)};
  }
  fmt::print(file, "{}\n", rows.dump(1));
  (void)std::fclose(file);
  return {};
}

}  // namespace

int main(int count, char** arguments) {
  transfuse::bench::GpuOptions options;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    if (argument == "--small") {
      options.small = true;
    } else if (argument == "--only" && i + 1 < count) {
      options.only = arguments[++i];
    } else {
      fmt::print(stderr, "usage: {} [--small] [--only PART_OF_A_NAME]\n", arguments[0]);
      return 2;
    }
  }
  const auto done = run(options);
  if (!done) fmt::print(stderr, "{}\n", done.error().to_string());
  return done ? 0 : 1;
}

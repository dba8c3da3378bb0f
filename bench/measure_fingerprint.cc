// T8 on the CPU: fingerprints of memory at rest, and in the copy beside the copy without.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "copy/copy.h"
#include "measure.h"
#include "stopwatch.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse::bench {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{1} << 20;

// A chunk's worth of bf16 rows, one after the other in a tensor.
StridedCopy piece(std::byte* target, uint64_t offset_bytes, bool fingerprint) {
  StridedCopy copy;
  copy.op = ElementOp::kCopy2;
  copy.target = target + offset_bytes;
  copy.fingerprint_key = fingerprint_key("model.layers.0.mlp.up_proj.weight");
  copy.linear_index = offset_bytes / 2;
  copy.fingerprint = fingerprint;
  copy.count[2] = kPieceBytes / 2;
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  return copy;
}

// Keeps a sum alive that nothing else looks at.
volatile uint64_t kept_sum;

enum class Pass { kMemcpy, kCopy, kCopyAndSum, kSum };

double gigabytes_per_second(Pass pass, const std::byte* source, std::byte* target, uint64_t size) {
  const Stopwatch watch;
  uint64_t sum = 0;
  if (pass == Pass::kMemcpy) {
    std::memcpy(target, source, size);
  } else {
    for (uint64_t at = 0; at < size; at += kPieceBytes) {
      const StridedCopy copy = piece(target, at, pass == Pass::kCopyAndSum);
      sum += pass == Pass::kSum ? sum_copy(copy, source + at) : run_copy(copy, source + at);
    }
    copy_fence();
  }
  const double seconds = watch.seconds();
  kept_sum = sum;
  return static_cast<double>(size) / seconds / 1e9;
}

std::vector<double> ratios(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> result(a.size());
  std::ranges::transform(a, b, result.begin(), [](double x, double y) { return x / y; });
  return result;
}

}  // namespace

Result<void> measure_fingerprint(const Options& options, const Sink& sink) {
  const uint64_t size = uint64_t{1} << (options.tiny ? 22 : 29);  // well beyond any cache
  const auto source = std::make_unique<std::byte[]>(size);
  const auto target = std::make_unique<std::byte[]>(size);
  for (uint64_t i = 0; i < size; ++i) source[i] = static_cast<std::byte>(i * 167 + (i >> 12));
  std::memset(target.get(), 1, size);

  std::vector<double> memcpy_rate, copy_rate, sum_in_copy_rate, sum_rate;
  for (int i = 0; i < options.repetitions; ++i) {
    memcpy_rate.push_back(gigabytes_per_second(Pass::kMemcpy, source.get(), target.get(), size));
    copy_rate.push_back(gigabytes_per_second(Pass::kCopy, source.get(), target.get(), size));
    sum_in_copy_rate.push_back(
        gigabytes_per_second(Pass::kCopyAndSum, source.get(), target.get(), size));
    sum_rate.push_back(gigabytes_per_second(Pass::kSum, source.get(), target.get(), size));
  }
  const nlohmann::json detail = {{"instructions", copy_path_name(copy_path())},
                                 {"bytes", size},
                                 {"memcpy_gigabytes_per_second", spread_of(memcpy_rate).median},
                                 {"element", "bf16"}};
  const std::string workload = fmt::format("{} MiB of bf16, one core", size >> 20);
  sink({"T8", workload, "fingerprint alone (target 5)", "GB/s", spread_of(sum_rate), detail});
  sink({"T8", workload, "copy", "GB/s", spread_of(copy_rate), detail});
  sink({"T8", workload, "copy with fingerprint", "GB/s", spread_of(sum_in_copy_rate), detail});
  sink({"T8", workload, "with / without fingerprint", "ratio",
        spread_of(ratios(sum_in_copy_rate, copy_rate)), detail});
  sink({"T8", workload, "copy / memcpy", "ratio", spread_of(ratios(copy_rate, memcpy_rate)),
        detail});
  return {};
}

}  // namespace transfuse::bench

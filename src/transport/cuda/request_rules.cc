// Rules in numbers and words.
#include "transport/cuda/request_rules.h"

#include <algorithm>
#include <cstdint>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::cuda {
namespace {

// One multiprocessor reads 8 GB/s of another GPU (H200): half of it leaves room for every pace.
constexpr double kGigabytesPerMultiprocessor = 4.0;

}  // namespace

uint32_t multiprocessors_for(const CopyLimits& limits) {
  if (limits.multiprocessors > 0 || limits.gigabytes_per_second <= 0) return limits.multiprocessors;
  return 2 + static_cast<uint32_t>(std::min(limits.gigabytes_per_second, 1e6) /
                                   kGigabytesPerMultiprocessor);
}

Error not_ours() {
  return {ErrorCode::kInvalidArgument,
          "cuda read: expected a region that a peer of this transport opened"};
}

Error joins_none() {
  return {ErrorCode::kInvalidArgument, "a request that joins regions reads one that does not join"};
}

Error scales_on_device() {
  return {ErrorCode::kInvalidArgument, "a read of memory of the host finds its scales on a device"};
}

}  // namespace transfuse::cuda

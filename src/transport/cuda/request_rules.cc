// Rules in numbers and words.
#include "transport/cuda/request_rules.h"

#include <cstdint>

#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/pace.h"

namespace transfuse::cuda {

uint32_t multiprocessors_for(const CopyLimits& limits) {
  if (limits.multiprocessors > 0 || limits.gigabytes_per_second <= 0) return limits.multiprocessors;
  return multiprocessors_of_pace(limits.gigabytes_per_second);
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

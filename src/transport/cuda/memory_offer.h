// What a process says of device memory that others may read: enough to find the GPU, to open the
// allocations and to check that the region lies in them. It changes when other memory is mapped.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/deadline.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {

// Lies in memory of the host that readers of the process see.
inline constexpr uint64_t kOfferBytes = 256;
// Physical memory comes in multiples of it (2 MiB for all GPUs there are).
inline constexpr uint64_t kHandleGranularityBytes = uint64_t{64} << 10;

struct MemoryOffer {
  DeviceUuid device{};
  uint64_t process = 0;  // random, of the offering process' transport
  uint64_t identity =
      0;  // of the physical memory, in the process: another one when it is mapped anew
  uint64_t allocation_bytes = 0;  // of all allocations that the region touches, one after another
  uint64_t offset_bytes = 0;      // of the region in them
  uint64_t size_bytes = 0;
  uint64_t address = 0;       // in the offering process
  RegionId handles{};         // where the handles are to be asked for, in address order
  uint64_t handle_count = 0;  // 0: one allocation, opened by ipc_handle
  CUipcMemHandle ipc_handle{};
};

// One writer. Readers in the middle of read_offer() wait for it.
void publish_offer(std::span<std::byte, kOfferBytes> place, const MemoryOffer& offer);
// Nothing is offered there any more, or until the next publish_offer().
void withdraw_offer(std::span<std::byte, kOfferBytes> place);

// As it was published, in one piece. kNotFound: it was withdrawn. kCorrupt unless it is one, the
// region lies in its allocations and these can be as many (I13). kUnavailable: it is half written
// at the deadline.
Result<MemoryOffer> read_offer(std::span<const std::byte, kOfferBytes> place, Deadline deadline);
// MemoryOffer::identity of what is offered there now; another number if nothing is.
uint64_t offered_identity(std::span<const std::byte, kOfferBytes> place);
// A number from what identifies the memory, that is none of the two that are not for offers.
uint64_t make_identity(std::span<const uint64_t> words);

}  // namespace transfuse::cuda

// Copies and sums within this process' memory of a device: the transport's engine makes them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// A copy on its way, for those who wait for it. Safe to use from any thread.
struct CopyProgress {
  std::atomic<bool> cancelled{false};  // ends it soon, with kCancelled
  std::atomic<uint64_t> copied_bytes{0};
};

// Runs `copies` from the device, whose source_offset_bytes are addresses, and waits. All targets
// lie on the device, or all in the host. sums[i] is the fingerprint of copies[i] where that wants
// one; empty: none does. kDeadlineExceeded: nothing has moved for a minute, or it did not end when
// it was cancelled; the device may still write.
Result<void> run_on_device(Transport& transport, std::span<const StridedCopy> copies,
                           std::span<uint64_t> sums, const CopyLimits& limits = {},
                           CopyProgress* progress = nullptr);

// Adds what copies `size_bytes` from one address to another.
void add_plain(std::vector<StridedCopy>& copies, std::byte* target, const std::byte* source,
               uint64_t size_bytes);

}  // namespace transfuse

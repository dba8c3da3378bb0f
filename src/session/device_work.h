// Copies and sums within this process' memory of a device: the transport's engine makes them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// Runs `copies` from the device, whose source_offset_bytes are addresses, and waits. All targets
// lie on the device, or all in the host. sums[i] is the fingerprint of copies[i] where that wants
// one; empty: none does. kDeadlineExceeded: nothing has moved for a minute; the device may still
// write.
Result<void> run_on_device(Transport& transport, std::span<const StridedCopy> copies,
                           std::span<uint64_t> sums, const CopyLimits& limits = {});

// Adds what copies `size_bytes` from one address to another.
void add_plain(std::vector<StridedCopy>& copies, std::byte* target, const std::byte* source,
               uint64_t size_bytes);

}  // namespace transfuse

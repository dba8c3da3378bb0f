// What a request may take of the device, and what it is told when its regions do not go together.
#pragma once

#include <cstdint>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::cuda {

// A paced launch holds its multiprocessors while it waits: as few as the pace needs.
uint32_t multiprocessors_for(const CopyLimits& limits);

Error not_ours();          // a region of no peer of this transport
Error joins_none();        // `regions` with one that does not join
Error scales_on_device();  // of numbers in the host

}  // namespace transfuse::cuda

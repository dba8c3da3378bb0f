// Zeros in what a layout declares as padding.
#pragma once

#include "session/memory.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// In the host, or on the device of `transport`.
Result<void> fill_padding(Transport& transport, const Layout& layout, const TargetMemory& memory);

}  // namespace transfuse

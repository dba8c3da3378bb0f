// The catalog that some layouts hold, as a layout of its own.
#pragma once

#include <span>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Every tensor that the layouts hold anything of, whole and row-major, in the dtype in which it is
// held. kInvalidArgument: they hold one in different dtypes or shapes.
Result<Layout> whole_layout(std::span<const Layout> layouts);

}  // namespace transfuse

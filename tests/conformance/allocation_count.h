// How often this program has allocated, whoever did it.
#pragma once

#include <cstdint>

namespace transfuse::conformance {

uint64_t allocation_count();

}  // namespace transfuse::conformance

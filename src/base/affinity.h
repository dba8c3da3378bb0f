// How many processors this process may use.
#pragma once

#include <sched.h>

#include <cstdint>

namespace transfuse {

inline uint32_t usable_core_count() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  const int count = CPU_COUNT(&set);
  return count > 0 ? static_cast<uint32_t>(count) : 1;
}

}  // namespace transfuse

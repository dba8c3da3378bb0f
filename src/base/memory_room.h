// How much more memory this process may take.
#pragma once

#include <cstdint>
#include <string>

namespace transfuse {

// What the host and the control groups still allow, and what says so ("/proc/meminfo", a cgroup
// file).
struct MemoryRoom {
  uint64_t size_bytes = UINT64_MAX;
  std::string limit;
};
// `root` is "" but for tests: what stands before /proc and /sys.
MemoryRoom memory_room(const std::string& root = {});

}  // namespace transfuse

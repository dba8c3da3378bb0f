// How much memory this process has, as the kernel counts it.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace transfuse::bench {

// A field of /proc/self/status in bytes ("RssAnon", "VmHWM", "VmRSS"); 0 if it is not there.
inline uint64_t process_memory_bytes(const std::string& field) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::stoull(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

// Lets VmHWM (the peak) start again from what is resident now.
inline void reset_memory_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace transfuse::bench

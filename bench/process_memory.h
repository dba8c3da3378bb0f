// What a process uses, as the kernel counts it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace transfuse::bench {

// A field of /proc/<pid>/status in bytes ("RssAnon", "VmHWM", "VmRSS"); 0 if it is not there.
inline uint64_t process_memory_bytes(const std::string& field, const std::string& pid = "self") {
  std::ifstream file("/proc/" + pid + "/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::stoull(line.substr(field.size() + 1)) * 1024;
  }
  return 0;
}

inline uint64_t open_file_count(const std::string& pid = "self") {
  const std::filesystem::directory_iterator files("/proc/" + pid + "/fd");
  return static_cast<uint64_t>(std::distance(begin(files), end(files)));
}

// Lets VmHWM (the peak) start again from what is resident now.
inline void reset_memory_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

}  // namespace transfuse::bench

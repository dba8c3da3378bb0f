// What the host and the control groups of this process still allow it to take.
#include "base/memory_room.h"

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>

namespace transfuse {
namespace {

// False where the file is missing or holds no number ("max").
bool read_number(const std::string& path, uint64_t& value) {
  std::ifstream file(path);
  std::string word;
  if (!(file >> word)) return false;
  const auto end = std::from_chars(word.data(), word.data() + word.size(), value);
  return end.ec == std::errc() && end.ptr == word.data() + word.size();
}

// The number after `key` in a file of lines "key number".
uint64_t read_field(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string name;
    uint64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return 0;
}

void lower(MemoryRoom& room, uint64_t size_bytes, const std::string& limit) {
  if (size_bytes >= room.size_bytes) return;
  room.size_bytes = size_bytes;
  room.limit = limit;
}

struct GroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable;
};

// The group and all that it lies in.
void lower_to_group(MemoryRoom& room, const std::string& mount, std::string group,
                    const GroupFiles& files) {
  while (true) {
    const std::string folder = mount + group + (group.ends_with('/') ? "" : "/");
    uint64_t limit = 0;
    uint64_t usage = 0;
    if (read_number(folder + files.limit, limit) && read_number(folder + files.usage, usage)) {
      const uint64_t cache = read_field(folder + "memory.stat", files.reclaimable);
      const uint64_t held = usage - std::min(usage, cache);
      lower(room, limit - std::min(limit, held), folder + files.limit);
    }
    if (group.empty() || group == "/") return;
    group.resize(group.rfind('/'));
  }
}

}  // namespace

MemoryRoom memory_room(const std::string& root) {
  MemoryRoom room;
  const std::string meminfo = root + "/proc/meminfo";
  if (const uint64_t kib = read_field(meminfo, "MemAvailable:"); kib != 0) {
    lower(room, kib * 1024, meminfo);
  }
  constexpr GroupFiles kVersion2 = {"/sys/fs/cgroup", "memory.max", "memory.current",
                                    "inactive_file"};
  constexpr GroupFiles kVersion1 = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                    "memory.usage_in_bytes", "total_inactive_file"};
  std::ifstream groups(root + "/proc/self/cgroup");
  std::string line;  // "0::/path" or "4:memory:/path"
  while (std::getline(groups, line)) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos || second + 1 >= line.size()) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (group.front() != '/') continue;
    if (controllers.empty()) lower_to_group(room, root + kVersion2.mount, group, kVersion2);
    if (controllers == "memory") lower_to_group(room, root + kVersion1.mount, group, kVersion1);
  }
  return room;
}

}  // namespace transfuse

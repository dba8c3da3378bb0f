// Read from /proc and the allocator; rights by capset and prctl.
#include "faults/process_facts.h"

#include <linux/capability.h>
#include <malloc.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace transfuse::faults {
namespace {

int64_t entries(const char* folder) {
  return std::distance(std::filesystem::directory_iterator(folder),
                       std::filesystem::directory_iterator());
}

int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all = 0;
  int64_t resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

Error refused(const char* call) {
  return Error{ErrorCode::kPermissionDenied, std::string(call) + ": " + std::strerror(errno)};
}

}  // namespace

nlohmann::json process_facts() {
  const struct mallinfo2 heap = mallinfo2();
  return {{"descriptors", entries("/proc/self/fd") - 1},  // without the one that counts
          {"threads", entries("/proc/self/task")},
          {"resident_bytes", resident_bytes()},
          {"heap_bytes", heap.uordblks + heap.hblkhd}};
}

Result<void> drop_ptrace_right() {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  __user_cap_data_struct rights[_LINUX_CAPABILITY_U32S_3] = {};
  if (::syscall(SYS_capget, &header, rights) != 0) return refused("capget");
  constexpr uint32_t kPtrace = uint32_t{1} << CAP_SYS_PTRACE;
  rights[0].effective &= ~kPtrace;
  rights[0].permitted &= ~kPtrace;
  rights[0].inheritable &= ~kPtrace;
  if (::syscall(SYS_capset, &header, rights) != 0) return refused("capset");
  return {};
}

Result<void> hide_memory() {
  if (::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return refused("prctl(PR_SET_DUMPABLE)");
  return {};
}

}  // namespace transfuse::faults

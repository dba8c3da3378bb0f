// Tries what the shm transport and the coordinator do: sealed memory, reading another process,
// sockets.
#include "host_checks.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/gpu.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

std::string system_error(std::string_view call) {
  return std::string(call) + ": " + std::strerror(errno);
}

HostCheck missing(std::string name, std::string found, std::string remedy) {
  return {std::move(name), CheckOutcome::kMissing, std::move(found), std::move(remedy)};
}

std::optional<std::string> read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

// A number, or "max" and what does not parse as unlimited (cgroup v1 writes a huge number).
uint64_t parse_limit(const std::string& text) {
  char* end = nullptr;
  const uint64_t value = std::strtoull(text.c_str(), &end, 10);
  return end == text.c_str() || value > (uint64_t{1} << 60) ? kUnlimited : value;
}

std::string gibibytes(uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GiB",
                static_cast<double>(bytes) / static_cast<double>(kGiB));
  return text;
}

// The folder of this process's cgroup for `controller` ("" for the unified hierarchy), if mounted.
std::optional<std::string> cgroup_folder(std::string_view controller) {
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controller.empty()
            ? controllers == ",,"
            : controllers.find("," + std::string(controller) + ",") != std::string::npos) {
      return "/sys/fs/cgroup" + (controller.empty() ? "" : "/" + std::string(controller)) + path;
    }
  }
  return std::nullopt;
}

struct MemoryLimit {
  uint64_t limit_bytes = kUnlimited;
  uint64_t used_bytes = 0;
};

// The tightest limit from this process's cgroup up to the root. Inside a container the listed path
// may not exist; then the mount point itself is the container's.
MemoryLimit cgroup_memory_limit() {
  struct Hierarchy {
    const char* controller;
    const char* root;
    const char* limit;
    const char* used;
  };
  constexpr Hierarchy kHierarchies[] = {
      {"", "/sys/fs/cgroup", "/memory.max", "/memory.current"},
      {"memory", "/sys/fs/cgroup/memory", "/memory.limit_in_bytes", "/memory.usage_in_bytes"}};
  MemoryLimit tightest;
  for (const Hierarchy& hierarchy : kHierarchies) {
    std::string folder = cgroup_folder(hierarchy.controller).value_or(hierarchy.root);
    while (folder.size() >= std::strlen(hierarchy.root)) {
      const auto limit = read_line(folder + hierarchy.limit);
      const auto used = read_line(folder + hierarchy.used);
      if (limit && used && parse_limit(*limit) < tightest.limit_bytes) {
        tightest = {parse_limit(*limit), parse_limit(*used)};
      }
      folder.resize(folder.rfind('/'));
    }
  }
  return tightest;
}

uint64_t available_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("MemAvailable:", 0) == 0) return parse_limit(line.substr(13)) * 1024;
  }
  return kUnlimited;
}

// Runs `body` in a forked child and returns its exit status, -1 if it did not exit by itself. The
// body may use only async-signal-safe calls.
template <typename Body>
int status_of_child(const Body& body) {
  const pid_t child = fork();
  if (child < 0) return -1;
  if (child == 0) _exit(body());
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

constexpr uint64_t kProbe = 0x5472616E73667573;  // what the probed child holds

// What another process of this user may do with a source process: 0 if it can read `address` of
// `pid`, else errno. Called in a sibling of the source: a parent may read its children even where
// strangers may not.
int errno_of_read(pid_t pid, const uint64_t* address) {
  uint64_t value = 0;
  iovec local{&value, sizeof value};
  iovec remote{const_cast<uint64_t*>(address), sizeof value};
  const ssize_t size = process_vm_readv(pid, &local, 1, &remote, 1, 0);
  if (size < 0) return errno;
  return size == sizeof value && value == kProbe ? 0 : EIO;
}

enum class SourceConsent { kNone, kAnyTracer };

// Forks a source and a reader and lets the reader read the source's memory.
int errno_of_sibling_read(SourceConsent consent) {
  int ready[2];
  if (pipe2(ready, O_CLOEXEC) != 0) return errno;
  const UniqueFd ready_read(ready[0]);
  UniqueFd ready_write(ready[1]);
  static volatile uint64_t probe = 0;
  const pid_t source = fork();
  if (source < 0) return errno;
  if (source == 0) {
    probe = kProbe;
    if (consent == SourceConsent::kAnyTracer) prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    const char byte = 1;
    if (write(ready_write.get(), &byte, 1) != 1) _exit(1);
    for (;;) pause();
  }
  ready_write.reset();
  char byte = 0;
  int outcome = EIO;
  if (read(ready_read.get(), &byte, 1) == 1) {
    const auto* address = const_cast<const uint64_t*>(&probe);
    outcome = status_of_child([&] { return errno_of_read(source, address); });
  }
  kill(source, SIGKILL);
  while (waitpid(source, nullptr, 0) < 0 && errno == EINTR) {
  }
  return outcome;
}

// Sends `fd` over a fresh socket of a private temporary folder, and checks who the peer is.
std::optional<std::string> failure_of_socket_exchange(const std::string& folder) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = folder + "/probe.sock";
  if (path.size() >= sizeof address.sun_path) return "socket path too long: " + path;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const auto* name = reinterpret_cast<const sockaddr*>(&address);

  const UniqueFd server(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const UniqueFd client(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!server || !client) return system_error("socket");
  if (bind(server.get(), name, sizeof address) != 0) return system_error("bind " + path);
  if (listen(server.get(), 1) != 0) return system_error("listen");
  if (connect(client.get(), name, sizeof address) != 0) return system_error("connect");
  const UniqueFd accepted(accept4(server.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!accepted) return system_error("accept");

  ucred peer{};
  socklen_t size = sizeof peer;
  if (getsockopt(accepted.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0)
    return system_error("SO_PEERCRED");
  if (peer.uid != geteuid() || peer.pid != getpid())
    return "SO_PEERCRED names another process than the one that connected";

  char byte = 1;
  iovec data{&byte, 1};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  const int sent = server.get();
  std::memcpy(CMSG_DATA(header), &sent, sizeof sent);
  if (sendmsg(client.get(), &message, 0) != 1) return system_error("sendmsg of a descriptor");
  if (recvmsg(accepted.get(), &message, MSG_CMSG_CLOEXEC) != 1) return system_error("recvmsg");
  header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return "no descriptor arrived";
  int received = -1;
  std::memcpy(&received, CMSG_DATA(header), sizeof received);
  const UniqueFd owner(received);
  return std::nullopt;
}

}  // namespace

const char* check_outcome_name(CheckOutcome outcome) {
  switch (outcome) {
    case CheckOutcome::kOk:
      return "ok";
    case CheckOutcome::kLimited:
      return "limited";
    case CheckOutcome::kMissing:
      return "missing";
  }
  return "?";
}

HostCheck check_memfd() {
  const std::string name = "memfd";
  const std::string remedy = "Linux 5.1 or newer, without a seccomp filter on memfd_create";
  const UniqueFd memory(memfd_create("transfuse-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory) return missing(name, system_error("memfd_create"), remedy);
  if (fallocate(memory.get(), 0, 0, static_cast<off_t>(kMiB)) != 0)
    return missing(name, system_error("fallocate of 1 MiB"), "free memory, or a larger limit");
  void* writable = mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
  if (writable == MAP_FAILED) return missing(name, system_error("mmap"), remedy);
  const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;
  std::optional<std::string> failure;
  if (fcntl(memory.get(), F_ADD_SEALS, seals) != 0) {
    failure = system_error("F_ADD_SEALS (shrink, grow, future write)");
  } else if (ftruncate(memory.get(), 0) == 0) {
    failure = "a sealed memfd could be shrunk";
  } else {
    void* other = mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
    if (other != MAP_FAILED) {
      munmap(other, kMiB);
      failure = "a sealed memfd could be mapped for writing";
    }
  }
  munmap(writable, kMiB);
  if (failure) return missing(name, *failure, remedy);
  return {name, CheckOutcome::kOk, "reserved, sealed and mapped 1 MiB", ""};
}

HostCheck check_memory_room() {
  const std::string name = "memory";
  const MemoryLimit cgroup = cgroup_memory_limit();
  const uint64_t available = available_memory_bytes();
  uint64_t room = available;
  std::string found = gibibytes(available) + " available on the host";
  if (cgroup.limit_bytes != kUnlimited) {
    const uint64_t left = cgroup.limit_bytes - std::min(cgroup.limit_bytes, cgroup.used_bytes);
    found += ", " + gibibytes(left) + " left of the cgroup's " + gibibytes(cgroup.limit_bytes);
    room = std::min(room, left);
  } else {
    found += ", no cgroup limit";
  }
  if (room < 64 * kMiB) return missing(name, found, "at least 64 MiB; in fact the model's size");
  const UniqueFd memory(memfd_create("transfuse-doctor", MFD_CLOEXEC));
  if (!memory || fallocate(memory.get(), 0, 0, static_cast<off_t>(16 * kMiB)) != 0)
    return missing(name, found + "; 16 MiB of shared memory could not be reserved",
                   "free memory, or a larger memory limit of the container");
  return {name, CheckOutcome::kOk, found, ""};
}

HostCheck check_process_vm_readv() {
  const std::string name = "process_vm_readv";
  const int plain = errno_of_sibling_read(SourceConsent::kNone);
  if (plain == 0) return {name, CheckOutcome::kOk, "read the memory of another process", ""};
  const std::string scope =
      read_line("/proc/sys/kernel/yama/ptrace_scope").value_or("absent (no Yama)");
  const std::string found = std::string("refused: ") +
                            (plain < 0 ? "the probe died" : std::strerror(plain)) +
                            ", kernel.yama.ptrace_scope is " + scope;
  if (errno_of_sibling_read(SourceConsent::kAnyTracer) == 0) {
    return {name, CheckOutcome::kLimited, found,
            "allow_any_tracer in the trainer, or sysctl kernel.yama.ptrace_scope=0, or memory that "
            "Transfuse allocates"};
  }
  return {name, CheckOutcome::kLimited, found,
          "memory that Transfuse allocates (memfd) needs no permission; for caller-owned memory "
          "run the container with SYS_PTRACE and one pid namespace"};
}

HostCheck check_pidfd() {
  const std::string name = "pidfd";
  const pid_t child = fork();
  if (child < 0) return missing(name, system_error("fork"), "a higher limit of processes");
  if (child == 0) _exit(0);
  const UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, child, 0)));
  const std::string failure = pidfd ? "" : system_error("pidfd_open");
  bool noticed = false;
  if (pidfd) {
    pollfd waiting{pidfd.get(), POLLIN, 0};
    noticed = poll(&waiting, 1, 2000) == 1;
  }
  while (waitpid(child, nullptr, 0) < 0 && errno == EINTR) {
  }
  if (!pidfd)
    return missing(name, failure, "Linux 5.3 or newer, without a seccomp filter on pidfd_open");
  if (!noticed) return missing(name, "the end of a child was not reported", "Linux 5.3 or newer");
  return {name, CheckOutcome::kOk, "the end of a child was reported", ""};
}

HostCheck check_unix_sockets() {
  const std::string name = "unix sockets";
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  const std::string parent = runtime != nullptr && *runtime != '\0' ? runtime : "/tmp";
  std::string folder = parent + "/transfuse-doctor-XXXXXX";
  const std::string remedy = "a writable XDG_RUNTIME_DIR or /tmp on a file system with sockets";
  if (mkdtemp(folder.data()) == nullptr)
    return missing(name, system_error("mkdtemp " + folder), remedy);
  const std::optional<std::string> failure = failure_of_socket_exchange(folder);
  unlink((folder + "/probe.sock").c_str());
  rmdir(folder.c_str());
  if (failure) return missing(name, *failure, remedy);
  return {name, CheckOutcome::kOk, "in " + parent + ", descriptors and peer credentials are passed",
          ""};
}

HostCheck check_cores() {
  const std::string name = "cores";
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0)
    return missing(name, system_error("sched_getaffinity"), "at most 1,024 cores per process");
  const int count = CPU_COUNT(&set);
  HostCheck check{name, CheckOutcome::kOk,
                  std::to_string(count) + " of " + std::to_string(sysconf(_SC_NPROCESSORS_ONLN)) +
                      " may be used",
                  ""};
  const auto quota = read_line(cgroup_folder("").value_or("/sys/fs/cgroup") + "/cpu.max");
  std::istringstream words(quota.value_or("max"));
  double microseconds = 0;
  double period = 0;
  if (words >> microseconds >> period && period > 0 && microseconds / period < count) {
    char text[64];
    std::snprintf(text, sizeof text, ", but the cgroup allows %.1f", microseconds / period);
    check.found += text;
    check.outcome = CheckOutcome::kLimited;
    check.remedy = "set `threads` to the cores that the cgroup allows";
  }
  return check;
}

HostCheck check_open_files() {
  const std::string name = "open files";
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
    return missing(name, system_error("getrlimit"), "no seccomp filter on getrlimit");
  HostCheck check{name, CheckOutcome::kOk, "limit " + std::to_string(limit.rlim_cur), ""};
  if (limit.rlim_cur < 256) {
    check.outcome = CheckOutcome::kLimited;
    check.remedy = "ulimit -n 1024: each region, peer and process is a descriptor";
  }
  return check;
}

HostCheck check_shmem_huge_pages() {
  const std::string name = "shmem huge pages";
  const std::string path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  const std::string text = read_line(path).value_or("");
  const size_t open = text.find('[');
  const size_t close = text.find(']');
  const std::string mode = open == std::string::npos || close == std::string::npos
                               ? "not in this kernel"
                               : text.substr(open + 1, close - open - 1);
  if (mode == "always" || mode == "within_size" || mode == "advise" || mode == "force")
    return {name, CheckOutcome::kOk, mode, ""};
  return {name, CheckOutcome::kLimited, mode + ": the first touch of shared memory is slower",
          "optional: echo advise > " + path};
}

HostCheck check_gpus() {
  const std::string name = "gpus";
#ifdef TRANSFUSE_CUDA
  const auto gpus = list_gpus();
  if (!gpus)
    return {name, CheckOutcome::kLimited, gpus.error().message,
            "only for weights in GPU memory: an NVIDIA driver for CUDA 12 or later"};
  std::string found;
  for (const Gpu& gpu : *gpus) {
    if (!found.empty()) found += ", ";
    found += std::to_string(gpu.ordinal) + ": " + gpu.name + " (" + gpu.uuid + ")";
  }
  return {name, CheckOutcome::kOk, found, ""};
#else
  return {name, CheckOutcome::kLimited, "this build has no CUDA",
          "only for weights in GPU memory: build where nvcc 13 or later is"};
#endif
}

std::vector<HostCheck> check_host() {
  return {check_memfd(),      check_memory_room(),      check_process_vm_readv(),
          check_pidfd(),      check_unix_sockets(),     check_cores(),
          check_open_files(), check_shmem_huge_pages(), check_gpus()};
}

}  // namespace transfuse

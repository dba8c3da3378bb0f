// The program's main: runs the tests, or plays one of their other processes.
#include "transport/shm/child_role.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::shm {
namespace {

constexpr const char* kRole = "--role";
constexpr uid_t kNobody = 65534;

std::string own_path() { return std::filesystem::read_symlink("/proc/self/exe").string(); }

void become(const std::string& as) {
  if (as == "self") return;
  if (geteuid() == 0) {
    TRANSFUSE_CHECK(setgroups(0, nullptr) == 0 && setgid(kNobody) == 0 && setuid(kNobody) == 0);
  }
  TRANSFUSE_CHECK(prctl(PR_SET_DUMPABLE, as == "hidden" ? 0 : 1, 0, 0, 0) == 0);
}

void fill(std::span<std::byte> bytes, uint64_t seed) {
  for (uint64_t i = 0; i < bytes.size(); ++i) bytes[i] = pattern(seed, i);
}

// serve <folder> <token> <kind> <count> <size> <seed> <as>
int serve(const std::vector<std::string>& arguments) {
  const bool owned = arguments.at(2) == "owned";
  const uint64_t count = std::stoull(arguments.at(3));
  const uint64_t size = std::stoull(arguments.at(4));
  const uint64_t seed = std::stoull(arguments.at(5));
  become(arguments.at(6));
  TransportOptions options;
  options.allow_any_tracer = owned && arguments.at(6) != "hidden";
  if (arguments.at(1) != "-") options.token = arguments.at(1);
  auto transport = open_shm_transport(arguments.at(0), options).value();
  std::vector<std::unique_ptr<LocalRegion>> regions;
  for (uint64_t i = 0; i < count; ++i) {
    if (owned) {
      void* memory =
          mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TRANSFUSE_CHECK(memory != MAP_FAILED);
      regions.push_back(
          transport->register_memory({static_cast<std::byte*>(memory), size}).value());
    } else {
      regions.push_back(transport->allocate(size).value());
    }
    fill(regions.back()->bytes(), seed + i);
  }
  std::cout << transport->endpoint().value() << std::endl;
  for (const auto& region : regions) {
    std::cout << static_cast<uint64_t>(region->descriptor().id) << ' '
              << reinterpret_cast<uint64_t>(region->bytes().data()) << std::endl;
  }
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string verb;
    uint64_t index = 0;
    words >> verb >> index;
    if (verb == "release") regions.at(index).reset();
    if (verb == "unmap") munmap(regions.at(index)->bytes().data(), size);
    if (verb == "fork") {  // a child that keeps every descriptor, also the sockets
      const pid_t child = fork();
      if (child == 0) {
        prctl(PR_SET_PDEATHSIG, 0);
        alarm(60);
        while (true) pause();
      }
      std::cout << child << std::endl;
      continue;
    }
    std::cout << "ok" << std::endl;
  }
  regions.clear();
  return 0;
}

// read <folder> <endpoint> <token> <id> <size> <seed> <as>: says "ok" or the error.
int read(const std::vector<std::string>& arguments) {
  const uint64_t size = std::stoull(arguments.at(4));
  become(arguments.at(6));
  auto outcome = [&]() -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(arguments.at(0)));
    TRANSFUSE_ASSIGN_OR_RETURN(
        auto peer, transport->connect(arguments.at(1), arguments.at(2), Deadline::after_ms(10000)));
    TRANSFUSE_ASSIGN_OR_RETURN(auto region,
                               peer->open_region({RegionId{std::stoull(arguments.at(3))}, size},
                                                 Deadline::after_ms(10000)));
    std::vector<std::byte> bytes(size);
    StridedCopy copy;
    copy.target = bytes.data();
    copy.count[2] = static_cast<uint32_t>(size);
    copy.source_stride[2] = copy.target_stride[2] = 1;
    TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket,
                               transport->submit({region.get(), {&copy, 1}, {}}));
    TRANSFUSE_CHECK(transport->wait_any({&ticket, 1}, Deadline::after_ms(30000)));
    TRANSFUSE_RETURN_IF_ERROR(transport->finish(ticket));
    for (uint64_t i = 0; i < size; ++i) {
      if (bytes[i] != pattern(std::stoull(arguments.at(5)), i)) {
        return Error{ErrorCode::kCorrupt, fmt::format("byte {} differs", i)};
      }
    }
    return {};
  }();
  std::cout << (outcome ? "ok" : outcome.error().to_string()) << std::endl;
  return 0;
}

// From now on only `more` descriptors beyond those that are open. The limit is on their numbers:
// free ones between those that are open are taken for good.
void limit_descriptors(uint64_t more) {
  rlimit limit{};
  TRANSFUSE_CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
  limit.rlim_cur = limit.rlim_max;
  TRANSFUSE_CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
  UniqueFd lowest_free(dup(STDIN_FILENO));
  while (static_cast<uint64_t>(lowest_free.get()) + 1 < open_descriptors(getpid()) - 1) {
    (void)lowest_free.release();
    lowest_free.reset(dup(STDIN_FILENO));
  }
  limit.rlim_cur = static_cast<rlim_t>(lowest_free.get()) + more;
  TRANSFUSE_CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

Result<MemoryHandle> make_handle(uint64_t index, uint64_t count, uint64_t size) {
  if (index >= count) {
    return Error{ErrorCode::kNotFound, fmt::format("handle {} of {}", index, count)};
  }
  UniqueFd fd(memfd_create("handle", MFD_CLOEXEC));
  if (!fd) return Error{ErrorCode::kResourceExhausted, "no descriptor is left: raise ulimit -n"};
  std::vector<std::byte> bytes(size);
  fill(bytes, index);
  TRANSFUSE_CHECK(write(fd.get(), bytes.data(), size) == static_cast<ssize_t>(size));
  return MemoryHandle{.fd = fd.release(), .size_bytes = size};
}

// handles <folder> <count> <size>: memfds that stand for handles, made when a reader asks.
int handles(const std::vector<std::string>& arguments) {
  const uint64_t count = std::stoull(arguments.at(1));
  const uint64_t size = std::stoull(arguments.at(2));
  auto transport = open_shm_transport(arguments.at(0)).value();
  auto region =
      transport->offer_handles([=](uint64_t index) { return make_handle(index, count, size); })
          .value();
  std::cout << transport->endpoint().value() << std::endl;
  std::cout << static_cast<uint64_t>(region->descriptor().id) << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string verb;
    uint64_t more = 0;
    words >> verb >> more;
    if (verb == "limit") limit_descriptors(more);
    if (verb == "release") region.reset();
    std::cout << "ok" << std::endl;
  }
  region.reset();
  return 0;
}

// fetch <folder> <endpoint> <id> <count> <size>: all handles, mapped one by one, with room for one
// descriptor more than the connection has: "ok" or the error.
int fetch(const std::vector<std::string>& arguments) {
  const RegionId id{std::stoull(arguments.at(2))};
  const uint64_t count = std::stoull(arguments.at(3));
  const uint64_t size = std::stoull(arguments.at(4));
  auto outcome = [&]() -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(arguments.at(0)));
    TRANSFUSE_ASSIGN_OR_RETURN(auto peer,
                               transport->connect(arguments.at(1), "", Deadline::after_ms(10000)));
    limit_descriptors(1);
    for (uint64_t i = 0; i < count; ++i) {
      TRANSFUSE_ASSIGN_OR_RETURN(const MemoryHandle handle,
                                 peer->open_handle(id, i, Deadline::after_ms(10000)));
      const UniqueFd fd(handle.fd);
      std::vector<std::byte> bytes(size);
      if (handle.size_bytes != size ||
          pread(fd.get(), bytes.data(), size, 0) != static_cast<ssize_t>(size)) {
        return Error{ErrorCode::kCorrupt, fmt::format("handle {} is not {} bytes", i, size)};
      }
      for (uint64_t at = 0; at < size; ++at) {
        if (bytes[at] != pattern(i, at)) {
          return Error{ErrorCode::kCorrupt, fmt::format("byte {} of handle {} differs", at, i)};
        }
      }
    }
    return {};
  }();
  std::cout << (outcome ? "ok" : outcome.error().to_string()) << std::endl;
  return 0;
}

uint64_t entries(const std::string& folder) {
  uint64_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++count;
  return count;
}

}  // namespace

TestFolder::TestFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "tf-shm-XXXXXX").string();
  TRANSFUSE_CHECK(mkdtemp(name.data()) != nullptr);
  path_ = name;
}

TestFolder::~TestFolder() {
  EXPECT_TRUE(files().empty()) << "left behind: " << files().front();
  std::filesystem::remove_all(path_);
}

std::vector<std::string> TestFolder::files() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path_)) {
    names.push_back(entry.path().filename().string());
  }
  return names;
}

ChildProcess::ChildProcess(const std::vector<std::string>& role_and_arguments) {
  int to[2];
  int from[2];
  TRANSFUSE_CHECK(pipe2(to, O_CLOEXEC) == 0 && pipe2(from, O_CLOEXEC) == 0);
  const std::string program = own_path();
  std::vector<const char*> arguments = {program.c_str(), kRole};
  for (const std::string& argument : role_and_arguments) arguments.push_back(argument.c_str());
  arguments.push_back(nullptr);
  const pid_t parent = getpid();
  pid_ = fork();
  TRANSFUSE_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    dup2(to[0], STDIN_FILENO);
    dup2(from[1], STDOUT_FILENO);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    execv(program.c_str(), const_cast<char* const*>(arguments.data()));
    _exit(127);
  }
  close(to[0]);
  close(from[1]);
  to_.reset(to[1]);
  from_.reset(from[0]);
}

ChildProcess::~ChildProcess() {
  if (pid_ < 0) return;
  signal(SIGCONT);
  to_.reset();
  for (int i = 0; i < 1000; ++i) {
    if (waitpid(pid_, nullptr, WNOHANG) != 0) return;
    usleep(10000);
  }
  ADD_FAILURE() << "process " << pid_ << " did not end by itself";
  signal(SIGKILL);
  wait();
}

void ChildProcess::say(const std::string& line) {
  const std::string bytes = line + "\n";
  TRANSFUSE_CHECK(write(to_.get(), bytes.data(), bytes.size()) ==
                  static_cast<ssize_t>(bytes.size()));
}

std::string ChildProcess::hear() {
  while (unread_.find('\n') == std::string::npos) {
    char buffer[4096];
    const ssize_t got = ::read(from_.get(), buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return {};
    unread_.append(buffer, static_cast<size_t>(got));
  }
  const size_t end = unread_.find('\n');
  const std::string line = unread_.substr(0, end);
  unread_.erase(0, end + 1);
  return line;
}

int ChildProcess::wait() {
  to_.reset();  // the end of its input asks a role to end
  int status = 0;
  while (waitpid(pid_, &status, 0) < 0) TRANSFUSE_CHECK(errno == EINTR);
  pid_ = -1;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

ServingProcess::ServingProcess(const Serving& s)
    : child({"serve", s.folder, s.token, s.kind, std::to_string(s.count),
             std::to_string(s.size_bytes), std::to_string(s.seed), s.as}),
      endpoint(child.hear()) {
  for (uint64_t i = 0; i < s.count; ++i) {
    std::istringstream line(child.hear());
    ServedRegion region;
    line >> region.id >> region.address;
    regions.push_back(region);
  }
}

uint64_t open_descriptors(pid_t pid) { return entries(fmt::format("/proc/{}/fd", pid)); }

uint64_t mappings(pid_t pid) {
  std::ifstream maps(fmt::format("/proc/{}/maps", pid));
  uint64_t count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

}  // namespace transfuse::shm

int main(int argc, char** argv) {
  const std::vector<std::string> all(argv, argv + argc);
  if (argc > 2 && all[1] == transfuse::shm::kRole) {
    const std::vector<std::string> arguments(all.begin() + 3, all.end());
    if (all[2] == "serve") return transfuse::shm::serve(arguments);
    if (all[2] == "read") return transfuse::shm::read(arguments);
    if (all[2] == "handles") return transfuse::shm::handles(arguments);
    if (all[2] == "fetch") return transfuse::shm::fetch(arguments);
    return 126;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

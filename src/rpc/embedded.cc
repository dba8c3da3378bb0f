// Starting `transfuse serve` in the background: spawned, detached, waited for by a pipe.
#include "rpc/embedded.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

extern char** environ;

namespace transfuse {

namespace {

constexpr int kReadyFd = 3;  // in the spawned process
constexpr off_t kMaxLogBytes = 1 << 20;
constexpr Duration kReapPause = std::chrono::milliseconds(2);

bool is_program(const std::string& path) {
  struct stat found{};
  return ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode) &&
         ::access(path.c_str(), X_OK) == 0;
}

std::vector<std::string> path_folders() {
  std::vector<std::string> folders;
  const char* path = std::getenv("PATH");
  std::string_view rest = path == nullptr ? "" : path;
  while (!rest.empty()) {
    const size_t end = rest.find(':');
    if (end != 0) folders.emplace_back(rest.substr(0, end));
    if (end == std::string_view::npos) break;
    rest.remove_prefix(end + 1);
  }
  return folders;
}

struct SpawnActions {
  posix_spawn_file_actions_t files{};
  posix_spawnattr_t attributes{};
  SpawnActions() {
    posix_spawn_file_actions_init(&files);
    posix_spawnattr_init(&attributes);
  }
  ~SpawnActions() {
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnActions(const SpawnActions&) = delete;
  SpawnActions& operator=(const SpawnActions&) = delete;
};

std::string log_tail(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return "";
  std::array<char, 512> tail{};
  const off_t size = ::lseek(fd.get(), 0, SEEK_END);
  const off_t from = size > off_t{sizeof tail} ? size - off_t{sizeof tail} : 0;
  const ssize_t got = ::pread(fd.get(), tail.data(), tail.size(), from);
  return got > 0 ? std::string(tail.data(), static_cast<size_t>(got)) : "";
}

// The spawned process itself ends as soon as it has gone to the background. One that does not is
// not ours to leave behind.
void reap(pid_t child, Deadline deadline) {
  while (true) {
    const pid_t ended = ::waitpid(child, nullptr, WNOHANG);
    if (ended == child || (ended < 0 && errno == ECHILD)) return;
    if (deadline.passed()) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
      return;
    }
    std::this_thread::sleep_for(kReapPause);
  }
}

Result<pid_t> spawn(const std::string& program, const RuntimePaths& paths,
                    const std::vector<std::string>& arguments, int ready_fd) {
  SpawnActions spawn;
  struct stat log{};
  const bool full = ::stat(paths.log.c_str(), &log) == 0 && log.st_size > kMaxLogBytes;
  const int log_flags = O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | (full ? O_TRUNC : 0);
  posix_spawn_file_actions_adddup2(&spawn.files, ready_fd, kReadyFd);
  posix_spawn_file_actions_addopen(&spawn.files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&spawn.files, 1, paths.log.c_str(), log_flags, 0600);
  posix_spawn_file_actions_adddup2(&spawn.files, 1, 2);
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&spawn.attributes, &none);
  posix_spawnattr_setsigdefault(&spawn.attributes, &all);
  posix_spawnattr_setflags(&spawn.attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);

  std::vector<char*> argv;
  argv.reserve(arguments.size());
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t child = -1;
  const int failed =
      ::posix_spawn(&child, program.c_str(), &spawn.files, &spawn.attributes, argv.data(), environ);
  if (failed == 0) return child;
  return Error{ErrorCode::kUnavailable,
               fmt::format("cannot run {}: {}", program, std::strerror(failed))};
}

// One byte '1' when it listens, else its words.
Result<void> wait_until_ready(int ready_fd, const std::string& program, const RuntimePaths& paths,
                              Deadline deadline) {
  std::string said;
  while (true) {
    pollfd waiting{.fd = ready_fd, .events = POLLIN, .revents = 0};
    const auto left = deadline.remaining() / std::chrono::milliseconds(1);
    const int ready = ::poll(&waiting, 1, static_cast<int>(std::min<int64_t>(left, 1'000'000)));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      return Error{ErrorCode::kDeadlineExceeded,
                   fmt::format("{} serve was started and did not listen on {} in time; log: {}",
                               program, paths.socket, paths.log)};
    }
    std::array<char, 512> bytes{};
    const ssize_t got = ::read(ready_fd, bytes.data(), bytes.size());
    if (got < 0 && errno == EINTR) continue;
    if (got > 0) said.append(bytes.data(), static_cast<size_t>(got));
    if (said == "1") return {};
    if (got <= 0) break;
  }
  return Error{ErrorCode::kUnavailable,
               fmt::format("{} serve ended before it listened on {}: {}", program, paths.socket,
                           said.empty() ? log_tail(paths.log) : said)};
}

}  // namespace

std::string own_folder() {
  static const char anchor = 0;
  Dl_info info{};
  std::error_code error;
  if (::dladdr(&anchor, &info) != 0 && info.dli_fname != nullptr &&
      std::strchr(info.dli_fname, '/') != nullptr) {
    const auto path = std::filesystem::canonical(info.dli_fname, error);
    if (!error) return path.parent_path();
  }
  // The main program is known by what it was called, which may lack a folder.
  const auto path = std::filesystem::canonical("/proc/self/exe", error);
  return error ? std::string() : path.parent_path().string();
}

Result<std::string> find_serve_program(const std::string& serve_command,
                                       const std::string& beside) {
  std::vector<std::string> tried;
  const char* named = std::getenv("TRANSFUSE_SERVE_COMMAND");
  if (named != nullptr && named[0] != '\0') {
    if (is_program(named)) return std::string(named);
    return Error{ErrorCode::kNotFound,
                 fmt::format("TRANSFUSE_SERVE_COMMAND names {}, which is no program", named)};
  }
  if (!serve_command.empty()) {
    if (is_program(serve_command)) return serve_command;
    return Error{
        ErrorCode::kNotFound,
        fmt::format("the option serve_command names {}, which is no program", serve_command)};
  }
  for (const std::string& path : {beside + "/transfuse", beside + "/bin/transfuse"}) {
    if (is_program(path)) return path;
    tried.push_back(path);
  }
  for (const std::string& folder : path_folders()) {
    if (is_program(folder + "/transfuse")) return folder + "/transfuse";
  }
  return Error{ErrorCode::kNotFound,
               fmt::format("the program `transfuse`, which serves as the coordinator, was not "
                           "found: TRANSFUSE_SERVE_COMMAND and the option serve_command are not "
                           "set, there is no {}, and none in $PATH",
                           fmt::join(tried, ", no "))};
}

namespace {

Result<void> start_coordinator(const RuntimePaths& paths, const ConnectOptions& options,
                               Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string program,
                             find_serve_program(options.serve_command, own_folder()));
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("no pipe to wait for {}: {}", program, std::strerror(errno))};
  }
  const UniqueFd reading(ends[0]);
  UniqueFd writing(ends[1]);
  const std::vector<std::string> arguments{program,
                                           "serve",
                                           "--detach",
                                           "--ready-fd",
                                           std::to_string(kReadyFd),
                                           "--embedded",
                                           paths.folder,
                                           "--job",
                                           options.job,
                                           "--idle-exit-ms",
                                           std::to_string(options.idle_exit_ms)};
  TRANSFUSE_ASSIGN_OR_RETURN(const pid_t child, spawn(program, paths, arguments, writing.get()));
  writing.reset();
  auto ready = wait_until_ready(reading.get(), program, paths, deadline);
  reap(child, ready ? deadline.earlier(Deadline::after_ms(1000)) : Deadline::after_ms(50));
  return ready;
}

}  // namespace

Result<void> ensure_coordinator(const RuntimePaths& paths, const ConnectOptions& options,
                                Deadline deadline) {
  if (somebody_listens(paths.socket)) return {};
  TRANSFUSE_ASSIGN_OR_RETURN(FolderLock lock, FolderLock::take(paths, deadline));
  if (somebody_listens(paths.socket)) return {};  // another member was faster
  auto started = start_coordinator(paths, options, deadline);
  // One that is only slow may still come, and its log is named in the error.
  if (!started && started.error().code != ErrorCode::kDeadlineExceeded) lock.undo(paths);
  return started;
}

}  // namespace transfuse

// Paths, permissions and the lock of the run-time folder.
#include "rpc/runtime_folder.h"

#include "base/unique_fd.h"
#include "rpc/rpc.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

namespace transfuse {

namespace {

constexpr size_t kMaxJobBytes = 40;  // as a file name; beyond it the hash stands for it
constexpr Duration kLockPause = std::chrono::milliseconds(5);

std::string job_file_name(std::string_view job) {
  const bool plain = !job.empty() && job.size() <= kMaxJobBytes && job.front() != '.' &&
                     std::all_of(job.begin(), job.end(), [](char c) {
                       return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                              (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
                     });
  if (plain) return std::string(job);
  return fmt::format("job-{:016x}", XXH3_64bits(job.data(), job.size()));
}

RuntimePaths paths_in(const std::string& folder, const std::string& name) {
  const std::string stem = folder + "/" + name;
  return {.folder = folder,
          .socket = stem + ".sock",
          .lock = stem + ".lock",
          .log = stem + ".log",
          .epoch = stem + ".epoch"};
}

bool is_folder(const char* path) {
  struct stat found{};
  return ::stat(path, &found) == 0 && S_ISDIR(found.st_mode) && found.st_uid == getuid();
}

std::string reason() { return std::strerror(errno); }

}  // namespace

size_t max_socket_path_bytes() { return sizeof(sockaddr_un{}.sun_path) - 1; }

Result<RuntimePaths> runtime_paths(std::string_view folder, std::string_view job) {
  const std::string name = job_file_name(job);
  if (!folder.empty()) {
    if (folder.front() != '/') {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("the run-time folder '{}' is no absolute path", folder)};
    }
    RuntimePaths paths = paths_in(std::string(folder), name);
    if (paths.socket.size() <= max_socket_path_bytes()) return paths;
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("the socket {} has a path of {} bytes, a unix socket allows {}: choose "
                    "a shorter run-time folder",
                    paths.socket, paths.socket.size(), max_socket_path_bytes())};
  }
  const char* xdg = std::getenv("XDG_RUNTIME_DIR");
  if (xdg != nullptr && xdg[0] == '/' && is_folder(xdg)) {
    RuntimePaths paths = paths_in(std::string(xdg) + "/transfuse", name);
    if (paths.socket.size() <= max_socket_path_bytes()) return paths;
  }
  return paths_in(fmt::format("/tmp/transfuse-{}", getuid()), name);
}

Result<void> prepare_folder(const std::string& folder) {
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
    const bool denied = errno == EACCES || errno == EPERM || errno == EROFS;
    return Error{denied ? ErrorCode::kPermissionDenied : ErrorCode::kUnavailable,
                 fmt::format("cannot make the run-time folder {}: {}", folder, reason())};
  }
  struct stat found{};
  if (::lstat(folder.c_str(), &found) != 0) {
    return Error{ErrorCode::kUnavailable, fmt::format("{} vanished: {}", folder, reason())};
  }
  const bool private_folder =
      S_ISDIR(found.st_mode) && found.st_uid == getuid() && (found.st_mode & 077) == 0;
  if (private_folder) return {};
  return Error{
      ErrorCode::kPermissionDenied,
      fmt::format("{} must be a folder of user {} with mode 0700; it is {} of user {} with "
                  "mode {:04o}. Remove it, or choose another run-time folder",
                  folder, getuid(), S_ISDIR(found.st_mode) ? "a folder" : "no folder", found.st_uid,
                  found.st_mode & 07777)};
}

Result<FolderLock> FolderLock::take(const RuntimePaths& paths, Deadline deadline) {
  while (true) {
    TRANSFUSE_RETURN_IF_ERROR(prepare_folder(paths.folder));
    UniqueFd fd(::open(paths.lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd && errno != ENOENT) {
      return Error{ErrorCode::kPermissionDenied,
                   fmt::format("cannot open {}: {}", paths.lock, reason())};
    }
    if (fd && ::flock(fd.get(), LOCK_EX | LOCK_NB) == 0) {
      // The file may have been removed by the one that held the lock: then it locks nothing.
      struct stat held{}, named{};
      if (::fstat(fd.get(), &held) == 0 && ::stat(paths.lock.c_str(), &named) == 0 &&
          held.st_ino == named.st_ino && held.st_dev == named.st_dev) {
        return FolderLock(std::move(fd));
      }
      continue;
    }
    if (deadline.passed()) {
      return Error{
          ErrorCode::kDeadlineExceeded,
          fmt::format("another process holds {}: it is starting or ending the coordinator, "
                      "and does not get on",
                      paths.lock)};
    }
    std::this_thread::sleep_for(std::min(kLockPause, deadline.remaining()));
  }
}

FolderLock::~FolderLock() {
  // Explicitly: a process that was forked meanwhile holds the same open file.
  if (fd_) ::flock(fd_.get(), LOCK_UN);
}

void FolderLock::remove_files(const RuntimePaths& paths) {
  ::unlink(paths.socket.c_str());
  ::unlink(paths.epoch.c_str());
  undo(paths);
}

void FolderLock::undo(const RuntimePaths& paths) {
  ::unlink(paths.log.c_str());
  ::unlink(paths.lock.c_str());
  ::rmdir(paths.folder.c_str());  // fails where something else is in it
}

bool somebody_listens(const std::string& socket_path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_path.size() > max_socket_path_bytes()) return false;
  std::memcpy(address.sun_path, socket_path.c_str(), socket_path.size() + 1);
  const UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) return false;
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return true;
  }
  return errno == EAGAIN;  // its queue of connections is full: alive, but slow or stopped
}

Result<std::string> open_runtime_folder(const std::string& runtime_folder) {
  TRANSFUSE_ASSIGN_OR_RETURN(const RuntimePaths paths, runtime_paths(runtime_folder, "default"));
  TRANSFUSE_RETURN_IF_ERROR(prepare_folder(paths.folder));
  return paths.folder;
}

}  // namespace transfuse

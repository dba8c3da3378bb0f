// Socket files: made under a name that says they are ready, found dead by connecting.
#include "transport/shm/runtime_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/random.h"
#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transport/shm/system_error.h"

namespace transfuse::shm {
namespace {

constexpr std::string_view kScheme = "shm:";
constexpr std::string_view kPrefix = "tf-";
constexpr std::string_view kSuffix = ".sock";
constexpr std::string_view kUnfinished = ".new";  // bound, but not listening yet
constexpr time_t kUnfinishedSeconds = 60;         // after it whoever made the file is gone
constexpr int kBacklog = 128;                     // net.core.somaxconn of older kernels

Result<UniqueFd> new_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("shm socket: expected a new socket, found: {}", errno_text(errno))};
  }
  return fd;
}

struct Address {
  sockaddr_un value{};
  UniqueFd folder;  // kept open while the address is used
};

// A path that is too long for a socket address (108 bytes) is reached through its folder.
Result<Address> make_address(const std::string& path) {
  Address address;
  address.value.sun_family = AF_UNIX;
  std::string reachable = path;
  if (path.size() >= sizeof address.value.sun_path) {
    const size_t slash = path.rfind('/');
    address.folder.reset(::open(path.substr(0, slash).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!address.folder) {
      return Error{ErrorCode::kUnavailable,
                   fmt::format("shm socket {}: its folder: {}", path, errno_text(errno))};
    }
    reachable = fmt::format("/proc/self/fd/{}{}", address.folder.get(), path.substr(slash));
  }
  if (reachable.size() >= sizeof address.value.sun_path) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("shm socket {}: expected a shorter file name", path)};
  }
  std::memcpy(address.value.sun_path, reachable.c_str(), reachable.size() + 1);
  return address;
}

int connect_once(int fd, const Address& address) {
  const int done =
      ::connect(fd, reinterpret_cast<const sockaddr*>(&address.value), sizeof address.value);
  return done == 0 ? 0 : errno;
}

// True if nobody listens at `path` any more.
bool is_dead(const std::string& path) {
  auto address = make_address(path);
  auto fd = new_socket();
  return address && fd && connect_once(fd->get(), *address) == ECONNREFUSED;
}

bool is_old(int folder, const char* name) {
  struct stat status{};
  return ::fstatat(folder, name, &status, AT_SYMLINK_NOFOLLOW) == 0 &&
         status.st_mtime + kUnfinishedSeconds < std::time(nullptr);
}

struct CloseFolder {
  void operator()(DIR* folder) const { ::closedir(folder); }
};

}  // namespace

Listener::Listener(UniqueFd socket, UniqueFd folder, std::string name)
    : socket_(std::move(socket)), folder_(std::move(folder)), name_(std::move(name)) {}

Listener::~Listener() {
  if (folder_) ::unlinkat(folder_.get(), name_.c_str(), 0);
}

Result<RuntimeFolder> RuntimeFolder::open(std::string_view path) {
  const std::string given(path);
  UniqueFd folder(::open(given.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder) {
    return Error{errno == EACCES ? ErrorCode::kPermissionDenied : ErrorCode::kNotFound,
                 fmt::format("runtime folder '{}': expected a folder that this user may enter, "
                             "found: {}",
                             given, errno_text(errno))};
  }
  struct stat status{};
  if (::fstat(folder.get(), &status) != 0 || status.st_uid != ::geteuid() ||
      (status.st_mode & 0777) != 0700) {
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("runtime folder '{}': expected owner {} and mode 0700, found owner {} "
                             "and mode {:04o}",
                             given, ::geteuid(), status.st_uid, status.st_mode & 0777)};
  }
  const std::unique_ptr<char, decltype(&std::free)> absolute(::realpath(given.c_str(), nullptr),
                                                             &std::free);
  RuntimeFolder opened(std::move(folder), absolute ? absolute.get() : given);
  TRANSFUSE_RETURN_IF_ERROR(opened.remove_stale());
  return opened;
}

Result<void> RuntimeFolder::remove_stale() {
  const int copy = ::openat(folder_.get(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, CloseFolder> folder(copy < 0 ? nullptr : ::fdopendir(copy));
  if (!folder) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("runtime folder '{}': cannot list it: {}", path_, errno_text(errno))};
  }
  std::vector<std::string> stale;
  while (const dirent* entry = ::readdir(folder.get())) {
    const std::string_view name = entry->d_name;
    if (!name.starts_with(kPrefix)) continue;
    const bool finished = name.ends_with(kSuffix);
    if (!finished && !(name.ends_with(kUnfinished) && is_old(folder_.get(), entry->d_name))) {
      continue;
    }
    if (is_dead(path_ + "/" + std::string(name))) stale.emplace_back(name);
  }
  for (const std::string& name : stale) {
    if (::unlinkat(folder_.get(), name.c_str(), 0) != 0 && errno != ENOENT) {
      return Error{ErrorCode::kPermissionDenied,
                   fmt::format("stale socket '{}/{}': cannot remove it: {}", path_, name,
                               errno_text(errno))};
    }
  }
  return {};
}

Result<void> RuntimeFolder::restore() {
  struct stat status{};
  if (::fstat(folder_.get(), &status) == 0 && status.st_nlink > 0) return {};
  if (::mkdir(path_.c_str(), 0700) != 0 && errno != EEXIST) {
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("runtime folder '{}': was removed, and cannot be made again: {}",
                             path_, errno_text(errno))};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(*this, open(path_));
  return {};
}

Result<Listener> RuntimeFolder::listen() {
  TRANSFUSE_RETURN_IF_ERROR(restore());
  const std::string name =
      fmt::format("{}{}-{:016x}{}", kPrefix, ::getpid(), random_identity(), kSuffix);
  const std::string unfinished = name + std::string(kUnfinished);
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd socket, new_socket());
  TRANSFUSE_ASSIGN_OR_RETURN(const Address address, make_address(path_ + "/" + unfinished));
  UniqueFd folder(::fcntl(folder_.get(), F_DUPFD_CLOEXEC, 0));
  // The mode of the file is that of the socket. The final name appears once somebody listens, so
  // that a socket without a listener is always a dead one.
  bool done = ::fchmod(socket.get(), 0600) == 0 && folder;
  done = done && ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address.value),
                        sizeof address.value) == 0;
  done = done && ::listen(socket.get(), kBacklog) == 0;
  done = done && ::renameat(folder_.get(), unfinished.c_str(), folder_.get(), name.c_str()) == 0;
  if (!done) {
    Error error{ErrorCode::kResourceExhausted,
                fmt::format("shm socket '{}/{}': expected to listen there, found: {}", path_, name,
                            errno_text(errno))};
    ::unlinkat(folder_.get(), unfinished.c_str(), 0);
    return error;
  }
  endpoint_ = fmt::format("{}{}/{}", kScheme, path_, name);
  return Listener(std::move(socket), std::move(folder), name);
}

Result<UniqueFd> connect_socket(std::string_view endpoint, Deadline deadline) {
  if (!endpoint.starts_with(kScheme) || endpoint.size() < kScheme.size() + 2 ||
      endpoint[kScheme.size()] != '/' || endpoint.size() > 4096 ||
      endpoint.find('\0') != std::string_view::npos) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("shm endpoint: expected 'shm:/<path>', found '{}'", endpoint.substr(0, 200))};
  }
  const std::string path(endpoint.substr(kScheme.size()));
  TRANSFUSE_ASSIGN_OR_RETURN(const Address address, make_address(path));
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd fd, new_socket());
  while (true) {
    const int failure = connect_once(fd.get(), address);
    if (failure == 0) return fd;
    if (failure == EAGAIN || failure == EINTR) {  // the queue of the listener is full
      if (deadline.passed()) {
        return Error{
            ErrorCode::kDeadlineExceeded,
            fmt::format("shm socket {}: the peer accepted no connection by the deadline", path)};
      }
      ::poll(nullptr, 0, 2);
      continue;
    }
    return Error{failure == EACCES || failure == EPERM ? ErrorCode::kPermissionDenied
                                                       : ErrorCode::kUnavailable,
                 fmt::format("shm socket {}: expected a peer that listens, found: {}", path,
                             errno_text(failure))};
  }
}

Result<Identity> check_identity(int socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("shm socket: the peer's credentials: {}", errno_text(errno))};
  }
  if (credentials.uid != ::geteuid() && credentials.uid != 0) {
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("shm socket: expected a peer of user {} or root, found user {}",
                             ::geteuid(), credentials.uid)};
  }
  return Identity{credentials.pid, credentials.uid};
}

}  // namespace transfuse::shm

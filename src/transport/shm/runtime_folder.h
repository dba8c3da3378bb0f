// The private folder where serving processes of one user put their sockets.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse::shm {

// A listening socket and its file, which the destructor removes. Used from one thread.
class Listener {
 public:
  Listener(UniqueFd socket, UniqueFd folder, std::string name);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  Listener(Listener&&) = default;
  Listener& operator=(Listener&&) = delete;
  int fd() const { return socket_.get(); }

 private:
  UniqueFd socket_;
  UniqueFd folder_;  // the file is removed from this folder, whatever its path leads to by then
  std::string name_;
};

class RuntimeFolder {
 public:
  // kPermissionDenied unless it belongs to this user and nobody else may enter it; kNotFound if it
  // is none. Sockets of dead processes are removed.
  static Result<RuntimeFolder> open(std::string_view path);

  // A new socket, file mode 0600, non-blocking. The folder is made again if it was removed since it
  // was opened: coordinators remove it when they leave it empty.
  Result<Listener> listen();
  // Of the socket that listen() made.
  const std::string& endpoint() const { return endpoint_; }

 private:
  RuntimeFolder(UniqueFd folder, std::string path)
      : folder_(std::move(folder)), path_(std::move(path)) {}
  Result<void> remove_stale();
  Result<void> restore();

  UniqueFd folder_;
  std::string path_;
  std::string endpoint_;
};

// Non-blocking. kInvalidArgument: no endpoint of this transport; kUnavailable: nobody listens.
Result<UniqueFd> connect_socket(std::string_view endpoint, Deadline deadline);

// Who is at the other end. kPermissionDenied unless it is this user or root. The pid is 0 where the
// other end lives in a pid namespace that this process cannot see.
struct Identity {
  int32_t pid = 0;
  uint32_t user = 0;
};
Result<Identity> check_identity(int socket);

}  // namespace transfuse::shm

// The private folder of the embedded coordinator: where its socket, lock and log lie.
#pragma once

#include <string>
#include <string_view>

#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

struct RuntimePaths {
  std::string folder;
  std::string socket;
  std::string lock;
  std::string log;
  std::string epoch;
};

// "" chooses $XDG_RUNTIME_DIR/transfuse, or /tmp/transfuse-<uid> where that is missing or too long
// for a socket. A job name that is no file name, or too long, is replaced by its hash. Only names
// paths, touches nothing. kInvalidArgument: `folder` is relative or leaves no room for a socket.
Result<RuntimePaths> runtime_paths(std::string_view folder, std::string_view job);

// Makes the folder, or checks that it is a folder of this user that nobody else may enter.
// kPermissionDenied says what was found.
Result<void> prepare_folder(const std::string& folder);

// Held while somebody starts or ends the coordinator. Waits to the deadline.
class FolderLock {
 public:
  static Result<FolderLock> take(const RuntimePaths& paths, Deadline deadline);
  FolderLock(FolderLock&& other) noexcept = default;
  FolderLock& operator=(FolderLock&&) = delete;
  ~FolderLock();

  // The socket is gone, nothing is to remain: the lock file too, and the folder if it is empty.
  void remove_files(const RuntimePaths& paths);
  // A start has failed: what it made is to go; the epoch of an earlier coordinator stays.
  void undo(const RuntimePaths& paths);

 private:
  explicit FolderLock(UniqueFd fd) : fd_(std::move(fd)) {}
  UniqueFd fd_;
};

// True if a process listens there, also one that is stopped.
bool somebody_listens(const std::string& socket_path);

// The largest path of a unix socket on this system.
size_t max_socket_path_bytes();

}  // namespace transfuse

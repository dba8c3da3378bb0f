// The reading side of the socket: one admitted connection to a serving process, and whether that
// process still lives.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/runtime_folder.h"
#include "transport/shm/wire.h"

namespace transfuse::shm {

// What the serving process says about a region, unchecked.
struct OfferedRegion {
  RegionKind kind = RegionKind::kMemfd;
  uint64_t size_bytes = 0;
  uint64_t address = 0;
  UniqueFd fd;
};

// Safe to call from any thread; requests go one after another.
class Connection {
 public:
  static Result<std::unique_ptr<Connection>> open(std::string_view endpoint, std::string_view token,
                                                  Deadline deadline);

  Result<OfferedRegion> open_region(RegionId id, Deadline deadline) EXCLUDES(mutex_);
  // Its descriptor and size; kHandle.
  Result<OfferedRegion> open_handle(RegionId id, uint64_t index, Deadline deadline)
      EXCLUDES(mutex_);
  // The pid as this process sees it (0: it does not), held by a pidfd, so that true from alive()
  // means that it was this process, not another one with its number, all the time before.
  bool alive() const;
  int32_t pid() const { return identity_.pid; }
  // The process is seen and held, so that it can be read by its pid.
  bool held() const { return identity_.pid != 0 && process_; }

 private:
  struct Answer;
  Connection(UniqueFd socket, UniqueFd process, Identity identity, std::string name)
      : socket_(std::move(socket)),
        process_(std::move(process)),
        identity_(identity),
        name_(std::move(name)) {}
  // Sends and waits for the answer; late answers to requests that were given up are dropped.
  Result<Answer> ask(const Body& body, Deadline deadline) EXCLUDES(mutex_);
  Result<Answer> exchange(uint64_t request, const std::string& bytes, Deadline deadline);
  Result<void> wait_for(short events, Deadline deadline);
  Error gone() const;
  Error too_late() const;

  const UniqueFd socket_;
  const UniqueFd process_;  // a pidfd; none where the kernel or a sandbox has none
  const Identity identity_;
  const std::string name_;  // the endpoint, for messages
  Mutex mutex_;
  CondVar free_;
  bool busy_ GUARDED_BY(mutex_) = false;
  uint64_t last_request_ GUARDED_BY(mutex_) = 0;
};

}  // namespace transfuse::shm

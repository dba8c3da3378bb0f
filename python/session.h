// The transport and the control that all publishers, receivers and arenas of one job share in this
// process.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::python {

// What is not said is left as the process has it, or takes its default.
struct SessionOptions {
  std::string job;                     // "": $TRANSFUSE_JOB or "default"
  std::optional<std::string> address;  // of a coordinator started by hand; empty: the job's own
  std::optional<std::string> token;    // what a coordinator with a token file asks for
  std::optional<uint32_t> threads;     // see TransportOptions
  std::optional<bool> allow_any_tracer;
};

class Session;

// Memory that Transfuse allocated. Shared by the Python object, its views and the publishers and
// receivers that use it.
struct ArenaMemory {
  std::shared_ptr<Session> session;  // first: the region must not outlive its transport
  std::unique_ptr<LocalRegion> region;
};

// Opened once per process and job, closed with its last user. Control is opened on first use.
// Safe to call from any thread. In a forked child it is not used.
// Shared by them: the last one closes it.
class Session : public std::enable_shared_from_this<Session> {
 public:
  // kInvalidArgument where the process has the job open with another option.
  static Result<std::shared_ptr<Session>> open(const SessionOptions& options);
  ~Session();

  Transport& transport() { return *transport_; }
  Result<Control*> control();

  Result<std::shared_ptr<ArenaMemory>> allocate(uint64_t size_bytes);
  // Arenas that are alive now.
  std::vector<std::shared_ptr<ArenaMemory>> arenas();

 private:
  Session(const SessionOptions& options, std::unique_ptr<Transport> transport);
  Result<void> join(const SessionOptions& options);

  const std::string job_;
  const uint32_t threads_;
  const bool allow_any_tracer_;
  const pid_t owner_pid_;
  std::unique_ptr<Transport> transport_;
  // Guarded by mutex_:
  std::mutex mutex_;
  std::optional<std::string> address_;
  std::optional<std::string> token_;
  std::unique_ptr<Control> control_;
  std::vector<std::weak_ptr<ArenaMemory>> arenas_;
};

}  // namespace transfuse::python

// The transport and the control that all publishers, receivers and arenas of one job, on one GPU or
// in memory of the host, share in this process.
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
  std::optional<int> device;  // a GPU by its ordinal in this process; empty: memory of the host
};

std::string device_name(int ordinal);  // as torch says it: "cuda:0"

class Session;

// Memory that Transfuse allocated. Shared by the Python object, its views and the publishers and
// receivers that use it.
struct ArenaMemory {
  std::shared_ptr<Session> session;  // first: the region must not outlive its transport
  std::unique_ptr<LocalRegion> region;
};

// Opened once per process, job and device, closed with its last user. Control is opened on first
// use. Safe to call from any thread. In a forked child it is not used. Shared by them: the last one
// closes it.
class Session : public std::enable_shared_from_this<Session> {
 public:
  // kInvalidArgument where the process has the job open with another option; kUnsupported where
  // this build or this host has no GPU and one is asked for.
  static Result<std::shared_ptr<Session>> open(const SessionOptions& options);
  ~Session();

  Transport& transport() { return *transport_; }
  std::optional<int> device() const { return device_; }
  Result<Control*> control();

  // On the device, where there is one.
  Result<std::shared_ptr<ArenaMemory>> allocate(uint64_t size_bytes);
  // Arenas that are alive now.
  std::vector<std::shared_ptr<ArenaMemory>> arenas();

 private:
  Session(const SessionOptions& options, std::unique_ptr<Transport> transport);
  Result<void> join(const SessionOptions& options);

  const std::string job_;
  const uint32_t threads_;
  const bool allow_any_tracer_;
  const std::optional<int> device_;
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

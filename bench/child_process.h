// This program again as another process, told what to do over a pipe: one line an order, one an
// answer.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse {
class Transport;
}

namespace transfuse::bench {

// What a process says of itself, for what it holds beyond its weights.
struct ProcessUsage {
  uint64_t anonymous_bytes = 0;  // resident private memory beyond that of the weights
  uint64_t open_files = 0;
  uint64_t regions = 0;  // live registrations
  uint64_t handles = 0;  // peers, remote regions, tickets
  uint64_t cpu_us = 0;   // since it was started, of all threads
};
std::string encode(const ProcessUsage& usage);
Result<ProcessUsage> decode_process_usage(std::string_view text);
// Of this process, which had `anonymous_bytes_before` when its weights were there and nothing else.
ProcessUsage own_usage(const Transport& transport, uint64_t anonymous_bytes_before);

// The commanding end. The destructor ends the process. Used from one thread.
class ChildProcess {
 public:
  // `transfuse <command> <specification>`; returns when that says that it is ready.
  static Result<std::unique_ptr<ChildProcess>> start(const std::string& command,
                                                     const std::string& specification,
                                                     std::string name);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  Result<std::string> ask(std::string_view order);
  // The two halves of ask(), so that several processes work at once.
  Result<void> send(std::string_view order);
  Result<std::string> receive();
  Result<ProcessUsage> usage();
  pid_t pid() const { return pid_; }

 private:
  ChildProcess(pid_t pid, UniqueFd to, FILE* from, std::string name);
  Error gone() const;

  const pid_t pid_;
  UniqueFd to_;
  FILE* const from_;
  const std::string name_;
};

// The other end: says that it is ready, and serves orders from stdin until it closes. What `obey`
// returns is the answer; its error is answered too.
void serve_orders(const std::function<Result<std::string>(const std::string& order)>& obey);

}  // namespace transfuse::bench

// A unix socket before the coordinator's, for one member: counts the bytes that pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse::bench {

struct WireBytes {
  uint64_t to_coordinator = 0;
  uint64_t from_coordinator = 0;
  uint64_t sum() const { return to_coordinator + from_coordinator; }
};

// Passes on what comes, on a thread of its own, until it is destroyed. Used from one thread.
class CountingRelay {
 public:
  // Both are paths.
  static Result<std::unique_ptr<CountingRelay>> open(const std::string& socket,
                                                     const std::string& coordinator_socket);
  ~CountingRelay();
  CountingRelay(const CountingRelay&) = delete;
  CountingRelay& operator=(const CountingRelay&) = delete;

  std::string address() const { return "unix:" + socket_; }
  WireBytes bytes() const { return {up_bytes_, down_bytes_}; }

 private:
  struct Connection;

  CountingRelay(std::string socket, std::string coordinator_socket, UniqueFd listener,
                UniqueFd wake);
  void run();
  void accept_one();

  const std::string socket_;
  const std::string coordinator_socket_;
  const UniqueFd listener_;
  const UniqueFd wake_;                // readable: end
  std::list<Connection> connections_;  // of the thread
  std::atomic<uint64_t> up_bytes_{0};
  std::atomic<uint64_t> down_bytes_{0};
  std::thread thread_;
};

}  // namespace transfuse::bench

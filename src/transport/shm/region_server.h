// Hands the regions of this process out to its peers: one thread that never waits for any of them.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/runtime_folder.h"
#include "transport/shm/wire.h"

namespace transfuse::shm {

// What is registered. Safe to call from any thread.
class RegionTable {
 public:
  struct Entry {
    int fd = -1;  // kMemfd; open until remove()
    uint64_t address = 0;
    uint64_t size_bytes = 0;
    RegionKind kind = RegionKind::kMemfd;
    const HandleMaker* make = nullptr;  // kHandle; valid until remove()
  };
  RegionId add(const Entry& entry) EXCLUDES(mutex_);
  void remove(RegionId id) EXCLUDES(mutex_);
  // Sends the answer to an OpenRegion; the entry cannot go while it is sent. False if the peer does
  // not take it at once.
  bool answer(int socket, uint64_t request, RegionId id) EXCLUDES(mutex_);
  // The same for an OpenHandle: the handle is made now and closed here, so that none stays open.
  bool answer_handle(int socket, uint64_t request, const OpenHandle& open) EXCLUDES(mutex_);
  void add_stats(TransportStats& stats) const EXCLUDES(mutex_);

 private:
  mutable Mutex mutex_;
  std::unordered_map<uint64_t, Entry> entries_ GUARDED_BY(mutex_);
  uint64_t last_id_ GUARDED_BY(mutex_) = 0;
  uint64_t bytes_ GUARDED_BY(mutex_) = 0;
};

// Bounded in connections, message sizes and time to say hello; a peer that breaks the protocol, or
// does not read its answers, loses its connection. The table outlives it. Used from one thread; the
// destructor waits for its own thread only.
class RegionServer {
 public:
  static Result<std::unique_ptr<RegionServer>> start(Listener listener, RegionTable& table,
                                                     std::string token);
  ~RegionServer();
  RegionServer(const RegionServer&) = delete;
  RegionServer& operator=(const RegionServer&) = delete;

 private:
  struct Connection {
    UniqueFd fd;
    bool admitted = false;  // hello and token were right
    TimePoint hello_by;
  };

  RegionServer(Listener listener, RegionTable& table, std::string token)
      : listener_(std::move(listener)), table_(table), token_(std::move(token)) {}
  static void* run(void* self);
  void loop();
  int poll_timeout_ms() const;
  void accept_new();
  // False: the connection is to be closed.
  bool serve(Connection& connection);
  bool handle(Connection& connection, std::string_view bytes);

  Listener listener_;
  RegionTable& table_;
  const std::string token_;
  UniqueFd stop_;  // an eventfd
  pthread_t thread_{};
  bool started_ = false;
  // Of the server's thread:
  std::vector<Connection> connections_;
  TimePoint accept_after_{};  // out of descriptors: a pause
};

}  // namespace transfuse::shm

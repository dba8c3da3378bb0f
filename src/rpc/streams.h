// The two streams of the coordinator, server side: attendance with member events, and versions.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "transfuse.pb.h"

namespace transfuse {

class CoordinatorService;

// Writes queued messages one after the other. Owned by itself until gRPC is done with it, and
// shared with the service while that may still queue something. Safe to call from any thread: gRPC
// runs its reactions on threads of its own, never inside StartWrite() or Finish().
template <typename Reactor, typename Message>
class OutStream : public Reactor {
 public:
  // Queues only, so that the order is that of the caller's lock; pump() sends, outside of it.
  // Messages for which `replaced` is true are dropped: they have not left yet and are outdated.
  template <typename Replaced>
  void enqueue(Message message, Replaced replaced) {
    const MutexLock lock(mutex_);
    std::erase_if(queue_, replaced);
    if (queue_.size() >= kMaxQueued) queue_.pop_front();
    queue_.push_back(std::move(message));
  }
  void enqueue(Message message) {
    enqueue(std::move(message), [](const Message&) { return false; });
  }
  size_t queued() {
    const MutexLock lock(mutex_);
    return queue_.size();
  }
  void pump() {
    const MutexLock lock(mutex_);
    write_next();
  }
  void end(const grpc::Status& status) {
    const MutexLock lock(mutex_);
    if (ending_) return;
    ending_ = true;
    status_ = status;
    if (!writing_) this->Finish(status_);
  }
  void OnWriteDone(bool ok) override {
    const MutexLock lock(mutex_);
    writing_ = false;
    if (ending_) {
      this->Finish(status_);
    } else if (ok) {
      write_next();
    }
  }
  void OnDone() override {
    const std::shared_ptr<OutStream> last = std::move(self_);  // may delete this at the end
  }

  std::shared_ptr<OutStream> share() const { return self_; }

  static constexpr size_t kMaxQueued = 1024;

 protected:
  void own_self(std::shared_ptr<OutStream> self) { self_ = std::move(self); }

 private:
  void write_next() REQUIRES(mutex_) {
    if (writing_ || ending_ || queue_.empty()) return;
    writing_ = true;
    current_ = std::move(queue_.front());
    queue_.pop_front();
    this->StartWrite(&current_);
  }

  std::shared_ptr<OutStream> self_;
  Mutex mutex_;
  std::deque<Message> queue_ GUARDED_BY(mutex_);
  Message current_ GUARDED_BY(mutex_);  // belongs to gRPC while writing_
  bool writing_ GUARDED_BY(mutex_) = false;
  bool ending_ GUARDED_BY(mutex_) = false;
  grpc::Status status_ GUARDED_BY(mutex_);
};

// One client's presence: beats in, notices out.
class AttendStream final
    : public OutStream<grpc::ServerBidiReactor<wire::Beat, wire::Notice>, wire::Notice> {
 public:
  static std::shared_ptr<AttendStream> open(CoordinatorService& service);

  void OnReadDone(bool ok) override;
  void OnCancel() override;

  uint64_t owner = 0;    // both guarded by the service's mutex
  bool leaving = false;  // its members left by themselves

 private:
  explicit AttendStream(CoordinatorService& service) : service_(service) {}

  CoordinatorService& service_;
  wire::Beat beat_;
};

class WatchStream final : public OutStream<grpc::ServerWriteReactor<wire::Version>, wire::Version> {
 public:
  static std::shared_ptr<WatchStream> open(CoordinatorService& service, std::string model);

  void add(const wire::Version& version);
  void OnCancel() override;

 private:
  WatchStream(CoordinatorService& service, std::string model)
      : service_(service), model_(std::move(model)) {}

  CoordinatorService& service_;
  const std::string model_;  // "": all
};

}  // namespace transfuse

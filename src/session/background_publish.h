// Copies and publishes a version on a thread of its own, while the trainer goes on.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "base/mutex.h"
#include "session/device_work.h"
#include "transfuse/deadline.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"

namespace transfuse {

// One version at a time. begin(), wait(), outcome() and clear() from one thread, the rest from
// any. The destructor cancels what runs, and waits for its end.
class BackgroundPublish {
 public:
  // False: the version is skipped.
  using Work = std::function<Result<bool>(CopyProgress&)>;

  // `size_bytes`: what a version copies. kResourceExhausted: no thread can be started.
  static Result<std::unique_ptr<BackgroundPublish>> open(uint64_t size_bytes);
  ~BackgroundPublish();
  BackgroundPublish(const BackgroundPublish&) = delete;
  BackgroundPublish& operator=(const BackgroundPublish&) = delete;

  // None is running. What `work` uses is its own until wait() has returned true.
  void begin(uint64_t version, Work work);
  void cancel() { copy_.cancelled = true; }
  // True: none is running. False at the deadline.
  bool wait(Deadline deadline);
  // Of the one that has ended.
  Result<bool> outcome() const;
  void clear();  // as if there had been none
  SnapshotProgress progress() const;

 private:
  explicit BackgroundPublish(uint64_t size_bytes) : size_bytes_(size_bytes) {}
  void serve();

  const uint64_t size_bytes_;
  CopyProgress copy_;
  std::thread thread_;

  mutable Mutex mutex_;
  CondVar changed_;
  SnapshotState state_ GUARDED_BY(mutex_) = SnapshotState::kNone;
  uint64_t version_ GUARDED_BY(mutex_) = 0;
  int64_t elapsed_us_ GUARDED_BY(mutex_) = 0;
  Work work_ GUARDED_BY(mutex_);  // to be begun
  Result<bool> outcome_ GUARDED_BY(mutex_) = true;
  bool stopping_ GUARDED_BY(mutex_) = false;
};

}  // namespace transfuse

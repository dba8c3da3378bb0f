// States of a version that is published in the background.
#include "session/background_publish.h"

#include <cstdint>
#include <memory>
#include <utility>

#include "base/mutex.h"
#include "base/thread.h"
#include "session/stopwatch.h"
#include "transfuse/deadline.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"

namespace transfuse {

Result<std::unique_ptr<BackgroundPublish>> BackgroundPublish::open(uint64_t size_bytes) {
  std::unique_ptr<BackgroundPublish> publish(new BackgroundPublish(size_bytes));
  TRANSFUSE_ASSIGN_OR_RETURN(
      publish->thread_, start_thread("snapshot", [publish = publish.get()] { publish->serve(); }));
  return publish;
}

BackgroundPublish::~BackgroundPublish() {
  cancel();
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void BackgroundPublish::begin(uint64_t version, Work work) {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(state_ != SnapshotState::kCopying);
  copy_.cancelled = false;
  copy_.copied_bytes = 0;
  state_ = SnapshotState::kCopying;
  version_ = version;
  elapsed_us_ = 0;
  work_ = std::move(work);
  changed_.notify_all();
}

void BackgroundPublish::serve() {
  mutex_.lock();
  while (!stopping_) {
    if (!work_) {
      changed_.wait(mutex_);
      continue;
    }
    const Work work = std::exchange(work_, {});
    mutex_.unlock();

    const Stopwatch watch;
    auto outcome = work(copy_);
    const int64_t elapsed_us = watch.elapsed_us();

    mutex_.lock();
    elapsed_us_ = elapsed_us;
    state_ = !outcome   ? SnapshotState::kFailed
             : *outcome ? SnapshotState::kPublished
                        : SnapshotState::kSkipped;
    outcome_ = std::move(outcome);
    changed_.notify_all();
  }
  mutex_.unlock();
}

bool BackgroundPublish::wait(Deadline deadline) {
  const MutexLock lock(mutex_);
  while (state_ == SnapshotState::kCopying) {
    if (!changed_.wait_until(mutex_, deadline) && state_ == SnapshotState::kCopying) return false;
  }
  return true;
}

Result<bool> BackgroundPublish::outcome() const {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(state_ != SnapshotState::kCopying);
  return outcome_;
}

void BackgroundPublish::clear() {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(state_ != SnapshotState::kCopying);
  state_ = SnapshotState::kNone;
  version_ = 0;
  elapsed_us_ = 0;
  copy_.copied_bytes = 0;
  outcome_ = true;
}

SnapshotProgress BackgroundPublish::progress() const {
  const MutexLock lock(mutex_);
  return {.state = state_,
          .version = version_,
          .copied_bytes = copy_.copied_bytes,
          .size_bytes = size_bytes_,
          .elapsed_us = elapsed_us_};
}

}  // namespace transfuse

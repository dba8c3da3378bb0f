// A mutex that clang's thread-safety analysis understands, with a condition variable that waits to
// a deadline.
#pragma once

#include <condition_variable>
#include <mutex>

#include "transfuse/deadline.h"

#if defined(__clang__)
#define TRANSFUSE_TSA(x) __attribute__((x))
#else
#define TRANSFUSE_TSA(x)
#endif
#undef GUARDED_BY  // abseil, below gRPC, defines it too, with the same meaning
#define GUARDED_BY(m) TRANSFUSE_TSA(guarded_by(m))
#define REQUIRES(...) TRANSFUSE_TSA(requires_capability(__VA_ARGS__))
#define EXCLUDES(...) TRANSFUSE_TSA(locks_excluded(__VA_ARGS__))

namespace transfuse {

class TRANSFUSE_TSA(capability("mutex")) Mutex {
 public:
  void lock() TRANSFUSE_TSA(acquire_capability()) { mutex_.lock(); }
  void unlock() TRANSFUSE_TSA(release_capability()) { mutex_.unlock(); }

 private:
  friend class CondVar;
  std::mutex mutex_;
};

class TRANSFUSE_TSA(scoped_lockable) MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) TRANSFUSE_TSA(acquire_capability(mutex)) : mutex_(mutex) {
    mutex_.lock();
  }
  ~MutexLock() TRANSFUSE_TSA(release_capability()) { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

class CondVar {
 public:
  // Both return with the mutex held again, possibly without reason: loop over the condition.
  void wait(Mutex& mutex) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    condition_.wait(lock);
    lock.release();
  }
  // False at the deadline.
  bool wait_until(Mutex& mutex, Deadline deadline) REQUIRES(mutex) {
    std::unique_lock<std::mutex> lock(mutex.mutex_, std::adopt_lock);
    const bool notified = condition_.wait_until(lock, deadline.at()) == std::cv_status::no_timeout;
    lock.release();
    return notified;
  }
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace transfuse

// A few threads that share out the pieces of one copy.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "transfuse/result.h"

namespace transfuse {

// Started once; they sleep between copies. Used from one thread.
class CopyThreads {
 public:
  // `count` threads work, the caller's among them. kResourceExhausted: they cannot be started.
  static Result<std::unique_ptr<CopyThreads>> open(uint32_t count);
  ~CopyThreads();
  CopyThreads(const CopyThreads&) = delete;
  CopyThreads& operator=(const CopyThreads&) = delete;

  // Calls work(i) once for every i below `count` and returns when all have returned: what they
  // wrote with ordinary stores is visible to the caller.
  void run(size_t count, const std::function<void(size_t)>& work);

 private:
  CopyThreads() = default;
  void serve();
  void take_pieces(size_t count, const std::function<void(size_t)>& work);

  std::vector<std::thread> threads_;
  std::atomic<size_t> next_{0};

  Mutex mutex_;
  CondVar changed_;
  uint64_t started_ GUARDED_BY(mutex_) = 0;  // copies
  uint32_t busy_ GUARDED_BY(mutex_) = 0;     // threads that have not ended the current one
  size_t count_ GUARDED_BY(mutex_) = 0;
  const std::function<void(size_t)>* work_ GUARDED_BY(mutex_) = nullptr;
  bool stopping_ GUARDED_BY(mutex_) = false;
};

}  // namespace transfuse

// Pieces are taken one by one, so that a thread that was held up takes fewer.
#include "session/copy_threads.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "base/mutex.h"
#include "base/thread.h"
#include "transfuse/result.h"

namespace transfuse {

Result<std::unique_ptr<CopyThreads>> CopyThreads::open(uint32_t count) {
  std::unique_ptr<CopyThreads> threads(new CopyThreads());
  for (uint32_t i = 1; i < count; ++i) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        auto thread, start_thread("shadow copy", [own = threads.get()] { own->serve(); }));
    threads->threads_.push_back(std::move(thread));
  }
  return threads;
}

CopyThreads::~CopyThreads() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void CopyThreads::take_pieces(size_t count, const std::function<void(size_t)>& work) {
  for (size_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) work(i);
}

void CopyThreads::run(size_t count, const std::function<void(size_t)>& work) {
  next_ = 0;
  {
    const MutexLock lock(mutex_);
    work_ = &work;
    count_ = count;
    busy_ = static_cast<uint32_t>(threads_.size());
    ++started_;
    changed_.notify_all();
  }
  take_pieces(count, work);
  const MutexLock lock(mutex_);
  while (busy_ > 0) changed_.wait(mutex_);
  work_ = nullptr;
}

void CopyThreads::serve() {
  uint64_t seen = 0;
  mutex_.lock();
  while (!stopping_) {
    if (started_ == seen) {
      changed_.wait(mutex_);
      continue;
    }
    seen = started_;
    const size_t count = count_;
    const auto& work = *work_;
    mutex_.unlock();
    take_pieces(count, work);
    mutex_.lock();
    if (--busy_ == 0) changed_.notify_all();
  }
  mutex_.unlock();
}

}  // namespace transfuse

// Threads that execute what streams are given, and events that say how far they are.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "fake_cuda/state.h"

namespace transfuse::fake_cuda {
namespace {

constexpr size_t kTasks = 1024;  // more than this make a stream allocate

// Of this process. Never destroyed, as the threads.
struct Streams {
  Mutex mutex;
  std::vector<Stream*> all GUARDED_BY(mutex);
};
Streams& streams() {
  static auto* const known = new Streams();
  return *known;
}

void move_rows(const Task& task) {
  for (uint64_t row = 0; row < task.height; ++row) {
    std::memmove(reinterpret_cast<void*>(task.target + row * task.target_pitch),
                 reinterpret_cast<const void*>(task.source + row * task.source_pitch), task.width);
  }
}

void run(const Task& task) {
  switch (task.kind) {
    case Task::Kind::kRows:
      return move_rows(task);
    case Task::Kind::kSet:
      std::memset(reinterpret_cast<void*>(task.target), static_cast<int>(task.value), task.width);
      return;
    case Task::Kind::kCopyKernel:
      return run_copy_kernel(task);
    case Task::Kind::kScaledKernel:
      return run_scaled_kernel(task);
    case Task::Kind::kRecord: {
      const MutexLock lock(task.event->mutex);
      task.event->reached = std::max(task.event->reached, task.record);
      task.event->when = std::chrono::steady_clock::now();
      task.event->changed.notify_all();
      return;
    }
    case Task::Kind::kWait:
      return task.event->wait(task.record);
  }
}

}  // namespace

bool Event::done() {
  const MutexLock lock(mutex);
  return reached >= recorded;
}

void Event::wait(uint64_t record) {
  const MutexLock lock(mutex);
  while (reached < record) changed.wait(mutex);
}

Stream::Stream(int device) : device_(device) {
  due_.reserve(kTasks);
  thread_ = std::thread([this] { work(); });
  const MutexLock lock(streams().mutex);
  streams().all.push_back(this);
}

Stream::~Stream() {
  {
    const MutexLock lock(streams().mutex);
    std::erase(streams().all, this);
  }
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  thread_.join();
}

void Stream::add(Task task) {
  const MutexLock lock(mutex_);
  if (capture_ != nullptr) {
    capture_->tasks.push_back(std::move(task));
    return;
  }
  due_.push_back(std::move(task));
  changed_.notify_all();
}

void Stream::wait() {
  const MutexLock lock(mutex_);
  while (!due_.empty() || running_) changed_.wait(mutex_);
}

void Stream::begin_capture() {
  const MutexLock lock(mutex_);
  capture_ = std::make_unique<Graph>();
}

std::unique_ptr<Graph> Stream::end_capture() {
  const MutexLock lock(mutex_);
  return std::move(capture_);
}

bool Stream::capturing() {
  const MutexLock lock(mutex_);
  return capture_ != nullptr;
}

void Stream::wait_for_all() {
  const MutexLock lock(streams().mutex);
  for (Stream* stream : streams().all) stream->wait();
}

void Stream::work() {
  std::vector<Task> batch;  // takes turns with due_: both keep their room
  batch.reserve(kTasks);
  const MutexLock lock(mutex_);
  while (true) {
    while (due_.empty() && !stopping_) changed_.wait(mutex_);
    if (due_.empty()) return;
    std::swap(batch, due_);
    running_ = true;
    mutex_.unlock();

    for (const Task& task : batch) run(task);
    batch.clear();

    mutex_.lock();
    running_ = false;
    changed_.notify_all();
  }
}

}  // namespace transfuse::fake_cuda

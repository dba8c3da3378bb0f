// The thread behind interruptible calls.
#include "operation.h"

#include <nanobind/nanobind.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

namespace transfuse::python {
namespace {

constexpr auto kSignalSlice = std::chrono::milliseconds(50);  // how late Ctrl-C is seen
constexpr auto kCancelGrace = std::chrono::seconds(2);

}  // namespace

struct OperationThread::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::function<void()> call;  // empty: idle
  uint64_t submitted = 0;
  uint64_t finished = 0;
  bool stop = false;

  void serve() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return call || stop; });
      if (!call) return;
      lock.unlock();
      call();
      lock.lock();
      call = nullptr;
      ++finished;
      changed.notify_all();
    }
  }
};

OperationThread::OperationThread() : owner_pid_(getpid()), state_(std::make_shared<State>()) {}

OperationThread::~OperationThread() {
  if (getpid() != owner_pid_) {
    // The thread does not exist in a forked child: nothing to wait for, and nothing may be freed.
    static_cast<void>(new std::thread(std::move(thread_)));
    static_cast<void>(new std::shared_ptr<State>(std::move(state_)));
    return;
  }
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->changed.notify_all();
  thread_.join();
}

void OperationThread::run_erased(std::function<void()> call, const std::function<void()>& cancel) {
  if (getpid() != owner_pid_) {
    const nanobind::gil_scoped_release unlocked;
    call();
    return;
  }
  std::optional<uint64_t> ticket;
  while (!ticket) {  // another thread may be first after every wait
    if (!wait_until({}, [this] { return !state_->call; })) throw nanobind::python_error();
    const nanobind::gil_scoped_release unlocked;
    const std::lock_guard lock(state_->mutex);
    if (state_->call) continue;
    state_->call.swap(call);
    ticket = ++state_->submitted;
    if (!thread_.joinable()) thread_ = std::thread([state = state_] { state->serve(); });
    state_->changed.notify_all();
  }
  const auto finished = [this, ticket] { return state_->finished >= *ticket; };
  if (!wait_until(cancel, finished)) throw nanobind::python_error();
}

// Waits for `condition`, under the mutex. False with a Python error set if a signal handler raised.
bool OperationThread::wait_until(const std::function<void()>& cancel,
                                 const std::function<bool()>& condition) {
  while (true) {
    {
      const nanobind::gil_scoped_release unlocked;
      std::unique_lock lock(state_->mutex);
      if (state_->changed.wait_for(lock, kSignalSlice, condition)) return true;
    }
    if (PyErr_CheckSignals() == 0) continue;
    if (cancel) {
      const nanobind::gil_scoped_release unlocked;
      cancel();
      std::unique_lock lock(state_->mutex);
      state_->changed.wait_for(lock, kCancelGrace, condition);
    }
    return false;
  }
}

}  // namespace transfuse::python

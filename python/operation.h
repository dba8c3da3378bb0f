// Blocking native calls that Ctrl-C can interrupt.
#pragma once

#include <nanobind/nanobind.h>
#include <sys/types.h>

#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

namespace transfuse::python {

// Runs the calls of one object, one after the other, on a thread of its own, while the caller waits
// without the GIL and looks for signals. The thread starts with the first call. The destructor
// waits for a call that still runs: whoever can must cancel it first. Safe to call from any thread.
class OperationThread {
 public:
  OperationThread();
  ~OperationThread();
  OperationThread(const OperationThread&) = delete;
  OperationThread& operator=(const OperationThread&) = delete;

  // Returns what `call` returned. On a signal whose handler raises: calls `cancel`, waits a moment
  // for the call to end and throws python_error; a call that ignores `cancel` goes on behind, and
  // the next run() waits for it. In a forked child the call runs in the caller's thread.
  template <typename F>
  auto run(F call, const std::function<void()>& cancel = {}) {
    using Outcome = decltype(call());
    auto outcome = std::make_shared<std::optional<Outcome>>();  // shared: the caller may give up
    run_erased([outcome, call = std::move(call)] { outcome->emplace(call()); }, cancel);
    return std::move(**outcome);
  }

 private:
  struct State;
  void run_erased(std::function<void()> call, const std::function<void()>& cancel);
  bool wait_until(const std::function<void()>& cancel, const std::function<bool()>& condition);

  const pid_t owner_pid_;
  std::shared_ptr<State> state_;  // shared with the thread
  std::thread thread_;
};

}  // namespace transfuse::python

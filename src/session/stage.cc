// States of a stage.
#include "session/stage.h"

#include <fmt/format.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <utility>

#include "base/mutex.h"
#include "base/thread.h"
#include "session/fetch.h"
#include "session/stopwatch.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {

Stage::Stage(Fetch& fetch, uint64_t size_bytes, const std::atomic<bool>& cancelled)
    : fetch_(fetch), size_bytes_(size_bytes), cancelled_(cancelled) {}

Result<void> Stage::begin(const FetchOrder& order) {
  const MutexLock lock(mutex_);
  if (state_ == StageState::kMoving) {
    return Error{ErrorCode::kAlreadyExists,
                 fmt::format("another version is being staged ({} of {} bytes are there)",
                             fetch_.progress().landed_bytes.load(), size_bytes_)};
  }
  if (!thread_.joinable()) {
    TRANSFUSE_ASSIGN_OR_RETURN(thread_, start_thread("staging", [this] { serve(); }));
  }
  fetch_.clear_progress();
  state_ = StageState::kMoving;
  error_.reset();
  report_ = {};
  report_.attempts = 0;
  order_ = order;
  changed_.notify_all();
  return {};
}

void Stage::drop(std::optional<Error> reason) {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(state_ != StageState::kMoving);
  state_ = reason ? StageState::kFailed : StageState::kNone;
  error_ = std::move(reason);
}

void Stage::stop() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Stage::serve() {
  mutex_.lock();
  while (!stopping_) {
    if (!order_) {
      changed_.wait(mutex_);
      continue;
    }
    const FetchOrder order = *order_;
    order_.reset();
    RefitReport report = report_;
    mutex_.unlock();

    const Stopwatch watch;
    auto fetched = fetch_.run(order, cancelled_, report);
    report.phases.total_us = watch.elapsed_us();

    mutex_.lock();
    report_ = std::move(report);
    state_ = fetched ? StageState::kReady : StageState::kFailed;
    if (fetched) {
      fetched_ = *fetched;
    } else {
      error_ = std::move(fetched).error();
    }
    changed_.notify_all();
  }
  mutex_.unlock();
}

StageProgress Stage::progress_locked() const {
  if (state_ == StageState::kNone) {
    return {.state = state_, .version = 0, .landed_bytes = 0, .size_bytes = size_bytes_};
  }
  return {.state = state_,
          .version = fetch_.progress().version,
          .landed_bytes = fetch_.progress().landed_bytes,
          .size_bytes = size_bytes_};
}

StageProgress Stage::progress() const {
  const MutexLock lock(mutex_);
  return progress_locked();
}

bool Stage::moving() const {
  const MutexLock lock(mutex_);
  return state_ == StageState::kMoving;
}

Result<StageProgress> Stage::wait(Deadline deadline) {
  const MutexLock lock(mutex_);
  while (state_ == StageState::kMoving) {
    if (!changed_.wait_until(mutex_, deadline) && state_ == StageState::kMoving) {
      return Error{ErrorCode::kDeadlineExceeded,
                   fmt::format("version {} is still being staged: {} of {} bytes are there",
                               fetch_.progress().version.load(),
                               fetch_.progress().landed_bytes.load(), size_bytes_)};
    }
  }
  if (state_ == StageState::kFailed) return *error_;
  if (state_ == StageState::kNone) {
    return Error{ErrorCode::kNotFound, "no version is being staged"};
  }
  return progress_locked();
}

RefitReport Stage::report() const {
  const MutexLock lock(mutex_);
  return report_;
}

Result<Fetched> Stage::ready() const {
  const MutexLock lock(mutex_);
  switch (state_) {
    case StageState::kReady:
      return fetched_;
    case StageState::kFailed:
      return *error_;
    case StageState::kMoving:
      return Error{ErrorCode::kNotFound,
                   fmt::format("version {} is not ready to be committed: {} of {} bytes are there",
                               fetch_.progress().version.load(),
                               fetch_.progress().landed_bytes.load(), size_bytes_)};
    case StageState::kNone:
      break;
  }
  return Error{ErrorCode::kNotFound, "no version is staged"};
}

}  // namespace transfuse

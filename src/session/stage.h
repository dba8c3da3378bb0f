// Fetches in the background, on a thread of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <thread>

#include "base/mutex.h"
#include "session/fetch.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {

// One version on its way, ready or failed. begin(), drop() and stop() from one thread, the rest
// from any. Outlived by the fetch, which nobody else uses meanwhile.
class Stage {
 public:
  // `size_bytes`: what a fetch writes. `cancelled` ends one soon.
  Stage(Fetch& fetch, uint64_t size_bytes, const std::atomic<bool>& cancelled);
  ~Stage() { stop(); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // Takes the place of one that is ready or has failed. kAlreadyExists: one is moving.
  // kResourceExhausted: the thread cannot be started.
  Result<void> begin(const FetchOrder& order);
  // Of a ready one: it was committed (no reason), or may not be any more.
  void drop(std::optional<Error> reason);
  // Waits for the fetch, which somebody has cancelled.
  void stop();

  StageProgress progress() const;
  // Success: it is ready. Its error: it failed. kNotFound: there is none.
  Result<StageProgress> wait(Deadline deadline);
  bool moving() const;
  // Of one that is not moving: what it did, and what is ready (nothing: why not).
  RefitReport report() const;
  Result<Fetched> ready() const;

 private:
  void serve();
  StageProgress progress_locked() const REQUIRES(mutex_);

  Fetch& fetch_;
  const uint64_t size_bytes_;
  const std::atomic<bool>& cancelled_;
  std::thread thread_;

  mutable Mutex mutex_;
  CondVar changed_;
  StageState state_ GUARDED_BY(mutex_) = StageState::kNone;
  std::optional<FetchOrder> order_ GUARDED_BY(mutex_);  // to be begun
  Fetched fetched_ GUARDED_BY(mutex_);
  RefitReport report_ GUARDED_BY(mutex_);
  std::optional<Error> error_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
};

}  // namespace transfuse

// What happens when, in one order that the seed fixes.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "transfuse/deadline.h"

namespace transfuse::sim {

inline Duration ms(int64_t count) { return std::chrono::milliseconds(count); }

// Used from one thread.
class Events {
 public:
  TimePoint now() const { return now_; }
  void at(TimePoint when, std::function<void()> what) {
    queue_.push({.when = std::max(when, now_), .order = ++count_, .what = std::move(what)});
  }
  void after(Duration delay, std::function<void()> what) { at(now_ + delay, std::move(what)); }
  // False: nothing happens until `end` any more; it is `end` then.
  bool run_next(TimePoint end) {
    if (queue_.empty() || queue_.top().when > end) {
      now_ = end;
      return false;
    }
    Event event = std::move(const_cast<Event&>(queue_.top()));  // popped at once
    queue_.pop();
    now_ = event.when;
    event.what();
    return true;
  }

 private:
  struct Event {
    TimePoint when;
    uint64_t order = 0;
    std::function<void()> what;
    bool operator<(const Event& other) const {
      return std::pair(other.when, other.order) < std::pair(when, order);
    }
  };
  std::priority_queue<Event> queue_;
  TimePoint now_{std::chrono::hours(1)};
  uint64_t count_ = 0;
};

}  // namespace transfuse::sim

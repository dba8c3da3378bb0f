// A point in monotonic time after which a wait gives up. Every wait in Transfuse takes one (I11).
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace transfuse {

using Duration = std::chrono::nanoseconds;
using TimePoint = std::chrono::steady_clock::time_point;

class Deadline {
 public:
  explicit Deadline(TimePoint at) : at_(at) {}
  static Deadline after(Duration duration) {
    return Deadline(std::chrono::steady_clock::now() + duration);
  }
  static Deadline after_ms(int64_t milliseconds) {
    return after(std::chrono::milliseconds(milliseconds));
  }

  TimePoint at() const { return at_; }
  bool passed() const { return std::chrono::steady_clock::now() >= at_; }
  Duration remaining() const {  // never negative
    return std::max(Duration::zero(),
                    std::chrono::duration_cast<Duration>(at_ - std::chrono::steady_clock::now()));
  }
  Deadline earlier(Deadline other) const { return Deadline(std::min(at_, other.at_)); }

 private:
  TimePoint at_;
};

}  // namespace transfuse

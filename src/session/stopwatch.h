// Elapsed time, for reports.
#pragma once

#include <chrono>
#include <cstdint>

#include "transfuse/deadline.h"

namespace transfuse {

inline int64_t microseconds_since(TimePoint start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() -
                                                               start)
      .count();
}

// Runs from its construction.
class Stopwatch {
 public:
  int64_t elapsed_us() const { return microseconds_since(start_); }

 private:
  TimePoint start_ = std::chrono::steady_clock::now();
};

}  // namespace transfuse

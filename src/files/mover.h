// Executes a reading into files, chunk by chunk, with a buffer of one chunk per thread.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "files/folder_writer.h"
#include "files/reading.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// Where a parameter of the target lies.
struct WritablePlace {
  const TargetFile* file = nullptr;
  uint64_t offset_bytes = 0;
};

// Used from one thread, which it joins with others of its own in move().
class Mover {
 public:
  explicit Mover(uint32_t threads) : threads_(threads) {}

  // All runs of `reading` into `places`, one per parameter of its target. `progress` is called with
  // the bytes written since the first move(); may be empty.
  Result<void> move(const Reading& reading, std::span<const WritablePlace> places,
                    const std::function<void(uint64_t)>& progress);

 private:
  // Target bytes [begin, end) of one parameter.
  struct Span {
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  struct Work;

  Result<void> move_chunk(Work& work, const Chunk& chunk);
  Result<void> move_dense(Work& work, uint32_t first_run, uint32_t end_run, const Span& span);
  Result<void> move_scattered(Work& work, uint32_t run);
  void count_bytes(uint64_t bytes);

  const uint32_t threads_;
  std::atomic<uint64_t> moved_bytes_{0};
};

}  // namespace transfuse

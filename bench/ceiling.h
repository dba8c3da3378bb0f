// memcpy with several threads: what no refit on this host can beat.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/result.h"
#include "weights.h"

namespace transfuse::bench {

// Owns a source buffer of the target's size. Used from one thread.
class Ceiling {
 public:
  static Result<Ceiling> open(uint64_t size_bytes, uint32_t threads);
  // Copies the buffer over `target`, each thread one contiguous share; returns seconds.
  double copy_seconds(std::span<std::byte> target) const { return copy_seconds(target, threads_); }
  double copy_seconds(std::span<std::byte> target, uint32_t threads) const;

 private:
  Ceiling(Weights source, uint32_t threads) : source_(std::move(source)), threads_(threads) {}
  Weights source_;
  uint32_t threads_;
};

}  // namespace transfuse::bench

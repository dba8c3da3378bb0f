// A plan whose sources are files: who serves every run, and sums of what files hold.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "copy/file_read.h"
#include "files/side.h"
#include "plan/copies.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Immutable after plan_reading(). Safe to use from any thread; the side outlives it.
class Reading {
 public:
  Reading(CopyTable copies, const ReadableSide& side, std::vector<uint32_t> holder,
          std::vector<uint32_t> rank)
      : copies_(std::move(copies)),
        side_(&side),
        holder_(std::move(holder)),
        rank_(std::move(rank)) {}

  const Plan& plan() const { return copies_.plan(); }
  // The copy of a run, with source_offset_bytes from the start of its parameter and no target.
  StridedCopy copy(uint32_t run) const;
  FileSpan source(uint32_t run) const;  // from the start of the parameter
  // Of run `run` as the target will hold it. `scratch`: kFileScratchBytes.
  Result<uint64_t> fingerprint(uint32_t run, std::span<std::byte> scratch) const;

 private:
  CopyTable copies_;
  const ReadableSide* side_;
  std::vector<uint32_t> holder_;  // per run
  std::vector<uint32_t> rank_;    // per run
};

// kLayoutMismatch where `side` does not hold all of `target`.
Result<Reading> plan_reading(const Layout& target, const ReadableSide& side, uint64_t chunk_bytes);

// Whole tensors of `side`, in the dtypes of `probe`'s parameters, one per parameter: the
// fingerprint of each, the same however they are sharded.
Result<std::vector<uint64_t>> whole_fingerprints(const Layout& probe, const ReadableSide& side,
                                                 uint32_t threads);

// kFingerprintMismatch unless rank `rank` of `target` holds what `reading` reads, run by run.
Result<void> compare_fingerprints(const Reading& reading, const ReadableSide& target, size_t rank,
                                  uint32_t threads);

// A buffer for each of several threads, made when it is first used.
class ThreadScratch {
 public:
  explicit ThreadScratch(uint32_t threads) : buffers_(threads) {}
  std::span<std::byte> of(uint32_t worker) {
    if (buffers_[worker].empty()) buffers_[worker].resize(kFileScratchBytes);
    return buffers_[worker];
  }

 private:
  std::vector<std::vector<std::byte>> buffers_;
};

// Calls body(worker, item) for every item, on the calling thread (worker 0) and threads - 1 others.
// The first error ends it and is returned. `tick` (may be empty) is called on the calling thread
// from time to time.
Result<void> for_each_parallel(uint32_t threads, size_t count,
                               const std::function<Result<void>(uint32_t, size_t)>& body,
                               const std::function<void()>& tick = {});

}  // namespace transfuse

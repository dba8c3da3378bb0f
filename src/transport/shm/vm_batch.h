// Turns strided copies into full process_vm_readv batches: rows straight into place where that is
// all there is to do, else through a buffer and run_copy().
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/shm/connection.h"

namespace transfuse::shm {

// Collects until a batch is full, then reads. Lives on the stack of one thread for one
// ReadSource::read(); allocates nothing.
class VmBatch {
 public:
  // `address`: of the region, in `process`.
  VmBatch(const Connection& process, uint64_t address, std::span<std::byte> scratch)
      : process_(process), address_(address), scratch_(scratch) {}

  // `sum`: where the fingerprint is added up, or null if none is wanted.
  Result<void> add(const StridedCopy& copy, uint64_t* sum);
  Result<void> flush();

 private:
  static constexpr size_t kMaxPieces = 1024;  // IOV_MAX, the kernel's bound
  static constexpr size_t kMaxBlocks = 128;

  // Part of a copy that waits in the buffer.
  struct Block {
    StridedCopy copy;
    const std::byte* source = nullptr;
    uint64_t* sum = nullptr;
  };
  // A dimension of a copy while it is cut into blocks; the one with the smallest source stride is
  // first.
  struct Axis {
    int dimension = 0;
    uint64_t count = 1;
    uint64_t stride_bytes = 0;  // at the source
    uint64_t step = 1;          // elements per block
    uint64_t buffer_stride_bytes = 0;
  };

  Result<void> add_rows(const StridedCopy& copy);
  Result<void> add_scaled(const StridedCopy& copy, uint64_t* sum);
  Result<void> add_buffered(const StridedCopy& copy, uint64_t* sum);
  // Chooses `step` and `buffer_stride_bytes`; returns how many of the axes lie in one piece.
  int shape_blocks(std::array<Axis, 3>& axes, uint64_t element_bytes) const;
  Result<void> add_block(const StridedCopy& copy, uint64_t* sum, const std::array<Axis, 3>& axes,
                         const std::array<uint64_t, 3>& begin, int joined);
  // Room for one more piece on each side, or a flush.
  Result<void> make_room();
  void append(std::byte* target, uint64_t source, uint64_t size_bytes);
  Result<void> transfer();

  const Connection& process_;
  const uint64_t address_;
  const std::span<std::byte> scratch_;
  uint64_t scratch_used_ = 0;
  size_t local_count_ = 0;
  size_t remote_count_ = 0;
  size_t block_count_ = 0;
  uint64_t bytes_ = 0;
  std::array<iovec, kMaxPieces> local_;   // NOLINT: the first local_count_ are set
  std::array<iovec, kMaxPieces> remote_;  // NOLINT: the first remote_count_ are set
  std::array<Block, kMaxBlocks> blocks_;
};

}  // namespace transfuse::shm

// Reads between the host and the device, through two pinned buffers: while one travels, the other
// is filled or emptied by the CPU.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/staged_pieces.h"

namespace transfuse::cuda {

// One read. Spans are the caller's until it has ended.
struct StagedRead {
  std::span<const StridedCopy> copies;
  std::span<uint64_t> fingerprints;           // empty, or one per copy
  const RemoteRegion* host_region = nullptr;  // the source, into memory of the device;
  std::vector<CUdeviceptr> bases;  // or of each copy's source on the device, into the host's
  const RemoteRegion* host_scales = nullptr;  // of the scales that are read; null: as the source
  std::vector<CUdeviceptr> scale_bases;       // or likewise
  double gigabytes_per_second = 0;            // of bytes written; 0: all there is

  std::atomic<bool> cancelled{false};
  std::atomic<uint64_t> progress{0};    // target bytes
  std::optional<Result<void>> outcome;  // under the mutex of the StagedReads
};

// Executes reads one after another on one thread, which starts with the first. Casts and
// fingerprints are the CPU's, in its pass. Safe to call from any thread. The destructor cancels
// what is left and waits for its own thread.
class StagedReads {
 public:
  // `host` reads host regions; both outlive it.
  StagedReads(Transport& host, const Device& device);
  ~StagedReads();
  StagedReads(const StagedReads&) = delete;
  StagedReads& operator=(const StagedReads&) = delete;

  // The read lives until ended() has said so. kResourceExhausted: no pinned memory, or no thread.
  Result<void> submit(StagedRead& read) EXCLUDES(mutex_);
  // Whether nothing of it writes any more: its outcome is there.
  bool ended(const StagedRead& read) EXCLUDES(mutex_);
  void wait(const StagedRead& read) EXCLUDES(mutex_);

 private:
  struct Buffer {
    Memory memory;  // pinned
    Event idle;     // of the device
    std::vector<StridedCopy> pieces;
    std::vector<uint32_t> copy_of;  // per piece: which copy it is of
    std::vector<StagedPiece> staged;
    std::vector<StridedCopy> host_copies;
    std::vector<uint64_t> sums;
  };
  // What is left of a read to be cut: pieces of copy `next` that did not fit any more.
  struct Cutting {
    size_t next = 0;
    std::vector<StridedCopy> pieces;
    std::deque<BlockScales> scales;  // of pieces, also of those that the buffers still hold
    size_t used = 0;
  };

  Result<void> open() REQUIRES(mutex_);
  void work();
  Result<void> run(StagedRead& read);
  Result<void> to_device(StagedRead& read);
  Result<void> from_device(StagedRead& read);
  // Fills the buffer's list with the next pieces; false if there are none. kUnsupported: a block
  // that shares a scale does not fit.
  Result<bool> next_pieces(const StagedRead& read, Cutting& cutting, Buffer& buffer,
                           bool casts_first);
  Result<void> read_host(const StagedRead& read, Buffer& buffer);
  Result<void> write_host(Buffer& buffer, const MappedSource& source);
  // Between a strided box of the device and the buffer, on the stream.
  Result<void> enqueue(const StridedCopy& box, CUdeviceptr device, CUdeviceptr buffer,
                       uint32_t element_bytes, const int64_t (&stride)[3], bool to_device);
  void count(StagedRead& read, const Buffer& buffer);
  void keep_pace(const StagedRead& read, TimePoint start) const;

  Transport& host_;
  const Device& device_;
  Stream stream_;
  std::array<Buffer, 2> buffers_;
  ReadQueue queue_{{}};  // of the CPU's side of reads into the host

  Mutex mutex_;
  CondVar changed_;
  std::deque<StagedRead*> due_ GUARDED_BY(mutex_);
  StagedRead* running_ GUARDED_BY(mutex_) = nullptr;
  bool open_ GUARDED_BY(mutex_) = false;
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace transfuse::cuda

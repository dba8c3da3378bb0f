// Executes a device table on a GPU: one kernel launch, and beside it the GPU's copy engines for
// what they move faster.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/device_table.h"
#include "transport/cuda/scaled_copies.h"

namespace transfuse::cuda {

// Which engine moves a long plain run. The kernel reads another GPU at 0.945 of what the copy
// engines reach, which need about 0.4 us a piece and have no fingerprint; within one GPU the kernel
// is the faster one (docs/decisions/0003).
struct EngineChoice {
  bool copy_engines = false;                 // of a source on another GPU
  uint64_t piece_bytes = uint64_t{1} << 20;  // shorter ones are the kernel's
};

struct CopyOptions {
  DeviceTableOptions table{};
  EngineChoice engines{};
  uint64_t spread = 0;  // see DeviceTableBuilder::build()
};

// The copies of one target, ready on its device. Used from one thread; outlived by the device.
class PreparedCopies {
 public:
  // Copy i reads the region of bases[sources[i]] and sums into sum i if its fingerprint is set.
  // `source_count` bases. kResourceExhausted where the device has no room for the table; nothing is
  // left behind then.
  static Result<PreparedCopies> make(const Device& device, std::span<const StridedCopy> copies,
                                     std::span<const uint32_t> sources, uint32_t source_count,
                                     const CopyOptions& options);

  struct Launch {
    CUstream stream = nullptr;     // the copies come after what it was given before
    uint32_t multiprocessors = 0;  // at most so many; 0: all
  };
  // Puts everything on the stream and returns; allocates nothing. `bases`: device addresses as this
  // process sees them, the same in every launch that is captured in a graph.
  Result<void> launch(std::span<const CUdeviceptr> bases, const Launch& launch);
  // Where the sums of the last launch lie when the stream has come so far: one per copy.
  std::span<const uint64_t> sums() const;

  uint64_t target_bytes() const { return target_bytes_; }
  uint64_t source_bytes() const { return source_bytes_; }
  uint64_t engine_bytes() const { return engine_bytes_; }  // of target_bytes(), by copy engines
  uint64_t memory_bytes() const;                           // on the device

 private:
  // A contiguous piece for a copy engine.
  struct Piece {
    uint64_t source_offset;
    uint64_t target;
    uint64_t size_bytes;
    uint32_t source;
  };
  static constexpr int kEngineStreams = 4;

  PreparedCopies() = default;
  Result<void> upload(const DeviceTable& table);
  Result<void> set_bases(std::span<const CUdeviceptr> bases, CUstream stream);
  Result<void> launch_kernel(const Launch& launch);
  Result<void> launch_engines(CUstream stream);

  const Device* device_ = nullptr;
  uint64_t target_bytes_ = 0;
  uint64_t source_bytes_ = 0;
  uint64_t engine_bytes_ = 0;
  uint32_t item_count_ = 0;
  uint64_t sum_count_ = 0;
  Memory runs_;
  Memory items_;
  Memory bases_;
  Memory work_;        // sums, then the number of the next item
  Memory host_sums_;   // pinned
  Memory host_bases_;  // pinned
  ScaledCopies scaled_;
  std::vector<CUdeviceptr> known_bases_;
  std::vector<Piece> pieces_;  // longest first, dealt to the streams
  std::vector<CUdeviceptr> piece_targets_;
  std::vector<CUdeviceptr> piece_sources_;
  std::vector<size_t> piece_sizes_;
  Stream engine_streams_[kEngineStreams];
  Event begin_;
  Event ends_[kEngineStreams];
};

}  // namespace transfuse::cuda

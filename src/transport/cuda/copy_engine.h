// Executes a device table on a GPU: one kernel launch, and beside it the GPU's copy engines for
// what they move faster.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/result.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device.h"
#include "transport/cuda/device_table.h"
#include "transport/cuda/engine_pieces.h"
#include "transport/cuda/scaled_copies.h"

namespace transfuse::cuda {

// Which engine moves a long plain run. The kernel reads another GPU at 0.945 of what the copy
// engines reach, which need about 0.4 us a piece; what they bring is summed where it has landed,
// while the next pieces are on their way. Within one GPU the kernel is the faster one
// (docs/decisions/0003).
struct EngineChoice {
  bool copy_engines = false;                 // of a source on another GPU
  uint64_t piece_bytes = uint64_t{1} << 20;  // shorter ones are the kernel's
};

struct CopyOptions {
  DeviceTableOptions table{};
  EngineChoice engines{};
  uint64_t spread = 0;  // see DeviceTableBuilder::build()
};

// The copies of one target, ready on its device. Targets are virtual addresses, translated when the
// copies run: other pages that are mapped at the same address later are written as they should be.
// That something is mapped there is the caller's to know. Used from one thread; outlived by the
// device and, where launches are captured, outlives the graph. Launches and replays follow one
// another: all use the same sums.
class PreparedCopies {
 public:
  // Copy i reads the region of bases[sources[i]] and sums into sum i if its fingerprint is set.
  // `source_count` bases. `scale_sources`: whose base the scales count from that copy i reads;
  // empty: sources[i]. kResourceExhausted where the device has no room for the table; nothing is
  // left behind then.
  static Result<PreparedCopies> make(const Device& device, std::span<const StridedCopy> copies,
                                     std::span<const uint32_t> sources, uint32_t source_count,
                                     const CopyOptions& options,
                                     std::span<const uint32_t> scale_sources = {});

  struct Launch {
    CUstream stream = nullptr;     // the copies come after what it was given before
    uint32_t multiprocessors = 0;  // at most so many; 0: all
    // At most so many bytes of the wider side; 0: as fast as possible. Kept by the kernel, which
    // holds its multiprocessors while it waits.
    double gigabytes_per_second = 0;

    bool limited() const { return multiprocessors != 0 || gigabytes_per_second != 0; }
  };
  // Puts everything on the stream and returns; allocates nothing, and waits for the stream only
  // where `bases` are others than before, and before it returns an error of the driver. They are
  // device addresses as this process sees them.
  // Under a limit, and while the stream is captured, the kernel moves everything: the copy engines
  // know no pace, and as nodes of a graph they are slower than it and keep their addresses.
  // kInvalidArgument for a rate that is none, and for new bases while the stream is captured.
  Result<void> launch(std::span<const CUdeviceptr> bases, const Launch& launch);
  // Gives launch() its bases before a capture, and captured launches new ones: every replay that
  // comes after this on its stream reads them.
  Result<void> set_bases(std::span<const CUdeviceptr> bases, CUstream stream);
  // Where the sums of the last launch lie when the stream has come so far: one per copy.
  std::span<const uint64_t> sums() const;

  uint64_t target_bytes() const { return target_bytes_; }
  uint64_t source_bytes() const { return source_bytes_; }
  uint64_t engine_bytes() const { return engine_bytes_; }  // of target_bytes(), by copy engines
  uint64_t memory_bytes() const;                           // on the device

 private:
  // The sums of what a leg of the copy engines brought: items that read the target.
  struct LandedLeg {
    uint32_t first_item = 0;
    uint32_t item_count = 0;
  };

  PreparedCopies() = default;
  // The table of what has landed, leg by leg.
  Result<DeviceTable> landed_table(std::span<const StridedCopy> copies,
                                   const DeviceTableOptions& options);
  Result<void> upload(const DeviceTable& table);
  Result<bool> captured(CUstream stream) const;
  Result<void> clear_work(CUstream stream) const;
  Result<void> launch_beside_engines(const Launch& launch);
  void end_all(CUstream stream);
  // The first `count` of the copies' items by at most `blocks`, and all that is scaled.
  Result<void> launch_items(const Launch& launch, uint32_t count, uint32_t blocks);
  Result<void> launch_sums(size_t leg, CUstream stream);
  Result<void> fetch_sums(CUstream stream) const;
  // Of launch number `progress` since the last clear_work().
  CopyLaunch arguments(uint32_t first_item, uint32_t item_count, size_t progress) const;

  const Device* device_ = nullptr;
  uint64_t target_bytes_ = 0;
  uint64_t source_bytes_ = 0;
  uint64_t engine_bytes_ = 0;
  uint32_t item_count_ = 0;         // of all copies
  uint32_t kernel_item_count_ = 0;  // the first ones: of what the copy engines never move
  uint32_t stage_bytes_ = 0;        // of a block; none where no item uses it
  uint64_t sum_count_ = 0;
  Memory runs_;
  Memory items_;
  Memory bases_;
  Memory work_;        // sums, then a CopyProgress for the copies and one for each landed leg
  Memory host_sums_;   // pinned
  Memory host_bases_;  // pinned
  ScaledCopies scaled_;
  std::vector<CUdeviceptr> known_bases_;
  EnginePieces pieces_;
  std::vector<LandedLeg> landed_;  // of each leg, where anything is summed
  Stream sum_stream_;
  Event summed_;
};

}  // namespace transfuse::cuda

// Times work on a GPU's stream; and the memory that benchmarks copy between GPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {

// Used from one thread; outlived by the device, whose kernels read the sources.
class GpuStopwatch {
 public:
  static Result<GpuStopwatch> create(const cuda::Device& device);

  CUstream stream() const { return stream_.get(); }
  const cuda::Device& device() const { return *device_; }
  // The median of several runs after one that warms up.
  Result<double> median_ms(const std::function<Result<void>()>& work) const;
  // GB/s of the copy engine on one contiguous piece.
  Result<double> one_piece(CUdeviceptr to, CUdeviceptr from, uint64_t size_bytes) const;
  // Pseudorandom bytes.
  Result<void> scramble(const cuda::Memory& memory);
  Result<void> clear(const cuda::Memory& memory) const;
  Result<void> wait() const;
  // The fingerprints of what lies where `copies`, which go into `memory`, have written.
  Result<std::vector<uint64_t>> sums_at_target(std::span<const StridedCopy> copies,
                                               const cuda::Memory& memory) const;

 private:
  GpuStopwatch() = default;

  const cuda::Device* device_ = nullptr;
  cuda::Stream stream_;
  cuda::Event begin_;
  cuda::Event end_;
  std::vector<std::byte> block_;
};

}  // namespace transfuse::bench

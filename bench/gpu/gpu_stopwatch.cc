// Events on a stream, and what the copies left at their target.
#include "gpu_stopwatch.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::bench {
namespace {

constexpr int kRepetitions = 7;

ElementOp plain(uint32_t bytes) {
  return bytes == 1   ? ElementOp::kCopy1
         : bytes == 2 ? ElementOp::kCopy2
         : bytes == 4 ? ElementOp::kCopy4
                      : ElementOp::kCopy8;
}

}  // namespace

Result<GpuStopwatch> GpuStopwatch::create(const cuda::Device& device) {
  GpuStopwatch watch;
  watch.device_ = &device;
  TRANSFUSE_ASSIGN_OR_RETURN(watch.stream_, cuda::Stream::create(device));
  TRANSFUSE_ASSIGN_OR_RETURN(watch.begin_, cuda::Event::create(device, cuda::EventKind::kTiming));
  TRANSFUSE_ASSIGN_OR_RETURN(watch.end_, cuda::Event::create(device, cuda::EventKind::kTiming));
  return watch;
}

Result<double> GpuStopwatch::median_ms(const std::function<Result<void>()>& work) const {
  const cuda::Driver& driver = device_->driver();
  const cuda::Current current = device_->use();
  std::vector<float> samples;
  for (int i = 0; i <= kRepetitions; ++i) {
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, begin_.get(), stream_.get()));
    TRANSFUSE_RETURN_IF_ERROR(work());
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, end_.get(), stream_.get()));
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventSynchronize, end_.get()));
    float ms = 0;
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(driver, cuEventElapsedTime, &ms, begin_.get(), end_.get()));
    if (i > 0) samples.push_back(ms);  // the first one warms up
  }
  std::ranges::sort(samples);
  return static_cast<double>(samples[samples.size() / 2]);
}

Result<double> GpuStopwatch::one_piece(CUdeviceptr to, CUdeviceptr from,
                                       uint64_t size_bytes) const {
  TRANSFUSE_ASSIGN_OR_RETURN(const double ms, median_ms([&] {
                               return TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync, to, from,
                                                     size_bytes, stream_.get());
                             }));
  return static_cast<double>(size_bytes) / ms / 1e6;
}

// From a block that is made here and copied on with a growing stride.
Result<void> GpuStopwatch::scramble(const cuda::Memory& memory) {
  constexpr uint64_t kBlock = (uint64_t{8} << 20) + 24;
  if (block_.empty()) {
    block_.resize(kBlock);
    uint64_t state = 88172645463325252U;
    for (auto& byte : block_) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      byte = static_cast<std::byte>(state >> 32);
    }
  }
  const cuda::Current current = device_->use();
  for (uint64_t at = 0; at < memory.size_bytes(); at += kBlock) {
    const uint64_t size = std::min(kBlock, memory.size_bytes() - at);
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync, memory.address() + at,
                       reinterpret_cast<CUdeviceptr>(block_.data()), size, stream_.get()));
  }
  return wait();
}

Result<void> GpuStopwatch::clear(const cuda::Memory& memory) const {
  const cuda::Current current = device_->use();
  return TRANSFUSE_CUDA(device_->driver(), cuMemsetD8Async, memory.address(), 0,
                        memory.size_bytes(), stream_.get());
}

Result<void> GpuStopwatch::wait() const {
  const cuda::Current current = device_->use();
  return TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream_.get());
}

Result<std::vector<uint64_t>> GpuStopwatch::sums_at_target(std::span<const StridedCopy> copies,
                                                           const cuda::Memory& memory) const {
  std::vector<StridedCopy> held(copies.begin(), copies.end());
  for (StridedCopy& copy : held) {
    copy.source_offset_bytes = reinterpret_cast<uint64_t>(copy.target) - memory.address();
    std::copy_n(copy.target_stride, 3, copy.source_stride);
    copy.target = nullptr;
    copy.op = plain(target_element_bytes(copy.op));
    copy.fingerprint = true;
  }
  const std::vector<uint32_t> sources(held.size(), 0);
  TRANSFUSE_ASSIGN_OR_RETURN(cuda::PreparedCopies prepared,
                             cuda::PreparedCopies::make(*device_, held, sources, 1, {}));
  const std::vector<CUdeviceptr> bases = {memory.address()};
  TRANSFUSE_RETURN_IF_ERROR(prepared.launch(bases, {.stream = stream_.get()}));
  TRANSFUSE_RETURN_IF_ERROR(wait());
  return std::vector<uint64_t>(prepared.sums().begin(), prepared.sums().end());
}

}  // namespace transfuse::bench

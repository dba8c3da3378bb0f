// Splits copies between kernel and copy engines, and puts both on a stream.
#include "transport/cuda/copy_engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <vector>

#include "copy/element_size.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device.h"
#include "transport/cuda/device_table.h"
#include "transport/cuda/driver.h"

namespace transfuse::cuda {
namespace {

// The bytes that `copy` moves if they are one piece on both sides and nobody asks for more than the
// move; else 0.
uint64_t contiguous_bytes(const StridedCopy& copy) {
  if (copy.fingerprint || source_bytes_of(copy.op) != target_bytes_of(copy.op)) return 0;
  int64_t span = 1;
  for (int i = 2; i >= 0; --i) {
    if (copy.count[i] == 1) continue;
    if (copy.source_stride[i] != span || copy.target_stride[i] != span) return 0;
    span *= copy.count[i];
  }
  return copy.target_bytes();
}

constexpr double kSlowest = 0.001;

// Nanoseconds a byte; 0 without a pace.
Result<double> pace_of(double gigabytes_per_second) {
  if (gigabytes_per_second == 0) return 0.0;
  if (!std::isfinite(gigabytes_per_second) || gigabytes_per_second < kSlowest) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a pace of {} GB/s: expected 0 (as fast as possible) or at least {}",
                             gigabytes_per_second, kSlowest)};
  }
  return 1 / gigabytes_per_second;
}

}  // namespace

Result<PreparedCopies> PreparedCopies::make(const Device& device,
                                            std::span<const StridedCopy> copies,
                                            std::span<const uint32_t> sources,
                                            uint32_t source_count, const CopyOptions& options,
                                            std::span<const uint32_t> scale_sources) {
  TRANSFUSE_CHECK(copies.size() == sources.size());
  PreparedCopies prepared;
  prepared.device_ = &device;
  DeviceTableBuilder builder(options.table);
  DeviceTableBuilder engine_builder(options.table);
  ScaledTable scaled;
  const bool engines = options.engines.copy_engines && device.driver().batch_copy != nullptr;
  for (uint32_t i = 0; i < copies.size(); ++i) {
    const StridedCopy& copy = copies[i];
    TRANSFUSE_CHECK(sources[i] < source_count);
    prepared.target_bytes_ += copy.target_bytes();
    prepared.source_bytes_ += copy.element_count() * source_bytes_of(copy.op);
    if (is_scaled(copy.op)) {
      const ScaledSources bases = {sources[i],
                                   scale_sources.empty() ? sources[i] : scale_sources[i]};
      TRANSFUSE_CHECK(bases.scales < source_count);
      TRANSFUSE_RETURN_IF_ERROR(add_scaled(copy, bases, i, options.table.base_alignment, scaled));
      continue;
    }
    const uint64_t piece = engines ? contiguous_bytes(copy) : 0;
    const bool by_engine = piece > 0 && piece >= options.engines.piece_bytes;
    TRANSFUSE_RETURN_IF_ERROR((by_engine ? engine_builder : builder).add(copy, sources[i], i));
    if (by_engine) {
      prepared.engine_bytes_ += piece;
      prepared.pieces_.push_back({.source_offset = copy.source_offset_bytes,
                                  .target = reinterpret_cast<uint64_t>(copy.target),
                                  .size_bytes = piece,
                                  .source = sources[i]});
    }
  }
  const bool any_sum = std::ranges::any_of(copies, &StridedCopy::fingerprint);
  prepared.sum_count_ = any_sum ? copies.size() : 0;
  // Dealt to the streams longest first: they end at about the same time.
  std::ranges::stable_sort(prepared.pieces_, std::greater(), &Piece::size_bytes);
  prepared.piece_targets_.resize(prepared.pieces_.size());
  prepared.piece_sources_.resize(prepared.pieces_.size());
  prepared.piece_sizes_.resize(prepared.pieces_.size());
  if (!prepared.pieces_.empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(prepared.begin_, Event::create(device, EventKind::kOrder));
    for (int i = 0; i < kEngineStreams; ++i) {
      TRANSFUSE_ASSIGN_OR_RETURN(prepared.engine_streams_[i], Stream::create(device));
      TRANSFUSE_ASSIGN_OR_RETURN(prepared.ends_[i], Event::create(device, EventKind::kOrder));
    }
  }
  prepared.known_bases_.resize(source_count);
  TRANSFUSE_ASSIGN_OR_RETURN(prepared.scaled_, ScaledCopies::make(device, scaled));
  DeviceTable table = builder.build(options.spread);
  prepared.kernel_item_count_ = static_cast<uint32_t>(table.items.size());
  TRANSFUSE_RETURN_IF_ERROR(table.append(engine_builder.build(options.spread)));
  TRANSFUSE_RETURN_IF_ERROR(prepared.upload(table));
  return prepared;
}

Result<void> PreparedCopies::upload(const DeviceTable& table) {
  const auto allocate = [&](MemoryKind place, uint64_t size) {
    return Memory::allocate(*device_, place, size);
  };
  item_count_ = static_cast<uint32_t>(table.items.size());
  const bool staged = std::ranges::any_of(table.runs, uses_stage, &DeviceRun::walk);
  stage_bytes_ = staged ? kStageBytes : 0;
  const uint64_t bases_bytes = known_bases_.size() * sizeof(CUdeviceptr);
  const uint64_t sums_bytes = sum_count_ * sizeof(uint64_t);
  TRANSFUSE_ASSIGN_OR_RETURN(runs_,
                             allocate(MemoryKind::kDevice, table.runs.size() * sizeof(DeviceRun)));
  TRANSFUSE_ASSIGN_OR_RETURN(
      items_, allocate(MemoryKind::kDevice, table.items.size() * sizeof(DeviceItem)));
  TRANSFUSE_ASSIGN_OR_RETURN(bases_, allocate(MemoryKind::kDevice, bases_bytes));
  TRANSFUSE_ASSIGN_OR_RETURN(work_,
                             allocate(MemoryKind::kDevice, sums_bytes + sizeof(CopyProgress)));
  TRANSFUSE_ASSIGN_OR_RETURN(host_sums_, allocate(MemoryKind::kPinned, sums_bytes));
  TRANSFUSE_ASSIGN_OR_RETURN(host_bases_, allocate(MemoryKind::kPinned, bases_bytes));
  TRANSFUSE_ASSIGN_OR_RETURN(const Stream stream, Stream::create(*device_));
  const Current current = device_->use();
  const Driver& driver = device_->driver();
  const auto send = [&](const Memory& to, const void* from) {
    if (to.size_bytes() == 0) return Result<void>();
    return TRANSFUSE_CUDA(driver, cuMemcpyAsync, to.address(), reinterpret_cast<CUdeviceptr>(from),
                          to.size_bytes(), stream.get());
  };
  TRANSFUSE_RETURN_IF_ERROR(send(runs_, table.runs.data()));
  TRANSFUSE_RETURN_IF_ERROR(send(items_, table.items.data()));
  return TRANSFUSE_CUDA(driver, cuStreamSynchronize, stream.get());
}

// Sent only when they changed: the table itself holds offsets.
Result<void> PreparedCopies::set_bases(std::span<const CUdeviceptr> bases, CUstream stream) {
  TRANSFUSE_CHECK(bases.size() == known_bases_.size());
  if (std::ranges::equal(bases, known_bases_)) return {};
  const Current current = device_->use();
  const Driver& driver = device_->driver();
  TRANSFUSE_ASSIGN_OR_RETURN(const bool capturing, captured(stream));
  if (capturing) {
    return Error{ErrorCode::kInvalidArgument,
                 "bases that differ from the last ones cannot be captured in a CUDA graph: call "
                 "set_bases() on a stream before the capture, and before a replay that is to read "
                 "other ones"};
  }
  // The last launch may still read the pinned copy.
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuStreamSynchronize, stream));
  std::ranges::copy(bases, host_bases_.as<CUdeviceptr>());
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemcpyAsync, bases_.address(),
                                           host_bases_.address(), bases_.size_bytes(), stream));
  std::ranges::copy(bases, known_bases_.begin());
  // Stream k takes pieces k, k + 4, ...
  size_t next = 0;
  for (int k = 0; k < kEngineStreams; ++k) {
    for (size_t i = static_cast<size_t>(k); i < pieces_.size(); i += kEngineStreams, ++next) {
      piece_targets_[next] = pieces_[i].target;
      piece_sources_[next] = bases[pieces_[i].source] + pieces_[i].source_offset;
      piece_sizes_[next] = pieces_[i].size_bytes;
    }
  }
  return {};
}

Result<bool> PreparedCopies::captured(CUstream stream) const {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device_->driver(), cuStreamIsCapturing, stream, &status));
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

Result<void> PreparedCopies::launch(std::span<const CUdeviceptr> bases, const Launch& launch) {
  const Current current = device_->use();
  TRANSFUSE_RETURN_IF_ERROR(set_bases(bases, launch.stream));
  bool engines = !pieces_.empty() && !launch.limited();
  if (engines) {
    TRANSFUSE_ASSIGN_OR_RETURN(const bool capturing, captured(launch.stream));
    engines = !capturing;
  }
  if (!engines) return launch_kernel(launch, item_count_);
  TRANSFUSE_RETURN_IF_ERROR(launch_engines(launch.stream));
  TRANSFUSE_RETURN_IF_ERROR(launch_kernel(launch, kernel_item_count_));
  for (const Event& end : ends_) {
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(device_->driver(), cuStreamWaitEvent, launch.stream, end.get(), 0));
  }
  return {};
}

Result<void> PreparedCopies::launch_kernel(const Launch& launch, uint32_t item_count) {
  TRANSFUSE_ASSIGN_OR_RETURN(const double ns_per_byte, pace_of(launch.gigabytes_per_second));
  if (item_count == 0 && scaled_.item_count() == 0) return {};
  const Driver& driver = device_->driver();
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemsetD8Async, work_.address(), 0,
                                           work_.size_bytes(), launch.stream));
  CopyLaunch arguments{
      .runs = runs_.as<DeviceRun>(),
      .items = items_.as<DeviceItem>(),
      .bases = bases_.as<uint64_t>(),
      .sums = work_.as<uint64_t>(),
      .progress = reinterpret_cast<CopyProgress*>(work_.as<uint64_t>() + sum_count_),
      .ns_per_byte = ns_per_byte,
      .item_count = item_count};
  std::array<void*, 1> pointers = {&arguments};
  const uint32_t most = block_count(launch.multiprocessors, device_->multiprocessors());
  const uint32_t blocks = std::min(most, item_count);
  const Device::Kernels& kernels = device_->kernels();
  const bool any = stage_bytes_ > 0 || ns_per_byte > 0;
  const CUfunction kernel = sum_count_ > 0 ? (any ? kernels.copy_any_and_sum : kernels.copy_and_sum)
                                           : (any ? kernels.copy_any : kernels.copy);
  if (item_count > 0) {
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuLaunchKernel, kernel, blocks, 1, 1,
                                             kCopyThreads, 1, 1, stage_bytes_, launch.stream,
                                             pointers.data(), nullptr));
  }
  TRANSFUSE_RETURN_IF_ERROR(scaled_.launch({.stream = launch.stream,
                                            .blocks = most,
                                            .ns_per_byte = ns_per_byte,
                                            .bases = bases_.as<uint64_t>(),
                                            .sums = work_.as<uint64_t>()}));
  if (sum_count_ == 0) return {};
  return TRANSFUSE_CUDA(driver, cuMemcpyAsync, host_sums_.address(), work_.address(),
                        host_sums_.size_bytes(), launch.stream);
}

Result<void> PreparedCopies::launch_engines(CUstream stream) {
  const Driver& driver = device_->driver();
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t attribute_begin = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, begin_.get(), stream));
  size_t first = 0;
  for (size_t k = 0; k < kEngineStreams; ++k) {
    const size_t count = (pieces_.size() + kEngineStreams - 1 - k) / kEngineStreams;
    const CUstream own = engine_streams_[k].get();
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuStreamWaitEvent, own, begin_.get(), 0));
    if (count > 0) {
      TRANSFUSE_RETURN_IF_ERROR(
          driver.check(driver.batch_copy(piece_targets_.data() + first,
                                         piece_sources_.data() + first, piece_sizes_.data() + first,
                                         count, &attributes, &attribute_begin, 1, own),
                       "cuMemcpyBatchAsync"));
    }
    first += count;
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, ends_[k].get(), own));
  }
  return {};
}

std::span<const uint64_t> PreparedCopies::sums() const {
  return {host_sums_.as<const uint64_t>(), sum_count_};
}

uint64_t PreparedCopies::memory_bytes() const {
  return runs_.size_bytes() + items_.size_bytes() + bases_.size_bytes() + work_.size_bytes() +
         scaled_.memory_bytes();
}

}  // namespace transfuse::cuda

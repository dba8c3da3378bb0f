// Splits copies between kernel and copy engines, and puts both on a stream.
#include "transport/cuda/copy_engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "copy/element_size.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device.h"
#include "transport/cuda/device_table.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/engine_pieces.h"
#include "transport/cuda/scaled_copies.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse::cuda {
namespace {

// The bytes that `copy` moves if they are one piece on both sides and are not changed on the way;
// else 0.
uint64_t contiguous_bytes(const StridedCopy& copy) {
  if (copy.target == nullptr || source_bytes_of(copy.op) != target_bytes_of(copy.op)) return 0;
  int64_t span = 1;
  for (int i = 2; i >= 0; --i) {
    if (copy.count[i] == 1) continue;
    if (copy.source_stride[i] != span || copy.target_stride[i] != span) return 0;
    span *= copy.count[i];
  }
  return copy.target_bytes();
}

// The sum of what `copy`, one piece, has written. Its source is address 0.
StridedCopy sum_of_landed(const StridedCopy& copy) {
  StridedCopy sum = copy;
  sum.source_offset_bytes = reinterpret_cast<uint64_t>(copy.target);
  sum.target = nullptr;
  return sum;
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
  std::vector<EnginePiece> pieces;
  bool landed_sums = false;
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
      landed_sums = landed_sums || copy.fingerprint;
      pieces.push_back({.source_offset = copy.source_offset_bytes,
                        .target = reinterpret_cast<uint64_t>(copy.target),
                        .size_bytes = piece,
                        .source = sources[i],
                        .copy = i});
    }
  }
  const bool any_sum = std::ranges::any_of(copies, &StridedCopy::fingerprint);
  prepared.sum_count_ = any_sum ? copies.size() : 0;
  TRANSFUSE_ASSIGN_OR_RETURN(prepared.pieces_,
                             EnginePieces::make(device, std::move(pieces), landed_sums));
  // None is there yet; 0 is one, that of the process' own memory.
  prepared.known_bases_.assign(source_count, UINT64_MAX);
  TRANSFUSE_ASSIGN_OR_RETURN(prepared.scaled_, ScaledCopies::make(device, scaled));
  DeviceTable table = builder.build(options.spread);
  prepared.kernel_item_count_ = static_cast<uint32_t>(table.items.size());
  TRANSFUSE_RETURN_IF_ERROR(table.append(engine_builder.build(options.spread)));
  prepared.item_count_ = static_cast<uint32_t>(table.items.size());
  if (landed_sums) {
    TRANSFUSE_ASSIGN_OR_RETURN(prepared.sum_stream_, Stream::create(device));
    TRANSFUSE_ASSIGN_OR_RETURN(prepared.summed_, Event::create(device, EventKind::kOrder));
    TRANSFUSE_ASSIGN_OR_RETURN(const DeviceTable landed,
                               prepared.landed_table(copies, options.table));
    TRANSFUSE_RETURN_IF_ERROR(table.append(landed));
  }
  TRANSFUSE_RETURN_IF_ERROR(prepared.upload(table));
  return prepared;
}

Result<DeviceTable> PreparedCopies::landed_table(std::span<const StridedCopy> copies,
                                                 const DeviceTableOptions& options) {
  const auto address_zero = static_cast<uint32_t>(known_bases_.size());
  DeviceTable all;
  for (size_t leg = 0; leg < pieces_.leg_count(); ++leg) {
    DeviceTableBuilder builder(options);
    for (const EnginePiece& piece : pieces_.leg(leg)) {
      const StridedCopy& copy = copies[piece.copy];
      if (!copy.fingerprint) continue;
      TRANSFUSE_RETURN_IF_ERROR(builder.add(sum_of_landed(copy), address_zero, piece.copy));
    }
    const DeviceTable table = builder.build(0);
    landed_.push_back({.first_item = item_count_ + static_cast<uint32_t>(all.items.size()),
                       .item_count = static_cast<uint32_t>(table.items.size())});
    TRANSFUSE_RETURN_IF_ERROR(all.append(table));
  }
  return all;
}

Result<void> PreparedCopies::upload(const DeviceTable& table) {
  const auto allocate = [&](MemoryKind place, uint64_t size) {
    return Memory::allocate(*device_, place, size);
  };
  const bool staged = std::ranges::any_of(table.runs, uses_stage, &DeviceRun::walk);
  stage_bytes_ = staged ? kStageBytes : 0;
  const uint64_t bases_bytes = (known_bases_.size() + 1) * sizeof(CUdeviceptr);  // address 0 last
  const uint64_t sums_bytes = sum_count_ * sizeof(uint64_t);
  TRANSFUSE_ASSIGN_OR_RETURN(runs_,
                             allocate(MemoryKind::kDevice, table.runs.size() * sizeof(DeviceRun)));
  TRANSFUSE_ASSIGN_OR_RETURN(
      items_, allocate(MemoryKind::kDevice, table.items.size() * sizeof(DeviceItem)));
  TRANSFUSE_ASSIGN_OR_RETURN(bases_, allocate(MemoryKind::kDevice, bases_bytes));
  const uint64_t progress_bytes = (1 + landed_.size()) * sizeof(CopyProgress);
  TRANSFUSE_ASSIGN_OR_RETURN(work_, allocate(MemoryKind::kDevice, sums_bytes + progress_bytes));
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
  host_bases_.as<CUdeviceptr>()[bases.size()] = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemcpyAsync, bases_.address(),
                                           host_bases_.address(), bases_.size_bytes(), stream));
  std::ranges::copy(bases, known_bases_.begin());
  pieces_.set_bases(bases);
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
  auto launched = clear_work(launch.stream);
  if (launched && engines) {
    launched = launch_beside_engines(launch);
  } else if (launched) {
    launched = launch_items(launch, item_count_,
                            block_count(launch.multiprocessors, device_->multiprocessors()));
  }
  if (launched) launched = fetch_sums(launch.stream);
  if (!launched) end_all(launch.stream);
  return launched;
}

// Nothing reads or writes after an error was returned: nobody would wait for it.
void PreparedCopies::end_all(CUstream stream) {
  pieces_.wait();
  const Driver& driver = device_->driver();
  if (sum_stream_.get() != nullptr) (void)driver.cuStreamSynchronize(sum_stream_.get());
  // What is captured does not run.
  if (const auto capturing = captured(stream); capturing && !*capturing) {
    (void)driver.cuStreamSynchronize(stream);
  }
}

// A leg is summed where it has landed while the next ones are on their way; the kernel leaves room
// for that on every multiprocessor.
Result<void> PreparedCopies::launch_beside_engines(const Launch& launch) {
  const Driver& driver = device_->driver();
  const uint32_t blocks =
      device_->multiprocessors() * (landed_.empty() ? kCopyBlocksPerMultiprocessor : 1);
  TRANSFUSE_RETURN_IF_ERROR(pieces_.come_after(launch.stream));
  for (size_t leg = 0; leg < pieces_.leg_count(); ++leg) {
    TRANSFUSE_RETURN_IF_ERROR(pieces_.launch(leg));
    if (leg == 0) TRANSFUSE_RETURN_IF_ERROR(launch_items(launch, kernel_item_count_, blocks));
    if (!landed_.empty()) TRANSFUSE_RETURN_IF_ERROR(launch_sums(leg, sum_stream_.get()));
  }
  if (landed_.empty()) return pieces_.let_follow(launch.stream, pieces_.leg_count() - 1);
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(driver, cuEventRecord, summed_.get(), sum_stream_.get()));
  return TRANSFUSE_CUDA(driver, cuStreamWaitEvent, launch.stream, summed_.get(), 0);
}

Result<void> PreparedCopies::launch_sums(size_t leg, CUstream stream) {
  TRANSFUSE_RETURN_IF_ERROR(pieces_.let_follow(stream, leg));
  const LandedLeg& landed = landed_[leg];
  if (landed.item_count == 0) return {};
  CopyLaunch launch = arguments(landed.first_item, landed.item_count, 1 + leg);
  std::array<void*, 1> pointers = {&launch};
  const uint32_t blocks = std::min(block_count(0, device_->multiprocessors()), landed.item_count);
  return TRANSFUSE_CUDA(device_->driver(), cuLaunchKernel, device_->kernels().copy_and_sum, blocks,
                        1, 1, kCopyThreads, 1, 1, 0, stream, pointers.data(), nullptr);
}

Result<void> PreparedCopies::clear_work(CUstream stream) const {
  return TRANSFUSE_CUDA(device_->driver(), cuMemsetD8Async, work_.address(), 0, work_.size_bytes(),
                        stream);
}

Result<void> PreparedCopies::fetch_sums(CUstream stream) const {
  if (sum_count_ == 0) return {};
  return TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync, host_sums_.address(), work_.address(),
                        host_sums_.size_bytes(), stream);
}

CopyLaunch PreparedCopies::arguments(uint32_t first_item, uint32_t item_count,
                                     size_t progress) const {
  return {.runs = runs_.as<DeviceRun>(),
          .items = items_.as<DeviceItem>() + first_item,
          .bases = bases_.as<uint64_t>(),
          .sums = work_.as<uint64_t>(),
          .progress = reinterpret_cast<CopyProgress*>(work_.as<uint64_t>() + sum_count_) + progress,
          .item_count = item_count};
}

Result<void> PreparedCopies::launch_items(const Launch& launch, uint32_t count, uint32_t blocks) {
  const Driver& driver = device_->driver();
  CopyLaunch copies = arguments(0, count, 0);
  TRANSFUSE_ASSIGN_OR_RETURN(copies.ns_per_byte, pace_of(launch.gigabytes_per_second));
  std::array<void*, 1> pointers = {&copies};
  const Device::Kernels& kernels = device_->kernels();
  const bool any = stage_bytes_ > 0 || copies.ns_per_byte > 0;
  const CUfunction kernel = sum_count_ > 0 ? (any ? kernels.copy_any_and_sum : kernels.copy_and_sum)
                                           : (any ? kernels.copy_any : kernels.copy);
  if (count > 0) {
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(driver, cuLaunchKernel, kernel, std::min(blocks, count), 1, 1, kCopyThreads,
                       1, 1, stage_bytes_, launch.stream, pointers.data(), nullptr));
  }
  return scaled_.launch({.stream = launch.stream,
                         .blocks = blocks,
                         .ns_per_byte = copies.ns_per_byte,
                         .bases = bases_.as<uint64_t>(),
                         .sums = work_.as<uint64_t>()});
}

std::span<const uint64_t> PreparedCopies::sums() const {
  return {host_sums_.as<const uint64_t>(), sum_count_};
}

uint64_t PreparedCopies::memory_bytes() const {
  return runs_.size_bytes() + items_.size_bytes() + bases_.size_bytes() + work_.size_bytes() +
         scaled_.memory_bytes();
}

}  // namespace transfuse::cuda

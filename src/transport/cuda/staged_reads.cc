// The two directions of a staged read, and the thread that walks them.
#include "transport/cuda/staged_reads.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/thread.h"
#include "copy/element_size.h"
#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/staged_pieces.h"

namespace transfuse::cuda {
namespace {

constexpr uint64_t kBufferBytes = uint64_t{32} << 20;
constexpr uint64_t kPieceBytes = uint64_t{4} << 20;  // small enough that threads share a buffer
constexpr uint64_t kMaxPitch = (uint64_t{1} << 31) - 1;
constexpr auto kSlice = std::chrono::milliseconds(50);  // how late a cancel is seen

Error cancelled_error() { return {ErrorCode::kCancelled, "cancelled by the caller"}; }

}  // namespace

StagedReads::StagedReads(Transport& host, const Device& device) : host_(host), device_(device) {}

StagedReads::~StagedReads() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    for (StagedRead* read : due_) read->outcome = cancelled_error();
    due_.clear();
    if (running_ != nullptr) running_->cancelled = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

Result<void> StagedReads::open() {
  for (Buffer& buffer : buffers_) {
    TRANSFUSE_ASSIGN_OR_RETURN(buffer.memory,
                               Memory::allocate(device_, MemoryKind::kPinned, kBufferBytes));
    TRANSFUSE_ASSIGN_OR_RETURN(buffer.idle, Event::create(device_, EventKind::kOrder));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(stream_, Stream::create(device_));
  TRANSFUSE_ASSIGN_OR_RETURN(thread_, start_thread("staging", [this] { work(); }));
  open_ = true;
  return {};
}

Result<void> StagedReads::submit(StagedRead& read) {
  const MutexLock lock(mutex_);
  if (!open_) TRANSFUSE_RETURN_IF_ERROR(open());
  due_.push_back(&read);
  changed_.notify_all();
  return {};
}

bool StagedReads::ended(const StagedRead& read) {
  const MutexLock lock(mutex_);
  return read.outcome.has_value();
}

void StagedReads::wait(const StagedRead& read) {
  const MutexLock lock(mutex_);
  while (!read.outcome) changed_.wait(mutex_);
}

void StagedReads::work() {
  const MutexLock lock(mutex_);
  while (true) {
    while (due_.empty() && !stopping_) changed_.wait(mutex_);
    if (due_.empty()) return;
    StagedRead& read = *due_.front();
    due_.pop_front();
    running_ = &read;
    mutex_.unlock();

    Result<void> outcome = run(read);

    mutex_.lock();
    read.outcome = std::move(outcome);
    running_ = nullptr;
    changed_.notify_all();
  }
}

Result<void> StagedReads::run(StagedRead& read) {
  for (size_t i = 0; i < read.fingerprints.size(); ++i) {
    if (read.copies[i].fingerprint) read.fingerprints[i] = 0;
  }
  const Current current = device_.use();
  Result<void> outcome = read.host_region != nullptr ? to_device(read) : from_device(read);
  // Nothing may be under way any more, whatever happened.
  Result<void> idle = TRANSFUSE_CUDA(device_.driver(), cuStreamSynchronize, stream_.get());
  return outcome ? std::move(idle) : std::move(outcome);
}

Result<bool> StagedReads::next_pieces(const StagedRead& read, Cutting& cutting, Buffer& buffer,
                                      bool casts_first) {
  buffer.pieces.clear();
  buffer.copy_of.clear();
  buffer.staged.clear();
  uint64_t used = 0;
  while (true) {
    if (cutting.used == cutting.pieces.size()) {
      if (cutting.next == read.copies.size()) break;
      const StridedCopy& copy = read.copies[cutting.next++];
      const uint32_t element = std::max(source_bytes_of(copy.op), target_bytes_of(copy.op));
      cutting.pieces.clear();
      cutting.used = 0;
      if (is_scaled(copy.op)) {
        cut_scaled_copy(copy, kPieceBytes / element, cutting.pieces, cutting.scales);
      } else {
        cut_copy(copy, kPieceBytes / element, cutting.pieces);
      }
      continue;
    }
    const StridedCopy& piece = cutting.pieces[cutting.used];
    // Every piece begins where any element may.
    const uint64_t size = (staged_bytes(piece, casts_first) + 15) / 16 * 16;
    if (size > kBufferBytes) {
      return Error{
          ErrorCode::kUnsupported,
          fmt::format("a block of {}x{} elements that share a scale has {} bytes, and what "
                      "goes between host and device goes through buffers of {}: let both "
                      "sides keep it on GPUs, or both in memory of the host",
                      piece.count[1], piece.count[2], size, kBufferBytes)};
    }
    if (used + size > kBufferBytes) break;
    buffer.pieces.push_back(piece);
    buffer.copy_of.push_back(static_cast<uint32_t>(cutting.next - 1));
    buffer.staged.push_back(stage_piece(piece, buffer.memory.as<std::byte>(), used, casts_first));
    used += size;
    ++cutting.used;
  }
  return !buffer.pieces.empty();
}

void StagedReads::count(StagedRead& read, const Buffer& buffer) {
  uint64_t bytes = 0;
  for (size_t i = 0; i < buffer.pieces.size(); ++i) {
    bytes += buffer.pieces[i].target_bytes();
    if (read.fingerprints.empty() || !buffer.pieces[i].fingerprint) continue;
    read.fingerprints[buffer.copy_of[i]] += buffer.sums[i];
  }
  read.progress += bytes;
}

void StagedReads::keep_pace(const StagedRead& read, TimePoint start) const {
  if (read.gigabytes_per_second <= 0) return;
  const double nanoseconds = static_cast<double>(read.progress) / read.gigabytes_per_second;
  std::this_thread::sleep_until(start + Duration(static_cast<int64_t>(nanoseconds)));
}

// The host's transport gathers into the buffer, with cast and fingerprint.
Result<void> StagedReads::read_host(const StagedRead& read, Buffer& buffer) {
  buffer.host_copies.clear();
  for (const StagedPiece& staged : buffer.staged) {
    buffer.host_copies.push_back(staged.to_stage);
    if (is_scaled(staged.to_stage.op)) buffer.host_copies.back().scales = &staged.blocks;
  }
  buffer.sums.assign(buffer.host_copies.size(), 0);
  TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket,
                             host_.submit({.region = read.host_region,
                                           .copies = buffer.host_copies,
                                           .fingerprints = buffer.sums,
                                           .scale_region = read.host_scales}));
  bool told = false;
  while (true) {
    const TicketState state = host_.poll(ticket);
    if (state != TicketState::kPending && state != TicketState::kPoisoned) break;
    if (read.cancelled && !told) host_.cancel(ticket);
    told = told || read.cancelled;
    if (told) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } else {
      host_.wait_any({&ticket, 1}, Deadline::after(kSlice));
    }
  }
  return host_.finish(ticket);
}

Result<void> StagedReads::to_device(StagedRead& read) {
  const TimePoint start = std::chrono::steady_clock::now();
  Cutting cutting;
  for (size_t turn = 0;; ++turn) {
    Buffer& buffer = buffers_[turn % 2];
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(device_.driver(), cuEventSynchronize, buffer.idle.get()));
    TRANSFUSE_ASSIGN_OR_RETURN(const bool more, next_pieces(read, cutting, buffer, true));
    if (!more) return {};
    TRANSFUSE_RETURN_IF_ERROR(read_host(read, buffer));
    for (const StagedPiece& staged : buffer.staged) {
      const StridedCopy& box = staged.from_stage;
      TRANSFUSE_RETURN_IF_ERROR(enqueue(box, reinterpret_cast<CUdeviceptr>(box.target),
                                        buffer.memory.address() + box.source_offset_bytes,
                                        target_bytes_of(box.op), box.target_stride, true));
      const StridedCopy& scales = staged.scales;
      if (scales.element_count() == 0) continue;
      TRANSFUSE_RETURN_IF_ERROR(enqueue(scales, reinterpret_cast<CUdeviceptr>(scales.target),
                                        buffer.memory.address() + scales.source_offset_bytes,
                                        target_bytes_of(scales.op), scales.target_stride, true));
    }
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(device_.driver(), cuEventRecord, buffer.idle.get(), stream_.get()));
    count(read, buffer);
    if (read.cancelled) return cancelled_error();
    keep_pace(read, start);
  }
}

// The CPU spreads what has arrived in the buffer, with cast and fingerprint.
Result<void> StagedReads::write_host(Buffer& buffer, const MappedSource& source) {
  buffer.host_copies.clear();
  for (const StagedPiece& staged : buffer.staged) {
    buffer.host_copies.push_back(staged.from_stage);
    if (is_scaled(staged.from_stage.op)) buffer.host_copies.back().scales = &staged.blocks;
  }
  buffer.sums.assign(buffer.host_copies.size(), 0);
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device_.driver(), cuEventSynchronize, buffer.idle.get()));
  TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket,
                             queue_.submit(source, buffer.host_copies, buffer.sums));
  while (!queue_.wait_any({&ticket, 1}, Deadline::after(kSlice))) continue;
  return queue_.finish(ticket);
}

Result<void> StagedReads::from_device(StagedRead& read) {
  const TimePoint start = std::chrono::steady_clock::now();
  const std::array<MappedSource, 2> sources = {
      MappedSource(buffers_[0].memory.as<const std::byte>(), kBufferBytes),
      MappedSource(buffers_[1].memory.as<const std::byte>(), kBufferBytes)};
  Cutting cutting;
  bool before = false;  // the other buffer is on its way
  for (size_t turn = 0;; ++turn) {
    Buffer& buffer = buffers_[turn % 2];
    bool more = !read.cancelled;
    if (more) {
      TRANSFUSE_ASSIGN_OR_RETURN(more, next_pieces(read, cutting, buffer, false));
    }
    for (size_t i = 0; more && i < buffer.staged.size(); ++i) {
      const StridedCopy& box = buffer.staged[i].to_stage;
      TRANSFUSE_RETURN_IF_ERROR(enqueue(box,
                                        read.bases[buffer.copy_of[i]] + box.source_offset_bytes,
                                        reinterpret_cast<CUdeviceptr>(box.target),
                                        source_bytes_of(box.op), box.source_stride, false));
      const StridedCopy& scales = buffer.staged[i].scales;
      if (scales.element_count() == 0) continue;
      TRANSFUSE_RETURN_IF_ERROR(
          enqueue(scales, read.scale_bases[buffer.copy_of[i]] + scales.source_offset_bytes,
                  reinterpret_cast<CUdeviceptr>(scales.target), source_bytes_of(scales.op),
                  scales.source_stride, false));
    }
    if (more) {
      TRANSFUSE_RETURN_IF_ERROR(
          TRANSFUSE_CUDA(device_.driver(), cuEventRecord, buffer.idle.get(), stream_.get()));
    }
    if (before) {
      Buffer& arrived = buffers_[(turn + 1) % 2];
      TRANSFUSE_RETURN_IF_ERROR(write_host(arrived, sources[(turn + 1) % 2]));
      count(read, arrived);
      keep_pace(read, start);
    }
    if (!more) break;
    before = true;
  }
  return read.cancelled ? Result<void>(cancelled_error()) : Result<void>();
}

// Rows that follow one another are one row; the others go as a rectangle where the pitch allows.
Result<void> StagedReads::enqueue(const StridedCopy& box, CUdeviceptr device, CUdeviceptr buffer,
                                  uint32_t element_bytes, const int64_t (&stride)[3],
                                  bool to_device) {
  const Driver& driver = device_.driver();
  const auto rows_of = [&](CUdeviceptr at, uint64_t width, uint64_t height,
                           uint64_t pitch) -> Result<void> {
    const CUdeviceptr in_buffer = buffer;
    buffer += width * height;
    if (height == 1 || pitch == width) {
      const CUdeviceptr to = to_device ? at : in_buffer;
      return TRANSFUSE_CUDA(driver, cuMemcpyAsync, to, to_device ? in_buffer : at, width * height,
                            stream_.get());
    }
    if (pitch < width || pitch > kMaxPitch) {
      for (uint64_t row = 0; row < height; ++row) {
        const CUdeviceptr here = at + row * pitch;
        const CUdeviceptr there = in_buffer + row * width;
        TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemcpyAsync, to_device ? here : there,
                                                 to_device ? there : here, width, stream_.get()));
      }
      return {};
    }
    CUDA_MEMCPY2D copy{};
    copy.srcMemoryType = copy.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
    copy.srcDevice = to_device ? in_buffer : at;
    copy.srcPitch = to_device ? width : pitch;
    copy.dstDevice = to_device ? at : in_buffer;
    copy.dstPitch = to_device ? pitch : width;
    copy.WidthInBytes = width;
    copy.Height = height;
    return TRANSFUSE_CUDA(driver, cuMemcpy2DAsync, &copy, stream_.get());
  };
  const auto bytes = [&](int level) {
    return static_cast<uint64_t>(stride[level]) * element_bytes;
  };
  const bool whole_rows = box.count[2] == 1 || stride[2] == 1;
  for (uint32_t i = 0; i < box.count[0]; ++i) {
    const CUdeviceptr outer = device + i * bytes(0);
    if (whole_rows) {
      TRANSFUSE_RETURN_IF_ERROR(
          rows_of(outer, uint64_t{box.count[2]} * element_bytes, box.count[1], bytes(1)));
      continue;
    }
    for (uint32_t j = 0; j < box.count[1]; ++j) {
      TRANSFUSE_RETURN_IF_ERROR(
          rows_of(outer + j * bytes(1), element_bytes, box.count[2], bytes(2)));
    }
  }
  return {};
}

}  // namespace transfuse::cuda

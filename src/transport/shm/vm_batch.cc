// How copies become pieces of process_vm_readv calls.
#include "transport/shm/vm_batch.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "copy/copy.h"
#include "copy/scaled_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/shm/connection.h"
#include "transport/shm/system_error.h"

namespace transfuse::shm {
namespace {

// A remote piece costs about 0.36 us, as much as reading 3 KiB (docs/transport-shm.md): rows that
// lie closer than that are read together with what is between them.
constexpr uint64_t kGapBytes = 2048;
constexpr uint64_t kDirectPitchBytes = 3072;
constexpr uint64_t kDirectRowBytes = 256;  // a local piece costs less, but not nothing
constexpr uint64_t kBufferAlignment = 64;

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

bool is_cast(ElementOp op) { return source_element_bytes(op) != target_element_bytes(op); }

// Rows can go into place as they are, and it pays.
bool goes_direct(const StridedCopy& copy) {
  if (is_cast(copy.op)) return false;
  const bool dense =
      copy.count[2] == 1 || (copy.source_stride[2] == 1 && copy.target_stride[2] == 1);
  if (!dense) return false;
  const uint64_t element = source_element_bytes(copy.op);
  const uint64_t row = copy.count[2] * element;
  uint64_t pitch = row;
  if (copy.count[0] > 1) pitch = static_cast<uint64_t>(copy.source_stride[0]) * element;
  if (copy.count[1] > 1) pitch = static_cast<uint64_t>(copy.source_stride[1]) * element;
  return pitch >= kDirectPitchBytes || (pitch == row && row >= kDirectRowBytes) ||
         copy.element_count() == copy.count[2];
}

void advance(iovec*& pieces, size_t& count, uint64_t size_bytes) {
  while (size_bytes > 0) {
    const uint64_t step = std::min<uint64_t>(size_bytes, pieces->iov_len);
    pieces->iov_base = static_cast<std::byte*>(pieces->iov_base) + step;
    pieces->iov_len -= step;
    size_bytes -= step;
    if (pieces->iov_len == 0) {
      ++pieces;
      --count;
    }
  }
}

Error read_error(int number, const Connection& process, const iovec& remote) {
  const std::string where = fmt::format("process_vm_readv of process {} at {}, {} bytes",
                                        process.pid(), fmt::ptr(remote.iov_base), remote.iov_len);
  const std::string what = errno_text(number);
  switch (number) {
    case ESRCH:
      return {ErrorCode::kUnavailable,
              fmt::format("{}: the process is gone, or closed its transport", where)};
    case EPERM:
    case ENOSYS:  // what some sandboxes answer
      return {
          ErrorCode::kPermissionDenied,
          fmt::format("{}: {}. The kernel lets this process read the other's memory only as the "
                      "same user, in the same user and pid namespace, where seccomp of a "
                      "container allows it, and where /proc/sys/kernel/yama/ptrace_scope is 0 "
                      "or the source allows it (allow_any_tracer). Memory from allocate() needs "
                      "none of this",
                      where, what)};
    case EFAULT:
      if (!process.alive()) {
        return {ErrorCode::kUnavailable,
                fmt::format("{}: the process is gone, or closed its transport", where)};
      }
      return {ErrorCode::kCorrupt,
              fmt::format("{}: expected memory on both sides, found: {}", where, what)};
    case ENOMEM:
      return {ErrorCode::kResourceExhausted, fmt::format("{}: {}", where, what)};
    default:
      return {ErrorCode::kUnavailable, fmt::format("{}: {}", where, what)};
  }
}

}  // namespace

Result<void> VmBatch::add(const StridedCopy& copy, uint64_t* sum) {
  if (copy.element_count() == 0) return {};
  if (is_scaled(copy.op)) return add_scaled(copy, sum);
  return sum == nullptr && goes_direct(copy) ? add_rows(copy) : add_buffered(copy, sum);
}

// The buffer is for blocks now, so that what waits in it goes first.
Result<void> VmBatch::add_scaled(const StridedCopy& copy, uint64_t* sum) {
  TRANSFUSE_RETURN_IF_ERROR(flush());
  return run_staged_scaled_copy(
      copy, scratch_, true, sum,
      [this](const StridedCopy& plain, std::span<std::byte> rest) -> Result<void> {
        VmBatch batch(process_, address_, rest);
        TRANSFUSE_RETURN_IF_ERROR(batch.add(plain, nullptr));
        return batch.flush();
      });
}

Result<void> VmBatch::add_rows(const StridedCopy& copy) {
  const uint64_t element = source_element_bytes(copy.op);
  const uint64_t row = copy.count[2] * element;
  for (uint64_t i0 = 0; i0 < copy.count[0]; ++i0) {
    for (uint64_t i1 = 0; i1 < copy.count[1]; ++i1) {
      const uint64_t source = i0 * static_cast<uint64_t>(copy.source_stride[0]) +
                              i1 * static_cast<uint64_t>(copy.source_stride[1]);
      const uint64_t target = i0 * static_cast<uint64_t>(copy.target_stride[0]) +
                              i1 * static_cast<uint64_t>(copy.target_stride[1]);
      TRANSFUSE_RETURN_IF_ERROR(make_room());
      append(copy.target + target * element, copy.source_offset_bytes + source * element, row);
    }
  }
  return {};
}

int VmBatch::shape_blocks(std::array<Axis, 3>& axes, uint64_t element_bytes) const {
  const uint64_t capacity = scratch_.size();
  uint64_t piece = element_bytes;  // bytes that are read as one
  int joined = 0;
  size_t k = 0;
  for (; k < axes.size() && axes[k].stride_bytes <= piece + kGapBytes; ++k) {
    Axis& axis = axes[k];
    axis.step = axis.count;
    if (axis.stride_bytes > 0) {
      axis.step = std::min(axis.count, (capacity - piece) / axis.stride_bytes + 1);
    }
    axis.buffer_stride_bytes = axis.stride_bytes;
    piece += (axis.step - 1) * axis.stride_bytes;
    ++joined;
    if (axis.step < axis.count) return joined;
  }
  uint64_t slice = round_up(piece, 8);
  uint64_t pieces = 1;
  for (; k < axes.size(); ++k) {
    Axis& axis = axes[k];
    axis.step =
        std::max<uint64_t>(1, std::min({axis.count, capacity / slice, kMaxPieces / pieces}));
    axis.buffer_stride_bytes = slice;
    slice *= axis.step;
    pieces *= axis.step;
    if (axis.step < axis.count) break;
  }
  return joined;
}

Result<void> VmBatch::add_buffered(const StridedCopy& copy, uint64_t* sum) {
  const uint64_t element = source_element_bytes(copy.op);
  std::array<Axis, 3> axes;
  for (int d = 0; d < 3; ++d) {
    const bool single = copy.count[d] == 1;  // its stride has no meaning
    axes[static_cast<size_t>(d)] = {
        d, copy.count[d], single ? 0 : static_cast<uint64_t>(copy.source_stride[d]) * element};
  }
  std::sort(axes.begin(), axes.end(),
            [](const Axis& a, const Axis& b) { return a.stride_bytes < b.stride_bytes; });
  const int joined = shape_blocks(axes, element);
  std::array<uint64_t, 3> begin{};
  for (begin[2] = 0; begin[2] < axes[2].count; begin[2] += axes[2].step) {
    for (begin[1] = 0; begin[1] < axes[1].count; begin[1] += axes[1].step) {
      for (begin[0] = 0; begin[0] < axes[0].count; begin[0] += axes[0].step) {
        TRANSFUSE_RETURN_IF_ERROR(add_block(copy, sum, axes, begin, joined));
      }
    }
  }
  return {};
}

Result<void> VmBatch::add_block(const StridedCopy& copy, uint64_t* sum,
                                const std::array<Axis, 3>& axes,
                                const std::array<uint64_t, 3>& begin, int joined) {
  const uint64_t element = source_element_bytes(copy.op);
  Block block{copy, nullptr, sum};
  uint64_t source = copy.source_offset_bytes;
  uint64_t piece = element;  // bytes of the joined axes
  uint64_t used = element;   // bytes of the buffer
  std::array<uint64_t, 3> pieces = {1, 1, 1};
  for (size_t k = 0; k < 3; ++k) {
    const Axis& axis = axes[k];
    const auto d = static_cast<size_t>(axis.dimension);
    const uint64_t count = std::min(axis.step, axis.count - begin[k]);
    source += begin[k] * axis.stride_bytes;
    block.copy.count[d] = static_cast<uint32_t>(count);
    block.copy.source_stride[d] = static_cast<int64_t>(axis.buffer_stride_bytes / element);
    block.copy.target += static_cast<int64_t>(begin[k]) * copy.target_stride[d] *
                         static_cast<int64_t>(target_element_bytes(copy.op));
    block.copy.linear_index += begin[k] * static_cast<uint64_t>(copy.index_stride[d]);
    used += (count - 1) * axis.buffer_stride_bytes;
    if (static_cast<int>(k) < joined) {
      piece += (count - 1) * axis.stride_bytes;
    } else {
      pieces[k] = count;
    }
  }
  const uint64_t count = pieces[0] * pieces[1] * pieces[2];
  if (std::max(local_count_, remote_count_) + count > kMaxPieces || block_count_ == kMaxBlocks ||
      scratch_used_ + used > scratch_.size()) {
    TRANSFUSE_RETURN_IF_ERROR(flush());
  }
  std::byte* const buffer = scratch_.data() + scratch_used_;
  for (uint64_t i2 = 0; i2 < pieces[2]; ++i2) {
    for (uint64_t i1 = 0; i1 < pieces[1]; ++i1) {
      for (uint64_t i0 = 0; i0 < pieces[0]; ++i0) {
        append(buffer + i0 * axes[0].buffer_stride_bytes + i1 * axes[1].buffer_stride_bytes +
                   i2 * axes[2].buffer_stride_bytes,
               source + i0 * axes[0].stride_bytes + i1 * axes[1].stride_bytes +
                   i2 * axes[2].stride_bytes,
               piece);
      }
    }
  }
  block.source = buffer;
  blocks_[block_count_++] = block;
  scratch_used_ =
      std::min<uint64_t>(round_up(scratch_used_ + used, kBufferAlignment), scratch_.size());
  return {};
}

Result<void> VmBatch::make_room() {
  return std::max(local_count_, remote_count_) == kMaxPieces ? flush() : Result<void>();
}

void VmBatch::append(std::byte* target, uint64_t source, uint64_t size_bytes) {
  // The two lists are independent streams of bytes: each joins what touches.
  const auto join = [size_bytes](iovec* pieces, size_t& count, std::byte* at) {
    if (count > 0) {
      iovec& last = pieces[count - 1];
      if (static_cast<std::byte*>(last.iov_base) + last.iov_len == at) {
        last.iov_len += size_bytes;
        return;
      }
    }
    pieces[count++] = {at, size_bytes};
  };
  join(local_.data(), local_count_, target);
  // An address of the other process, never used as a pointer here.
  join(remote_.data(), remote_count_,
       reinterpret_cast<std::byte*>(address_ + source));  // NOLINT(performance-no-int-to-ptr)
  bytes_ += size_bytes;
}

Result<void> VmBatch::flush() {
  TRANSFUSE_RETURN_IF_ERROR(transfer());
  for (size_t i = 0; i < block_count_; ++i) {
    const uint64_t sum = run_copy(blocks_[i].copy, blocks_[i].source);
    if (blocks_[i].sum != nullptr) *blocks_[i].sum += sum;
  }
  local_count_ = 0;
  remote_count_ = 0;
  block_count_ = 0;
  scratch_used_ = 0;
  bytes_ = 0;
  return {};
}

Result<void> VmBatch::transfer() {
  if (bytes_ == 0) return {};
  iovec* local = local_.data();
  iovec* remote = remote_.data();
  size_t local_count = local_count_;
  size_t remote_count = remote_count_;
  for (uint64_t left = bytes_; left > 0;) {
    const ssize_t got =
        ::process_vm_readv(process_.pid(), local, local_count, remote, remote_count, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return read_error(got == 0 ? EFAULT : errno, process_, *remote);
    left -= static_cast<uint64_t>(got);
    advance(local, local_count, static_cast<uint64_t>(got));
    advance(remote, remote_count, static_cast<uint64_t>(got));
  }
  // The number may belong to another process since; then the bytes are that one's.
  if (!process_.alive()) return read_error(ESRCH, process_, remote_[0]);
  return {};
}

}  // namespace transfuse::shm

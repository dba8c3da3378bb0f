// Cuts a copy into blocks that fit the buffer: what lies close together is read as one.
#include "copy/file_read.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <system_error>

#include "copy/copy.h"
#include "copy/scaled_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// Bytes that nobody wants are cheaper to read than a system call is, up to so many.
constexpr uint64_t kGapBytes = 4096;
// Pieces of so many bytes go straight to where they belong.
constexpr uint64_t kDirectBytes = uint64_t{16} << 10;

// A dimension of a copy, while it is cut into blocks.
struct Axis {
  int dimension = 0;
  uint64_t count = 1;
  uint64_t stride_bytes = 0;  // at the source
  uint64_t step = 1;          // elements in a block
};

// By rising stride at the source.
std::array<Axis, 3> axes_of(const StridedCopy& copy, uint64_t element_bytes) {
  std::array<Axis, 3> axes;
  for (int d = 0; d < 3; ++d) {
    const bool single = copy.count[d] == 1;  // its stride has no meaning
    axes[static_cast<size_t>(d)] = {
        .dimension = d,
        .count = copy.count[d],
        .stride_bytes = single ? 0 : static_cast<uint64_t>(copy.source_stride[d]) * element_bytes};
  }
  std::ranges::sort(axes, {}, &Axis::stride_bytes);
  return axes;
}

void choose_steps(std::array<Axis, 3>& axes, uint64_t element_bytes, uint64_t capacity) {
  uint64_t span = element_bytes;
  for (Axis& axis : axes) {
    if (axis.stride_bytes > span + kGapBytes) return;
    axis.step = axis.count;
    if (axis.stride_bytes > 0) {
      axis.step = std::min(axis.count, (capacity - span) / axis.stride_bytes + 1);
    }
    span += (axis.step - 1) * axis.stride_bytes;
    if (axis.step < axis.count) return;
  }
}

// Calls body(block, first source byte, bytes it spans) for every block; the block's target and
// index are its own, its source offset is not.
template <typename Body>
Result<void> for_each_block(const StridedCopy& copy, uint64_t capacity, Body body) {
  const uint64_t element_bytes = source_element_bytes(copy.op);
  std::array<Axis, 3> axes = axes_of(copy, element_bytes);
  choose_steps(axes, element_bytes, capacity);
  std::array<uint64_t, 3> at{};
  for (at[2] = 0; at[2] < axes[2].count; at[2] += axes[2].step) {
    for (at[1] = 0; at[1] < axes[1].count; at[1] += axes[1].step) {
      for (at[0] = 0; at[0] < axes[0].count; at[0] += axes[0].step) {
        StridedCopy block = copy;
        uint64_t begin = copy.source_offset_bytes;
        uint64_t span = element_bytes;
        int64_t target = 0;
        for (size_t k = 0; k < axes.size(); ++k) {
          const Axis& axis = axes[k];
          const auto d = static_cast<size_t>(axis.dimension);
          const uint64_t count = std::min(axis.step, axis.count - at[k]);
          block.count[d] = static_cast<uint32_t>(count);
          begin += at[k] * axis.stride_bytes;
          span += (count - 1) * axis.stride_bytes;
          target += static_cast<int64_t>(at[k]) * copy.target_stride[d];
          block.linear_index += at[k] * static_cast<uint64_t>(copy.index_stride[d]);
        }
        if (copy.target != nullptr) {
          block.target = copy.target + target * int64_t{target_element_bytes(copy.op)};
        }
        TRANSFUSE_RETURN_IF_ERROR(body(block, begin, span));
      }
    }
  }
  return {};
}

// Whether the innermost elements, without a cast, are pieces worth a read of their own.
bool goes_direct(const StridedCopy& copy) {
  const uint64_t element_bytes = source_element_bytes(copy.op);
  return element_bytes == target_element_bytes(copy.op) &&
         (copy.count[2] == 1 || (copy.source_stride[2] == 1 && copy.target_stride[2] == 1)) &&
         copy.count[2] * element_bytes >= kDirectBytes;
}

Result<void> read_direct(const FileSpan& file, const StridedCopy& copy) {
  const uint64_t element_bytes = source_element_bytes(copy.op);
  for (uint32_t i0 = 0; i0 < copy.count[0]; ++i0) {
    for (uint32_t i1 = 0; i1 < copy.count[1]; ++i1) {
      const int64_t source = i0 * copy.source_stride[0] + i1 * copy.source_stride[1];
      const int64_t target = i0 * copy.target_stride[0] + i1 * copy.target_stride[1];
      const auto bytes = static_cast<int64_t>(element_bytes);
      TRANSFUSE_RETURN_IF_ERROR(
          read_file(file, copy.source_offset_bytes + static_cast<uint64_t>(source * bytes),
                    {copy.target + target * bytes, copy.count[2] * element_bytes}));
    }
  }
  return {};
}

// `write`: false sums only.
Result<void> scaled_file_copy(const FileSpan& file, const StridedCopy& copy,
                              std::span<std::byte> scratch, bool write, uint64_t* sum,
                              const FileSpan* scales) {
  if (scales != nullptr && copy.scales_end_bytes() > 0) {
    return for_each_band(
        copy,
        [&](const StridedCopy& plain) { return run_file_copy(*scales, plain, scratch, nullptr); },
        [&](const StridedCopy& run) {
          return scaled_file_copy(file, run, scratch, write, sum, nullptr);
        });
  }
  return run_staged_scaled_copy(copy, scratch, write, sum,
                                [&file](const StridedCopy& plain, std::span<std::byte> rest) {
                                  return run_file_copy(file, plain, rest, nullptr);
                                });
}

}  // namespace

Result<void> read_file(const FileSpan& file, uint64_t offset_bytes, std::span<std::byte> to) {
  uint64_t at = file.offset_bytes + offset_bytes;
  while (!to.empty()) {
    const ssize_t got = ::pread(file.fd, to.data(), to.size(), static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return Error{ErrorCode::kUnavailable,
                   fmt::format("cannot read {} bytes at {} of {}: {}", to.size(), at, file.path,
                               std::generic_category().message(errno))};
    }
    if (got == 0) {
      return Error{ErrorCode::kTornRead,
                   fmt::format("{}: ends at byte {}, expected {} more: it was cut while it was "
                               "read",
                               file.path, at, to.size())};
    }
    at += static_cast<uint64_t>(got);
    to = to.subspan(static_cast<size_t>(got));
  }
  return {};
}

Result<void> run_file_copy(const FileSpan& file, const StridedCopy& copy,
                           std::span<std::byte> scratch, uint64_t* sum, const FileSpan* scales) {
  if (copy.element_count() == 0) return {};
  if (is_scaled(copy.op)) return scaled_file_copy(file, copy, scratch, true, sum, scales);
  if (sum == nullptr && goes_direct(copy)) return read_direct(file, copy);
  return for_each_block(copy, scratch.size(),
                        [&](StridedCopy& block, uint64_t begin, uint64_t span) -> Result<void> {
                          TRANSFUSE_RETURN_IF_ERROR(read_file(file, begin, scratch.first(span)));
                          block.fingerprint = sum != nullptr;
                          const uint64_t found = run_copy(block, scratch.data());
                          if (sum != nullptr) *sum += found;
                          return {};
                        });
}

Result<void> sum_file_copy(const FileSpan& file, const StridedCopy& copy,
                           std::span<std::byte> scratch, uint64_t& sum, const FileSpan* scales) {
  if (copy.element_count() == 0) return {};
  if (is_scaled(copy.op)) return scaled_file_copy(file, copy, scratch, false, &sum, scales);
  return for_each_block(copy, scratch.size(),
                        [&](StridedCopy& block, uint64_t begin, uint64_t span) -> Result<void> {
                          TRANSFUSE_RETURN_IF_ERROR(read_file(file, begin, scratch.first(span)));
                          sum += sum_copy(block, scratch.data());
                          return {};
                        });
}

}  // namespace transfuse

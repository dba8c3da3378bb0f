// One block after another: the largest magnitude, the scale, then the elements through a buffer.
#include "copy/scaled_copy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <span>

#include "copy/block_scale.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// Elements that are worked on at a time: 16 KiB as f32.
constexpr uint64_t kPieceElements = 4096;
constexpr uint32_t kScaleBytes = 4;

template <typename T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// What brings a source's elements to f32, and f32 to a target's.
ElementOp widening(ElementOp op) {
  if (op == ElementOp::kF32ToE4M3) return ElementOp::kCopy4;
  return op == ElementOp::kBF16ToE4M3 ? ElementOp::kBF16ToF32 : ElementOp::kF16ToF32;
}
ElementOp narrowing(ElementOp op) {
  if (op == ElementOp::kE4M3ToF32) return ElementOp::kCopy4;
  return op == ElementOp::kE4M3ToBF16 ? ElementOp::kF32ToBF16 : ElementOp::kF32ToF16;
}

// Loops whose count the compiler knows, so that it makes vectors of them; one version for each set
// of instructions, chosen when the program is loaded. A function that chooses would call
// ThreadSanitizer before that is there.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define TRANSFUSE_VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TRANSFUSE_VERSIONS
#endif
constexpr uint64_t kAtOnce = 64;
static_assert(kPieceElements % kAtOnce == 0);

TRANSFUSE_VERSIONS uint32_t largest_magnitude(const uint32_t* values, uint64_t count) {
  uint32_t largest[kAtOnce] = {};
  uint64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    for (uint64_t k = 0; k < kAtOnce; ++k) {
      const uint32_t found = magnitude_of_f32(values[i + k]);
      largest[k] = found > largest[k] ? found : largest[k];
    }
  }
  for (; i < count; ++i) largest[0] = std::max(largest[0], magnitude_of_f32(values[i]));
  return *std::max_element(std::begin(largest), std::end(largest));
}

TRANSFUSE_VERSIONS void quantize_values(const uint32_t* values, uint64_t count, uint32_t scale,
                                        uint8_t* to) {
  uint64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) {
    uint8_t written[kAtOnce];  // apart from `to`, which might be where the values are
    for (uint64_t k = 0; k < kAtOnce; ++k) written[k] = quantize_f32_bits(values[i + k], scale);
    std::memcpy(to + i, written, kAtOnce);
  }
  for (; i < count; ++i) to[i] = quantize_f32_bits(values[i], scale);
}

// One execution of a copy or of a sum. Used from one thread.
class ScaledWalk {
 public:
  ScaledWalk(const StridedCopy& copy, const std::byte* source, bool write, bool sum)
      : copy_(copy), scales_(*copy.scales), source_(source), write_(write), sum_(sum) {}

  uint64_t run() {
    const auto done = for_each_part(copy_, kPieceElements, [this](const ScaledPart& part) {
      run_part(part);
      return Result<void>();
    });
    TRANSFUSE_CHECK(done.has_value());
    return total_;
  }

 private:
  void run_part(const ScaledPart& part) {
    const auto [i, j] = part.block;
    const auto place =
        static_cast<int64_t>(i) * scales_.stride[0] + static_cast<int64_t>(j) * scales_.stride[1];
    if (!quantizes(copy_.op)) {
      scale_ = load<uint32_t>(first_scale() + place * kScaleBytes);
      dequantize(part);
      return;
    }
    quantize(part);
    if (write_) std::memcpy(scales_.target + place * kScaleBytes, &scale_, kScaleBytes);
    if (!sum_) return;
    const uint64_t index = scales_.linear_index +
                           i * static_cast<uint64_t>(scales_.index_stride[0]) +
                           j * static_cast<uint64_t>(scales_.index_stride[1]);
    total_ += element_fingerprint(scales_.fingerprint_key, index, scale_, kScaleBytes);
  }

  const std::byte* first_scale() const {
    if (scales_.fetched != nullptr) return scales_.fetched;
    return source_ + static_cast<int64_t>(scales_.source_offset_bytes - copy_.source_offset_bytes);
  }

  // A block in pieces that fit the buffers.
  template <typename Visit>
  static void for_each_piece(const ScaledPart& block, Visit&& visit) {
    const uint64_t columns = std::min(block.columns, kPieceElements);
    const uint64_t rows = std::max<uint64_t>(1, kPieceElements / columns);
    for (uint64_t r = 0; r < block.rows; r += rows) {
      for (uint64_t c = 0; c < block.columns; c += columns) {
        visit(ScaledPart{.row = block.row + r,
                         .column = block.column + c,
                         .rows = std::min(rows, block.rows - r),
                         .columns = std::min(columns, block.columns - c)});
      }
    }
  }

  const std::byte* source_at(uint64_t row, uint64_t column) const {
    return source_ + (static_cast<int64_t>(row) * copy_.source_stride[1] +
                      static_cast<int64_t>(column) * copy_.source_stride[2]) *
                         source_element_bytes(copy_.op);
  }

  void quantize(const ScaledPart& block) {
    uint32_t largest = 0;
    for_each_piece(block, [&](const ScaledPart& piece) {
      gather(piece);
      largest = std::max(largest, largest_magnitude(values_.data(), piece.rows * piece.columns));
    });
    scale_ = scale_bits_of_block(largest);
    const bool held = block.rows * block.columns <= kPieceElements;  // still in the buffer
    for_each_piece(block, [&](const ScaledPart& piece) {
      if (!held) gather(piece);
      quantize_values(values_.data(), piece.rows * piece.columns, scale_, written_.data());
      put(piece, ElementOp::kCopy1, reinterpret_cast<const std::byte*>(written_.data()));
    });
  }

  void gather(const ScaledPart& piece) {
    StridedCopy in;
    in.op = widening(copy_.op);
    in.target = reinterpret_cast<std::byte*>(values_.data());
    in.count[1] = static_cast<uint32_t>(piece.rows);
    in.count[2] = static_cast<uint32_t>(piece.columns);
    in.source_stride[1] = copy_.source_stride[1];
    in.source_stride[2] = copy_.source_stride[2];
    in.target_stride[1] = static_cast<int64_t>(piece.columns);
    in.target_stride[2] = 1;
    run_copy(in, source_at(piece.row, piece.column));
  }

  void dequantize(const ScaledPart& piece) {
    uint64_t i = 0;
    for (uint64_t r = 0; r < piece.rows; ++r) {
      const std::byte* from = source_at(piece.row + r, piece.column);
      for (uint64_t c = 0; c < piece.columns; ++c, ++i, from += copy_.source_stride[2]) {
        values_[i] = dequantize_e4m3_bits(load<uint8_t>(from), scale_);
      }
    }
    put(piece, narrowing(copy_.op), reinterpret_cast<const std::byte*>(values_.data()));
  }

  // From the buffer to where the piece belongs.
  void put(const ScaledPart& piece, ElementOp op, const std::byte* buffer) {
    StridedCopy out;
    out.op = op;
    out.fingerprint = sum_;
    out.fingerprint_key = copy_.fingerprint_key;
    out.count[1] = static_cast<uint32_t>(piece.rows);
    out.count[2] = static_cast<uint32_t>(piece.columns);
    out.source_stride[1] = static_cast<int64_t>(piece.columns);
    out.source_stride[2] = 1;
    const auto at = [&piece](const int64_t(&stride)[3]) {
      return static_cast<int64_t>(piece.row) * stride[1] +
             static_cast<int64_t>(piece.column) * stride[2];
    };
    for (int level = 1; level < 3; ++level) {
      out.target_stride[level] = copy_.target_stride[level];
      out.index_stride[level] = copy_.index_stride[level];
    }
    out.linear_index = copy_.linear_index + static_cast<uint64_t>(at(copy_.index_stride));
    if (write_) {
      out.target = copy_.target + at(copy_.target_stride) * target_element_bytes(copy_.op);
      total_ += run_copy(out, buffer);
    } else if (sum_) {
      total_ += sum_copy(out, buffer);
    }
  }

  const StridedCopy& copy_;
  const BlockScales& scales_;
  const std::byte* const source_;
  const bool write_;
  const bool sum_;
  uint32_t scale_ = 0;
  uint64_t total_ = 0;
  alignas(64) std::array<uint32_t, kPieceElements> values_;  // NOLINT: written before it is read
  alignas(64) std::array<uint8_t, kPieceElements> written_;  // NOLINT: as values_
};

}  // namespace

uint64_t run_scaled_copy(const StridedCopy& copy, const std::byte* source, bool write, bool sum) {
  if (copy.element_count() == 0) return 0;
  return ScaledWalk(copy, source, write, sum).run();
}

StridedCopy blocks_of(const StridedCopy& copy, const uint32_t (&first)[2], uint32_t count,
                      BlockScales& blocks) {
  const BlockScales& scales = *copy.scales;
  StridedCopy part = copy;
  blocks = scales;
  const uint32_t end[2] = {first[0] + 1, first[1] + count};
  int64_t source = 0;
  int64_t target = 0;
  int64_t scale = 0;
  for (int axis = 0; axis < 2; ++axis) {
    const auto begin_of = [&](uint32_t block) {
      return block == 0 ? 0 : int64_t{block} * scales.block[axis] - scales.phase[axis];
    };
    const int level = axis + 1;
    const int64_t begin = begin_of(first[axis]);
    const int64_t length = std::min(begin_of(end[axis]), int64_t{copy.count[level]}) - begin;
    part.count[level] = static_cast<uint32_t>(length);
    source += begin * copy.source_stride[level];
    target += begin * copy.target_stride[level];
    scale += first[axis] * scales.stride[axis];
    part.linear_index += static_cast<uint64_t>(begin * copy.index_stride[level]);
    blocks.linear_index += static_cast<uint64_t>(first[axis] * scales.index_stride[axis]);
    if (first[axis] > 0) blocks.phase[axis] = 0;
  }
  part.source_offset_bytes += static_cast<uint64_t>(source) * source_element_bytes(copy.op);
  if (copy.target != nullptr) {
    part.target = copy.target + target * target_element_bytes(copy.op);
  }
  blocks.source_offset_bytes += static_cast<uint64_t>(scale * kScaleBytes);
  if (scales.target != nullptr) blocks.target = scales.target + scale * kScaleBytes;
  if (scales.fetched != nullptr) blocks.fetched = scales.fetched + scale * kScaleBytes;
  part.scales = nullptr;
  return part;
}

ScaledBand band_of(const StridedCopy& copy, const uint32_t (&first)[2], uint32_t count,
                   uint32_t* fetched) {
  ScaledBand band;
  band.run = blocks_of(copy, first, count, band.blocks);
  band.scales.op = ElementOp::kCopy4;
  band.scales.target = reinterpret_cast<std::byte*>(fetched);
  band.scales.count[2] = count;
  band.scales.source_stride[2] = band.blocks.stride[1];
  band.scales.target_stride[2] = 1;
  band.scales.source_offset_bytes = band.blocks.source_offset_bytes;
  band.blocks.stride[0] = 0;
  band.blocks.stride[1] = 1;
  band.blocks.fetched = reinterpret_cast<const std::byte*>(fetched);
  return band;
}

Result<void> stage_part(const StridedCopy& copy, const ScaledPart& part,
                        std::span<std::byte> buffer, StagedPart& staged) {
  const BlockScales& scales = *copy.scales;
  const uint32_t in = source_element_bytes(copy.op);
  const uint64_t size_bytes = (part.rows * part.columns * in + 3) / 4 * 4;
  const bool reads_scale = !quantizes(copy.op) && scales.fetched == nullptr;
  const uint64_t scale_bytes = reads_scale ? kScaleBytes : 0;
  if (size_bytes + scale_bytes > buffer.size()) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("a block of {}x{} elements that share a scale has {} bytes, and this "
                             "route reads through a buffer of {}: let the source keep its weights "
                             "in memory that is mapped (allocate() of its transport)",
                             part.rows, part.columns, size_bytes, buffer.size())};
  }
  const auto row = static_cast<int64_t>(part.row);
  const auto column = static_cast<int64_t>(part.column);
  const auto at = [&](const int64_t(&stride)[3]) { return row * stride[1] + column * stride[2]; };
  const auto scale_at = [&](const int64_t(&stride)[2]) {
    return static_cast<int64_t>(part.block[0]) * stride[0] +
           static_cast<int64_t>(part.block[1]) * stride[1];
  };
  StridedCopy& run = staged.run;
  run = copy;
  run.count[1] = static_cast<uint32_t>(part.rows);
  run.count[2] = static_cast<uint32_t>(part.columns);
  run.linear_index += static_cast<uint64_t>(at(copy.index_stride));
  if (copy.target != nullptr) {
    run.target = copy.target + at(copy.target_stride) * target_element_bytes(copy.op);
  }
  run.source_stride[1] = static_cast<int64_t>(part.columns);
  run.source_stride[2] = 1;
  run.source_offset_bytes = 0;
  run.scales = nullptr;

  staged.elements = {};
  staged.elements.op = plain_copy(in);
  staged.elements.source_offset_bytes =
      copy.source_offset_bytes + static_cast<uint64_t>(at(copy.source_stride) * in);
  staged.elements.target = buffer.data();
  for (int level = 1; level < 3; ++level) {
    staged.elements.count[level] = run.count[level];
    staged.elements.source_stride[level] = copy.source_stride[level];
    staged.elements.target_stride[level] = run.source_stride[level];
  }

  staged.scales = {
      .source_offset_bytes = size_bytes,
      .linear_index = scales.linear_index + static_cast<uint64_t>(scale_at(scales.index_stride)),
      .fingerprint_key = scales.fingerprint_key,
      .block = {run.count[1], run.count[2]}};
  if (scales.target != nullptr) {
    staged.scales.target = scales.target + scale_at(scales.stride) * kScaleBytes;
  }
  if (scales.fetched != nullptr) {
    staged.scales.fetched = scales.fetched + scale_at(scales.stride) * kScaleBytes;
  }
  staged.scale = {};
  staged.scale.count[2] = reads_scale ? 1 : 0;
  staged.scale.op = ElementOp::kCopy4;
  staged.scale.source_offset_bytes =
      scales.source_offset_bytes + static_cast<uint64_t>(scale_at(scales.stride) * kScaleBytes);
  staged.scale.target = buffer.data() + size_bytes;
  return {};
}

}  // namespace transfuse

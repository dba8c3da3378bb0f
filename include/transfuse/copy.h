// One strided copy with its cast and fingerprint: what every copy engine executes, and the
// sharding-independent checksum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace transfuse {

// What happens to one element on its way. The number in a copy is the element size in bytes on both
// sides.
enum class ElementOp : uint8_t {
  kCopy1,
  kCopy2,
  kCopy4,
  kCopy8,
  kF32ToBF16,
  kF32ToF16,
  kBF16ToF32,
  kF16ToF32,
  // To and from fp8 e4m3 with one f32 scale per block: docs/fp8.md. They need StridedCopy::scales.
  kF32ToE4M3,
  kBF16ToE4M3,
  kF16ToE4M3,
  kE4M3ToF32,
  kE4M3ToBF16,
  kE4M3ToF16
};
inline constexpr int kElementOpCount = 8;  // of those without scales, which come first
inline constexpr int kScaledOpCount = 6;
inline constexpr bool is_scaled(ElementOp op) { return static_cast<int>(op) >= kElementOpCount; }
inline constexpr bool quantizes(ElementOp op) {
  return op == ElementOp::kF32ToE4M3 || op == ElementOp::kBF16ToE4M3 || op == ElementOp::kF16ToE4M3;
}
uint32_t source_element_bytes(ElementOp op);
uint32_t target_element_bytes(ElementOp op);

// The blocks of a copy that quantises (writes fp8 and the blocks' scales) or dequantises (reads
// both). Rows are the copy's middle level, columns its inner level; its outer level counts 1.
struct BlockScales {
  std::byte* target = nullptr;  // quantising: where the first block's scale is written
  // Dequantising: where the first block's scale lies, from the start of the region that holds it.
  uint64_t source_offset_bytes = 0;
  // Dequantising: that scale in this process, where the scales were brought here before the copy.
  const std::byte* fetched = nullptr;
  uint64_t linear_index = 0;     // quantising: of the first scale in its catalog tensor
  uint64_t fingerprint_key = 0;  // quantising: of that tensor
  uint32_t block[2] = {128, 128};
  // Dequantising: where the copy's first element lies in its block. A quantising copy begins with a
  // block, and every block that it touches is in it as far as the tensor goes.
  uint32_t phase[2] = {0, 0};
  int64_t stride[2] = {0, 0};  // elements, from scale to scale
  int64_t index_stride[2] = {0, 0};
};

// Elements (i0, i1, i2), i2 innermost: source element source_offset_bytes + sum(i * source_stride)
// elements, likewise at the target. `linear_index` and `index_stride` place every element in its
// catalog tensor for the fingerprint.
struct StridedCopy {
  uint64_t source_offset_bytes = 0;  // from the start of the source region
  std::byte* target = nullptr;
  uint64_t linear_index = 0;
  uint64_t fingerprint_key = 0;  // fingerprint_key(tensor name)
  uint32_t count[3] = {1, 1, 1};
  ElementOp op = ElementOp::kCopy1;
  bool fingerprint = false;  // true: the sum of the elements as written is wanted
  int64_t source_stride[3] = {0, 0, 0};
  int64_t target_stride[3] = {0, 0, 0};
  int64_t index_stride[3] = {0, 0, 0};
  const BlockScales* scales = nullptr;  // set where is_scaled(op); the caller's, as the copy is

  uint64_t element_count() const { return uint64_t{count[0]} * count[1] * count[2]; }
  // Blocks of a scaled copy along its rows (0) or columns (1).
  uint64_t block_count(int axis) const;
  uint64_t target_bytes() const;  // of the elements, and of the scales that are written
  // One past the last element this copy reads, from the start of the region. Strides are not
  // negative.
  uint64_t source_end_bytes() const;
  // One past the last scale this copy reads, from the start of the region that holds them; 0: none.
  uint64_t scales_end_bytes() const;
};

// The fingerprint of a quantising copy is that of its elements plus that of its scales.
// The fingerprint of a box is the wrapping 64-bit sum of element_fingerprint() over its elements:
// the same number however the box is sharded, whoever holds it and in whatever order it is read.
uint64_t fingerprint_key(std::string_view tensor_name);
// `bits`: the element's bytes, zero-extended, little-endian; the formula is in docs/fingerprint.md.
uint64_t element_fingerprint(uint64_t key, uint64_t linear_index, uint64_t bits,
                             uint32_t element_bytes);

}  // namespace transfuse

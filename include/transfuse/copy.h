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
  kF16ToF32
};
inline constexpr int kElementOpCount = 8;
uint32_t source_element_bytes(ElementOp op);
uint32_t target_element_bytes(ElementOp op);

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

  uint64_t element_count() const { return uint64_t{count[0]} * count[1] * count[2]; }
  uint64_t target_bytes() const { return element_count() * target_element_bytes(op); }
  // One past the last source byte this copy reads, from the start of the region. Strides are not
  // negative.
  uint64_t source_end_bytes() const;
};

// The fingerprint of a box is the wrapping 64-bit sum of element_fingerprint() over its elements:
// the same number however the box is sharded, whoever holds it and in whatever order it is read.
uint64_t fingerprint_key(std::string_view tensor_name);
// `bits`: the element's bytes, zero-extended, little-endian; the formula is in docs/fingerprint.md.
uint64_t element_fingerprint(uint64_t key, uint64_t linear_index, uint64_t bits,
                             uint32_t element_bytes);

}  // namespace transfuse

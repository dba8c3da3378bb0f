// Row kernels for aarch64, where NEON is always there.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define TRANSFUSE_TARGET
#define TRANSFUSE_VECTOR __attribute__((always_inline)) inline

namespace transfuse {
namespace {

// 16 bytes: four 32-bit words or two 64-bit sums.
struct Vec {
  static constexpr uint64_t kBytes = 16;
  uint32x4_t v;

  TRANSFUSE_VECTOR static Vec load(const std::byte* from) {
    return {vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(from)))};
  }
  TRANSFUSE_VECTOR static Vec all(uint32_t word) { return {vdupq_n_u32(word)}; }
  // The words a, b, a, b, ...
  TRANSFUSE_VECTOR static Vec pairs(uint32_t a, uint32_t b) {
    return {vreinterpretq_u32_u64(vdupq_n_u64((uint64_t{b} << 32) | a))};
  }
  // The first `size_bytes` (1 to 16) of a vector; zero beyond.
  TRANSFUSE_VECTOR static Vec load_first(const std::byte* from, uint64_t size_bytes) {
    alignas(16) std::byte buffer[kBytes] = {};
    std::memcpy(buffer, from, size_bytes);
    return load(buffer);
  }
  TRANSFUSE_VECTOR void store_first(std::byte* to, uint64_t size_bytes) const {
    alignas(16) std::byte buffer[kBytes];
    store(buffer);
    std::memcpy(to, buffer, size_bytes);
  }
  TRANSFUSE_VECTOR void store(std::byte* to) const {
    vst1q_u8(reinterpret_cast<uint8_t*>(to), vreinterpretq_u8_u32(v));
  }
  // The cores of servers notice by themselves that a line is written as a whole.
  TRANSFUSE_VECTOR void stream(std::byte* to) const { store(to); }
  TRANSFUSE_VECTOR static void prefetch(const std::byte* line) { __builtin_prefetch(line); }
  TRANSFUSE_VECTOR Vec operator+(Vec b) const { return {vaddq_u32(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator^(Vec b) const { return {veorq_u32(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator&(Vec b) const { return {vandq_u32(v, b.v)}; }
  TRANSFUSE_VECTOR Vec times(Vec b) const { return {vmulq_u32(v, b.v)}; }
  template <int kBits>
  TRANSFUSE_VECTOR Vec right() const {
    if constexpr (kBits == 0) {
      return *this;
    } else {
      return {vshrq_n_u32(v, kBits)};
    }
  }
  TRANSFUSE_VECTOR Vec upper_words() const {
    return {vreinterpretq_u32_u64(vshrq_n_u64(vreinterpretq_u64_u32(v), 32))};
  }
  TRANSFUSE_VECTOR friend Vec xor3(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
  TRANSFUSE_VECTOR friend Vec add64(Vec a, Vec b) {
    return {
        vreinterpretq_u32_u64(vaddq_u64(vreinterpretq_u64_u32(a.v), vreinterpretq_u64_u32(b.v)))};
  }
  TRANSFUSE_VECTOR friend Vec multiply_even(Vec a, Vec b) {
    return {vreinterpretq_u32_u64(
        vmull_u32(vmovn_u64(vreinterpretq_u64_u32(a.v)), vmovn_u64(vreinterpretq_u64_u32(b.v))))};
  }
  // Words whose number is below the limit; zero elsewhere.
  TRANSFUSE_VECTOR Vec where_less(Vec number, Vec limit) const {
    return {vandq_u32(vcltq_u32(number.v, limit.v), v)};
  }
  TRANSFUSE_VECTOR uint64_t sum64() const { return vaddvq_u64(vreinterpretq_u64_u32(v)); }
  TRANSFUSE_VECTOR uint32_t sum32() const { return vaddvq_u32(v); }
  TRANSFUSE_VECTOR Vec unless_nan(uint32x4_t words, uint32_t nan) const {
    const uint32x4_t magnitude = vandq_u32(v, vdupq_n_u32(0x7FFFFFFF));
    const uint32x4_t is_nan = vcgtq_u32(magnitude, vdupq_n_u32(0x7F800000));
    return {vbslq_u32(is_nan, vdupq_n_u32(nan), words)};
  }
  TRANSFUSE_VECTOR Vec to_bf16() const {
    const uint32x4_t even = vandq_u32(vshrq_n_u32(v, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(v, vdupq_n_u32(0x7FFF)), even);
    return unless_nan(vshrq_n_u32(rounded, 16), 0x7FC0);
  }
  TRANSFUSE_VECTOR Vec to_f16() const {
    const float16x4_t half = vcvt_f16_f32(vreinterpretq_f32_u32(v));
    return unless_nan(vmovl_u16(vreinterpret_u16_f16(half)), 0x7E00);
  }
  // Words from as many 16-bit numbers, of half a vector.
  TRANSFUSE_VECTOR static Vec load_bf16(const std::byte* from) {
    const uint8x8_t half = vld1_u8(reinterpret_cast<const uint8_t*>(from));
    return {vshll_n_u16(vreinterpret_u16_u8(half), 16)};
  }
  TRANSFUSE_VECTOR static Vec load_f16(const std::byte* from) {
    const uint8x8_t half = vld1_u8(reinterpret_cast<const uint8_t*>(from));
    return {vreinterpretq_u32_f32(vcvt_f32_f16(vreinterpret_f16_u8(half)))};
  }
  // The words of `low`, then those of `high`, as 16 bits each.
  TRANSFUSE_VECTOR static Vec pack(Vec low, Vec high) {
    return {vreinterpretq_u32_u16(vcombine_u16(vmovn_u32(low.v), vmovn_u32(high.v)))};
  }
};

}  // namespace
}  // namespace transfuse

#include "copy/row_kernels.h"
#include "copy/row_simd.h"

namespace transfuse {
const RowKernels kNeonRows = kVectorRows;
}  // namespace transfuse
#endif

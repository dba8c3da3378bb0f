// The scale of a block of fp8 numbers, and one element under it, bit for bit: every path gives what
// these give. docs/fp8.md has the formulas and their sources.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/host_device.h"
#include "copy/cast.h"

namespace transfuse {

inline constexpr float kE4M3Max = 448.0f;
inline constexpr uint32_t kF32Nan = 0x7FC00000u;

// The magnitude of an f32 as a number that grows with it; NaN is the largest, so that the maximum
// over a block with a NaN is one.
TRANSFUSE_HOST_DEVICE inline uint32_t magnitude_of_f32(uint32_t bits) { return bits & 0x7FFFFFFFu; }

// amax / 448 in f32; 1 where that is 0, so that nothing is divided by 0. `magnitude`: the largest
// of the block. Bits.
TRANSFUSE_HOST_DEVICE inline uint32_t scale_bits_of_block(uint32_t magnitude) {
  if (magnitude > 0x7F800000u) return kF32Nan;
#ifdef __CUDA_ARCH__
  const uint32_t scale = bits_of_f32(__fdiv_rn(f32_of_bits(magnitude), kE4M3Max));
#else
  const uint32_t scale = bits_of_f32(f32_of_bits(magnitude) / kE4M3Max);
#endif
  return scale == 0 ? bits_of_f32(1.0f) : scale;
}

// value / scale in f32, clamped to [-448, 448], rounded to the nearest e4m3, ties to the even one.
TRANSFUSE_HOST_DEVICE inline uint8_t quantize_f32_bits(uint32_t bits, uint32_t scale_bits) {
#ifdef __CUDA_ARCH__
  return cast_f32_bits_to_e4m3(bits_of_f32(__fdiv_rn(f32_of_bits(bits), f32_of_bits(scale_bits))));
#else
  return cast_f32_bits_to_e4m3(bits_of_f32(f32_of_bits(bits) / f32_of_bits(scale_bits)));
#endif
}

// value / scale without a division, where that is the same to the last bit: the quotient of one
// reciprocal is corrected twice by its remainder, which is exact. The first correction leaves it
// beside the quotient at most, and of such a one the second makes the nearest (Markstein 1990,
// where the reciprocal is rounded to nearest and nothing underflows). Of values that are finite and
// not larger than 448 scales of about that size.
class ScaleQuotient {
 public:
  TRANSFUSE_HOST_DEVICE explicit ScaleQuotient(uint32_t scale_bits)
      : scale_(f32_of_bits(scale_bits)) {
#ifdef __CUDA_ARCH__
    reciprocal_ = __frcp_rn(scale_);
#else
    reciprocal_ = 1.0f / scale_;
#endif
  }
  // Between 2^-60 and 2^60 remainders of all values count exactly, but those of values so small
  // that their e4m3 is 0 whatever they leave.
  TRANSFUSE_HOST_DEVICE static bool exact(uint32_t scale_bits) {
    return scale_bits - 0x21800000u <= 0x5D800000u - 0x21800000u;
  }

  TRANSFUSE_HOST_DEVICE float of(uint32_t bits) const {
    const float value = f32_of_bits(bits);
    float quotient = product(value, reciprocal_);
    quotient = sum_of_product(sum_of_product(-quotient, scale_, value), reciprocal_, quotient);
    quotient = sum_of_product(sum_of_product(-quotient, scale_, value), reciprocal_, quotient);
    // That of -0 has lost its sign.
    return f32_of_bits((bits_of_f32(quotient) & 0x7FFFFFFFu) | (bits & 0x80000000u));
  }

 private:
  TRANSFUSE_HOST_DEVICE static float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  TRANSFUSE_HOST_DEVICE static float sum_of_product(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }

  float scale_;
  float reciprocal_;
};

// value * scale in f32; every NaN becomes 0x7FC00000.
TRANSFUSE_HOST_DEVICE inline uint32_t dequantize_e4m3_bits(uint8_t bits, uint32_t scale_bits) {
#ifdef __CUDA_ARCH__
  const uint32_t product =
      bits_of_f32(__fmul_rn(f32_of_bits(cast_e4m3_bits_to_f32(bits)), f32_of_bits(scale_bits)));
#else
  const uint32_t product =
      bits_of_f32(f32_of_bits(cast_e4m3_bits_to_f32(bits)) * f32_of_bits(scale_bits));
#endif
  return magnitude_of_f32(product) > 0x7F800000u ? kF32Nan : product;
}

}  // namespace transfuse

// The scale of a block of fp8 numbers, and one element under it, bit for bit: every path gives what
// these give. docs/fp8.md has the formulas and their sources.
#pragma once

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

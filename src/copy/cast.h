// The casts of a copy, bit for bit: every path gives what these give.
#pragma once

#include <bit>
#include <cstdint>

#include "base/host_device.h"

namespace transfuse {

TRANSFUSE_HOST_DEVICE inline float f32_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}
TRANSFUSE_HOST_DEVICE inline uint32_t bits_of_f32(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

TRANSFUSE_HOST_DEVICE inline uint16_t cast_f32_bits_to_bf16(uint32_t bits) {
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

TRANSFUSE_HOST_DEVICE inline uint16_t cast_f32_bits_to_f16(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7E00;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above
  if (magnitude >= 0x38800000u) {  // 2^-14 and above: normal in f16
    const uint32_t rebased = magnitude - 0x38000000u;
    return static_cast<uint16_t>(sign | ((rebased + 0x0FFFu + ((rebased >> 13) & 1u)) >> 13));
  }
  if (magnitude <= 0x33000000u) return static_cast<uint16_t>(sign);  // 2^-25 and below: zero
  const uint32_t mantissa = (magnitude & 0x007FFFFFu) | 0x00800000u;
  const uint32_t shift = 126u - (magnitude >> 23);  // 14 to 24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const uint32_t up = (rest > half || (rest == half && (kept & 1u) != 0)) ? 1u : 0u;
  return static_cast<uint16_t>(sign | (kept + up));
}

// Exact. As torch does: a NaN keeps its payload.
TRANSFUSE_HOST_DEVICE inline uint32_t cast_bf16_bits_to_f32(uint16_t bits) {
  return uint32_t{bits} << 16;
}

// Exact. As torch does, and the CPUs: a NaN keeps its payload and becomes quiet.
TRANSFUSE_HOST_DEVICE inline uint32_t cast_f16_bits_to_f32(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu;
  const uint32_t mantissa = bits & 0x03FFu;
  if (exponent == 31) {
    return sign | 0x7F800000u | (mantissa << 13) | (mantissa != 0 ? 0x00400000u : 0u);
  }
  if (exponent > 0) return sign | ((exponent + 112u) << 23) | (mantissa << 13);
  if (mantissa == 0) return sign;
#ifdef __CUDA_ARCH__
  const uint32_t zeros = static_cast<uint32_t>(__clz(static_cast<int>(mantissa)));
#else
  const auto zeros = static_cast<uint32_t>(std::countl_zero(mantissa));
#endif
  const uint32_t shift = zeros - 21u;  // to bit 10
  return sign | ((113u - shift) << 23) | (((mantissa << shift) & 0x03FFu) << 13);
}

// What is above 448, the largest number of e4m3, becomes 448; every NaN becomes 0x7F. Chosen by
// masks, as compilers make branches of conditions and then no vectors.
TRANSFUSE_HOST_DEVICE inline uint8_t cast_f32_bits_to_e4m3(uint32_t bits) {
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // 2^-6 and above: normal in e4m3.
  const uint32_t rebased = magnitude - 0x3C000000u;
  const uint32_t normal = (rebased + 0x0007FFFFu + ((rebased >> 20) & 1u)) >> 20;
  // Below: added to 2^14, whose last bit is worth 2^-9 as that of e4m3's subnormals is.
  const uint32_t subnormal = bits_of_f32(f32_of_bits(magnitude) + 16384.0f) - 0x46800000u;
  const auto where = [](bool condition) { return 0u - static_cast<uint32_t>(condition); };
  uint32_t result = normal ^ ((normal ^ subnormal) & where(magnitude < 0x3C800000u));
  result ^= (result ^ 0x7Eu) & where(magnitude >= 0x43E00000u);
  result |= sign;
  result ^= (result ^ 0x7Fu) & where(magnitude > 0x7F800000u);
  return static_cast<uint8_t>(result);
}

// Exact. NaN keeps its sign, as in torch.
TRANSFUSE_HOST_DEVICE inline uint32_t cast_e4m3_bits_to_f32(uint8_t bits) {
  const uint32_t sign = (bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7Fu;
  if (magnitude == 0x7Fu) return sign | 0x7FF00000u;
  if (magnitude >= 8) return sign | ((magnitude << 20) + 0x3C000000u);
  return sign | bits_of_f32(static_cast<float>(magnitude) * 0x1p-9f);
}

}  // namespace transfuse

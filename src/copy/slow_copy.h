// The slow truth about copies, for tests: element by element, with casts by arithmetic on numbers.
// Shares no code with the engine that it judges.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "transfuse/copy.h"

namespace transfuse {

// Casts by arithmetic, not by bits: the nearest value of the format, ties to the even one.
inline uint16_t slow_bf16(uint32_t bits) {
  const auto value = std::bit_cast<float>(bits);
  if (std::isnan(value)) return 0x7FC0;
  if (std::isinf(value)) return static_cast<uint16_t>(bits >> 16);
  const double wide = value;
  const auto below = static_cast<uint16_t>(bits >> 16);  // towards zero
  const auto above = static_cast<uint16_t>(below + 1);   // away from zero
  const auto as_double = [](uint16_t b) {
    // One step beyond the largest finite value counts as 2^128.
    if ((b & 0x7FFF) == 0x7F80) return std::copysign(0x1p128, (b & 0x8000) != 0 ? -1.0 : 1.0);
    return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(b) << 16));
  };
  const double down = std::abs(wide - as_double(below));
  const double up = std::abs(as_double(above) - wide);
  if (down == up) return (below & 1) == 0 ? below : above;
  return down < up ? below : above;
}

inline double f16_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1F;
  const int mantissa = bits & 0x3FF;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) return sign * 0x1p16;  // as a neighbour of the largest finite value
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

inline uint16_t slow_f16(uint32_t bits) {
  const auto value = std::bit_cast<float>(bits);
  if (std::isnan(value)) return 0x7E00;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(value));
  uint16_t low = 0;
  uint16_t high = 0x7C00;
  while (low < high) {  // the largest finite or infinite f16 that is not above
    const auto middle = static_cast<uint16_t>((low + high + 1) / 2);
    if (f16_value(middle) <= magnitude) {
      low = middle;
    } else {
      high = static_cast<uint16_t>(middle - 1);
    }
  }
  if (low == 0x7C00) return sign | 0x7C00;
  const double down = magnitude - f16_value(low);
  const double up = f16_value(static_cast<uint16_t>(low + 1)) - magnitude;
  const bool take_next = up < down || (up == down && (low & 1) != 0);
  return static_cast<uint16_t>(sign | (take_next ? low + 1 : low));
}

inline double e4m3_value(uint8_t bits) {
  const int exponent = (bits >> 3) & 0xF;
  const int mantissa = bits & 7;
  const double sign = (bits & 0x80) != 0 ? -1.0 : 1.0;
  if (exponent == 15 && mantissa == 7) return std::nan("");
  if (exponent == 0) return sign * std::ldexp(mantissa, -9);
  return sign * std::ldexp(8 + mantissa, exponent - 10);
}

// The nearest number of e4m3, ties to the even one; beyond the largest, that one.
inline uint8_t slow_e4m3(float value) {
  if (std::isnan(value)) return 0x7F;
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const double magnitude = std::abs(static_cast<double>(value));
  uint8_t best = 0;
  for (uint8_t candidate = 1; candidate < 0x7F; ++candidate) {
    const double nearer = std::abs(magnitude - e4m3_value(candidate));
    const double so_far = std::abs(magnitude - e4m3_value(best));
    if (nearer < so_far || (nearer == so_far && (candidate & 1) == 0)) best = candidate;
    if (std::isinf(magnitude)) best = 0x7E;
  }
  return static_cast<uint8_t>(sign | best);
}

// NaN, which arithmetic does not carry over: the payload moves up.
inline uint32_t slow_widened(double value, uint16_t bits, bool is_nan, int payload_shift,
                             uint32_t nan) {
  if (!is_nan) return std::bit_cast<uint32_t>(static_cast<float>(value));
  const uint32_t sign = (bits & 0x8000) != 0 ? 0x80000000u : 0;
  return sign | nan | (uint32_t{bits} << payload_shift & 0x007FFFFFu);
}
inline uint32_t slow_from_bf16(uint16_t bits) {
  const int exponent = (bits >> 7) & 0xFF;
  const int mantissa = bits & 0x7F;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 0xFF && mantissa == 0) return slow_widened(sign * HUGE_VAL, bits, false, 0, 0);
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  return slow_widened(sign * value, bits, exponent == 0xFF, 16, 0x7F800000u);
}
inline uint32_t slow_from_f16(uint16_t bits) {
  const bool special = ((bits >> 10) & 0x1F) == 31;
  const bool infinite = special && (bits & 0x3FF) == 0;
  const double value = infinite ? std::copysign(HUGE_VAL, f16_value(bits)) : f16_value(bits);
  return slow_widened(value, bits, special && !infinite, 13, 0x7FC00000u);
}

// The element at (row, column) of a copy with scales, as f32.
inline float slow_value(const StridedCopy& copy, const std::byte* source, uint64_t row,
                        uint64_t column) {
  const uint32_t bytes = source_element_bytes(copy.op);
  uint32_t bits = 0;
  std::memcpy(&bits,
              source + (row * static_cast<uint64_t>(copy.source_stride[1]) +
                        column * static_cast<uint64_t>(copy.source_stride[2])) *
                           bytes,
              bytes);
  if (bytes == 1) return static_cast<float>(e4m3_value(static_cast<uint8_t>(bits)));
  if (copy.op == ElementOp::kBF16ToE4M3) bits = slow_from_bf16(static_cast<uint16_t>(bits));
  if (copy.op == ElementOp::kF16ToE4M3) bits = slow_from_f16(static_cast<uint16_t>(bits));
  return std::bit_cast<float>(bits);
}

// amax / 448 of the block that (row, column) lies in; element by element.
inline float slow_scale(const StridedCopy& copy, const std::byte* source, uint64_t row,
                        uint64_t column) {
  const auto [rows, columns] = copy.scales->block;
  const uint64_t first_row = row / rows * rows;
  const uint64_t first_column = column / columns * columns;
  float largest = 0;
  for (uint64_t r = first_row; r < copy.count[1] && r < first_row + rows; ++r) {
    for (uint64_t c = first_column; c < copy.count[2] && c < first_column + columns; ++c) {
      const float magnitude = std::fabs(slow_value(copy, source, r, c));
      if (std::isnan(magnitude)) return std::nanf("");
      if (magnitude > largest) largest = magnitude;
    }
  }
  const float scale = largest / 448.0f;
  return scale == 0.0f ? 1.0f : scale;
}

inline uint64_t slow_element(ElementOp op, const std::byte* from) {
  uint64_t bits = 0;
  std::memcpy(&bits, from, source_element_bytes(op));
  if (op == ElementOp::kF32ToBF16) return slow_bf16(static_cast<uint32_t>(bits));
  if (op == ElementOp::kF32ToF16) return slow_f16(static_cast<uint32_t>(bits));
  if (op == ElementOp::kBF16ToF32) return slow_from_bf16(static_cast<uint16_t>(bits));
  if (op == ElementOp::kF16ToF32) return slow_from_f16(static_cast<uint16_t>(bits));
  return bits;
}

// As slow_copy(), for copies with scales; `scales` is a shadow of copy.scales->target.
inline uint64_t slow_scaled_copy(const StridedCopy& copy, const std::byte* source,
                                 std::byte* target, std::byte* scales) {
  const BlockScales& blocks = *copy.scales;
  const uint32_t out = target_element_bytes(copy.op);
  std::vector<float> scale_of(copy.block_count(0) * copy.block_count(1));
  uint64_t sum = 0;
  for (uint64_t row = 0; row < copy.count[1]; ++row) {
    for (uint64_t column = 0; column < copy.count[2]; ++column) {
      const uint64_t i = (row + blocks.phase[0]) / blocks.block[0];
      const uint64_t j = (column + blocks.phase[1]) / blocks.block[1];
      const auto at = [](uint64_t a, uint64_t b, const int64_t* stride) {
        return a * static_cast<uint64_t>(stride[0]) + b * static_cast<uint64_t>(stride[1]);
      };
      const uint64_t place = at(i, j, blocks.stride) * 4;
      uint64_t bits = 0;
      if (quantizes(copy.op)) {
        const bool first = row % blocks.block[0] == 0 && column % blocks.block[1] == 0;
        float& scale = scale_of[i * copy.block_count(1) + j];
        if (first) scale = slow_scale(copy, source, row, column);
        auto scale_bits = std::bit_cast<uint32_t>(scale);
        if (std::isnan(scale)) scale_bits = 0x7FC00000u;
        bits = slow_e4m3(slow_value(copy, source, row, column) / scale);
        if (first) {
          if (scales != nullptr) std::memcpy(scales + place, &scale_bits, 4);
          sum += element_fingerprint(blocks.fingerprint_key,
                                     blocks.linear_index + at(i, j, blocks.index_stride),
                                     scale_bits, 4);
        }
      } else {
        float scale = 0;
        const auto apart =
            static_cast<int64_t>(blocks.source_offset_bytes - copy.source_offset_bytes);
        std::memcpy(&scale, (blocks.fetched != nullptr ? blocks.fetched : source + apart) + place,
                    4);
        const float value = slow_value(copy, source, row, column) * scale;
        const uint32_t wide = std::isnan(value) ? 0x7FC00000u : std::bit_cast<uint32_t>(value);
        bits = wide;
        if (copy.op == ElementOp::kE4M3ToBF16) bits = slow_bf16(wide);
        if (copy.op == ElementOp::kE4M3ToF16) bits = slow_f16(wide);
      }
      std::memcpy(target + at(row, column, copy.target_stride + 1) * out, &bits, out);
      sum += element_fingerprint(copy.fingerprint_key,
                                 copy.linear_index + at(row, column, copy.index_stride + 1), bits,
                                 out);
    }
  }
  return sum;
}

// Writes into `target` (a shadow of copy.target) and returns the sum of element_fingerprint().
inline uint64_t slow_copy(const StridedCopy& copy, const std::byte* source, std::byte* target) {
  uint64_t sum = 0;
  const uint32_t in = source_element_bytes(copy.op);
  const uint32_t out = target_element_bytes(copy.op);
  for (uint64_t a = 0; a < copy.count[0]; ++a) {
    for (uint64_t b = 0; b < copy.count[1]; ++b) {
      for (uint64_t c = 0; c < copy.count[2]; ++c) {
        const auto at = [&](const int64_t* stride) {
          return a * static_cast<uint64_t>(stride[0]) + b * static_cast<uint64_t>(stride[1]) +
                 c * static_cast<uint64_t>(stride[2]);
        };
        const uint64_t bits = slow_element(copy.op, source + at(copy.source_stride) * in);
        std::memcpy(target + at(copy.target_stride) * out, &bits, out);
        sum += element_fingerprint(copy.fingerprint_key, copy.linear_index + at(copy.index_stride),
                                   bits, out);
      }
    }
  }
  return sum;
}

}  // namespace transfuse

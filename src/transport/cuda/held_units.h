// A block of numbers in registers: all of a lane's units are loaded before the first is used, so
// that each is read once, whoever's memory it is. Blocks of 128x128 numbers are such, and smaller
// ones. The kernel and host tests run the same code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "base/host_device.h"
#include "copy/block_scale.h"
#include "copy/cast.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/scaled_device.h"

namespace transfuse {

// Two numbers that are no NaN.
TRANSFUSE_HOST_DEVICE inline uint32_t e4m3_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return cast_f32_bits_to_e4m3(bits_of_f32(first)) |
         uint32_t{cast_f32_bits_to_e4m3(bits_of_f32(second))} << 8;
#endif
}

struct F32Pair {
  float first;
  float second;
};
// Of the two lowest bytes, which are no NaN.
TRANSFUSE_HOST_DEVICE inline F32Pair f32_pair(uint32_t numbers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  F32Pair pair;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(numbers)));
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(pair.first), "=f"(pair.second)
      : "r"(halves));
  return pair;
#else
  return {f32_of_bits(cast_e4m3_bits_to_f32(static_cast<uint8_t>(numbers))),
          f32_of_bits(cast_e4m3_bits_to_f32(static_cast<uint8_t>(numbers >> 8)))};
#endif
}

// Two values that are no NaN, as two of 16 bits.
template <ElementOp kOp>
TRANSFUSE_HOST_DEVICE inline uint32_t narrow_pair(F32Pair values) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  if constexpr (kOp == ElementOp::kE4M3ToBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values.second), "f"(values.first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(values.second), "f"(values.first));
  }
  return pair;
#else
  const auto narrow = [](float value) -> uint32_t {
    if constexpr (kOp == ElementOp::kE4M3ToBF16) return cast_f32_bits_to_bf16(bits_of_f32(value));
    return cast_f32_bits_to_f16(bits_of_f32(value));
  };
  return narrow(values.first) | narrow(values.second) << 16;
#endif
}

// Any of the four bytes.
TRANSFUSE_HOST_DEVICE inline bool has_nan(uint32_t numbers) {
  return (((numbers & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u) != 0;
}

class ScaleProduct {
 public:
  TRANSFUSE_HOST_DEVICE explicit ScaleProduct(uint32_t scale_bits)
      : scale_(f32_of_bits(scale_bits)) {}
  TRANSFUSE_HOST_DEVICE float of(float value) const {
#ifdef __CUDA_ARCH__
    return __fmul_rn(value, scale_);
#else
    return value * scale_;
#endif
  }

 private:
  float scale_;
};

template <ElementOp kOp>
class HeldLane {
 public:
  using Lane = ScaledLane<kOp, kScaledUnit>;
  using In = typename Lane::In;
  using Out = typename Lane::Out;
  using Factor = std::conditional_t<quantizes_of(kOp), ScaleQuotient, ScaleProduct>;
  static constexpr bool kQuantizes = quantizes_of(kOp);

  TRANSFUSE_HOST_DEVICE HeldLane(const ScaledView& view, uint32_t lane) : view_(view), lane_(lane) {
    const uint32_t total = view.rows * view.units;
    count_ = lane < total ? (total - lane - 1) / view.lanes + 1 : 0;
  }

  // Units that the lane has not are zeros.
  TRANSFUSE_HOST_DEVICE void load(In (&held)[kHeldUnits]) const {
    uint32_t unit = lane_ % view_.units;
    Walk source(view_, reinterpret_cast<uint64_t>(view_.source), view_.source_stride[0],
                kScaledUnit * view_.source_stride[1], lane_ / view_.units, unit);
    TRANSFUSE_UNROLL
    for (uint32_t k = 0; k < kHeldUnits; ++k) {
      held[k] = In{};
      if (k < count_) held[k] = In::load(reinterpret_cast<const std::byte*>(source.at()));
      source.next(step(unit));
    }
  }

  TRANSFUSE_HOST_DEVICE static uint32_t magnitude(const In (&held)[kHeldUnits]) {
    uint32_t largest = 0;
    TRANSFUSE_UNROLL
    for (uint32_t k = 0; k < kHeldUnits; ++k) {
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kScaledUnit; ++i) {
        const uint32_t found = magnitude_of_f32(Lane::wide(held[k].element(i)));
        largest = found > largest ? found : largest;
      }
    }
    return largest;
  }

  // What the compiler knows of the units: values that it widened for the first pass and would keep
  // for the second take twice their registers.
  TRANSFUSE_HOST_DEVICE static void forget([[maybe_unused]] In (&held)[kHeldUnits]) {
#ifdef __CUDA_ARCH__
    TRANSFUSE_UNROLL
    for (uint32_t k = 0; k < kHeldUnits; ++k) {
      TRANSFUSE_UNROLL
      for (uint32_t w = 0; w < In::kWords; ++w) asm volatile("" : "+r"(held[k].word[w]));
    }
#endif
  }

  // Whether move() makes what the scale asks for.
  TRANSFUSE_HOST_DEVICE static bool moves(const In (&held)[kHeldUnits], uint32_t scale) {
    if constexpr (quantizes_of(kOp)) return ScaleQuotient::exact(scale);
    bool nan = magnitude_of_f32(scale) >= 0x7F800000u;
    TRANSFUSE_UNROLL
    for (uint32_t k = 0; k < kHeldUnits; ++k) {
      TRANSFUSE_UNROLL
      for (uint32_t w = 0; w < In::kWords; ++w) nan = nan || has_nan(held[k].word[w]);
    }
    return !nan;
  }

  TRANSFUSE_HOST_DEVICE uint64_t move(const In (&held)[kHeldUnits], uint32_t scale) const {
    const uint32_t row = lane_ / view_.units;
    uint32_t unit = lane_ % view_.units;
    Walk target(view_, reinterpret_cast<uint64_t>(view_.target), view_.target_stride[0],
                kScaledUnit * view_.target_stride[1], row, unit);
    Walk index(view_, view_.index, view_.index_stride[0], kScaledUnit * view_.index_stride[1], row,
               unit);
    const Factor factor(scale);
    uint64_t sum = 0;
    TRANSFUSE_UNROLL
    for (uint32_t k = 0; k < kHeldUnits; ++k) {
      if (k < count_) {
        const Out out = moved(held[k], factor);
        if (view_.target != nullptr) out.store(reinterpret_cast<std::byte*>(target.at()));
        if (view_.fingerprint) sum += unit_sum(static_cast<uint32_t>(index.at()), out);
      }
      const bool wraps = step(unit);
      target.next(wraps);
      index.next(wraps);
    }
    return sum;
  }

 private:
  TRANSFUSE_HOST_DEVICE bool step(uint32_t& unit) const {
    unit += view_.unit_step;
    const bool wraps = unit >= view_.units;
    if (wraps) unit -= view_.units;
    return wraps;
  }
  TRANSFUSE_HOST_DEVICE static Out moved(const In& in, const Factor& factor) {
    Out out{};
    if constexpr (quantizes_of(kOp)) {
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kScaledUnit; i += 2) {
        const uint32_t pair = e4m3_pair(factor.of(Lane::wide(in.element(i))),
                                        factor.of(Lane::wide(in.element(i + 1))));
        out.word[i / 4] |= pair << (8 * (i % 4));
      }
    } else {
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kScaledUnit; i += 2) {
        const F32Pair read = f32_pair(in.word[i / 4] >> (8 * (i % 4)));
        const F32Pair pair = {factor.of(read.first), factor.of(read.second)};
        if constexpr (kOp == ElementOp::kE4M3ToF32) {
          out.word[i] = bits_of_f32(pair.first);
          out.word[i + 1] = bits_of_f32(pair.second);
        } else {
          out.word[i / 2] = narrow_pair<kOp>(pair);
        }
      }
    }
    return out;
  }

  // All elements of a held block share the upper half of their linear indices.
  TRANSFUSE_HOST_DEVICE uint64_t unit_sum(uint32_t index, const Out& out) const {
    const uint32_t ahead = static_cast<uint32_t>(view_.index_stride[1]) * kIndexFactor;
    uint32_t place = index * kIndexFactor + view_.seed.first;
    uint64_t sum = 0;
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kScaledUnit; ++i, place += ahead) {
      sum += mix_word(place, view_.seed.second, out.element(i));
    }
    return sum;
  }

  const ScaledView& view_;
  const uint32_t lane_;
  uint32_t count_;
};

template <class Use>
TRANSFUSE_HOST_DEVICE uint64_t with_held(const ScaledView& view, uint32_t lane, const Use& use) {
  switch (view.op) {
    case ElementOp::kF32ToE4M3:
      return use(HeldLane<ElementOp::kF32ToE4M3>(view, lane));
    case ElementOp::kBF16ToE4M3:
      return use(HeldLane<ElementOp::kBF16ToE4M3>(view, lane));
    case ElementOp::kF16ToE4M3:
      return use(HeldLane<ElementOp::kF16ToE4M3>(view, lane));
    case ElementOp::kE4M3ToF32:
      return use(HeldLane<ElementOp::kE4M3ToF32>(view, lane));
    case ElementOp::kE4M3ToBF16:
      return use(HeldLane<ElementOp::kE4M3ToBF16>(view, lane));
    case ElementOp::kE4M3ToF16:
      return use(HeldLane<ElementOp::kE4M3ToF16>(view, lane));
    default:
      return 0;
  }
}

// A lane's share of a block with view.held. `scale_of(magnitude)`, by all lanes, makes the scale of
// the largest magnitude that each of them found. False where the lane has moved nothing, which
// scaled_move() is to do: for scales and numbers that hardly any block has.
template <class ScaleOf>
TRANSFUSE_HOST_DEVICE inline bool move_held(const ScaledView& view, uint32_t lane,
                                            const ScaleOf& scale_of, uint64_t& sum) {
  bool moves = false;
  sum = with_held(view, lane, [&](const auto& of) -> uint64_t {
    using Lane = std::remove_cvref_t<decltype(of)>;
    typename Lane::In held[kHeldUnits];
    of.load(held);
    uint32_t magnitude = 0;
    if constexpr (Lane::kQuantizes) magnitude = Lane::magnitude(held);
    const uint32_t scale = scale_of(magnitude);
    Lane::forget(held);
    moves = Lane::moves(held, scale);
    return moves ? of.move(held, scale) : 0;
  });
  return moves;
}

}  // namespace transfuse

// What one thread of a block (a lane) does with a block of numbers that share a scale. The kernel
// and host tests run the same code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "copy/block_scale.h"
#include "copy/cast.h"
#include "copy/element_size.h"
#include "copy/fingerprint.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse {

// Units of a lane that are held in registers between the two passes over a block (held_units.h).
inline constexpr uint32_t kHeldUnits = 4;
// Elements that do not come in units are kept here: 128x128 of bf16 or f16. Larger blocks are read
// twice.
inline constexpr uint32_t kScaledStageBytes = 32768;

// What the lanes of an item share, made by one of them.
struct ScaledView {
  const std::byte* source = nullptr;  // of the block's first element
  std::byte* target = nullptr;        // null: sum only
  const std::byte* read_scale = nullptr;
  std::byte* written_scale = nullptr;
  uint64_t index = 0;
  uint64_t key = 0;
  uint64_t scale_index = 0;
  uint64_t scale_key = 0;
  int64_t source_stride[2] = {0, 0};
  int64_t target_stride[2] = {0, 0};
  int64_t index_stride[2] = {0, 0};
  MixSeed seed{};  // for the upper half of `index`
  uint32_t rows = 0;
  uint32_t units = 0;  // in a row
  uint32_t lanes = 1;
  uint32_t row_step = 0;  // from a lane's unit to its next one
  uint32_t unit_step = 0;
  uint32_t sum = 0;
  ElementOp op = ElementOp::kF32ToE4M3;
  bool fingerprint = false;
  bool vectors = false;
  bool held = false;
  bool staged = false;

  // Of the wider side.
  TRANSFUSE_HOST_DEVICE uint64_t size_bytes() const {
    const uint32_t in = source_bytes_of(op);
    const uint32_t out = target_bytes_of(op);
    return uint64_t{rows} * units * (vectors ? kScaledUnit : 1) * (in > out ? in : out);
  }
};

// `bases`: addresses, per source.
TRANSFUSE_HOST_DEVICE inline ScaledView view_of(const ScaledRun& run, const ScaledItem& item,
                                                const uint64_t* bases, uint32_t lanes) {
  int64_t first[2];
  uint32_t length[2];
  for (int axis = 0; axis < 2; ++axis) {
    const uint64_t block = run.block[axis];
    const uint64_t begin = item.block[axis] == 0 ? 0 : item.block[axis] * block - run.phase[axis];
    uint64_t end = (item.block[axis] + uint64_t{1}) * block - run.phase[axis];
    if (end > run.count[axis]) end = run.count[axis];
    first[axis] = static_cast<int64_t>(begin);
    length[axis] = static_cast<uint32_t>(end - begin);
  }
  const auto at = [&](const int64_t(&stride)[2]) {
    return first[0] * stride[0] + first[1] * stride[1];
  };
  const auto scale_at = [&](const int64_t(&stride)[2]) {
    return int64_t{item.block[0]} * stride[0] + int64_t{item.block[1]} * stride[1];
  };
  ScaledView view;
  view.source = reinterpret_cast<const std::byte*>(bases[run.source] + run.source_offset) +
                at(run.source_stride);
  if (run.target != 0) {
    view.target = reinterpret_cast<std::byte*>(run.target) + at(run.target_stride);
  }
  if (!quantizes_of(run.op)) {
    view.read_scale = reinterpret_cast<const std::byte*>(bases[run.scale_source] + run.scales) +
                      scale_at(run.scale_stride);
  } else if (run.scales != 0 && run.target != 0) {
    view.written_scale = reinterpret_cast<std::byte*>(run.scales) + scale_at(run.scale_stride);
  }
  view.index = run.linear_index + static_cast<uint64_t>(at(run.index_stride));
  view.key = run.key;
  view.scale_index =
      run.scale_linear_index + static_cast<uint64_t>(scale_at(run.scale_index_stride));
  view.scale_key = run.scale_key;
  for (int axis = 0; axis < 2; ++axis) {
    view.source_stride[axis] = run.source_stride[axis];
    view.target_stride[axis] = run.target_stride[axis];
    view.index_stride[axis] = run.index_stride[axis];
  }
  if (run.fingerprint) {
    view.seed = mix_seed(run.key, static_cast<uint32_t>(view.index >> 32), target_bytes_of(run.op));
  }
  view.rows = length[0];
  view.units = run.vectors ? length[1] / kScaledUnit : length[1];
  view.lanes = lanes;
  view.row_step = lanes / view.units;
  view.unit_step = lanes % view.units;
  view.sum = run.sum;
  view.op = run.op;
  view.fingerprint = run.fingerprint;
  view.vectors = run.vectors;
  const int64_t span = (length[0] - int64_t{1}) * run.index_stride[0] +
                       (length[1] - int64_t{1}) * run.index_stride[1];
  view.held = run.vectors && uint64_t{view.rows} * view.units <= uint64_t{lanes} * kHeldUnits &&
              (view.index + static_cast<uint64_t>(span)) >> 32 == view.index >> 32;
  view.staged = !run.vectors && quantizes_of(run.op) &&
                uint64_t{length[0]} * length[1] * source_bytes_of(run.op) <= kScaledStageBytes;
  return view;
}

// kCount elements of kBytes each as they lie in memory: a vector, half of one, or one element at
// any address.
template <uint32_t kBytes, uint32_t kCount>
struct RawUnit {
  static constexpr uint32_t kSize = kBytes * kCount;
  static constexpr uint32_t kWords = (kSize + 3) / 4;
  uint32_t word[kWords];

  TRANSFUSE_HOST_DEVICE uint32_t element(uint32_t i) const {
    constexpr uint32_t kInWord = 4 / kBytes;
    const uint32_t shifted = word[i / kInWord] >> (8 * kBytes * (i % kInWord));
    return kBytes == 4 ? shifted : shifted & ((1u << (8 * kBytes % 32)) - 1u);
  }
  TRANSFUSE_HOST_DEVICE void put(uint32_t i, uint32_t bits) {
    constexpr uint32_t kInWord = 4 / kBytes;
    word[i / kInWord] |= bits << (8 * kBytes * (i % kInWord));
  }

  TRANSFUSE_HOST_DEVICE static RawUnit load(const std::byte* source) {
    RawUnit unit{};
    if constexpr (kSize % kVectorBytes == 0) {
      TRANSFUSE_UNROLL
      for (uint32_t v = 0; v < kSize / kVectorBytes; ++v) {
        const Vector vector = load_vector(source + v * kVectorBytes);
        for (uint32_t w = 0; w < 4; ++w) unit.word[4 * v + w] = vector.word[w];
      }
    } else if constexpr (kSize == 8) {
      const uint64_t both = *reinterpret_cast<const uint64_t*>(source);
      unit.word[0] = static_cast<uint32_t>(both);
      unit.word[1] = static_cast<uint32_t>(both >> 32);
    } else {
      for (uint32_t i = 0; i < kSize; ++i) {
        unit.word[0] |= static_cast<uint32_t>(source[i]) << (8 * i);
      }
    }
    return unit;
  }
  // Of the stage, which is shared by the threads of a block and no global memory.
  TRANSFUSE_HOST_DEVICE static RawUnit load_staged(const std::byte* stage) {
    if constexpr (kSize < 4) {
      return load(stage);
    } else {
      RawUnit unit;
      TRANSFUSE_UNROLL
      for (uint32_t w = 0; w < kWords; ++w) {
        unit.word[w] = reinterpret_cast<const uint32_t*>(stage)[w];
      }
      return unit;
    }
  }
  TRANSFUSE_HOST_DEVICE void store_staged(std::byte* stage) const {
    if constexpr (kSize < 4) {
      store(stage);
    } else {
      TRANSFUSE_UNROLL
      for (uint32_t w = 0; w < kWords; ++w) reinterpret_cast<uint32_t*>(stage)[w] = word[w];
    }
  }
  TRANSFUSE_HOST_DEVICE void store(std::byte* target) const {
    if constexpr (kSize % kVectorBytes == 0) {
      TRANSFUSE_UNROLL
      for (uint32_t v = 0; v < kSize / kVectorBytes; ++v) {
        Vector vector;
        for (uint32_t w = 0; w < 4; ++w) vector.word[w] = word[4 * v + w];
        store_vector(target + v * kVectorBytes, vector);
      }
    } else if constexpr (kSize == 8) {
      *reinterpret_cast<uint64_t*>(target) = uint64_t{word[1]} << 32 | word[0];
    } else {
      for (uint32_t i = 0; i < kSize; ++i) {
        target[i] = static_cast<std::byte>((word[0] >> (8 * i)) & 0xFF);
      }
    }
  }
};

template <ElementOp kOp, uint32_t kCount>
class ScaledLane {
 public:
  using In = RawUnit<source_bytes_of(kOp), kCount>;
  using Out = RawUnit<target_bytes_of(kOp), kCount>;

  TRANSFUSE_HOST_DEVICE ScaledLane(const ScaledView& view, uint32_t lane, std::byte* stage)
      : view_(view), lane_(lane), stage_(stage) {}

  // The largest magnitude among the lane's elements, which go into the stage if they are to.
  TRANSFUSE_HOST_DEVICE uint32_t magnitude() const {
    uint32_t largest = 0;
    for (uint32_t u = lane_; u < view_.rows * view_.units; u += view_.lanes) {
      const In unit = In::load(source_at(u));
      if (view_.staged) unit.store_staged(stage_ + uint64_t{u} * In::kSize);
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kCount; ++i) {
        const uint32_t found = magnitude_of_f32(wide(unit.element(i)));
        largest = found > largest ? found : largest;
      }
    }
    return largest;
  }

  // Moves the lane's elements under `scale`; its part of the sum.
  TRANSFUSE_HOST_DEVICE uint64_t move(uint32_t scale) const {
    uint64_t sum = 0;
    for (uint32_t u = lane_; u < view_.rows * view_.units; u += view_.lanes) {
      const uint32_t row = u / view_.units;
      const auto column = static_cast<int64_t>(u % view_.units) * kCount;
      const In unit =
          view_.staged ? In::load_staged(stage_ + uint64_t{u} * In::kSize) : In::load(source_at(u));
      Out out{};
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kCount; ++i) out.put(i, moved(unit.element(i), scale));
      if (view_.target != nullptr) {
        out.store(view_.target + row * view_.target_stride[0] + column * view_.target_stride[1]);
      }
      if (!view_.fingerprint) continue;
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kCount; ++i) {
        const uint64_t index =
            view_.index + static_cast<uint64_t>(row * view_.index_stride[0] +
                                                (column + i) * view_.index_stride[1]);
        sum += element_sum(index, out.element(i));
      }
    }
    return sum;
  }

  TRANSFUSE_HOST_DEVICE static uint32_t wide(uint32_t bits) {
    if constexpr (kOp == ElementOp::kF32ToE4M3) return bits;
    if constexpr (kOp == ElementOp::kBF16ToE4M3) {
      return cast_bf16_bits_to_f32(static_cast<uint16_t>(bits));
    }
    return cast_f16_bits_to_f32(static_cast<uint16_t>(bits));
  }
  TRANSFUSE_HOST_DEVICE static uint32_t moved(uint32_t bits, uint32_t scale) {
    if constexpr (quantizes_of(kOp)) {
      return quantize_f32_bits(wide(bits), scale);
    } else {
      const uint32_t value = dequantize_e4m3_bits(static_cast<uint8_t>(bits), scale);
      if constexpr (kOp == ElementOp::kE4M3ToF32) return value;
      if constexpr (kOp == ElementOp::kE4M3ToBF16) return cast_f32_bits_to_bf16(value);
      return cast_f32_bits_to_f16(value);
    }
  }

 private:
  TRANSFUSE_HOST_DEVICE const std::byte* source_at(uint32_t u) const {
    return view_.source + u / view_.units * view_.source_stride[0] +
           static_cast<int64_t>(u % view_.units) * kCount * view_.source_stride[1];
  }
  TRANSFUSE_HOST_DEVICE uint64_t element_sum(uint64_t index, uint32_t bits) const {
    const auto high = static_cast<uint32_t>(index >> 32);
    const MixSeed seed = high == static_cast<uint32_t>(view_.index >> 32)
                             ? view_.seed
                             : mix_seed(view_.key, high, target_bytes_of(kOp));
    return mix_word(static_cast<uint32_t>(index) * kIndexFactor + seed.first, seed.second, bits);
  }

  const ScaledView& view_;
  const uint32_t lane_;
  std::byte* const stage_;
};

// Calls use(lane) with the ScaledLane of the view's operation.
template <uint32_t kCount, class Use>
TRANSFUSE_HOST_DEVICE uint64_t with_lane(const ScaledView& view, uint32_t lane, std::byte* stage,
                                         const Use& use) {
  switch (view.op) {
    case ElementOp::kF32ToE4M3:
      return use(ScaledLane<ElementOp::kF32ToE4M3, kCount>(view, lane, stage));
    case ElementOp::kBF16ToE4M3:
      return use(ScaledLane<ElementOp::kBF16ToE4M3, kCount>(view, lane, stage));
    case ElementOp::kF16ToE4M3:
      return use(ScaledLane<ElementOp::kF16ToE4M3, kCount>(view, lane, stage));
    case ElementOp::kE4M3ToF32:
      return use(ScaledLane<ElementOp::kE4M3ToF32, kCount>(view, lane, stage));
    case ElementOp::kE4M3ToBF16:
      return use(ScaledLane<ElementOp::kE4M3ToBF16, kCount>(view, lane, stage));
    case ElementOp::kE4M3ToF16:
      return use(ScaledLane<ElementOp::kE4M3ToF16, kCount>(view, lane, stage));
    default:
      return 0;
  }
}

// The first pass over a block that is quantised. A function of its own on the device, as is the
// second: what is held in registers needs them.
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE inline uint32_t scaled_magnitude(const ScaledView& view,
                                                                          uint32_t lane,
                                                                          std::byte* stage) {
  const auto use = [](const auto& of) -> uint64_t { return of.magnitude(); };
  return static_cast<uint32_t>(view.vectors ? with_lane<kScaledUnit>(view, lane, stage, use)
                                            : with_lane<1>(view, lane, stage, use));
}

// The only pass over a block that is dequantised, the second over one that is quantised.
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE inline uint64_t scaled_move(const ScaledView& view,
                                                                     uint32_t lane,
                                                                     std::byte* stage,
                                                                     uint32_t scale) {
  const auto use = [scale](const auto& of) -> uint64_t { return of.move(scale); };
  return view.vectors ? with_lane<kScaledUnit>(view, lane, stage, use)
                      : with_lane<1>(view, lane, stage, use);
}

TRANSFUSE_HOST_DEVICE inline uint32_t read_scale(const ScaledView& view) {
  return RawUnit<4, 1>::load(view.read_scale).word[0];
}

// For one lane: the scale to where it belongs; its part of the sum.
TRANSFUSE_HOST_DEVICE inline uint64_t write_scale(const ScaledView& view, uint32_t scale) {
  if (view.written_scale != nullptr) {
    RawUnit<4, 1> unit{};
    unit.word[0] = scale;
    unit.store(view.written_scale);
  }
  if (!view.fingerprint) return 0;
  const MixSeed seed =
      mix_seed(view.scale_key, static_cast<uint32_t>(view.scale_index >> 32), sizeof(float));
  return mix_word(static_cast<uint32_t>(view.scale_index) * kIndexFactor + seed.first, seed.second,
                  scale);
}

}  // namespace transfuse

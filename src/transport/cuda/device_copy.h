// What one thread of a block does with an item of a device table: moves its units, casts and sums
// them. Kernels and host tests run the same code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "copy/cast.h"
#include "copy/fingerprint.h"
#include "transport/cuda/device_table.h"

namespace transfuse {

// A thread among those that share an item.
struct Lane {
  uint32_t index = 0;
  uint32_t count = 1;
};

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

// Adds up fingerprints. Elements that are summed together mostly share the upper half of their
// linear indices: the seed is made anew only where it changes.
template <uint32_t kElementBytes>
class Summer {
 public:
  static constexpr bool kSums = true;

  TRANSFUSE_HOST_DEVICE Summer(uint64_t key, uint64_t first_index)
      : key_(key), high_(static_cast<uint32_t>(first_index >> 32)) {
    seed();
  }

  // Elements `index`, `index` + `step`, ...: bits(i) are those of the i-th.
  template <uint32_t kCount, class Bits>
  TRANSFUSE_HOST_DEVICE void add(uint64_t index, int64_t step, const Bits& bits) {
    const uint64_t last = index + static_cast<uint64_t>((kCount - 1) * step);
    if (static_cast<uint32_t>(index >> 32) == high_ && static_cast<uint32_t>(last >> 32) == high_) {
      uint32_t scaled = static_cast<uint32_t>(index) * kIndexFactor;
      const uint32_t scaled_step = static_cast<uint32_t>(step) * kIndexFactor;
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kCount; ++i, scaled += scaled_step) mix(scaled, bits(i));
      return;
    }
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint64_t at = index + static_cast<uint64_t>(static_cast<int64_t>(i) * step);
      if (static_cast<uint32_t>(at >> 32) != high_) {
        high_ = static_cast<uint32_t>(at >> 32);
        seed();
      }
      mix(static_cast<uint32_t>(at) * kIndexFactor, bits(i));
    }
  }
  TRANSFUSE_HOST_DEVICE uint64_t sum() const { return sum_; }

 private:
  TRANSFUSE_HOST_DEVICE void mix(uint32_t scaled, uint64_t bits) {
    sum_ += mix_word(scaled + seed_.first, seed_.second, static_cast<uint32_t>(bits));
    if constexpr (kElementBytes == 8) {
      sum_ += mix_word(scaled + upper_.first, upper_.second, static_cast<uint32_t>(bits >> 32));
    }
  }
  TRANSFUSE_HOST_DEVICE void seed() {
    seed_ = mix_seed(key_, high_, kElementBytes);
    if constexpr (kElementBytes == 8) upper_ = mix_seed(key_, high_, kUpperPart);
  }

  uint64_t key_;
  uint64_t sum_ = 0;
  MixSeed seed_{};
  MixSeed upper_{};
  uint32_t high_;
};

// In place of a Summer where no sum is wanted.
struct NoSum {
  static constexpr bool kSums = false;
  TRANSFUSE_HOST_DEVICE uint64_t sum() const { return 0; }
};

// -- units: what is loaded, what is stored, and how the elements of it are summed --

template <uint32_t kBytes>
struct UnsignedOf;
template <>
struct UnsignedOf<1> {
  using type = uint8_t;
};
template <>
struct UnsignedOf<2> {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};

template <uint32_t kBytes>
struct CopyCast {
  using Source = typename UnsignedOf<kBytes>::type;
  using Target = Source;
  TRANSFUSE_HOST_DEVICE static Target cast(Source bits) { return bits; }
};
struct F32ToBF16Cast {
  using Source = uint32_t;
  using Target = uint16_t;
  TRANSFUSE_HOST_DEVICE static Target cast(Source bits) { return cast_f32_bits_to_bf16(bits); }
};
struct F32ToF16Cast {
  using Source = uint32_t;
  using Target = uint16_t;
  TRANSFUSE_HOST_DEVICE static Target cast(Source bits) { return cast_f32_bits_to_f16(bits); }
};

// One element, at any address.
template <class Cast>
struct ElementUnit {
  using Source = typename Cast::Source;
  using Target = typename Cast::Target;
  struct Loaded {
    Source bits;
  };
  static constexpr uint32_t kElements = 1;

  // Byte by byte: nothing is known of the alignment.
  TRANSFUSE_HOST_DEVICE static Loaded load(const std::byte* source) {
    Source bits = 0;
    if (reinterpret_cast<uintptr_t>(source) % sizeof(Source) == 0) {
      bits = *reinterpret_cast<const Source*>(source);
    } else {
      for (uint32_t i = 0; i < sizeof(Source); ++i) {
        bits = static_cast<Source>(bits |
                                   static_cast<Source>(static_cast<Source>(source[i]) << (8 * i)));
      }
    }
    return {bits};
  }
  template <class Sum>
  TRANSFUSE_HOST_DEVICE static void store(std::byte* target, const Loaded& loaded, uint64_t index,
                                          int64_t /*index_step*/, Sum& sum) {
    const Target bits = Cast::cast(loaded.bits);
    if (reinterpret_cast<uintptr_t>(target) % sizeof(Target) == 0) {
      *reinterpret_cast<Target*>(target) = bits;
    } else {
      for (uint32_t i = 0; i < sizeof(Target); ++i) {
        target[i] = static_cast<std::byte>((uint64_t{bits} >> (8 * i)) & 0xFF);
      }
    }
    if constexpr (Sum::kSums) {
      sum.template add<1>(index, 0, [&](uint32_t) { return uint64_t{bits}; });
    }
  }
};

// kVectorBytes of the narrower side.
template <class Cast>
struct VectorUnit {
  using Source = typename Cast::Source;
  using Target = typename Cast::Target;
  static constexpr uint32_t kNarrow =
      sizeof(Source) < sizeof(Target) ? sizeof(Source) : sizeof(Target);
  static constexpr uint32_t kElements = kVectorBytes / kNarrow;
  static constexpr bool kPlain = sizeof(Source) == sizeof(Target);
  static constexpr uint32_t kSourceVectors = kElements * sizeof(Source) / kVectorBytes;
  static constexpr uint32_t kTargetVectors = kElements * sizeof(Target) / kVectorBytes;
  struct Loaded {
    Vector vector[kSourceVectors];
  };

  TRANSFUSE_HOST_DEVICE static Loaded load(const std::byte* source) {
    Loaded loaded;
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kSourceVectors; ++i) {
      loaded.vector[i] = reinterpret_cast<const Vector*>(source)[i];
    }
    return loaded;
  }
  template <class Sum>
  TRANSFUSE_HOST_DEVICE static void store(std::byte* target, const Loaded& loaded, uint64_t index,
                                          int64_t index_step, Sum& sum) {
    if constexpr (kPlain && !Sum::kSums) {
      *reinterpret_cast<Vector*>(target) = loaded.vector[0];
    } else {
      Vector out[kTargetVectors] = {};
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kElements; ++i) {
        put<Target>(out, i, Cast::cast(element<Source>(loaded.vector, i)));
      }
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kTargetVectors; ++i) reinterpret_cast<Vector*>(target)[i] = out[i];
      if constexpr (Sum::kSums) {
        sum.template add<kElements>(index, index_step,
                                    [&](uint32_t i) { return uint64_t{element<Target>(out, i)}; });
      }
    }
  }

 private:
  template <class Bits>
  TRANSFUSE_HOST_DEVICE static Bits element(const Vector* vectors, uint32_t i) {
    if constexpr (sizeof(Bits) == 8) {
      const uint32_t* words = &vectors[i / 2].word[i % 2 * 2];
      return static_cast<Bits>(uint64_t{words[1]} << 32 | words[0]);
    } else {
      constexpr uint32_t kInWord = 4 / sizeof(Bits);
      const uint32_t word = vectors[i / (4 * kInWord)].word[i / kInWord % 4];
      return static_cast<Bits>(word >> (8 * sizeof(Bits) * (i % kInWord)));
    }
  }
  template <class Bits>
  TRANSFUSE_HOST_DEVICE static void put(Vector* vectors, uint32_t i, Bits bits) {
    if constexpr (sizeof(Bits) == 8) {
      uint32_t* words = &vectors[i / 2].word[i % 2 * 2];
      words[0] = static_cast<uint32_t>(bits);
      words[1] = static_cast<uint32_t>(static_cast<uint64_t>(bits) >> 32);
    } else {
      constexpr uint32_t kInWord = 4 / sizeof(Bits);
      vectors[i / (4 * kInWord)].word[i / kInWord % 4] |= static_cast<uint32_t>(bits)
                                                          << (8 * sizeof(Bits) * (i % kInWord));
    }
  }
};

// Where in an item a lane is: its units are lane.count apart.
class Cursor {
 public:
  TRANSFUSE_HOST_DEVICE Cursor(const DeviceItem& item, Lane lane)
      : units_(item.units),
        row_step_(lane.count / item.units),
        unit_step_(lane.count % item.units),
        row_(lane.index / item.units),
        unit_(lane.index % item.units) {}

  TRANSFUSE_HOST_DEVICE uint32_t row() const { return row_; }
  TRANSFUSE_HOST_DEVICE uint32_t unit() const { return unit_; }
  TRANSFUSE_HOST_DEVICE void next() {
    row_ += row_step_;
    unit_ += unit_step_;
    if (unit_ >= units_) {
      unit_ -= units_;
      ++row_;
    }
  }

 private:
  uint32_t units_;
  uint32_t row_step_;
  uint32_t unit_step_;
  uint32_t row_;
  uint32_t unit_;
};

// Offset of an element from the first one of its run, in what `pitch` and `step` are given in.
template <bool kOneLevel>
TRANSFUSE_HOST_DEVICE int64_t offset_of(const DeviceRun& run, uint32_t row, uint32_t element,
                                        const int64_t (&pitch)[2], int64_t step) {
  if constexpr (kOneLevel) return row * pitch[1] + element * step;
  return row / run.inner_rows * pitch[0] + row % run.inner_rows * pitch[1] + element * step;
}

// Moves the lane's share of `item` and returns its part of the sum. Loads of kInFlight units are
// under way before the first is stored. A function of its own on the device: inlined into one
// switch, they share too few registers.
template <class Unit, class Sum, uint32_t kInFlight, bool kOneLevel>
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE uint64_t copy_units(const DeviceRun& run,
                                                             const DeviceItem& item,
                                                             const std::byte* base, Lane lane,
                                                             Sum sum) {
  const std::byte* const source = base + run.source_offset;
  std::byte* const target = reinterpret_cast<std::byte*>(run.target);
  Cursor loading(item, lane);
  Cursor storing = loading;
  while (storing.row() < item.rows) {
    typename Unit::Loaded loaded[kInFlight];
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kInFlight; ++i) {
      if (loading.row() < item.rows) {
        loaded[i] = Unit::load(
            source + offset_of<kOneLevel>(run, item.first_row + loading.row(),
                                          (item.first_unit + loading.unit()) * Unit::kElements,
                                          run.source_pitch, run.source_step));
      }
      loading.next();
    }
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kInFlight; ++i) {
      if (storing.row() < item.rows) {
        const uint32_t row = item.first_row + storing.row();
        const uint32_t element = (item.first_unit + storing.unit()) * Unit::kElements;
        uint64_t index = 0;
        if constexpr (Sum::kSums) {
          index = run.linear_index + static_cast<uint64_t>(offset_of<kOneLevel>(
                                         run, row, element, run.index_pitch, run.index_step));
        }
        Unit::store(
            target + offset_of<kOneLevel>(run, row, element, run.target_pitch, run.target_step),
            loaded[i], index, run.index_step, sum);
      }
      storing.next();
    }
  }
  return sum.sum();
}

inline constexpr uint32_t kVectorsInFlight = 4;
inline constexpr uint32_t kElementsInFlight = 8;

template <class Unit, uint32_t kInFlight>
TRANSFUSE_HOST_DEVICE uint64_t copy_walk(const DeviceRun& run, const DeviceItem& item,
                                         const std::byte* base, Lane lane) {
  using Sum = Summer<sizeof(typename Unit::Target)>;
  const bool one_level =
      run.source_pitch[0] == 0 && run.target_pitch[0] == 0 && run.index_pitch[0] == 0;
  if (run.fingerprint) {
    const Sum sum(run.key, run.linear_index);
    return one_level ? copy_units<Unit, Sum, kInFlight, true>(run, item, base, lane, sum)
                     : copy_units<Unit, Sum, kInFlight, false>(run, item, base, lane, sum);
  }
  return one_level ? copy_units<Unit, NoSum, kInFlight, true>(run, item, base, lane, NoSum())
                   : copy_units<Unit, NoSum, kInFlight, false>(run, item, base, lane, NoSum());
}

template <class Cast>
TRANSFUSE_HOST_DEVICE uint64_t copy_cast(const DeviceRun& run, const DeviceItem& item,
                                         const std::byte* base, Lane lane) {
  using Vectors = VectorUnit<Cast>;
  return run.walk == RunWalk::kVectors
             ? copy_walk<Vectors, kVectorsInFlight / Vectors::kSourceVectors>(run, item, base, lane)
             : copy_walk<ElementUnit<Cast>, kElementsInFlight>(run, item, base, lane);
}

// One lane's share of one item: the whole switch of the kernel.
TRANSFUSE_HOST_DEVICE inline uint64_t copy_item(const DeviceRun& run, const DeviceItem& item,
                                                const std::byte* base, Lane lane) {
  switch (run.op) {
    case ElementOp::kCopy1:
      return copy_cast<CopyCast<1>>(run, item, base, lane);
    case ElementOp::kCopy2:
      return copy_cast<CopyCast<2>>(run, item, base, lane);
    case ElementOp::kCopy4:
      return copy_cast<CopyCast<4>>(run, item, base, lane);
    case ElementOp::kCopy8:
      return copy_cast<CopyCast<8>>(run, item, base, lane);
    case ElementOp::kF32ToBF16:
      return copy_cast<F32ToBF16Cast>(run, item, base, lane);
    case ElementOp::kF32ToF16:
      return copy_cast<F32ToF16Cast>(run, item, base, lane);
  }
  return 0;
}

}  // namespace transfuse

// What one thread of a block (a lane) does with an item of a device table: moves its units, casts
// and sums them. Kernels and host tests run the same code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/host_device.h"
#include "copy/cast.h"
#include "copy/fingerprint.h"
#include "transport/cuda/device_table.h"

namespace transfuse {

struct alignas(kVectorBytes) Vector {
  uint32_t word[4];
};

// Aligned ones. On the device the address space is said, which the compiler cannot know.
TRANSFUSE_HOST_DEVICE inline Vector load_vector(const std::byte* source) {
#ifdef __CUDA_ARCH__
  Vector v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(source));
  return v;
#else
  return *reinterpret_cast<const Vector*>(source);
#endif
}
TRANSFUSE_HOST_DEVICE inline void store_vector(std::byte* target, const Vector& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(target), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#else
  *reinterpret_cast<Vector*>(target) = v;
#endif
}

// What the lanes of an item share, made by one of them. One row begins source_pitch after the one
// before it; so at the target and in the catalog tensor.
struct ItemView {
  const std::byte* source = nullptr;  // of the first unit of the first row
  std::byte* target = nullptr;        // null: sum only
  uint64_t index = 0;
  int64_t source_pitch = 0;  // bytes
  int64_t target_pitch = 0;  // bytes
  int64_t index_pitch = 0;   // elements
  int64_t source_step = 0;   // bytes from unit to unit
  int64_t target_step = 0;   // bytes
  int64_t index_step = 0;    // from element to element
  uint64_t key = 0;
  MixSeed seed{};   // for the upper half of `index`
  MixSeed upper{};  // the same of an 8-byte element's upper half
  uint32_t rows = 0;
  uint32_t units = 0;
  uint32_t lanes = 1;
  uint32_t row_step = 0;  // from a lane's unit to its next one
  uint32_t unit_step = 0;
  uint32_t sum = 0;
  ElementOp op = ElementOp::kCopy1;
  RunWalk walk = RunWalk::kElements;
  bool fingerprint = false;
};

TRANSFUSE_HOST_DEVICE inline ItemView view_of(const DeviceRun& run, const DeviceItem& item,
                                              const std::byte* base, uint32_t lanes) {
  const auto elements = static_cast<int64_t>(unit_elements(run.walk, run.op));
  const int64_t outer = item.first_row / run.inner_rows;
  const int64_t inner = item.first_row % run.inner_rows;
  const int64_t element = static_cast<int64_t>(item.first_unit) * elements;
  ItemView view{
      .source = base + run.source_offset + outer * run.source_pitch[0] +
                inner * run.source_pitch[1] + element * run.source_step,
      .target = run.target == 0
                    ? nullptr
                    : reinterpret_cast<std::byte*>(run.target) + outer * run.target_pitch[0] +
                          inner * run.target_pitch[1] + element * run.target_step,
      .index = run.linear_index +
               static_cast<uint64_t>(outer * run.index_pitch[0] + inner * run.index_pitch[1] +
                                     element * run.index_step),
      .source_pitch = run.source_pitch[1],
      .target_pitch = run.target_pitch[1],
      .index_pitch = run.index_pitch[1],
      .source_step = elements * run.source_step,
      .target_step = elements * run.target_step,
      .index_step = run.index_step,
      .key = run.key,
      .rows = item.rows,
      .units = item.units,
      .lanes = lanes,
      .row_step = lanes / item.units,
      .unit_step = lanes % item.units,
      .sum = run.sum,
      .op = run.op,
      .walk = run.walk,
      .fingerprint = run.fingerprint};
  if (run.fingerprint) {
    const auto high = static_cast<uint32_t>(view.index >> 32);
    const uint32_t bytes = target_bytes_of(run.op);
    view.seed = mix_seed(run.key, high, bytes);
    if (bytes == 8) view.upper = mix_seed(run.key, high, kUpperPart);
  }
  return view;
}

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

// The i-th element of vectors.
template <class Bits>
TRANSFUSE_HOST_DEVICE inline Bits element_of(const Vector* vectors, uint32_t i) {
  if constexpr (sizeof(Bits) == 8) {
    const uint32_t* words = &vectors[i / 2].word[i % 2 * 2];
    return static_cast<Bits>(uint64_t{words[1]} << 32 | words[0]);
  } else {
    constexpr uint32_t kInWord = 4 / sizeof(Bits);
    const uint32_t word = vectors[i / (4 * kInWord)].word[i / kInWord % 4];
    return static_cast<Bits>(word >> (8 * sizeof(Bits) * (i % kInWord)));
  }
}
// Puts it there, where there are zeros.
template <class Bits>
TRANSFUSE_HOST_DEVICE inline void put_element(Vector* vectors, uint32_t i, Bits bits) {
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
// Takes the first element away: every other one moves to the place before its own.
template <class Bits, uint32_t kVectors>
TRANSFUSE_HOST_DEVICE inline void drop_element(Vector* vectors) {
  constexpr uint32_t kWords = 4 * kVectors;
  constexpr uint32_t kWhole = sizeof(Bits) / 4;  // words of an element
  TRANSFUSE_UNROLL
  for (uint32_t i = 0; i < kWords; ++i) {
    const uint32_t from = i + kWhole;
    const uint32_t low = from < kWords ? vectors[from / 4].word[from % 4] : 0;
    if constexpr (kWhole > 0) {
      vectors[i / 4].word[i % 4] = low;
    } else {
      const uint32_t high = from + 1 < kWords ? vectors[(from + 1) / 4].word[(from + 1) % 4] : 0;
      constexpr uint32_t kShift = 8 * sizeof(Bits) % 32;
      vectors[i / 4].word[i % 4] = low >> kShift | high << (32 - kShift);
    }
  }
}

// Adds up fingerprints. Elements of an item mostly share the upper half of their linear indices,
// and with it the seed.
template <uint32_t kElementBytes>
class Summer {
 public:
  static constexpr bool kSums = true;

  TRANSFUSE_HOST_DEVICE explicit Summer(const ItemView& view) : view_(view) {}

  using Bits = typename UnsignedOf<kElementBytes>::type;

  TRANSFUSE_HOST_DEVICE void add(uint64_t index, Bits bits) {
    const auto high = static_cast<uint32_t>(index >> 32);
    const uint32_t scaled = static_cast<uint32_t>(index) * kIndexFactor;
    if (high == static_cast<uint32_t>(view_.index >> 32)) {
      mix(scaled, view_.seed, view_.upper, bits);
    } else {
      mix(scaled, mix_seed(view_.key, high, kElementBytes), mix_seed(view_.key, high, kUpperPart),
          bits);
    }
  }
  // Elements `index`, `index` + view.index_step, ...: those of vectors.
  template <uint32_t kVectors>
  TRANSFUSE_HOST_DEVICE void add_vectors(uint64_t index, const Vector* vectors) {
    constexpr uint32_t kCount = kVectors * kVectorBytes / kElementBytes;
    const uint64_t last =
        index + static_cast<uint64_t>(static_cast<int64_t>(kCount - 1) * view_.index_step);
    const auto high = static_cast<uint32_t>(view_.index >> 32);
    if (static_cast<uint32_t>(index >> 32) == high && static_cast<uint32_t>(last >> 32) == high) {
      uint32_t scaled = static_cast<uint32_t>(index) * kIndexFactor;
      const uint32_t step = static_cast<uint32_t>(view_.index_step) * kIndexFactor;
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kCount; ++i, scaled += step) {
        mix(scaled, view_.seed, view_.upper, element_of<Bits>(vectors, i));
      }
      return;
    }
    // Hardly ever: short code counts more than speed.
    Vector left[kVectors];
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kVectors; ++i) left[i] = vectors[i];
    TRANSFUSE_NO_UNROLL
    for (uint32_t i = 0; i < kCount; ++i, index += static_cast<uint64_t>(view_.index_step)) {
      add(index, element_of<Bits>(left, 0));
      drop_element<Bits, kVectors>(left);
    }
  }
  TRANSFUSE_HOST_DEVICE uint64_t sum() const { return sum_; }

 private:
  TRANSFUSE_HOST_DEVICE void mix(uint32_t scaled, MixSeed seed, MixSeed upper, uint64_t bits) {
    sum_ += mix_word(scaled + seed.first, seed.second, static_cast<uint32_t>(bits));
    if constexpr (kElementBytes == 8) {
      sum_ += mix_word(scaled + upper.first, upper.second, static_cast<uint32_t>(bits >> 32));
    }
  }

  const ItemView& view_;
  uint64_t sum_ = 0;
};

// In place of a Summer where no sum is wanted.
struct NoSum {
  static constexpr bool kSums = false;
  TRANSFUSE_HOST_DEVICE explicit NoSum(const ItemView& /*view*/) {}
  TRANSFUSE_HOST_DEVICE uint64_t sum() const { return 0; }
};

// -- units: what is loaded, what is stored, and how the elements of it are summed --

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
struct BF16ToF32Cast {
  using Source = uint16_t;
  using Target = uint32_t;
  TRANSFUSE_HOST_DEVICE static Target cast(Source bits) { return cast_bf16_bits_to_f32(bits); }
};
struct F16ToF32Cast {
  using Source = uint16_t;
  using Target = uint32_t;
  TRANSFUSE_HOST_DEVICE static Target cast(Source bits) { return cast_f16_bits_to_f32(bits); }
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
  template <bool kStores, class Sum>
  TRANSFUSE_HOST_DEVICE static void store(std::byte* target, const Loaded& loaded, uint64_t index,
                                          Sum& sum) {
    const Target bits = Cast::cast(loaded.bits);
    if constexpr (!kStores) {
      // Summed only.
    } else if (reinterpret_cast<uintptr_t>(target) % sizeof(Target) == 0) {
      *reinterpret_cast<Target*>(target) = bits;
    } else {
      for (uint32_t i = 0; i < sizeof(Target); ++i) {
        target[i] = static_cast<std::byte>((uint64_t{bits} >> (8 * i)) & 0xFF);
      }
    }
    if constexpr (Sum::kSums) {
      sum.add(index, bits);
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
      loaded.vector[i] = load_vector(source + i * kVectorBytes);
    }
    return loaded;
  }
  template <bool kStores, class Sum>
  TRANSFUSE_HOST_DEVICE static void store(std::byte* target, const Loaded& loaded, uint64_t index,
                                          Sum& sum) {
    if constexpr (kPlain && kStores && !Sum::kSums) {
      store_vector(target, loaded.vector[0]);
    } else {
      Vector out[kTargetVectors] = {};
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < kElements; ++i) {
        put_element<Target>(out, i, Cast::cast(element_of<Source>(loaded.vector, i)));
      }
      if constexpr (kStores) {
        TRANSFUSE_UNROLL
        for (uint32_t i = 0; i < kTargetVectors; ++i) {
          store_vector(target + i * kVectorBytes, out[i]);
        }
      }
      if constexpr (Sum::kSums) {
        sum.template add_vectors<kTargetVectors>(index, out);
      }
    }
  }
};

// Where one lane is on one side of an item: units further along a row, and on the next row after
// the last one.
class Walk {
 public:
  template <class View>
  TRANSFUSE_HOST_DEVICE Walk(const View& view, uint64_t first, int64_t pitch, int64_t step,
                             uint32_t row, uint32_t unit)
      : at_(first + static_cast<uint64_t>(row * pitch + unit * step)),
        advance_(static_cast<uint64_t>(view.row_step * pitch + view.unit_step * step)),
        wrap_(static_cast<uint64_t>(pitch - view.units * step)) {}

  TRANSFUSE_HOST_DEVICE uint64_t at() const { return at_; }
  TRANSFUSE_HOST_DEVICE void next(bool wraps) { at_ += advance_ + (wraps ? wrap_ : 0); }

 private:
  uint64_t at_;
  uint64_t advance_;
  uint64_t wrap_;
};

// Moves the lane's share of an item and returns its part of the sum. Loads of kInFlight units are
// under way before the first is stored.
template <class Unit, class Sum, uint32_t kInFlight, bool kStores = true>
TRANSFUSE_HOST_DEVICE uint64_t copy_units(const ItemView& view, uint32_t lane) {
  const uint32_t total = view.rows * view.units;
  if (lane >= total) return 0;
  const uint32_t units = view.units;
  const uint32_t unit_step = view.unit_step;
  uint32_t left = (total - lane - 1) / view.lanes + 1;
  const uint32_t row = lane / units;
  uint32_t unit = lane % units;
  Walk source(view, reinterpret_cast<uint64_t>(view.source), view.source_pitch, view.source_step,
              row, unit);
  Walk target(view, reinterpret_cast<uint64_t>(view.target), view.target_pitch, view.target_step,
              row, unit);
  Walk index(view, view.index, view.index_pitch, Unit::kElements * view.index_step, row, unit);
  Sum sum(view);
  // The next unit of the lane: whether it is on a later row than the step alone says.
  const auto step = [&] {
    unit += unit_step;
    const bool wraps = unit >= units;
    if (wraps) unit -= units;
    return wraps;
  };
  for (; left >= kInFlight; left -= kInFlight) {
    typename Unit::Loaded loaded[kInFlight];
    bool wraps[kInFlight];
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kInFlight; ++i) {
      loaded[i] = Unit::load(reinterpret_cast<const std::byte*>(source.at()));
      wraps[i] = step();
      source.next(wraps[i]);
    }
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kInFlight; ++i) {
      Unit::template store<kStores>(reinterpret_cast<std::byte*>(target.at()), loaded[i],
                                    index.at(), sum);
      target.next(wraps[i]);
      if constexpr (Sum::kSums) index.next(wraps[i]);
    }
  }
  for (; left > 0; --left) {
    Unit::template store<kStores>(reinterpret_cast<std::byte*>(target.at()),
                                  Unit::load(reinterpret_cast<const std::byte*>(source.at())),
                                  index.at(), sum);
    const bool wraps = step();
    source.next(wraps);
    target.next(wraps);
    if constexpr (Sum::kSums) index.next(wraps);
  }
  return sum.sum();
}

inline constexpr uint32_t kVectorsInFlight = 4;
inline constexpr uint32_t kElementsInFlight = 8;

template <class Unit, uint32_t kInFlight, bool kSums>
TRANSFUSE_HOST_DEVICE uint64_t copy_unit(const ItemView& view, uint32_t lane) {
  if constexpr (kSums) {
    using Sum = Summer<sizeof(typename Unit::Target)>;
    if (view.fingerprint) {
      return view.target == nullptr ? copy_units<Unit, Sum, kInFlight, false>(view, lane)
                                    : copy_units<Unit, Sum, kInFlight>(view, lane);
    }
  }
  return copy_units<Unit, NoSum, kInFlight>(view, lane);
}

template <class Cast>
inline constexpr uint32_t kUnitsInFlight = kVectorsInFlight / VectorUnit<Cast>::kSourceVectors;

template <class Cast, bool kSums>
TRANSFUSE_HOST_DEVICE uint64_t copy_cast(const ItemView& view, uint32_t lane) {
  return view.walk == RunWalk::kVectors
             ? copy_unit<VectorUnit<Cast>, kUnitsInFlight<Cast>, kSums>(view, lane)
             : copy_unit<ElementUnit<Cast>, kElementsInFlight, kSums>(view, lane);
}

// Everything else. Functions of their own on the device: inlined into one switch, all would share
// too few registers.
template <bool kSums>
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE uint64_t copy_rarely(const ItemView& view, uint32_t lane) {
  switch (view.op) {
    case ElementOp::kCopy1:
      return copy_cast<CopyCast<1>, kSums>(view, lane);
    case ElementOp::kCopy2:
      return copy_cast<CopyCast<2>, kSums>(view, lane);
    case ElementOp::kCopy4:
      return copy_cast<CopyCast<4>, kSums>(view, lane);
    case ElementOp::kCopy8:
      return copy_cast<CopyCast<8>, kSums>(view, lane);
    case ElementOp::kF32ToBF16:
      return copy_cast<F32ToBF16Cast, kSums>(view, lane);
    case ElementOp::kF32ToF16:
      return copy_cast<F32ToF16Cast, kSums>(view, lane);
    case ElementOp::kBF16ToF32:
      return copy_cast<BF16ToF32Cast, kSums>(view, lane);
    case ElementOp::kF16ToF32:
      return copy_cast<F16ToF32Cast, kSums>(view, lane);
    default:  // those with scales are in a table of their own
      break;
  }
  return 0;
}

// What almost all bytes of real plans are. kInline: part of the caller's loop; else a function of
// its own like copy_rarely().
template <class Cast, class Sum>
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE uint64_t call_copy_vectors(const ItemView& view,
                                                                    uint32_t lane) {
  return copy_units<VectorUnit<Cast>, Sum, kUnitsInFlight<Cast>>(view, lane);
}
template <class Cast, class Sum, bool kInline>
TRANSFUSE_HOST_DEVICE uint64_t copy_vectors(const ItemView& view, uint32_t lane) {
  if constexpr (kInline) return copy_units<VectorUnit<Cast>, Sum, kUnitsInFlight<Cast>>(view, lane);
  return call_copy_vectors<Cast, Sum>(view, lane);
}

// One lane's share of one item that does not use the stage. kSums: whether any run of the table has
// a fingerprint.
template <bool kSums, bool kInline = false>
TRANSFUSE_HOST_DEVICE uint64_t copy_item(const ItemView& view, uint32_t lane) {
  if (view.walk == RunWalk::kVectors) {
    // Without a fingerprint every plain copy is one of 8-byte elements (DeviceTableBuilder).
    if (!view.fingerprint && view.op == ElementOp::kCopy8) {
      return copy_vectors<CopyCast<8>, NoSum, kInline>(view, lane);
    }
    if constexpr (kSums) {
      if (view.fingerprint && view.target != nullptr) {
        if (view.op == ElementOp::kCopy2) {
          return copy_vectors<CopyCast<2>, Summer<2>, kInline>(view, lane);
        }
        if (view.op == ElementOp::kCopy1)
          return call_copy_vectors<CopyCast<1>, Summer<1>>(view, lane);
        if (view.op == ElementOp::kF32ToBF16) {
          return call_copy_vectors<F32ToBF16Cast, Summer<2>>(view, lane);
        }
      }
    }
  }
  return copy_rarely<kSums>(view, lane);
}

}  // namespace transfuse

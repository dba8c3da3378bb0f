// The row kernels over a vector type. Included by one file per instruction set, after it has
// defined Vec and TRANSFUSE_VECTOR (inline, with the target attribute): such functions cannot be
// shared between files that are compiled for different CPUs. No lambdas: they would lose the
// attribute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "copy/fingerprint.h"
#include "copy/row_kernels.h"
#include "transfuse/copy.h"

namespace transfuse {
namespace {

// Rows from this size on are written past the caches: the target is not read again soon, and a
// streaming store does not fetch the line first. Measured with copy_bench: below it the partial
// lines at both ends cost more than the fetches.
constexpr uint64_t kStreamBytes = 2048;
constexpr uint64_t kLineBytes = 64;

// Elements below 4 bytes are taken from a vector word by word: phase j is the j-th element of every
// word, so no shuffle is needed.
template <typename T>
constexpr uint32_t kPhases = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
template <typename T>
constexpr uint64_t kPerVector = Vec::kBytes / sizeof(T);

// Number of the element that holds phase 0 of each word.
template <typename T>
TRANSFUSE_VECTOR Vec word_elements() {
  alignas(64) uint32_t numbers[Vec::kBytes / 4];
  for (uint32_t w = 0; w < Vec::kBytes / 4; ++w) {
    numbers[w] = sizeof(T) == 8 ? w / 2 : w * kPhases<T>;
  }
  return Vec::load(reinterpret_cast<const std::byte*>(numbers));
}

// Element j of every word, zero-extended.
template <typename T, uint32_t j>
TRANSFUSE_VECTOR Vec phase(Vec raw) {
  if constexpr (sizeof(T) >= 4) {
    return raw;
  } else if constexpr (sizeof(T) == 2) {
    return j == 0 ? raw & Vec::all(0xFFFF) : raw.template right<16>();
  } else {
    return j == 3 ? raw.template right<24>() : raw.template right<8 * j>() & Vec::all(0xFF);
  }
}

// The running fingerprint of a row of T.
template <typename T>
struct Sum {
  Vec place;    // of phase 0
  Vec step;     // from one element to the next
  Vec advance;  // from one vector to the next
  Vec second;
  Vec products = Vec::all(0);  // 64-bit sums of value * weight
  Vec values = Vec::all(0);    // 32-bit sums of value: their weight's 33rd bit

  TRANSFUSE_VECTOR explicit Sum(const RowSeed& seed) {
    alignas(64) uint32_t places[Vec::kBytes / 4];
    alignas(64) uint32_t seconds[Vec::kBytes / 4];
    for (uint32_t w = 0; w < Vec::kBytes / 4; ++w) {
      const bool upper = sizeof(T) == 8 && w % 2 == 1;
      const uint32_t element = sizeof(T) == 8 ? w / 2 : w * kPhases<T>;
      places[w] = (upper ? seed.upper_place : seed.place) + element * seed.step;
      seconds[w] = upper ? seed.upper_second : seed.second;
    }
    place = Vec::load(reinterpret_cast<const std::byte*>(places));
    second = Vec::load(reinterpret_cast<const std::byte*>(seconds));
    step = Vec::all(seed.step);
    advance = Vec::all(seed.step * static_cast<uint32_t>(kPerVector<T>));
  }

  TRANSFUSE_VECTOR void mix(Vec at, Vec value) {
    Vec weight = (at ^ at.template right<15>()).times(Vec::all(kKeyFactor));
    weight = xor3(weight, weight.template right<13>(), second);
    products = add64(products, multiply_even(value, weight));
    products = add64(products, multiply_even(value.upper_words(), weight.upper_words()));
    values = values + value;
  }
  template <uint32_t j>
  TRANSFUSE_VECTOR void add_phase(Vec raw) {
    const Vec at = j == 0 ? place : place + step.times(Vec::all(j));
    mix(at, phase<T, j>(raw).times(Vec::all(kBitsFactor)) ^ at);
  }
  // Only elements below `count`.
  template <uint32_t j>
  TRANSFUSE_VECTOR void add_phase(Vec raw, Vec count) {
    const Vec at = j == 0 ? place : place + step.times(Vec::all(j));
    const Vec value = phase<T, j>(raw).times(Vec::all(kBitsFactor)) ^ at;
    mix(at, value.where_less(word_elements<T>() + Vec::all(j), count));
  }
  TRANSFUSE_VECTOR void add(Vec raw) {
    add_phase<0>(raw);
    if constexpr (kPhases<T> > 1) add_phase<1>(raw);
    if constexpr (kPhases<T> > 2) {
      add_phase<2>(raw);
      add_phase<3>(raw);
    }
    place = place + advance;
  }
  TRANSFUSE_VECTOR void add_first(Vec raw, uint32_t count) {
    const Vec limit = Vec::all(count);
    add_phase<0>(raw, limit);
    if constexpr (kPhases<T> > 1) add_phase<1>(raw, limit);
    if constexpr (kPhases<T> > 2) {
      add_phase<2>(raw, limit);
      add_phase<3>(raw, limit);
    }
    place = place + step.times(limit);
  }
  TRANSFUSE_VECTOR uint64_t total() const {
    return products.sum64() + (uint64_t{values.sum32()} << 32);
  }
};

// What a sum is replaced by where none is wanted.
template <typename T>
struct NoSum {
  TRANSFUSE_VECTOR explicit NoSum(const RowSeed& /*seed*/) {}
  TRANSFUSE_VECTOR void add(Vec /*raw*/) {}
  TRANSFUSE_VECTOR void add_first(Vec /*raw*/, uint32_t /*count*/) {}
  TRANSFUSE_VECTOR uint64_t total() const { return 0; }
};

// Elements of T to go until `target` lies on a cache line; count or more if it never does.
template <typename T>
TRANSFUSE_VECTOR uint64_t head_elements(const std::byte* target, uint64_t count) {
  const uint64_t beyond = reinterpret_cast<uintptr_t>(target) % kLineBytes;
  if (beyond % sizeof(T) != 0) return count;
  return beyond == 0 ? 0 : (kLineBytes - beyond) / sizeof(T);
}

// Fewer elements than a cache line holds.
template <typename T, bool kWrite, typename S>
TRANSFUSE_VECTOR void part_row(const std::byte*& source, std::byte*& target, uint64_t count,
                               S& sum) {
  while (count > 0) {
    const uint64_t n = count < kPerVector<T> ? count : kPerVector<T>;
    alignas(64) std::byte buffer[Vec::kBytes] = {};
    std::memcpy(buffer, source, n * sizeof(T));
    if constexpr (kWrite) {
      std::memcpy(target, buffer, n * sizeof(T));
      target += n * sizeof(T);
    }
    sum.add_first(Vec::load(buffer), static_cast<uint32_t>(n));
    source += n * sizeof(T);
    count -= n;
  }
}

template <typename T, bool kWrite, bool kStream, typename S>
TRANSFUSE_VECTOR uint64_t whole_row(const std::byte*& source, std::byte*& target, uint64_t count,
                                    S& sum) {
  constexpr uint64_t kAtOnce = kLineBytes / Vec::kBytes;
  for (; count >= kAtOnce * kPerVector<T>; count -= kAtOnce * kPerVector<T>) {
    for (uint64_t v = 0; v < kAtOnce; ++v) {
      const Vec raw = Vec::load(source);
      if constexpr (kWrite) {
        kStream ? raw.stream(target) : raw.store(target);
        target += Vec::kBytes;
      }
      sum.add(raw);
      source += Vec::kBytes;
    }
  }
  return count;
}

template <typename T, bool kWrite, typename S>
TRANSFUSE_TARGET uint64_t copy_row(const std::byte* source, std::byte* target, uint64_t count,
                                   const RowSeed& seed) {
  S sum(seed);
  if constexpr (kWrite) {
    const uint64_t head = head_elements<T>(target, count);
    if (count * sizeof(T) >= kStreamBytes && head < count) {
      part_row<T, kWrite>(source, target, head, sum);
      count = whole_row<T, kWrite, true>(source, target, count - head, sum);
    }
  }
  count = whole_row<T, kWrite, false>(source, target, count, sum);
  part_row<T, kWrite>(source, target, count, sum);
  return sum.total();
}

// Plain copies move bytes, whatever the element.
template <uint32_t kElementBytes>
TRANSFUSE_TARGET void plain_row(const std::byte* source, std::byte* target, uint64_t count) {
  const uint64_t size = count * kElementBytes;
  if (size < kStreamBytes) {
    std::memcpy(target, source, size);
    return;
  }
  copy_row<uint8_t, true, NoSum<uint8_t>>(source, target, size, RowSeed{});
}

struct CastBF16 {
  TRANSFUSE_VECTOR static Vec words(Vec f32) { return f32.to_bf16(); }
};
struct CastF16 {
  TRANSFUSE_VECTOR static Vec words(Vec f32) { return f32.to_f16(); }
};

// Fewer elements than a cache line of 16-bit results holds. A word of the sum is one result.
template <typename Cast, bool kWrite, typename S>
TRANSFUSE_VECTOR void part_cast(const std::byte*& source, std::byte*& target, uint64_t count,
                                S& sum) {
  constexpr uint64_t kWords = kPerVector<uint32_t>;
  while (count > 0) {
    const uint64_t n = count < kWords ? count : kWords;
    alignas(64) std::byte buffer[Vec::kBytes] = {};
    std::memcpy(buffer, source, n * 4);
    const Vec words = Cast::words(Vec::load(buffer));
    sum.add_first(words, static_cast<uint32_t>(n));
    if constexpr (kWrite) {
      Vec::pack(words, words).store(buffer);
      std::memcpy(target, buffer, n * 2);
      target += n * 2;
    }
    source += n * 4;
    count -= n;
  }
}

template <typename Cast, bool kWrite, bool kStream, typename S>
TRANSFUSE_VECTOR uint64_t whole_cast(const std::byte*& source, std::byte*& target, uint64_t count,
                                     S& sum) {
  constexpr uint64_t kPair = 2 * kPerVector<uint32_t>;
  constexpr uint64_t kAtOnce = kLineBytes / Vec::kBytes;
  for (; count >= kAtOnce * kPair; count -= kAtOnce * kPair) {
    for (uint64_t v = 0; v < kAtOnce; ++v) {
      const Vec low = Cast::words(Vec::load(source));
      const Vec high = Cast::words(Vec::load(source + Vec::kBytes));
      if constexpr (kWrite) {
        const Vec packed = Vec::pack(low, high);
        kStream ? packed.stream(target) : packed.store(target);
        target += Vec::kBytes;
      }
      sum.add(low);
      sum.add(high);
      source += 2 * Vec::kBytes;
    }
  }
  return count;
}

template <typename Cast, bool kWrite, typename S>
TRANSFUSE_TARGET uint64_t cast_row(const std::byte* source, std::byte* target, uint64_t count,
                                   const RowSeed& seed) {
  S sum(seed);
  if constexpr (kWrite) {
    const uint64_t head = head_elements<uint16_t>(target, count);
    if (count * 2 >= kStreamBytes && head < count) {
      part_cast<Cast, kWrite>(source, target, head, sum);
      count = whole_cast<Cast, kWrite, true>(source, target, count - head, sum);
    }
  }
  count = whole_cast<Cast, kWrite, false>(source, target, count, sum);
  part_cast<Cast, kWrite>(source, target, count, sum);
  return sum.total();
}

template <typename Cast>
TRANSFUSE_TARGET void plain_cast(const std::byte* source, std::byte* target, uint64_t count) {
  cast_row<Cast, true, NoSum<uint32_t>>(source, target, count, RowSeed{});
}

template <bool kWrite, typename T>
constexpr RowKernels::Sum kSumRow = copy_row<T, kWrite, Sum<T>>;
template <bool kWrite, typename Cast>
constexpr RowKernels::Sum kSumCast = cast_row<Cast, kWrite, Sum<uint32_t>>;

constexpr RowKernels kVectorRows = {
    .copy = {plain_row<1>, plain_row<2>, plain_row<4>, plain_row<8>, plain_cast<CastBF16>,
             plain_cast<CastF16>},
    .copy_sum = {kSumRow<true, uint8_t>, kSumRow<true, uint16_t>, kSumRow<true, uint32_t>,
                 kSumRow<true, uint64_t>, kSumCast<true, CastBF16>, kSumCast<true, CastF16>},
    .sum = {kSumRow<false, uint8_t>, kSumRow<false, uint16_t>, kSumRow<false, uint32_t>,
            kSumRow<false, uint64_t>, kSumCast<false, CastBF16>, kSumCast<false, CastF16>},
};

}  // namespace
}  // namespace transfuse

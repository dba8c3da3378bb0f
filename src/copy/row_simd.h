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
// streaming store does not fetch the line first. Below it ordinary stores were faster in
// copy_bench.
constexpr uint64_t kStreamBytes = 1024;
constexpr uint64_t kLineBytes = 64;
// The hardware follows a row, but not the jump to the next one: so many bytes ahead are asked for.
constexpr uint64_t kAheadBytes = 8192;

// Elements below 4 bytes are taken from a vector word by word: phase j is the j-th element of every
// word, so no shuffle is needed.
template <typename T>
constexpr uint32_t kPhases = sizeof(T) < 4 ? 4 / sizeof(T) : 1;
template <typename T>
constexpr uint64_t kPerVector = Vec::kBytes / sizeof(T);

// Number of the element that phase 0 of each word belongs to.
template <typename T>
struct WordElements {
  alignas(64) uint32_t number[Vec::kBytes / 4];
  constexpr WordElements() : number() {
    for (uint32_t w = 0; w < Vec::kBytes / 4; ++w) {
      number[w] = sizeof(T) == 8 ? w / 2 : w * kPhases<T>;
    }
  }
};
template <typename T>
constexpr WordElements<T> kWordElements;
template <typename T>
TRANSFUSE_VECTOR Vec word_elements() {
  return Vec::load(reinterpret_cast<const std::byte*>(kWordElements<T>.number));
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

// The running fingerprint of rows of T.
template <typename T>
struct Sum {
  Vec start;    // place of phase 0 at the beginning of the row
  Vec place;    // of phase 0, now
  Vec step;     // from one element to the next
  Vec advance;  // from one vector to the next
  Vec second;
  Vec products = Vec::all(0);  // 64-bit sums of value * weight
  Vec values = Vec::all(0);    // 32-bit sums of value: their weight's 33rd bit

  TRANSFUSE_VECTOR explicit Sum(const RowSeed& seed)
      : start(sizeof(T) == 8 ? Vec::pairs(seed.place, seed.upper_place) : Vec::all(seed.place)),
        step(Vec::all(seed.step)),
        advance(Vec::all(seed.step * static_cast<uint32_t>(kPerVector<T>))),
        second(sizeof(T) == 8 ? Vec::pairs(seed.second, seed.upper_second)
                              : Vec::all(seed.second)) {
    start = start + step.times(word_elements<T>());
    place = start;
  }
  TRANSFUSE_VECTOR void next_row(uint32_t place_pitch) {
    start = start + Vec::all(place_pitch);
    place = start;
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
  TRANSFUSE_VECTOR void next_row(uint32_t /*place_pitch*/) {}
  TRANSFUSE_VECTOR void add(Vec /*raw*/) {}
  TRANSFUSE_VECTOR void add_first(Vec /*raw*/, uint32_t /*count*/) {}
  TRANSFUSE_VECTOR uint64_t total() const { return 0; }
};

// What is moved: T as it is. A vector read is a vector written and summed.
template <typename T>
struct Plain {
  using Word = T;  // what the sum sees
  static constexpr uint64_t kSourceBytes = sizeof(T);
  static constexpr uint64_t kTargetBytes = sizeof(T);

  template <bool kWrite, bool kStream, typename S>
  TRANSFUSE_VECTOR static void whole(const std::byte* source, std::byte* target, S& sum) {
    const Vec raw = Vec::load(source);
    if constexpr (kWrite) kStream ? raw.stream(target) : raw.store(target);
    sum.add(raw);
  }
  // `count` elements, at most a vector of them.
  template <bool kWrite, typename S>
  TRANSFUSE_VECTOR static void part(const std::byte* source, std::byte* target, uint64_t count,
                                    S& sum) {
    const Vec raw = Vec::load_first(source, count * sizeof(T));
    if constexpr (kWrite) raw.store_first(target, count * sizeof(T));
    sum.add_first(raw, static_cast<uint32_t>(count));
  }
};

// f32 to 16 bits. Two vectors read are one written; a word of the sum is one result.
template <bool kBF16>
struct Cast {
  using Word = uint32_t;
  static constexpr uint64_t kSourceBytes = 4;
  static constexpr uint64_t kTargetBytes = 2;

  TRANSFUSE_VECTOR static Vec words(Vec f32) { return kBF16 ? f32.to_bf16() : f32.to_f16(); }
  template <bool kWrite, bool kStream, typename S>
  TRANSFUSE_VECTOR static void whole(const std::byte* source, std::byte* target, S& sum) {
    const Vec low = words(Vec::load(source));
    const Vec high = words(Vec::load(source + Vec::kBytes));
    if constexpr (kWrite) {
      const Vec packed = Vec::pack(low, high);
      kStream ? packed.stream(target) : packed.store(target);
    }
    sum.add(low);
    sum.add(high);
  }
  template <bool kWrite, typename S>
  TRANSFUSE_VECTOR static void part(const std::byte* source, std::byte* target, uint64_t count,
                                    S& sum) {
    constexpr uint64_t kHalf = Vec::kBytes / 4;
    const uint64_t first = count < kHalf ? count : kHalf;
    const Vec low = words(Vec::load_first(source, first * 4));
    sum.add_first(low, static_cast<uint32_t>(first));
    Vec high = low;
    if (count > first) {
      high = words(Vec::load_first(source + Vec::kBytes, (count - first) * 4));
      sum.add_first(high, static_cast<uint32_t>(count - first));
    }
    if constexpr (kWrite) Vec::pack(low, high).store_first(target, count * 2);
  }
};

// 16 bits to f32. Half a vector read is one written.
template <bool kBF16>
struct Widen {
  using Word = uint32_t;
  static constexpr uint64_t kSourceBytes = 2;
  static constexpr uint64_t kTargetBytes = 4;

  TRANSFUSE_VECTOR static Vec words(const std::byte* source) {
    return kBF16 ? Vec::load_bf16(source) : Vec::load_f16(source);
  }
  template <bool kWrite, bool kStream, typename S>
  TRANSFUSE_VECTOR static void whole(const std::byte* source, std::byte* target, S& sum) {
    const Vec f32 = words(source);
    if constexpr (kWrite) kStream ? f32.stream(target) : f32.store(target);
    sum.add(f32);
  }
  template <bool kWrite, typename S>
  TRANSFUSE_VECTOR static void part(const std::byte* source, std::byte* target, uint64_t count,
                                    S& sum) {
    alignas(64) std::byte buffer[Vec::kBytes / 2] = {};
    std::memcpy(buffer, source, count * 2);
    const Vec f32 = words(buffer);
    if constexpr (kWrite) f32.store_first(target, count * 4);
    sum.add_first(f32, static_cast<uint32_t>(count));
  }
};

// Elements to go until `target` lies on a cache line; `count` if it never does.
template <uint64_t kTargetBytes>
TRANSFUSE_VECTOR uint64_t head_elements(const std::byte* target, uint64_t count) {
  const uint64_t beyond = reinterpret_cast<uintptr_t>(target) % kLineBytes;
  if (beyond % kTargetBytes != 0) return count;
  return beyond == 0 ? 0 : (kLineBytes - beyond) / kTargetBytes;
}

// The row loops. `Move` is Plain, Cast or Widen, `S` the sum. Used from one thread.
template <typename Move, bool kWrite, typename S>
struct Rows {
  static constexpr uint64_t kAtOnce = Vec::kBytes / Move::kTargetBytes;  // elements

  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  int64_t ahead = 0;  // bytes from where the source is to where it will be soon
  uint64_t near = 0;  // elements before the end of a row

  TRANSFUSE_VECTOR void skip(uint64_t count) {
    source += count * Move::kSourceBytes;
    if constexpr (kWrite) target += count * Move::kTargetBytes;
  }
  TRANSFUSE_VECTOR void part(uint64_t count, S& sum) {
    for (; count > kAtOnce; count -= kAtOnce) {
      Move::template part<kWrite>(source, target, kAtOnce, sum);
      skip(kAtOnce);
    }
    if (count > 0) {
      Move::template part<kWrite>(source, target, count, sum);
      skip(count);
    }
  }
  template <bool kStream>
  TRANSFUSE_VECTOR uint64_t whole(uint64_t count, S& sum) {
    for (; count >= kAtOnce; count -= kAtOnce) {
      Move::template whole<kWrite, kStream>(source, target, sum);
      skip(kAtOnce);
    }
    return count;
  }
  // The last `near` elements of a row ask for the beginning of the next one.
  template <bool kStream>
  TRANSFUSE_VECTOR void rest(uint64_t count, S& sum) {
    if (count > near) count = near + whole<kStream>(count - near, sum);
    for (; count >= kAtOnce; count -= kAtOnce) {
      for (uint64_t at = 0; at < kAtOnce * Move::kSourceBytes; at += kLineBytes) {
        Vec::prefetch(source + ahead + at);
      }
      Move::template whole<kWrite, kStream>(source, target, sum);
      skip(kAtOnce);
    }
    part(count, sum);
  }
  TRANSFUSE_VECTOR void row(uint64_t count, S& sum) {
    if constexpr (kWrite) {
      const uint64_t head = head_elements<Move::kTargetBytes>(target, count);
      if (count * Move::kTargetBytes >= kStreamBytes && head < count) {
        part(head, sum);
        return rest<true>(count - head, sum);
      }
    }
    rest<false>(count, sum);
  }
};

template <typename Move, bool kWrite, typename S>
TRANSFUSE_TARGET uint64_t walk_rows(const RowBlock& block, const RowSeed& seed) {
  S sum(seed);
  Rows<Move, kWrite, S> rows;
  constexpr uint64_t kNear = kAheadBytes / Move::kSourceBytes;
  const bool is_long = block.count > kNear;
  const uint64_t rows_ahead = is_long ? 1 : kNear / (block.count + 1) + 1;
  const int64_t ahead =
      static_cast<int64_t>(rows_ahead) * block.source_pitch -
      (is_long ? static_cast<int64_t>((block.count - kNear) * Move::kSourceBytes) : 0);
  for (uint64_t r = 0; r < block.rows; ++r) {
    const auto row = static_cast<int64_t>(r);
    rows.source = block.source + row * block.source_pitch;
    if constexpr (kWrite) rows.target = block.target + row * block.target_pitch;
    const bool more = r + rows_ahead < block.rows;
    rows.ahead = more ? ahead : 0;
    rows.near = more ? kNear : 0;
    rows.row(block.count, sum);
    sum.next_row(block.place_pitch);
  }
  return sum.total();
}

// Plain copies without a sum move bytes, whatever the element.
template <uint64_t kElementBytes>
TRANSFUSE_TARGET void copy_bytes(const RowBlock& block) {
  RowBlock bytes = block;
  bytes.count *= kElementBytes;
  if (bytes.rows == 1 && bytes.count < kStreamBytes) {
    std::memcpy(bytes.target, bytes.source, bytes.count);
    return;
  }
  walk_rows<Plain<uint8_t>, true, NoSum<uint8_t>>(bytes, RowSeed{});
}
template <typename Move>
TRANSFUSE_TARGET void cast_only(const RowBlock& block) {
  walk_rows<Move, true, NoSum<uint32_t>>(block, RowSeed{});
}

template <typename Move, bool kWrite>
constexpr RowKernels::Sum kSum = walk_rows<Move, kWrite, Sum<typename Move::Word>>;

constexpr RowKernels kVectorRows = {
    .copy = {copy_bytes<1>, copy_bytes<2>, copy_bytes<4>, copy_bytes<8>, cast_only<Cast<true>>,
             cast_only<Cast<false>>, cast_only<Widen<true>>, cast_only<Widen<false>>},
    .copy_sum = {kSum<Plain<uint8_t>, true>, kSum<Plain<uint16_t>, true>,
                 kSum<Plain<uint32_t>, true>, kSum<Plain<uint64_t>, true>, kSum<Cast<true>, true>,
                 kSum<Cast<false>, true>, kSum<Widen<true>, true>, kSum<Widen<false>, true>},
    .sum = {kSum<Plain<uint8_t>, false>, kSum<Plain<uint16_t>, false>, kSum<Plain<uint32_t>, false>,
            kSum<Plain<uint64_t>, false>, kSum<Cast<true>, false>, kSum<Cast<false>, false>,
            kSum<Widen<true>, false>, kSum<Widen<false>, false>},
};

}  // namespace
}  // namespace transfuse

// Row kernels in plain C++: the truth for the others, and what runs where there is no AVX2.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "copy/cast.h"
#include "copy/fingerprint.h"
#include "copy/row_kernels.h"
#include "transfuse/copy.h"

namespace transfuse {
namespace {

template <typename T>
T load(const std::byte* from, uint64_t index) {
  T value;
  std::memcpy(&value, from + index * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
struct Plain {
  static void copy(const std::byte* source, std::byte* target, uint64_t count) {
    std::memcpy(target, source, count * sizeof(T));
  }
  static uint64_t sum(const std::byte* source, uint64_t count, const RowSeed& seed) {
    uint64_t sum = 0;
    uint32_t place = seed.place;
    uint32_t upper_place = seed.upper_place;
    for (uint64_t i = 0; i < count; ++i, place += seed.step) {
      const T bits = load<T>(source, i);
      sum += mix_word(place, seed.second, static_cast<uint32_t>(bits));
      if constexpr (sizeof(T) == 8) {
        sum += mix_word(upper_place, seed.upper_second, static_cast<uint32_t>(bits >> 32));
        upper_place += seed.step;
      }
    }
    return sum;
  }
  static uint64_t copy_sum(const std::byte* source, std::byte* target, uint64_t count,
                           const RowSeed& seed) {
    // A block stays in the first-level cache between the copy and the sum.
    constexpr uint64_t kBlock = 4096 / sizeof(T);
    uint64_t sum = 0;
    RowSeed at = seed;
    for (uint64_t done = 0; done < count; done += kBlock) {
      const uint64_t n = count - done < kBlock ? count - done : kBlock;
      std::byte* to = target + done * sizeof(T);
      copy(source + done * sizeof(T), to, n);
      sum += Plain::sum(to, n, at);
      at.place += at.step * static_cast<uint32_t>(n);
      at.upper_place += at.step * static_cast<uint32_t>(n);
    }
    return sum;
  }
};

template <typename Source, typename Target, Target (*kCast)(Source)>
struct Cast {
  template <bool kWrite, bool kSum>
  static uint64_t run(const std::byte* source, std::byte* target, uint64_t count,
                      const RowSeed& seed) {
    uint64_t sum = 0;
    uint32_t place = seed.place;
    for (uint64_t i = 0; i < count; ++i, place += seed.step) {
      const Target bits = kCast(load<Source>(source, i));
      if constexpr (kWrite) std::memcpy(target + i * sizeof bits, &bits, sizeof bits);
      if constexpr (kSum) sum += mix_word(place, seed.second, bits);
    }
    return sum;
  }
  static void copy(const std::byte* source, std::byte* target, uint64_t count) {
    run<true, false>(source, target, count, RowSeed{});
  }
  static uint64_t sum(const std::byte* source, uint64_t count, const RowSeed& seed) {
    return run<false, true>(source, nullptr, count, seed);
  }
  static uint64_t copy_sum(const std::byte* source, std::byte* target, uint64_t count,
                           const RowSeed& seed) {
    return run<true, true>(source, target, count, seed);
  }
};
using CastBF16 = Cast<uint32_t, uint16_t, cast_f32_bits_to_bf16>;
using CastF16 = Cast<uint32_t, uint16_t, cast_f32_bits_to_f16>;
using WidenBF16 = Cast<uint16_t, uint32_t, cast_bf16_bits_to_f32>;
using WidenF16 = Cast<uint16_t, uint32_t, cast_f16_bits_to_f32>;

template <typename Row>
void copy_rows(const RowBlock& block) {
  for (uint64_t r = 0; r < block.rows; ++r) {
    const auto row = static_cast<int64_t>(r);
    Row::copy(block.source + row * block.source_pitch, block.target + row * block.target_pitch,
              block.count);
  }
}

template <typename Row, bool kWrite>
uint64_t sum_rows(const RowBlock& block, const RowSeed& seed) {
  uint64_t sum = 0;
  RowSeed at = seed;
  for (uint64_t r = 0; r < block.rows; ++r) {
    const auto row = static_cast<int64_t>(r);
    const std::byte* source = block.source + row * block.source_pitch;
    if constexpr (kWrite) {
      sum += Row::copy_sum(source, block.target + row * block.target_pitch, block.count, at);
    } else {
      sum += Row::sum(source, block.count, at);
    }
    at.place += block.place_pitch;
    at.upper_place += block.place_pitch;
  }
  return sum;
}

template <bool kWrite>
constexpr RowKernels::Sum kSums[kElementOpCount] = {
    sum_rows<Plain<uint8_t>, kWrite>,  sum_rows<Plain<uint16_t>, kWrite>,
    sum_rows<Plain<uint32_t>, kWrite>, sum_rows<Plain<uint64_t>, kWrite>,
    sum_rows<CastBF16, kWrite>,        sum_rows<CastF16, kWrite>,
    sum_rows<WidenBF16, kWrite>,       sum_rows<WidenF16, kWrite>};

}  // namespace

const RowKernels kPortableRows = {
    .copy = {copy_rows<Plain<uint8_t>>, copy_rows<Plain<uint16_t>>, copy_rows<Plain<uint32_t>>,
             copy_rows<Plain<uint64_t>>, copy_rows<CastBF16>, copy_rows<CastF16>,
             copy_rows<WidenBF16>, copy_rows<WidenF16>},
    .copy_sum = {kSums<true>[0], kSums<true>[1], kSums<true>[2], kSums<true>[3], kSums<true>[4],
                 kSums<true>[5], kSums<true>[6], kSums<true>[7]},
    .sum = {kSums<false>[0], kSums<false>[1], kSums<false>[2], kSums<false>[3], kSums<false>[4],
            kSums<false>[5], kSums<false>[6], kSums<false>[7]},
};

}  // namespace transfuse

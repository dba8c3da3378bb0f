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

struct CastBF16 {
  static uint16_t cast(uint32_t bits) { return cast_f32_bits_to_bf16(bits); }
};
struct CastF16 {
  static uint16_t cast(uint32_t bits) { return cast_f32_bits_to_f16(bits); }
};

template <typename T>
void copy_row(const std::byte* source, std::byte* target, uint64_t count) {
  std::memcpy(target, source, count * sizeof(T));
}

template <typename T>
uint64_t sum_row(const std::byte* source, std::byte* /*target*/, uint64_t count,
                 const RowSeed& seed) {
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

// A block that stays in the first-level cache between the copy and the sum.
constexpr uint64_t kBlockBytes = 4096;

template <typename T>
uint64_t copy_sum_row(const std::byte* source, std::byte* target, uint64_t count,
                      const RowSeed& seed) {
  uint64_t sum = 0;
  RowSeed at = seed;
  constexpr uint64_t kBlock = kBlockBytes / sizeof(T);
  for (uint64_t done = 0; done < count; done += kBlock) {
    const uint64_t n = count - done < kBlock ? count - done : kBlock;
    std::memcpy(target + done * sizeof(T), source + done * sizeof(T), n * sizeof(T));
    sum += sum_row<T>(target + done * sizeof(T), nullptr, n, at);
    at.place += at.step * static_cast<uint32_t>(n);
    at.upper_place += at.step * static_cast<uint32_t>(n);
  }
  return sum;
}

template <typename Cast, bool kWrite, bool kSum>
uint64_t cast_row(const std::byte* source, std::byte* target, uint64_t count, const RowSeed& seed) {
  uint64_t sum = 0;
  uint32_t place = seed.place;
  for (uint64_t i = 0; i < count; ++i, place += seed.step) {
    const uint16_t bits = Cast::cast(load<uint32_t>(source, i));
    if constexpr (kWrite) std::memcpy(target + i * sizeof bits, &bits, sizeof bits);
    if constexpr (kSum) sum += mix_word(place, seed.second, bits);
  }
  return sum;
}

template <typename Cast>
void cast_only_row(const std::byte* source, std::byte* target, uint64_t count) {
  cast_row<Cast, true, false>(source, target, count, RowSeed{});
}

}  // namespace

const RowKernels kPortableRows = {
    .copy = {copy_row<uint8_t>, copy_row<uint16_t>, copy_row<uint32_t>, copy_row<uint64_t>,
             cast_only_row<CastBF16>, cast_only_row<CastF16>},
    .copy_sum = {copy_sum_row<uint8_t>, copy_sum_row<uint16_t>, copy_sum_row<uint32_t>,
                 copy_sum_row<uint64_t>, cast_row<CastBF16, true, true>,
                 cast_row<CastF16, true, true>},
    .sum = {sum_row<uint8_t>, sum_row<uint16_t>, sum_row<uint32_t>, sum_row<uint64_t>,
            cast_row<CastBF16, false, true>, cast_row<CastF16, false, true>},
};

}  // namespace transfuse

// Row kernels for AVX2 with F16C. Selected at run time.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define TRANSFUSE_TARGET __attribute__((target("avx2,f16c")))
#define TRANSFUSE_VECTOR TRANSFUSE_TARGET __attribute__((always_inline)) inline

namespace transfuse {
namespace {

// 32 bytes: eight 32-bit words or four 64-bit sums.
struct Vec {
  static constexpr uint64_t kBytes = 32;
  __m256i v;

  TRANSFUSE_VECTOR static Vec load(const std::byte* from) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
  }
  TRANSFUSE_VECTOR static Vec all(uint32_t word) {
    return {_mm256_set1_epi32(static_cast<int>(word))};
  }
  // The words a, b, a, b, ...
  TRANSFUSE_VECTOR static Vec pairs(uint32_t a, uint32_t b) {
    return {_mm256_set1_epi64x(static_cast<long long>((uint64_t{b} << 32) | a))};
  }
  // The first `size_bytes` (1 to 32) of a vector; zero beyond.
  TRANSFUSE_VECTOR static Vec load_first(const std::byte* from, uint64_t size_bytes) {
    alignas(32) std::byte buffer[kBytes] = {};
    std::memcpy(buffer, from, size_bytes);
    return load(buffer);
  }
  TRANSFUSE_VECTOR void store_first(std::byte* to, uint64_t size_bytes) const {
    alignas(32) std::byte buffer[kBytes];
    store(buffer);
    std::memcpy(to, buffer, size_bytes);
  }
  TRANSFUSE_VECTOR void store(std::byte* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  }
  TRANSFUSE_VECTOR void stream(std::byte* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v);
  }
  TRANSFUSE_VECTOR static void prefetch(const std::byte* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
  }
  TRANSFUSE_VECTOR Vec operator+(Vec b) const { return {_mm256_add_epi32(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator^(Vec b) const { return {_mm256_xor_si256(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator&(Vec b) const { return {_mm256_and_si256(v, b.v)}; }
  TRANSFUSE_VECTOR Vec times(Vec b) const { return {_mm256_mullo_epi32(v, b.v)}; }
  template <int kBits>
  TRANSFUSE_VECTOR Vec right() const {
    return {_mm256_srli_epi32(v, kBits)};
  }
  TRANSFUSE_VECTOR Vec upper_words() const { return {_mm256_srli_epi64(v, 32)}; }
  TRANSFUSE_VECTOR friend Vec xor3(Vec a, Vec b, Vec c) { return a ^ b ^ c; }
  TRANSFUSE_VECTOR friend Vec add64(Vec a, Vec b) { return {_mm256_add_epi64(a.v, b.v)}; }
  TRANSFUSE_VECTOR friend Vec multiply_even(Vec a, Vec b) { return {_mm256_mul_epu32(a.v, b.v)}; }
  // Words whose number is below the limit (both below 2^31); zero elsewhere.
  TRANSFUSE_VECTOR Vec where_less(Vec number, Vec limit) const {
    return {_mm256_and_si256(_mm256_cmpgt_epi32(limit.v, number.v), v)};
  }
  TRANSFUSE_VECTOR uint64_t sum64() const {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
  TRANSFUSE_VECTOR uint32_t sum32() const {
    alignas(32) uint32_t words[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), v);
    uint32_t sum = 0;
    for (const uint32_t word : words) sum += word;
    return sum;
  }
  TRANSFUSE_VECTOR Vec unless_nan(__m256i words, int nan) const {
    const __m256i magnitude = _mm256_and_si256(v, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    return {_mm256_blendv_epi8(words, _mm256_set1_epi32(nan), is_nan)};
  }
  TRANSFUSE_VECTOR Vec to_bf16() const {
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(0x7FFF)), even);
    return unless_nan(_mm256_srli_epi32(rounded, 16), 0x7FC0);
  }
  TRANSFUSE_VECTOR Vec to_f16() const {
    const __m128i half = _mm256_cvtps_ph(_mm256_castsi256_ps(v), _MM_FROUND_TO_NEAREST_INT);
    return unless_nan(_mm256_cvtepu16_epi32(half), 0x7E00);
  }
  // Words from as many 16-bit numbers, of half a vector.
  TRANSFUSE_VECTOR static Vec load_bf16(const std::byte* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)};
  }
  TRANSFUSE_VECTOR static Vec load_f16(const std::byte* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castps_si256(_mm256_cvtph_ps(half))};
  }
  // The words of `low`, then those of `high`, as 16 bits each.
  TRANSFUSE_VECTOR static Vec pack(Vec low, Vec high) {
    return {_mm256_permute4x64_epi64(_mm256_packus_epi32(low.v, high.v), 0xD8)};
  }
};

}  // namespace
}  // namespace transfuse

#include "copy/row_kernels.h"
#include "copy/row_simd.h"

namespace transfuse {
const RowKernels kAvx2Rows = kVectorRows;
}  // namespace transfuse
#endif

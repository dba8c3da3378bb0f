// Row kernels for AVX-512 F, BW, VL and DQ. Selected at run time.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 warns about the undefined vectors inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define TRANSFUSE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c,avx2")))
#define TRANSFUSE_VECTOR TRANSFUSE_TARGET __attribute__((always_inline)) inline

namespace transfuse {
namespace {

// 64 bytes: sixteen 32-bit words or eight 64-bit sums.
struct Vec {
  static constexpr uint64_t kBytes = 64;
  __m512i v;

  TRANSFUSE_VECTOR static Vec load(const std::byte* from) { return {_mm512_loadu_si512(from)}; }
  TRANSFUSE_VECTOR static Vec all(uint32_t word) {
    return {_mm512_set1_epi32(static_cast<int>(word))};
  }
  // The words a, b, a, b, ...
  TRANSFUSE_VECTOR static Vec pairs(uint32_t a, uint32_t b) {
    return {_mm512_set1_epi64(static_cast<long long>((uint64_t{b} << 32) | a))};
  }
  // The first `size_bytes` (1 to 64) of a vector; zero beyond.
  TRANSFUSE_VECTOR static Vec load_first(const std::byte* from, uint64_t size_bytes) {
    return {_mm512_maskz_loadu_epi8(~uint64_t{0} >> (64 - size_bytes), from)};
  }
  TRANSFUSE_VECTOR void store_first(std::byte* to, uint64_t size_bytes) const {
    _mm512_mask_storeu_epi8(to, ~uint64_t{0} >> (64 - size_bytes), v);
  }
  TRANSFUSE_VECTOR void store(std::byte* to) const { _mm512_storeu_si512(to, v); }
  TRANSFUSE_VECTOR void stream(std::byte* to) const {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
  }
  TRANSFUSE_VECTOR static void prefetch(const std::byte* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
  }
  TRANSFUSE_VECTOR Vec operator+(Vec b) const { return {_mm512_add_epi32(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator^(Vec b) const { return {_mm512_xor_si512(v, b.v)}; }
  TRANSFUSE_VECTOR Vec operator&(Vec b) const { return {_mm512_and_si512(v, b.v)}; }
  TRANSFUSE_VECTOR Vec times(Vec b) const { return {_mm512_mullo_epi32(v, b.v)}; }
  template <unsigned kBits>
  TRANSFUSE_VECTOR Vec right() const {
    return {_mm512_srli_epi32(v, kBits)};
  }
  TRANSFUSE_VECTOR Vec upper_words() const { return {_mm512_srli_epi64(v, 32)}; }
  TRANSFUSE_VECTOR friend Vec xor3(Vec a, Vec b, Vec c) {
    return {_mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96)};
  }
  TRANSFUSE_VECTOR friend Vec add64(Vec a, Vec b) { return {_mm512_add_epi64(a.v, b.v)}; }
  TRANSFUSE_VECTOR friend Vec multiply_even(Vec a, Vec b) { return {_mm512_mul_epu32(a.v, b.v)}; }
  // Words whose number is below the limit; zero elsewhere.
  TRANSFUSE_VECTOR Vec where_less(Vec number, Vec limit) const {
    return {_mm512_maskz_mov_epi32(_mm512_cmplt_epu32_mask(number.v, limit.v), v)};
  }
  TRANSFUSE_VECTOR uint64_t sum64() const {
    alignas(64) uint64_t lanes[8];
    _mm512_store_si512(lanes, v);
    uint64_t sum = 0;
    for (const uint64_t lane : lanes) sum += lane;
    return sum;
  }
  TRANSFUSE_VECTOR uint32_t sum32() const {
    alignas(64) uint32_t words[16];
    _mm512_store_si512(words, v);
    uint32_t sum = 0;
    for (const uint32_t word : words) sum += word;
    return sum;
  }
  TRANSFUSE_VECTOR __mmask16 nan_words() const {
    return _mm512_cmpgt_epu32_mask(_mm512_and_si512(v, _mm512_set1_epi32(0x7FFFFFFF)),
                                   _mm512_set1_epi32(0x7F800000));
  }
  TRANSFUSE_VECTOR Vec to_bf16() const {
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(0x7FFF)), even);
    return {_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan_words(),
                                  _mm512_set1_epi32(0x7FC0))};
  }
  TRANSFUSE_VECTOR Vec to_f16() const {
    const __m256i half = _mm512_cvtps_ph(_mm512_castsi512_ps(v), _MM_FROUND_TO_NEAREST_INT);
    return {
        _mm512_mask_mov_epi32(_mm512_cvtepu16_epi32(half), nan_words(), _mm512_set1_epi32(0x7E00))};
  }
  // Words from as many 16-bit numbers, of half a vector.
  TRANSFUSE_VECTOR static Vec load_bf16(const std::byte* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)};
  }
  TRANSFUSE_VECTOR static Vec load_f16(const std::byte* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castps_si512(_mm512_cvtph_ps(half))};
  }
  // The words of `low`, then those of `high`, as 16 bits each.
  TRANSFUSE_VECTOR static Vec pack(Vec low, Vec high) {
    return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(low.v)),
                               _mm512_cvtepi32_epi16(high.v), 1)};
  }
};

}  // namespace
}  // namespace transfuse

#include "copy/row_kernels.h"
#include "copy/row_simd.h"

namespace transfuse {
const RowKernels kAvx512Rows = kVectorRows;
}  // namespace transfuse
#endif

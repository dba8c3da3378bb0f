// The CPU copy engine: strided copies with cast and fingerprint in one pass, and fingerprints of
// memory at rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// The copy without a cast of elements of 1, 2, 4 or 8 bytes.
ElementOp plain_copy(uint32_t element_bytes);

// Executes `copy`. `source` is the address of element (0, 0, 0): source_offset_bytes is already
// applied. Returns the fingerprint of the elements as written, 0 if copy.fingerprint is not set.
// Source and target do not overlap; neither needs any alignment. Scales that were not fetched lie
// where their offset says, seen from the copy's. Safe to call from any thread.
//
// Large runs are written with streaming stores, which other threads may see late: call copy_fence()
// on the same thread after the last run_copy() and before saying that the bytes are there (through
// a mutex, a release store or a system call).
uint64_t run_copy(const StridedCopy& copy, const std::byte* source);
void copy_fence();

// The fingerprint that run_copy() would return, whatever copy.fingerprint says. Writes nothing and
// does not use copy.target.
uint64_t sum_copy(const StridedCopy& copy, const std::byte* source);

// The casts, one element at a time: round to nearest even; every NaN becomes 0x7FC0 (bf16) or
// 0x7E00 (f16); f16 overflows to infinity and keeps subnormals. Argument and result are bits.
uint16_t f32_bits_to_bf16(uint32_t bits);
uint16_t f32_bits_to_f16(uint32_t bits);
// Exact; a NaN keeps its payload, and that of f16 becomes quiet.
uint32_t bf16_bits_to_f32(uint16_t bits);
uint32_t f16_bits_to_f32(uint16_t bits);
// What is above 448 becomes 448, every NaN 0x7F.
uint8_t f32_bits_to_e4m3(uint32_t bits);
uint32_t e4m3_bits_to_f32(uint8_t bits);  // exact; NaN keeps its sign

// kCorrupt unless every byte that `copy` reads lies in a region of `source_size_bytes`, scales in
// one of `scales_size_bytes`, nothing overflows and no stride is negative (I13).
Result<void> check_copy(const StridedCopy& copy, uint64_t source_size_bytes,
                        uint64_t scales_size_bytes);
inline Result<void> check_copy(const StridedCopy& copy, uint64_t source_size_bytes) {
  return check_copy(copy, source_size_bytes, source_size_bytes);
}

// Which code runs; chosen once from what the CPU has.
enum class CopyPath : uint8_t { kPortable, kNeon, kAvx2, kAvx512 };
#if defined(__x86_64__)
inline constexpr CopyPath kCopyPaths[] = {CopyPath::kPortable, CopyPath::kAvx2, CopyPath::kAvx512};
#elif defined(__aarch64__)
inline constexpr CopyPath kCopyPaths[] = {CopyPath::kPortable, CopyPath::kNeon};
#else
inline constexpr CopyPath kCopyPaths[] = {CopyPath::kPortable};
#endif
std::string_view copy_path_name(CopyPath path);  // "portable", "neon", "avx2", "avx512"
bool has_copy_path(CopyPath path);
CopyPath copy_path();
// For tests and benchmarks: this CPU has `path`.
void force_copy_path(CopyPath path);
CopyPath best_copy_path();

}  // namespace transfuse

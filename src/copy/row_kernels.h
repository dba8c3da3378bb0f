// Rows: contiguous runs of elements, the inner loops of the copy engine, one set per instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "transfuse/copy.h"

namespace transfuse {

// Where a row lies in the fingerprint: the first element's place, what is added from element to
// element, and the second seed; `upper_*` for the upper halves of 8-byte elements.
struct RowSeed {
  uint32_t place = 0;
  uint32_t step = 0;
  uint32_t second = 0;
  uint32_t upper_place = 0;
  uint32_t upper_second = 0;
};

// `rows` rows of `count` elements, from row to row `*_pitch` bytes apart, and `place_pitch` in the
// fingerprint.
struct RowBlock {
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  uint64_t count = 0;
  uint64_t rows = 1;
  int64_t source_pitch = 0;
  int64_t target_pitch = 0;
  uint32_t place_pitch = 0;
};

// Indexed by ElementOp. Every kernel takes any alignment. `sum` writes nothing and ignores the
// target. Sums are of the elements as written.
struct RowKernels {
  using Copy = void (*)(const RowBlock& block);
  using Sum = uint64_t (*)(const RowBlock& block, const RowSeed& seed);
  Copy copy[kElementOpCount];
  Sum copy_sum[kElementOpCount];
  Sum sum[kElementOpCount];
};

extern const RowKernels kPortableRows;
#if defined(__aarch64__)
extern const RowKernels kNeonRows;
#endif
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows;    // needs AVX2 and F16C
extern const RowKernels kAvx512Rows;  // needs AVX-512 F, BW, VL and DQ
#endif

}  // namespace transfuse

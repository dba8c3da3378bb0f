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

// Indexed by ElementOp. Every kernel takes any alignment. `copy` and `copy_sum` write `count`
// elements at `target`; `sum` ignores it. Sums are of the elements as written.
struct RowKernels {
  using Copy = void (*)(const std::byte* source, std::byte* target, uint64_t count);
  using Sum = uint64_t (*)(const std::byte* source, std::byte* target, uint64_t count,
                           const RowSeed& seed);
  Copy copy[kElementOpCount];
  Sum copy_sum[kElementOpCount];
  Sum sum[kElementOpCount];
};

extern const RowKernels kPortableRows;
#if defined(__x86_64__)
extern const RowKernels kAvx2Rows;    // needs AVX2 and F16C
extern const RowKernels kAvx512Rows;  // needs AVX-512 F, BW, VL and DQ
#endif

}  // namespace transfuse

// Which tensor of a layout holds the scales of which fp8 tensor.
#pragma once

#include <cstdint>

namespace transfuse {

// `tensor` is fp8 e4m3, [rows, columns], and an element of it is worth what it says times the scale
// of its block (docs/fp8.md). `scales` is f32, [ceil(rows / block_rows), ceil(columns /
// block_columns)], or any shape of one element where there is one block.
struct Quantization {
  uint32_t tensor = 0;  // indices into Layout::tensors()
  uint32_t scales = 0;
  int64_t block_rows = 0;  // never more than the tensor has
  int64_t block_columns = 0;
  bool operator==(const Quantization&) const = default;
};

}  // namespace transfuse

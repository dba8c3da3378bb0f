// A dense array with the few torch operations that loaders of weights use: the judge of layouts
// moves whole tensors about and knows no boxes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace transfuse::frameworks {

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<int32_t> data;  // row-major

  static Tensor zeros(const std::vector<int64_t>& shape);
  Tensor view(const std::vector<int64_t>& new_shape) const;
  Tensor narrow(int dim, int64_t start, int64_t length) const;
  // torch.chunk: pieces of ceil(n / count); the last ones may be short or empty.
  Tensor chunk(int64_t count, int64_t index, int dim) const;
  // Of the last two dimensions.
  Tensor transposed() const;
  // Rows of zeros up to `rows`.
  Tensor padded(int64_t rows) const;
  // param.narrow(dim, start, value.shape[dim]).copy_(value)
  void copy_into(int dim, int64_t start, const Tensor& value);
};
// Blocks of `block` that `count` elements take.
inline int64_t blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

Tensor cat(const std::vector<Tensor>& parts, int dim);

using StateDict = std::map<std::string, Tensor>;

}  // namespace transfuse::frameworks

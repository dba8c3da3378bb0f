// A dense array with the few torch operations that loaders of weights use.
#include "layouts/tensor.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "transfuse/result.h"

namespace transfuse::frameworks {
namespace {

int64_t product(const std::vector<int64_t>& shape, size_t begin, size_t end) {
  int64_t n = 1;
  for (size_t d = begin; d < end; ++d) n *= shape[d];
  return n;
}

}  // namespace

Tensor Tensor::zeros(const std::vector<int64_t>& shape) {
  return {shape, std::vector<int32_t>(static_cast<size_t>(product(shape, 0, shape.size())), 0)};
}

Tensor Tensor::view(const std::vector<int64_t>& new_shape) const {
  TRANSFUSE_CHECK(product(new_shape, 0, new_shape.size()) == static_cast<int64_t>(data.size()));
  return {new_shape, data};
}

Tensor Tensor::narrow(int dim, int64_t start, int64_t length) const {
  const auto d = static_cast<size_t>(dim);
  TRANSFUSE_CHECK(d < shape.size() && start >= 0 && length >= 0 && start + length <= shape[d]);
  const int64_t inner = product(shape, d + 1, shape.size());
  Tensor out{shape, {}};
  out.shape[d] = length;
  for (int64_t outer = 0; outer < product(shape, 0, d); ++outer) {
    const auto from = data.begin() + (outer * shape[d] + start) * inner;
    out.data.insert(out.data.end(), from, from + length * inner);
  }
  return out;
}

Tensor Tensor::chunk(int64_t count, int64_t index, int dim) const {
  const int64_t length = shape[static_cast<size_t>(dim)];
  const int64_t piece = (length + count - 1) / count;
  const int64_t start = std::min(index * piece, length);
  return narrow(dim, start, std::min(piece, length - start));
}

Tensor Tensor::transposed() const {
  Tensor out = *this;
  const size_t rank = shape.size();
  const auto rows = static_cast<size_t>(shape[rank - 2]);
  const auto columns = static_cast<size_t>(shape[rank - 1]);
  std::swap(out.shape[rank - 2], out.shape[rank - 1]);
  for (size_t i = 0; i < data.size(); ++i) {
    const size_t matrix = i / (rows * columns);
    const size_t row = i / columns % rows;
    out.data[(matrix * columns + i % columns) * rows + row] = data[i];
  }
  return out;
}

Tensor Tensor::padded(int64_t rows) const {
  Tensor out = *this;
  out.shape[0] = rows;
  out.data.resize(static_cast<size_t>(product(out.shape, 0, out.shape.size())), 0);
  return out;
}

void Tensor::copy_into(int dim, int64_t start, const Tensor& value) {
  const auto d = static_cast<size_t>(dim);
  TRANSFUSE_CHECK(value.shape.size() == shape.size() && start + value.shape[d] <= shape[d]);
  const int64_t inner = product(shape, d + 1, shape.size());
  const int64_t run = value.shape[d] * inner;
  TRANSFUSE_CHECK(product(shape, 0, d) * run == static_cast<int64_t>(value.data.size()));
  for (int64_t outer = 0; outer < product(shape, 0, d); ++outer) {
    std::copy_n(value.data.begin() + outer * run, run,
                data.begin() + (outer * shape[d] + start) * inner);
  }
}

Tensor cat(const std::vector<Tensor>& parts, int dim) {
  Tensor out = parts.at(0);
  const auto d = static_cast<size_t>(dim);
  out.shape[d] = 0;
  for (const Tensor& part : parts) out.shape[d] += part.shape[d];
  out = Tensor::zeros(out.shape);
  int64_t start = 0;
  for (const Tensor& part : parts) {
    out.copy_into(dim, start, part);
    start += part.shape[d];
  }
  return out;
}

}  // namespace transfuse::frameworks

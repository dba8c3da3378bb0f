// Dims and boxes: small vectors of extents, and where two boxes meet.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

int64_t saturating_product(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

}  // namespace

Dims::Dims(std::initializer_list<int64_t> values)
    : Dims(std::span(values.begin(), values.size())) {}

Dims::Dims(std::span<const int64_t> values) {
  TRANSFUSE_CHECK(values.size() <= size_t{kMaxRank});
  std::copy(values.begin(), values.end(), values_.begin());
  rank_ = static_cast<int>(values.size());
}

void Dims::push_back(int64_t value) {
  TRANSFUSE_CHECK(rank_ < kMaxRank);
  values_[static_cast<size_t>(rank_++)] = value;
}

int64_t Dims::product() const {
  int64_t product = 1;
  for (const int64_t value : values()) {
    if (value == 0) return 0;
    product = saturating_product(product, value);
  }
  return product;
}

bool Dims::operator==(const Dims& other) const {
  return std::ranges::equal(values(), other.values());
}

std::string Dims::to_string() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string((*this)[i]);
  }
  return text + "]";
}

Dims row_major_strides(const Dims& shape) {
  Dims strides = shape;
  int64_t stride = 1;
  for (int i = shape.rank() - 1; i >= 0; --i) {
    strides[i] = stride;
    stride = saturating_product(stride, shape[i]);
  }
  return strides;
}

Box Box::whole(const Dims& shape) {
  Box box;
  for (int i = 0; i < shape.rank(); ++i) box.offset.push_back(0);
  box.length = shape;
  return box;
}

std::string Box::to_string() const {
  std::string text = "[";
  for (int i = 0; i < offset.rank(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(offset[i]) + ":" + std::to_string(offset[i] + length[i]);
  }
  return text + "]";
}

std::optional<Box> intersect(const Box& a, const Box& b) {
  TRANSFUSE_CHECK(a.offset.rank() == b.offset.rank());
  Box meet;
  for (int i = 0; i < a.offset.rank(); ++i) {
    const int64_t begin = std::max(a.offset[i], b.offset[i]);
    const int64_t end = std::min(a.offset[i] + a.length[i], b.offset[i] + b.length[i]);
    if (begin >= end) return std::nullopt;
    meet.offset.push_back(begin);
    meet.length.push_back(end - begin);
  }
  return meet;
}

}  // namespace transfuse

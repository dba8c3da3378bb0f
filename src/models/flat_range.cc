// A run of a row-major tensor's elements, as shards of flattened parameters are, cut into boxes.
#include <fmt/format.h>

#include <cstdint>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// The boxes of elements [begin, end) counted within what `box` fixes in its dimensions before
// `dim`.
void cut(Box box, int dim, int64_t begin, int64_t end, std::vector<Box>& boxes) {
  int64_t row = 1;
  for (int d = dim + 1; d < box.length.rank(); ++d) row *= box.length[d];
  const auto add = [&](int64_t first, int64_t count, int64_t from, int64_t to) {
    Box piece = box;
    piece.offset[dim] = first;
    piece.length[dim] = count;
    if (from == 0 && to == row) {
      boxes.push_back(piece);
    } else {
      cut(piece, dim + 1, from, to, boxes);
    }
  };
  int64_t first = begin / row;
  const int64_t last = end / row;
  if (first == last) {
    if (begin < end) add(first, 1, begin % row, end % row);
    return;
  }
  if (begin % row != 0) add(first++, 1, begin % row, row);
  if (first < last) add(first, last - first, 0, row);
  if (end % row != 0) add(last, 1, 0, end % row);
}

}  // namespace

Result<std::vector<Box>> flat_range_boxes(const Dims& shape, int64_t begin, int64_t end) {
  if (begin < 0 || begin > end || end > shape.product()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("elements {} to {} of a tensor of shape {}: expected a part of its {}",
                             begin, end, shape.to_string(), shape.product())};
  }
  std::vector<Box> boxes;
  if (begin == end) return boxes;
  const Box whole = Box::whole(shape);
  if (shape.rank() == 0) {
    boxes.push_back(whole);
  } else {
    cut(whole, 0, begin, end, boxes);
  }
  return boxes;
}

}  // namespace transfuse

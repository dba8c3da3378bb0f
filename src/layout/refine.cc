// One tensor seen in shapes that differ only in how dimensions are split.
#include "layout/refine.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// Dimensions [end[d - 1], end[d]) of the fine shape are dimension d of the coarse one. What is left
// over has length 1.
using Groups = std::array<int, kMaxRank>;

std::optional<Groups> groups_of(const Dims& fine, const Dims& coarse) {
  Groups end{};
  int next = 0;
  for (int d = 0; d < coarse.rank(); ++d) {
    int64_t product = 1;
    while (product < coarse[d] && next < fine.rank()) {
      if (fine[next] == 0 || product > coarse[d] / fine[next]) return std::nullopt;
      product *= fine[next++];
    }
    if (product != coarse[d]) return std::nullopt;
    end[static_cast<size_t>(d)] = next;
  }
  while (next < fine.rank() && fine[next] == 1) ++next;
  return next == fine.rank() ? std::optional(end) : std::nullopt;
}

// Cuts the range [begin, end) of a dimension, whose parts from `first` on are `radices`, into
// boxes.
class RangeSplitter {
 public:
  RangeSplitter(const Dims& fine, int first, int last) : fine_(fine), first_(first), last_(last) {}

  std::vector<Box> split(int64_t begin, int64_t end) {
    cut(first_, begin, end);
    return std::move(boxes_);
  }

 private:
  int64_t inner(int d) const {
    int64_t product = 1;
    while (++d < last_) product *= fine_[d];
    return product;
  }

  // The range, counted within the dimensions before `d` as prefix_ has them.
  void cut(int d, int64_t begin, int64_t end) {
    if (d == last_) {
      boxes_.push_back(prefix_);
      return;
    }
    const int64_t size = inner(d);
    while (begin < end) {
      const int64_t index = begin / size;
      const bool whole = begin % size == 0 && end - begin >= size;
      const int64_t next = whole ? end / size * size : std::min(end, (index + 1) * size);
      const Box before = prefix_;
      prefix_.offset.push_back(index);
      prefix_.length.push_back(whole ? next / size - index : 1);
      cut(d + 1, whole ? 0 : begin - index * size, whole ? size : next - index * size);
      prefix_ = before;
      begin = next;
    }
  }

  const Dims& fine_;
  const int first_;
  const int last_;
  Box prefix_;
  std::vector<Box> boxes_;
};

void append(Box& box, const Box& more) {
  for (const int64_t offset : more.offset.values()) box.offset.push_back(offset);
  for (const int64_t length : more.length.values()) box.length.push_back(length);
}

}  // namespace

bool splits(const Dims& fine, const Dims& coarse) {
  return fine == coarse || (coarse.product() > 0 && groups_of(fine, coarse));
}

void append_split(const Tile& tile, const Dims& coarse, const Dims& fine, std::vector<Tile>& out) {
  const std::optional<Groups> ends = groups_of(fine, coarse);
  TRANSFUSE_CHECK(ends.has_value());
  std::vector<Tile> tiles(1, tile);
  tiles[0].box = {};
  tiles[0].element_strides = {};
  int first = 0;
  for (int d = 0; d < coarse.rank(); ++d) {
    const int last = (*ends)[static_cast<size_t>(d)];
    const int64_t begin = tile.box.offset[d];
    const std::vector<Box> boxes =
        RangeSplitter(fine, first, last).split(begin, begin + tile.box.length[d]);
    const Dims inner = row_major_strides(
        Dims(fine.values().subspan(static_cast<size_t>(first), static_cast<size_t>(last - first))));
    std::vector<Tile> next;
    for (const Tile& partial : tiles) {
      for (const Box& box : boxes) {
        Tile& added = next.emplace_back(partial);
        int64_t at = 0;
        for (int i = 0; i < inner.rank(); ++i) {
          at += box.offset[i] * inner[i];
          added.element_strides.push_back(tile.element_strides[d] * inner[i]);
        }
        added.element_offset += (inner.rank() == 0 ? 0 : at - begin) * tile.element_strides[d];
        append(added.box, box);
      }
    }
    tiles = std::move(next);
    first = last;
  }
  for (Tile& done : tiles) {
    while (done.box.offset.rank() < fine.rank()) {
      append(done.box, {.offset = {0}, .length = {1}});
      done.element_strides.push_back(1);
    }
    out.push_back(done);
  }
}

Box joined_box(const Box& box, const Dims& fine, const Dims& coarse) {
  const std::optional<Groups> ends = groups_of(fine, coarse);
  TRANSFUSE_CHECK(ends.has_value());
  Box joined;
  int next = 0;
  for (int d = 0; d < coarse.rank(); ++d) {
    int64_t low = 0;
    int64_t last = 0;
    for (; next < (*ends)[static_cast<size_t>(d)]; ++next) {
      low = low * fine[next] + box.offset[next];
      last = last * fine[next] + box.offset[next] + box.length[next] - 1;
    }
    joined.offset.push_back(low);
    joined.length.push_back(last - low + 1);
  }
  return joined;
}

}  // namespace transfuse

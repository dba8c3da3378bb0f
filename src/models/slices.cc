// Parameters that a framework makes by concatenating slices of logical matrices along dim 0.
#include "models/slices.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

int64_t blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

// The scales of elements [begin, end) of `count`.
Result<Range> scales_of(const ModelTensor& tensor, const char* what, Range range, int64_t count,
                        int64_t block) {
  for (const int64_t cut : {range.begin, range.end}) {
    if (cut % block == 0 || cut == count) continue;
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{}: a cut of its weight at {} {} of {}: expected a multiple of {}, as "
                    "one scale is of {} of them",
                    tensor.name, what, cut, count, block, block)};
  }
  return Range{range.begin / block, blocks(range.end, block)};
}

}  // namespace

Slice whole_slice(const Piece& piece) {
  return {.rows = {0, piece.shape[0]}, .columns = {0, piece.shape.rank() > 1 ? piece.shape[1] : 1}};
}

Range share_of(int64_t count, int64_t rank, int64_t size) {
  return {rank * (count / size), (rank + 1) * (count / size)};
}

size_t Slices::parameter(const Destination& to) {
  const auto [at, fresh] = index_.try_emplace(to.parameter, parameters_.size());
  if (fresh) {
    parameters_.push_back(
        {.spec = {.name = to.parameter, .dtype = to.dtype, .element_count = 0}, .parts = {}});
  }
  return at->second;
}

Result<void> Slices::add(const Destination& to, const ModelTensor& tensor, const Piece& piece,
                         const Slice& slice) {
  Range rows = slice.rows;
  Range columns = slice.columns;
  Range here{piece.first_row, piece.first_row + piece.row_count};
  if (tensor.content == Content::kScale) {
    const Dims& shape = piece.shape;
    const Dims& block = tensor.block;
    TRANSFUSE_ASSIGN_OR_RETURN(rows, scales_of(tensor, "row", rows, shape[0], block[0]));
    TRANSFUSE_ASSIGN_OR_RETURN(columns, scales_of(tensor, "column", columns, shape[1], block[1]));
    TRANSFUSE_ASSIGN_OR_RETURN(here, scales_of(tensor, "row", here, shape[0], block[0]));
  }
  const size_t p = parameter(to);
  int64_t& width = parameters_[p].width;
  TRANSFUSE_CHECK(width == -1 || width == columns.count());
  width = columns.count();
  parameters_[p].parts.push_back({.place = to.place, .rows = rows.count()});
  const Range held{std::max(rows.begin, here.begin), std::min(rows.end, here.end)};
  const uint32_t t = builder_.tensor(model_.published(tensor));
  if (held.count() <= 0) return {};
  PendingTile tile{.parameter = p,
                   .place = to.place,
                   .row = held.begin - rows.begin,
                   .tensor = t,
                   .box = {.offset = piece.origin, .length = {}},
                   .strides = {}};
  for (int d = 0; d < tensor.shape.rank(); ++d) {
    const bool row = d == piece.row_dimension;
    const bool column = d == piece.column_dimension;
    if (row) tile.box.offset[d] += held.begin - here.begin;
    if (column) tile.box.offset[d] += columns.begin;
    tile.box.length.push_back(row ? held.count() : column ? columns.count() : 1);
    tile.strides.push_back(row ? width : 1);
  }
  tiles_.push_back(tile);
  return {};
}

void Slices::add_zeros(const Destination& to, int64_t rows) {
  parameters_[parameter(to)].parts.push_back({.place = to.place, .rows = rows, .zeros = true});
}

Result<Layout> Slices::build() {
  std::vector<uint32_t> handles;
  std::vector<std::vector<int64_t>> first_rows(parameters_.size());
  for (size_t p = 0; p < parameters_.size(); ++p) {
    Parameter& parameter = parameters_[p];
    std::ranges::sort(parameter.parts, {}, &Part::place);
    const auto same = [](const Part& a, const Part& b) {  // pieces of one matrix
      TRANSFUSE_CHECK(a.place != b.place || a.rows == b.rows);
      return a.place == b.place;
    };
    parameter.parts.erase(std::ranges::unique(parameter.parts, same).begin(),
                          parameter.parts.end());
    int64_t rows = 0;
    for (const Part& part : parameter.parts) {
      first_rows[p].push_back(rows);
      rows += part.rows;
    }
    parameter.spec.element_count = rows * parameter.width;
    handles.push_back(builder_.parameter(parameter.spec));
    for (size_t i = 0; i < parameter.parts.size(); ++i) {
      const Part& part = parameter.parts[i];
      if (!part.zeros) continue;
      builder_.fill(handles[p], first_rows[p][i] * parameter.width, {part.rows, parameter.width},
                    {parameter.width, 1});
    }
  }
  for (const PendingTile& tile : tiles_) {
    const Parameter& parameter = parameters_[tile.parameter];
    const auto part = std::ranges::lower_bound(parameter.parts, tile.place, {}, &Part::place);
    const auto i = static_cast<size_t>(part - parameter.parts.begin());
    builder_.tile(tile.tensor, tile.box, handles[tile.parameter],
                  (first_rows[tile.parameter][i] + tile.row) * parameter.width, tile.strides);
  }
  return builder_.build();
}

}  // namespace transfuse

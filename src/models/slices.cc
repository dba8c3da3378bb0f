// Parameters that a framework makes by concatenating slices of logical matrices along dim 0.
#include "models/slices.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "layout/refine.h"
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

// The dimension of the piece's rows split in two, `rows` of them together.
Dims shape_in_turns(const Dims& shape, const Piece& piece, int64_t rows) {
  Dims split;
  for (int d = 0; d < shape.rank(); ++d) {
    split.push_back(d == piece.row_dimension ? shape[d] / rows : shape[d]);
    if (d == piece.row_dimension) split.push_back(rows);
  }
  return split;
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
  const int rank = tensor.shape.rank();
  const int last = std::max(piece.row_dimension, std::min(piece.column_dimension, rank - 1));
  int64_t inner = 1;
  for (int d = last + 1; d < rank; ++d) inner *= tensor.shape[d];
  const size_t p = parameter(to);
  int64_t& width = parameters_[p].width;
  TRANSFUSE_CHECK(width == -1 || width == columns.count() * inner);
  width = columns.count() * inner;
  parameters_[p].parts.push_back({.place = to.place, .rows = rows.count()});
  const Range held{std::max(rows.begin, here.begin), std::min(rows.end, here.end)};
  TensorSpec spec = model_.published(tensor);
  if (piece.period > 0) spec.shape = shape_in_turns(spec.shape, piece, piece.period);
  const uint32_t t = builder_.tensor(spec);
  if (held.count() <= 0) return {};
  PendingTile pending{.parameter = p, .place = to.place, .tensor = t, .tile = {}};
  pending.tile.box.offset = piece.origin;
  pending.tile.element_offset = (held.begin - rows.begin) * width;
  for (int d = 0; d < rank; ++d) {
    const bool row = d == piece.row_dimension;
    const bool column = d == piece.column_dimension && !row;
    if (row) pending.tile.box.offset[d] += held.begin - here.begin;
    if (column) pending.tile.box.offset[d] += columns.begin;
    if (d > last) inner /= tensor.shape[d];
    pending.tile.box.length.push_back(d > last ? tensor.shape[d]
                                      : row    ? held.count()
                                      : column ? columns.count()
                                               : 1);
    pending.tile.element_strides.push_back(row ? width : inner);
  }
  if (piece.period > 0) {
    add_turns(pending, tensor, piece);
  } else {
    tiles_.push_back(pending);
  }
  return {};
}

// `whole` has the rows of the piece as if they followed each other.
void Slices::add_turns(const PendingTile& whole, const ModelTensor& tensor, const Piece& piece) {
  Dims rows = tensor.shape;
  rows[piece.row_dimension] = piece.shape[0];
  std::vector<Tile> tiles;
  append_split(whole.tile, rows, shape_in_turns(rows, piece, piece.turn_rows), tiles);
  for (const Tile& tile : tiles) {
    PendingTile& added = tiles_.emplace_back(whole);
    added.tile = tile;
    added.tile.box.offset[piece.row_dimension + 1] += piece.turn_begin;
  }
}

void Slices::add_zeros(const Destination& to, int64_t rows, int64_t width) {
  const size_t p = parameter(to);
  if (parameters_[p].width == -1) parameters_[p].width = width;
  parameters_[p].parts.push_back({.place = to.place, .rows = rows, .zeros = true});
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
  for (const PendingTile& pending : tiles_) {
    const Parameter& parameter = parameters_[pending.parameter];
    const auto part = std::ranges::lower_bound(parameter.parts, pending.place, {}, &Part::place);
    const auto i = static_cast<size_t>(part - parameter.parts.begin());
    const int64_t first = first_rows[pending.parameter][i] * parameter.width;
    builder_.tile(pending.tensor, pending.tile.box, handles[pending.parameter],
                  first + pending.tile.element_offset, pending.tile.element_strides);
  }
  return builder_.build();
}

}  // namespace transfuse

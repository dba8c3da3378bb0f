// Outer levels first; within the buffer the innermost index runs fastest.
#include "transport/cuda/staged_pieces.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "copy/copy.h"
#include "copy/element_size.h"
#include "copy/scaled_copy.h"
#include "transfuse/copy.h"

namespace transfuse::cuda {
namespace {

// Elements [first, first + count) of one level.
StridedCopy part_of(const StridedCopy& copy, int level, uint32_t first, uint32_t count) {
  StridedCopy part = copy;
  const auto at = static_cast<int64_t>(first);
  part.count[level] = count;
  part.source_offset_bytes +=
      static_cast<uint64_t>(at * copy.source_stride[level]) * source_bytes_of(copy.op);
  if (part.target != nullptr) {
    part.target += at * copy.target_stride[level] * target_bytes_of(copy.op);
  }
  part.linear_index += static_cast<uint64_t>(at * copy.index_stride[level]);
  return part;
}

}  // namespace

void cut_copy(const StridedCopy& copy, uint64_t most, std::vector<StridedCopy>& pieces) {
  if (copy.element_count() <= most) {
    if (copy.element_count() > 0) pieces.push_back(copy);
    return;
  }
  int level = 0;
  while (copy.count[level] == 1) ++level;
  const uint64_t row = copy.element_count() / copy.count[level];
  const auto rows = static_cast<uint32_t>(
      std::clamp<uint64_t>(most / std::max<uint64_t>(row, 1), 1, copy.count[level]));
  for (uint32_t first = 0; first < copy.count[level]; first += rows) {
    cut_copy(part_of(copy, level, first, std::min(rows, copy.count[level] - first)), most, pieces);
  }
}

void cut_scaled_copy(const StridedCopy& copy, uint64_t most, std::vector<StridedCopy>& pieces,
                     std::deque<BlockScales>& scales) {
  const uint64_t block = uint64_t{copy.scales->block[0]} * copy.scales->block[1];
  const auto columns = static_cast<uint32_t>(copy.block_count(1));
  const auto at_once =
      static_cast<uint32_t>(std::clamp<uint64_t>(most / block, 1, std::max<uint32_t>(columns, 1)));
  for (uint32_t i = 0; i < copy.block_count(0); ++i) {
    for (uint32_t j = 0; j < columns; j += at_once) {
      BlockScales& blocks = scales.emplace_back();
      pieces.push_back(blocks_of(copy, {i, j}, std::min(at_once, columns - j), blocks));
      pieces.back().scales = &blocks;
    }
  }
}

namespace {

// Whether scales lie in the buffer, too: written there by the cast, or brought there before it.
bool stages_scales(const StridedCopy& piece, bool casts_first) {
  return is_scaled(piece.op) && quantizes(piece.op) == casts_first;
}

// Elements in the buffer end at a multiple of what a scale needs.
uint64_t element_bytes_in_stage(const StridedCopy& piece, bool casts_first) {
  const uint32_t element = casts_first ? target_bytes_of(piece.op) : source_bytes_of(piece.op);
  return (piece.element_count() * element + 3) / 4 * 4;
}

// The scales' way on the other side than the scaled copy's, through the buffer.
void stage_scales(const StridedCopy& piece, std::byte* buffer, uint64_t offset_bytes,
                  bool casts_first, StagedPiece& staged) {
  const BlockScales& scales = *piece.scales;
  const auto columns = static_cast<int64_t>(piece.block_count(1));
  StridedCopy& box = staged.scales;
  box.op = ElementOp::kCopy4;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t packed = axis == 0 ? columns : 1;
    box.count[axis + 1] = static_cast<uint32_t>(piece.block_count(axis));
    box.source_stride[axis + 1] = casts_first ? packed : scales.stride[axis];
    box.target_stride[axis + 1] = casts_first ? scales.stride[axis] : packed;
    staged.blocks.stride[axis] = packed;
  }
  if (casts_first) {
    box.target = scales.target;
    box.source_offset_bytes = offset_bytes;
    staged.blocks.target = buffer + offset_bytes;
  } else {
    box.target = buffer + offset_bytes;
    box.source_offset_bytes = scales.source_offset_bytes;
    staged.blocks.fetched = buffer + offset_bytes;
  }
}

}  // namespace

uint64_t staged_bytes(const StridedCopy& piece, bool casts_first) {
  const uint64_t scales = stages_scales(piece, casts_first)
                              ? piece.block_count(0) * piece.block_count(1) * sizeof(float)
                              : 0;
  return element_bytes_in_stage(piece, casts_first) + scales;
}

StagedPiece stage_piece(const StridedCopy& piece, std::byte* buffer, uint64_t offset_bytes,
                        bool casts_first) {
  StagedPiece staged{.to_stage = piece, .from_stage = piece, .scales = {}, .blocks = {}};
  staged.to_stage.target = buffer + offset_bytes;
  staged.from_stage.source_offset_bytes = offset_bytes;
  int64_t stride = 1;
  for (int level = 2; level >= 0; --level) {
    staged.to_stage.target_stride[level] = staged.from_stage.source_stride[level] = stride;
    stride *= piece.count[level];
  }
  if (casts_first) {
    staged.from_stage.op = plain_copy(target_bytes_of(piece.op));
    staged.from_stage.fingerprint = false;
  } else {
    staged.to_stage.op = plain_copy(source_bytes_of(piece.op));
    staged.to_stage.fingerprint = false;
  }
  staged.scales.count[2] = 0;
  if (!is_scaled(piece.op)) return staged;
  staged.blocks = *piece.scales;
  (casts_first ? staged.from_stage : staged.to_stage).scales = nullptr;
  if (stages_scales(piece, casts_first)) {
    stage_scales(piece, buffer, offset_bytes + element_bytes_in_stage(piece, casts_first),
                 casts_first, staged);
  }
  return staged;
}

}  // namespace transfuse::cuda

// Outer levels first; within the buffer the innermost index runs fastest.
#include "transport/cuda/staged_pieces.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "copy/copy.h"
#include "copy/element_size.h"
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

StagedPiece stage_piece(const StridedCopy& piece, std::byte* buffer, uint64_t offset_bytes,
                        bool casts_first) {
  StagedPiece staged{.to_stage = piece, .from_stage = piece};
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
  return staged;
}

}  // namespace transfuse::cuda

// Cuts copies so that each piece fits a staging buffer, where its elements lie close together.
#pragma once

#include <cstdint>
#include <vector>

#include "transfuse/copy.h"

namespace transfuse::cuda {

// Adds pieces of `copy` of at most `most` elements each: together they are the copy, the sums of
// their fingerprints are its sum. `most` is not 0.
void cut_copy(const StridedCopy& copy, uint64_t most, std::vector<StridedCopy>& pieces);

// One side of a piece, at rest in a staging buffer: elements follow one another in its order.
// `to_stage` gathers into it, `from_stage` spreads from it. Elements in the buffer are those of the
// source, or (`casts_first`) those of the target; the fingerprint is taken with the cast.
struct StagedPiece {
  StridedCopy to_stage;    // its target is the buffer
  StridedCopy from_stage;  // its source_offset_bytes counts from the buffer's beginning
};
StagedPiece stage_piece(const StridedCopy& piece, std::byte* buffer, uint64_t offset_bytes,
                        bool casts_first);

}  // namespace transfuse::cuda

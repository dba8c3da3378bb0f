// Cuts copies so that each piece fits a staging buffer, where its elements lie close together.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "transfuse/copy.h"

namespace transfuse::cuda {

// Adds pieces of `copy` of at most `most` elements each: together they are the copy, the sums of
// their fingerprints are its sum. `most` is not 0.
void cut_copy(const StridedCopy& copy, uint64_t most, std::vector<StridedCopy>& pieces);

// The same of a copy with scales: pieces are blocks of one row of blocks, with their scales in
// `scales`, and have at most `most` elements or are one block.
void cut_scaled_copy(const StridedCopy& copy, uint64_t most, std::vector<StridedCopy>& pieces,
                     std::deque<BlockScales>& scales);

// What a piece needs of a staging buffer: its elements, and scales that go through it with them.
uint64_t staged_bytes(const StridedCopy& piece, bool casts_first);

// One side of a piece, at rest in a staging buffer: elements follow one another in its order.
// `to_stage` gathers into it, `from_stage` spreads from it. Elements in the buffer are those of the
// source, or (`casts_first`) those of the target; the fingerprint is taken with the cast.
struct StagedPiece {
  StridedCopy to_stage;    // its target is the buffer
  StridedCopy from_stage;  // its source_offset_bytes counts from the buffer's beginning
  // Scales that are written into the buffer or fetched there by the side that has the scaled copy,
  // as a copy of the other side; empty where there are none.
  StridedCopy scales;
  BlockScales blocks;  // of the scaled copy, whose `scales` is to point here
};
StagedPiece stage_piece(const StridedCopy& piece, std::byte* buffer, uint64_t offset_bytes,
                        bool casts_first);

}  // namespace transfuse::cuda

// Copies that quantise to fp8 or dequantise from it, block by block.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// What run_copy() and sum_copy() do for a copy whose op is_scaled(). `write`: false writes nothing,
// neither elements nor scales.
uint64_t run_scaled_copy(const StridedCopy& copy, const std::byte* source, bool write, bool sum);

// Part of a scaled copy under one scale: all of a block where the copy quantises.
struct ScaledPart {
  uint64_t row = 0;
  uint64_t column = 0;
  uint64_t rows = 0;
  uint64_t columns = 0;
  uint64_t block[2] = {0, 0};  // which one
};

// Calls visit(part) for the parts of `copy`, row by row of blocks; those of a dequantising copy
// have at most `most_elements`. Stops at the first error.
template <typename Visit>
Result<void> for_each_part(const StridedCopy& copy, uint64_t most_elements, Visit&& visit) {
  const BlockScales& scales = *copy.scales;
  const auto begin_of = [&scales](uint64_t block, int axis) {
    return block == 0 ? 0 : block * scales.block[axis] - scales.phase[axis];
  };
  for (uint64_t i = 0; i < copy.block_count(0); ++i) {
    for (uint64_t j = 0; j < copy.block_count(1); ++j) {
      ScaledPart block{.row = begin_of(i, 0), .column = begin_of(j, 1), .block = {i, j}};
      block.rows = std::min<uint64_t>(begin_of(i + 1, 0), copy.count[1]) - block.row;
      block.columns = std::min<uint64_t>(begin_of(j + 1, 1), copy.count[2]) - block.column;
      if (quantizes(copy.op)) {
        TRANSFUSE_RETURN_IF_ERROR(visit(block));
        continue;
      }
      const uint64_t columns = std::clamp<uint64_t>(block.columns, 1, most_elements);
      const uint64_t rows = std::max<uint64_t>(1, most_elements / columns);
      for (uint64_t r = 0; r < block.rows; r += rows) {
        for (uint64_t c = 0; c < block.columns; c += columns) {
          ScaledPart part = block;
          part.row += r;
          part.column += c;
          part.rows = std::min(rows, block.rows - r);
          part.columns = std::min(columns, block.columns - c);
          TRANSFUSE_RETURN_IF_ERROR(visit(part));
        }
      }
    }
  }
  return {};
}

// Scales that are brought at once where they lie in another region than their numbers.
inline constexpr uint32_t kBandScales = 256;

// The `count` blocks from (row, column) on of one row of blocks, as a copy of their own; `blocks`
// becomes its scales.
StridedCopy blocks_of(const StridedCopy& copy, const uint32_t (&first)[2], uint32_t count,
                      BlockScales& blocks);

// Blocks of one row of blocks, as a copy whose scales have been fetched.
struct ScaledBand {
  StridedCopy scales;  // into the fetched ones
  StridedCopy run;     // its scales are below
  BlockScales blocks;
};
ScaledBand band_of(const StridedCopy& copy, const uint32_t (&first)[2], uint32_t count,
                   uint32_t* fetched);

// Executes a dequantising copy whose scales lie elsewhere than its numbers. `read_scales(plain)`
// executes a copy without a cast before it returns, `read_numbers(run)` one with fetched scales.
template <typename ReadScales, typename ReadNumbers>
Result<void> for_each_band(const StridedCopy& copy, ReadScales&& read_scales,
                           ReadNumbers&& read_numbers) {
  std::array<uint32_t, kBandScales> fetched{};
  const auto columns = static_cast<uint32_t>(copy.block_count(1));
  for (uint32_t i = 0; i < copy.block_count(0); ++i) {
    for (uint32_t j = 0; j < columns; j += kBandScales) {
      ScaledBand band = band_of(copy, {i, j}, std::min(kBandScales, columns - j), fetched.data());
      band.run.scales = &band.blocks;
      TRANSFUSE_RETURN_IF_ERROR(read_scales(band.scales));
      TRANSFUSE_RETURN_IF_ERROR(read_numbers(band.run));
    }
  }
  return {};
}

// A part whose source elements, and the scale of a dequantising one, are brought into a buffer.
struct StagedPart {
  StridedCopy elements;  // into the buffer, as they are
  StridedCopy scale;     // into the buffer; empty where the copy quantises
  StridedCopy run;       // out of the buffer; its scales are below
  BlockScales scales;
};
// kUnsupported: the buffer is too small for a block.
Result<void> stage_part(const StridedCopy& copy, const ScaledPart& part,
                        std::span<std::byte> buffer, StagedPart& staged);

// As run_scaled_copy() for a source that is not this process' memory. `read(plain, scratch)`
// executes a copy without a cast before it returns. Adds to *sum where `sum` is not null.
template <typename Read>
Result<void> run_staged_scaled_copy(const StridedCopy& copy, std::span<std::byte> scratch,
                                    bool write, uint64_t* sum, Read&& read) {
  const std::span<std::byte> buffer = scratch.first(scratch.size() / 2 / 8 * 8);
  const std::span<std::byte> rest = scratch.subspan(buffer.size());
  const uint64_t room = buffer.size() / source_element_bytes(copy.op);
  const uint64_t most = room > sizeof(float) ? room - sizeof(float) : 1;
  return for_each_part(copy, most, [&](const ScaledPart& part) -> Result<void> {
    StagedPart staged;
    TRANSFUSE_RETURN_IF_ERROR(stage_part(copy, part, buffer, staged));
    TRANSFUSE_RETURN_IF_ERROR(read(staged.elements, rest));
    if (staged.scale.element_count() > 0) TRANSFUSE_RETURN_IF_ERROR(read(staged.scale, rest));
    staged.run.scales = &staged.scales;
    const uint64_t found = run_scaled_copy(staged.run, buffer.data(), write, sum != nullptr);
    if (sum != nullptr) *sum += found;
    return {};
  });
}

}  // namespace transfuse

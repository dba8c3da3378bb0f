// Each copy as a row of words: a struct may have bytes of no value between its members.
#include "transport/cuda/copy_key.h"

#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse::cuda {
namespace {

constexpr size_t kWords = 16;
constexpr size_t kRows = 32;  // hashed at once

using Row = std::array<uint64_t, kWords>;

Row row_of(const StridedCopy& copy, uint32_t source) {
  const uint64_t flags = static_cast<uint64_t>(copy.op) << 1 | (copy.fingerprint ? 1 : 0);
  return {copy.source_offset_bytes,
          reinterpret_cast<uintptr_t>(copy.target),
          copy.linear_index,
          copy.fingerprint_key,
          uint64_t{copy.count[0]} << 32 | copy.count[1],
          uint64_t{copy.count[2]} << 32 | source,
          flags,
          static_cast<uint64_t>(copy.source_stride[0]),
          static_cast<uint64_t>(copy.source_stride[1]),
          static_cast<uint64_t>(copy.source_stride[2]),
          static_cast<uint64_t>(copy.target_stride[0]),
          static_cast<uint64_t>(copy.target_stride[1]),
          static_cast<uint64_t>(copy.target_stride[2]),
          static_cast<uint64_t>(copy.index_stride[0]),
          static_cast<uint64_t>(copy.index_stride[1]),
          static_cast<uint64_t>(copy.index_stride[2])};
}

}  // namespace

CopyKey key_of(std::span<const StridedCopy> copies, std::span<const uint32_t> sources,
               std::span<const uint32_t> scale_sources, bool sums) {
  TRANSFUSE_CHECK(copies.size() == sources.size() && copies.size() == scale_sources.size());
  std::array<Row, kRows> rows;
  XXH128_hash_t hash{.low64 = copies.size(), .high64 = sums ? 1U : 0U};
  for (size_t first = 0; first < copies.size(); first += kRows) {
    const size_t count = std::min(kRows, copies.size() - first);
    for (size_t i = 0; i < count; ++i) rows[i] = row_of(copies[first + i], sources[first + i]);
    const XXH128_hash_t part = XXH3_128bits_withSeed(rows.data(), count * sizeof(Row), hash.low64);
    hash = {.low64 = part.low64, .high64 = part.high64 ^ (hash.high64 * 0x9E3779B97F4A7C15U + 1)};
  }
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i].scales == nullptr) continue;
    const BlockScales& scales = *copies[i].scales;
    const Row row = {reinterpret_cast<uintptr_t>(scales.target),
                     scales.source_offset_bytes,
                     scales.linear_index,
                     scales.fingerprint_key,
                     uint64_t{scales.block[0]} << 32 | scales.block[1],
                     uint64_t{scales.phase[0]} << 32 | scales.phase[1],
                     static_cast<uint64_t>(scales.stride[0]),
                     static_cast<uint64_t>(scales.stride[1]),
                     static_cast<uint64_t>(scales.index_stride[0]),
                     static_cast<uint64_t>(scales.index_stride[1]),
                     scale_sources[i]};
    const XXH128_hash_t part = XXH3_128bits_withSeed(row.data(), sizeof(Row), hash.low64);
    hash = {.low64 = part.low64, .high64 = part.high64 ^ (hash.high64 * 0x9E3779B97F4A7C15U + 1)};
  }
  return {.low = hash.low64, .high = hash.high64};
}

}  // namespace transfuse::cuda

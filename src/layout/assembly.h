// From loose parts to a Layout: the one place that validates, sorts and digests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Bounds that build() and decode_layout() share, so that a message of a few megabytes cannot ask
// for all memory of the reader. A 1T-class mixture of experts has 70,000 names and 100,000 tiles.
inline constexpr size_t kMaxNameBytes = 1024;
inline constexpr size_t kMaxTotalNameBytes = size_t{64} << 20;
inline constexpr size_t kMaxTotalMetadataBytes = size_t{64} << 20;
inline constexpr size_t kMaxTiles = size_t{1} << 22;
inline constexpr int64_t kMaxElements = INT64_MAX / 8;  // bytes of any dtype fit in int64_t

// What a layout says beside where things lie.
struct LayoutWords {
  std::string kind{};
  std::map<uint32_t, Metadata> metadata{};  // by tensor; never empty ones
  bool empty() const { return kind.empty() && metadata.empty(); }
};

struct Layout::Content {
  std::vector<TensorSpec> tensors;
  std::vector<ParameterSpec> parameters;
  std::vector<Tile> tiles;
  std::vector<Fill> fills;
  std::vector<Quantization> quantizations;
  LayoutWords words;
  std::vector<uint32_t> first_tile;  // tensors + 1 entries
  Digest digest;
  uint64_t tile_bytes = 0;
  uint64_t parameter_bytes = 0;
};

// Parts in any order; tiles, fills and quantizations refer to positions in `tensors` and
// `parameters`.
struct LayoutParts {
  std::vector<TensorSpec> tensors;
  std::vector<ParameterSpec> parameters;
  std::vector<Tile> tiles;
  std::vector<Fill> fills;
  std::vector<Quantization> quantizations;
  LayoutWords words;
};

// Used from one thread.
class LayoutAssembly {
 public:
  // Names must be distinct within `tensors` and within `parameters`. `encoding`, if not null,
  // receives the canonical bytes that were digested.
  static Result<Layout> assemble(LayoutParts&& parts, std::string* encoding = nullptr);
  static std::string encode(const Layout& layout);
};

// The canonical wire form; all spans sorted as in a Layout.
std::string encode_parts(std::span<const TensorSpec> tensors,
                         std::span<const ParameterSpec> parameters, std::span<const Tile> tiles,
                         std::span<const Fill> fills, std::span<const Quantization> quantizations,
                         const LayoutWords& words);

// Checks quantizations whose handles are positions in the other parts, whose tiles and dtypes are
// checked with them; makes blocks no larger than their tensors and sorts by tensor.
Result<void> check_quantizations(LayoutParts& parts);

}  // namespace transfuse

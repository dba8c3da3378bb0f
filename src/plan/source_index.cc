// Which tiles of which sources carry each tensor of the target: names are matched here, once.
#include "plan/source_index.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "layout/refine.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

constexpr uint32_t kAhead = 12;

// Target tensors by name: open addressing over 64-bit hashes. Both sides are sorted by name, so the
// tensor after the last match is tried before anything is hashed.
class NameTable {
 public:
  explicit NameTable(std::span<const TensorSpec> tensors) : tensors_(tensors) {
    const size_t size = std::bit_ceil(tensors.size() * 2 + 1);
    slots_.resize(size);
    mask_ = size - 1;
    for (uint32_t i = 0; i < tensors.size(); ++i) {
      const uint64_t hash = hash_of(tensors[i].name);
      size_t at = hash & mask_;
      while (slots_[at].index_plus_one != 0) at = (at + 1) & mask_;
      slots_[at] = {static_cast<uint32_t>(hash >> 32), i + 1};
    }
  }

  // `expected`: where the name is if both sides go on in step.
  std::optional<uint32_t> find(std::string_view name, uint32_t expected) const {
    if (expected < tensors_.size() && tensors_[expected].name == name) return expected;
    const uint64_t hash = hash_of(name);
    for (size_t at = hash & mask_; slots_[at].index_plus_one != 0; at = (at + 1) & mask_) {
      const uint32_t index = slots_[at].index_plus_one - 1;
      if (slots_[at].tag == static_cast<uint32_t>(hash >> 32) && tensors_[index].name == name) {
        return index;
      }
    }
    return std::nullopt;
  }

 private:
  struct Slot {
    uint32_t tag = 0;
    uint32_t index_plus_one = 0;
  };
  static uint64_t hash_of(std::string_view name) { return XXH3_64bits(name.data(), name.size()); }

  std::span<const TensorSpec> tensors_;
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

}  // namespace

SourceIndex::SourceIndex(const Layout& target, std::span<const Layout> sources)
    : target_(target), first_(target.tensors().size() + 1), known_(target.tensors().size()) {
  struct Match {
    TileRange range;
    uint32_t tensor = 0;
  };
  const std::span<const TensorSpec> wanted = target.tensors();
  const NameTable table(wanted);
  std::vector<Match> matches;
  std::vector<uint32_t> reshaped;
  size_t most = 0;
  for (const Layout& source : sources) most += std::min(source.tensors().size(), wanted.size());
  matches.reserve(most);
  for (uint32_t s = 0; s < sources.size(); ++s) {
    const std::span<const TensorSpec> offered = sources[s].tensors();
    uint32_t expected = 0;
    for (uint32_t i = 0; i < offered.size(); ++i) {
      // Names lie scattered on the heap: without this, waiting for them is most of a compilation.
      if (i + kAhead < offered.size()) __builtin_prefetch(offered[i + kAhead].name.data());
      if (expected + kAhead < wanted.size()) {
        __builtin_prefetch(wanted[expected + kAhead].name.data());
      }
      const std::optional<uint32_t> found = table.find(offered[i].name, expected);
      if (!found) continue;
      expected = *found + 1;
      known_[*found] = 1;
      const Dims& shape = wanted[*found].shape;
      if (!(offered[i].shape == shape)) {
        if (!splits(offered[i].shape, shape) && !splits(shape, offered[i].shape)) {
          conflicts_.push_back({*found, s, i});
          continue;
        }
        reshaped.push_back(*found);
      }
      const std::span<const Tile> tiles = sources[s].tiles_of(i);
      if (tiles.empty()) continue;
      matches.push_back({{tiles.data(), static_cast<uint32_t>(tiles.size()), s}, *found});
      ++first_[*found];
    }
  }
  // Counting sort by tensor; within a tensor the order of sources stays.
  uint32_t sum = 0;
  for (uint32_t& entry : first_) sum += std::exchange(entry, sum);
  ranges_.resize(matches.size());
  for (const Match& match : matches) ranges_[first_[match.tensor]++] = match.range;
  for (size_t i = first_.size() - 1; i > 0; --i) first_[i] = first_[i - 1];
  first_[0] = 0;
  std::sort(reshaped.begin(), reshaped.end());
  reshaped.erase(std::unique(reshaped.begin(), reshaped.end()), reshaped.end());
  for (const uint32_t tensor : reshaped) view_in_one_shape(tensor, sources);
}

void SourceIndex::view_in_one_shape(uint32_t tensor, std::span<const Layout> sources) {
  const auto shape_at = [&](const TileRange& range) -> const Dims& {
    return sources[range.source].tensors()[range.first->tensor].shape;
  };
  const auto parts = [](const Dims& shape) {
    return std::ranges::count_if(shape.values(), [](int64_t length) { return length != 1; });
  };
  const std::span<TileRange> ranges =
      std::span(ranges_).subspan(first_[tensor], first_[tensor + 1] - first_[tensor]);
  const Dims& wanted = target_.tensors()[tensor].shape;
  const Dims* finest = &wanted;
  for (const TileRange& range : ranges) {
    if (parts(shape_at(range)) > parts(*finest)) finest = &shape_at(range);
  }
  view_of_.resize(target_.tensors().size());
  View& view = views_.emplace_back(View{.shape = *finest, .target_tiles = {}, .source_tiles = {}});
  view_of_[tensor] = static_cast<uint32_t>(views_.size());
  for (const Tile& tile : target_.tiles_of(tensor)) {
    append_split(tile, wanted, view.shape, view.target_tiles);
  }
  for (TileRange& range : ranges) {
    const Dims& shape = shape_at(range);
    if (shape == view.shape) continue;
    if (!splits(view.shape, shape)) {
      conflicts_.push_back({tensor, range.source, range.first->tensor});
      continue;
    }
    std::vector<Tile>& tiles = view.source_tiles.emplace_back();
    for (uint32_t i = 0; i < range.count; ++i) {
      append_split(range.first[i], shape, view.shape, tiles);
    }
    range.first = tiles.data();
    range.count = static_cast<uint32_t>(tiles.size());
  }
}

const Dims& SourceIndex::shape(uint32_t tensor) const {
  const bool own = view_of_.empty() || view_of_[tensor] == 0;
  return own ? target_.tensors()[tensor].shape : views_[view_of_[tensor] - 1].shape;
}

std::span<const Tile> SourceIndex::target_tiles(uint32_t tensor) const {
  const bool own = view_of_.empty() || view_of_[tensor] == 0;
  return own ? target_.tiles_of(tensor) : std::span(views_[view_of_[tensor] - 1].target_tiles);
}

}  // namespace transfuse

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
    : first_(target.tensors().size() + 1), known_(target.tensors().size()) {
  struct Match {
    TileRange range;
    uint32_t tensor = 0;
  };
  const std::span<const TensorSpec> wanted = target.tensors();
  const NameTable table(wanted);
  std::vector<Match> matches;
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
      if (!(offered[i].shape == wanted[*found].shape)) {
        conflicts_.push_back({*found, s, i});
        continue;
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
}

}  // namespace transfuse

// Pairs tiles of fp8 numbers with tiles of scales so that every scale is written exactly once (I1).
#include "plan/scale_places.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

Finding of_tile(const Layout& layout, const Tile& tile, std::string reason) {
  Finding finding;
  finding.kind = FindingKind::kBlock;
  finding.tensor = layout.tensors()[tile.tensor].name;
  finding.parameter = layout.parameters()[tile.parameter].name;
  finding.box = tile.box;
  finding.reason = std::move(reason);
  return finding;
}

std::string words(const Layout& layout, const Tile& tile) {
  return "tile " + tile.box.to_string() + " of tensor \"" + layout.tensors()[tile.tensor].name +
         "\" in parameter \"" + layout.parameters()[tile.parameter].name + "\"";
}

std::string blocks_of(const Quantization& q) {
  return "blocks of " + std::to_string(q.block_rows) + "x" + std::to_string(q.block_columns);
}

}  // namespace

ScalePlaces::ScalePlaces(const Layout& target, const SourceIndex& index, size_t limit,
                         std::vector<Finding>& findings)
    : target_(target) {
  const std::span<const Quantization> quantizations = target.quantizations();
  for (uint32_t i = 0; i < quantizations.size(); ++i) {
    const Quantization& q = quantizations[i];
    if (!index.of(q.scales).empty()) continue;
    if (quantizing_.empty()) {
      quantizing_.resize(target.tensors().size());
      written_.resize(target.tensors().size());
      places_.resize(target.tiles().size());
    }
    quantizing_[q.tensor] = i + 1;
    written_[q.scales] = 1;
    if (findings.size() < limit) place(q, limit, findings);
  }
}

const Tile* ScalePlaces::scales_of(const Tile& tile) const {
  return places_[static_cast<size_t>(&tile - target_.tiles().data())];
}

// Every tile of numbers takes the first tile of scales that holds all of its own and of which
// nobody took one; in the end all scales must be taken.
bool ScalePlaces::place(const Quantization& q, size_t limit, std::vector<Finding>& findings) {
  const BlockGrid grid(q, target_.tensors()[q.tensor].shape);
  const std::span<const Tile> scale_tiles = target_.tiles_of(q.scales);
  std::vector<std::vector<Bounds>> taken(scale_tiles.size());
  const size_t before = findings.size();
  const auto free_in = [&](size_t s, const Bounds& wanted) {
    if (!holds_scales(scale_tiles[s], wanted)) return false;
    Bounds unused;
    for (const Bounds& other : taken[s]) {
      if (clip(other, wanted, 2, unused)) return false;
    }
    return true;
  };
  for (const Tile& tile : target_.tiles_of(q.tensor)) {
    if (findings.size() >= limit) return false;
    const Bounds box = to_bounds(tile.box);
    if (!grid.whole(box)) {
      findings.push_back(
          of_tile(target_, tile,
                  words(target_, tile) + ": expected whole " + blocks_of(q) +
                      ", found a cut through blocks; sources do not hold the scales \"" +
                      target_.tensors()[q.scales].name +
                      "\", which would have to "
                      "be computed over more than the tile"));
      continue;
    }
    const Bounds wanted = grid.scales_of(box);
    size_t s = 0;
    while (s < scale_tiles.size() && !free_in(s, wanted)) ++s;
    if (s == scale_tiles.size()) {
      findings.push_back(of_tile(target_, tile,
                                 words(target_, tile) + ": expected a tile of \"" +
                                     target_.tensors()[q.scales].name + "\" that holds scales " +
                                     to_box(wanted, 2).to_string() + " for it alone, found none"));
      continue;
    }
    taken[s].push_back(wanted);
    places_[static_cast<size_t>(&tile - target_.tiles().data())] = &scale_tiles[s];
  }
  for (size_t s = 0; s < scale_tiles.size() && findings.size() == before; ++s) {
    int64_t covered = 0;
    for (const Bounds& part : taken[s]) covered += volume(part, 2);
    if (covered == scale_tiles[s].box.element_count()) continue;
    findings.push_back(of_tile(target_, scale_tiles[s],
                               words(target_, scale_tiles[s]) + ": expected scales of tiles of \"" +
                                   target_.tensors()[q.tensor].name + "\" for all of its " +
                                   std::to_string(scale_tiles[s].box.element_count()) +
                                   " elements, found them for " + std::to_string(covered)));
  }
  return findings.size() == before;
}

}  // namespace transfuse

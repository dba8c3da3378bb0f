// One pass over a target and its sources that either hands out every tile with its holders or says
// what is wrong: compile() and diagnose() are the same judgement.
#include "plan/compare.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "layout/refine.h"
#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "plan/coverage.h"
#include "plan/intersect.h"
#include "plan/scale_places.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

constexpr size_t kNamedHolders = 4;  // in a message

}  // namespace

std::vector<Layout> distinct_sources(std::span<const Layout> sources) {
  std::vector<Layout> distinct(sources.begin(), sources.end());
  std::sort(distinct.begin(), distinct.end(),
            [](const Layout& a, const Layout& b) { return a.digest() < b.digest(); });
  const auto same = [](const Layout& a, const Layout& b) { return a.digest() == b.digest(); };
  distinct.erase(std::unique(distinct.begin(), distinct.end(), same), distinct.end());
  return distinct;
}

Comparison::Comparison(const Layout& target, std::span<const Layout> sources, size_t limit)
    : target_(target),
      sources_(sources),
      limit_(limit),
      index_(target, sources),
      conflicting_(target.tensors().size()),
      scale_places_(target, index_, limit, findings_) {
  for (const Layout& source : sources) source_parameters_.push_back(source.parameters());
}

std::vector<Finding> Comparison::run(const Visit& visit) {
  check_coverage(target_, limit_, findings_);
  find_shape_conflicts();
  const auto tensor_count = static_cast<uint32_t>(target_.tensors().size());
  for (uint32_t t = 0; t < tensor_count && !full(); ++t) compare_tensor(t, visit);
  return std::move(findings_);
}

void Comparison::find_shape_conflicts() {
  for (const ShapeConflict& conflict : index_.shape_conflicts()) {
    if (target_.tiles_of(conflict.tensor).empty()) continue;
    conflicting_[conflict.tensor] = 1;
    if (full()) continue;
    const TensorSpec& wanted = target_.tensors()[conflict.tensor];
    const Layout& source = sources_[conflict.source];
    Finding finding;
    finding.kind = FindingKind::kShape;
    finding.tensor = wanted.name;
    finding.parameter = target_.parameters()[target_.tiles_of(conflict.tensor)[0].parameter].name;
    finding.box = Box::whole(wanted.shape);
    finding.reason = "tensor \"" + wanted.name + "\": expected shape " + wanted.shape.to_string() +
                     ", found " + source.tensors()[conflict.source_tensor].shape.to_string() +
                     " in source layout " + source.digest().to_string() +
                     ": neither only splits dimensions of the other and of other sources' shapes";
    findings_.push_back(std::move(finding));
  }
}

void Comparison::compare_tensor(uint32_t tensor, const Visit& visit) {
  const std::span<const Tile> tiles = index_.target_tiles(tensor);
  const Dims& shape = index_.shape(tensor);
  if (tiles.empty() || conflicting_[tensor] != 0) return;
  if (scale_places_.written(tensor)) return;  // with the tensor that they are of
  if (!index_.known(tensor)) {
    add(FindingKind::kUnknownTensor, tiles[0], to_bounds(Box::whole(shape)),
        "tensor \"" + target_.tensors()[tensor].name + "\": expected in one of " +
            std::to_string(sources_.size()) + " source layouts, found in none");
    return;
  }
  if (tensor + 1 < conflicting_.size()) prefetch_tiles(tensor + 1);
  const auto quantization = scale_places_.quantization_of(tensor);
  if (quantization && !(shape == target_.tensors()[tensor].shape)) {
    add(FindingKind::kShape, tiles[0], to_bounds(Box::whole(shape)),
        "tensor \"" + target_.tensors()[tensor].name + "\": expected shape " +
            target_.tensors()[tensor].shape.to_string() +
            " at every source, as its blocks are of that shape, found " + shape.to_string());
    return;
  }
  std::optional<BlockGrid> grid;
  if (quantization) grid.emplace(*quantization, shape);
  for (const Tile& tile : tiles) {
    cells_.build(tile, index_.of(tensor), grid ? &*grid : nullptr);
    const bool dequantizing = !quantization && check_dequantizing(tile);
    if (quantization) {
      check_quantizing(tile, *quantization);
    } else if (!dequantizing) {
      check_dtypes(tile);
    }
    if (!cells_.complete()) {
      for (const Cell& cell : cells_.cells()) {
        if (cell.holder_count == 0) add_gap(tile, cell, grid ? &*grid : nullptr);
      }
    }
    if (full()) return;
    if (!findings_.empty()) continue;
    visit({.tile = tile,
           .shape = shape,
           .cells = cells_,
           .quantization = quantization ? &*quantization : nullptr,
           .scales = quantization ? scale_places_.scales_of(tile) : nullptr,
           .dequantizes = dequantizing});
  }
}

// Elements that no source holds; under `grid` also those of blocks that no source holds whole.
void Comparison::add_gap(const Tile& tile, const Cell& cell, const BlockGrid* grid) {
  const std::string& name = target_.tensors()[tile.tensor].name;
  const int rank = cells_.rank();
  std::string reason = "elements " + to_box(cell.bounds, rank).to_string() + " of tensor \"" +
                       name + "\" " + index_.shape(tile.tensor).to_string() +
                       ": expected a source that holds them, found none";
  std::string holders;
  if (grid != nullptr) {
    Bounds block = grid->scales_of(cell.bounds);
    for (int d = 0; d < 2; ++d) block.high[d] = block.low[d] + 1;
    block = grid->elements_of(block);
    Bounds common;
    size_t named = 0;
    for (const TileRange& range : index_.of(tile.tensor)) {
      for (const Tile* held = range.first; held != range.first + range.count; ++held) {
        if (!clip(to_bounds(held->box), block, rank, common)) continue;
        if (++named > kNamedHolders) continue;
        holders += (named > 1 ? ", " : "") + to_box(common, rank).to_string() +
                   " in source layout " + sources_[range.source].digest().to_string();
      }
    }
    if (named > kNamedHolders) {
      holders += " and " + std::to_string(named - kNamedHolders) + " more";
    }
    if (named > 0) {
      reason = "block " + to_box(block, rank).to_string() + " of tensor \"" + name + "\" " +
               index_.shape(tile.tensor).to_string() +
               ", which shares one scale: expected a source that holds all of it, found parts: " +
               holders + "; let sources cut it at multiples of " + std::to_string(grid->block[0]) +
               " rows and " + std::to_string(grid->block[1]) + " columns";
    }
  }
  add(holders.empty() ? FindingKind::kGap : FindingKind::kBlock, tile, cell.bounds,
      std::move(reason));
}

bool Comparison::dequantizes(const Tile& tile, const HolderTile& holder) const {
  const Dtype held = source_parameters_[holder.source][holder.tile->parameter].dtype;
  const Dtype wanted = target_.parameters()[tile.parameter].dtype;
  const bool wide = wanted == Dtype::kF32 || wanted == Dtype::kBF16 || wanted == Dtype::kF16;
  return held == Dtype::kF8E4M3 && wide &&
         sources_[holder.source].quantization_of(holder.tile->tensor).has_value();
}

bool Comparison::check_dequantizing(const Tile& tile) {
  size_t count = 0;
  size_t all = 0;
  for (const Cell& cell : cells_.cells()) {
    for (const HolderTile& holder : cells_.holders_of(cell)) {
      ++all;
      count += dequantizes(tile, holder);
    }
  }
  if (count == 0) return false;
  const std::string& name = target_.tensors()[tile.tensor].name;
  if (count < all) {
    add(FindingKind::kDtype, tile, to_bounds(tile.box),
        "tensor \"" + name +
            "\": expected sources that all hold f8e4m3 with scales, or none, as "
            "their numbers differ; found both");
    return true;
  }
  for (const Cell& cell : cells_.cells()) {
    for (const HolderTile& holder : cells_.holders_of(cell)) {
      const Layout& source = sources_[holder.source];
      const Quantization q = source.quantization_of(holder.tile->tensor).value();
      const Dims& shape = source.tensors()[q.tensor].shape;
      if (!(shape == index_.shape(tile.tensor))) {
        add(FindingKind::kShape, tile, cell.bounds,
            "tensor \"" + name + "\": expected shape " + shape.to_string() +
                " everywhere, as the blocks of its scales are of that shape, found " +
                index_.shape(tile.tensor).to_string());
        return true;
      }
      const Bounds wanted = BlockGrid(q, shape).scales_of(cell.bounds);
      if (tile_of_scales(source, q.scales, wanted) != nullptr) continue;
      add(FindingKind::kBlock, tile, cell.bounds,
          "elements " + to_box(cell.bounds, cells_.rank()).to_string() + " of tensor \"" + name +
              "\": expected their scales " + to_box(wanted, 2).to_string() + " of \"" +
              source.tensors()[q.scales].name + "\" in one piece in source layout " +
              source.digest().to_string() + ", which holds the elements, found them not");
    }
  }
  return true;
}

void Comparison::check_quantizing(const Tile& tile, const Quantization& quantization) {
  for (const Cell& cell : cells_.cells()) {
    for (const HolderTile& holder : cells_.holders_of(cell)) {
      const ParameterSpec& held = source_parameters_[holder.source][holder.tile->parameter];
      if (held.dtype == Dtype::kF32 || held.dtype == Dtype::kBF16 || held.dtype == Dtype::kF16) {
        continue;
      }
      add(FindingKind::kDtype, tile, cell.bounds,
          "tensor \"" + target_.tensors()[tile.tensor].name + "\": no source holds its scales \"" +
              target_.tensors()[quantization.scales].name +
              "\", so that f32, bf16 or f16 is expected, from which they are computed; found " +
              std::string(dtype_name(held.dtype)) + " in parameter \"" + held.name +
              "\" of source layout " + sources_[holder.source].digest().to_string());
      return;
    }
  }
}

// The sources' tiles of one tensor lie in as many places as there are sources.
void Comparison::prefetch_tiles(uint32_t tensor) const {
  for (const TileRange& range : index_.of(tensor)) {
    const auto* line = reinterpret_cast<const std::byte*>(range.first);
    for (size_t offset = 0; offset < sizeof(Tile); offset += 64) __builtin_prefetch(line + offset);
  }
}

void Comparison::check_dtypes(const Tile& tile) {
  const ParameterSpec& parameter = target_.parameters()[tile.parameter];
  for (const Cell& cell : cells_.cells()) {
    for (const HolderTile& holder : cells_.holders_of(cell)) {
      const ParameterSpec& held = source_parameters_[holder.source][holder.tile->parameter];
      if (held.dtype == parameter.dtype || castable(held.dtype, parameter.dtype)) continue;
      add(FindingKind::kDtype, tile, cell.bounds,
          "tensor \"" + target_.tensors()[tile.tensor].name + "\": parameter \"" + parameter.name +
              "\" expects " + std::string(dtype_name(parameter.dtype)) +
              " or what casts to it, found " + std::string(dtype_name(held.dtype)) +
              " in parameter \"" + held.name + "\" of source layout " +
              sources_[holder.source].digest().to_string());
    }
  }
}

void Comparison::add(FindingKind kind, const Tile& tile, const Bounds& bounds, std::string reason) {
  if (full()) return;
  Finding finding;
  finding.kind = kind;
  finding.tensor = target_.tensors()[tile.tensor].name;
  finding.parameter = target_.parameters()[tile.parameter].name;
  const Dims& compared = index_.shape(tile.tensor);
  const Dims& own = target_.tensors()[tile.tensor].shape;
  finding.box = to_box(bounds, compared.rank());
  if (!(compared == own)) finding.box = joined_box(finding.box, compared, own);
  finding.reason = std::move(reason);
  findings_.push_back(std::move(finding));
}

}  // namespace transfuse

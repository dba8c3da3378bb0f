// One pass over a target and its sources that either hands out every tile with its holders or says
// what is wrong: compile() and diagnose() are the same judgement.
#include "plan/compare.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "layout/refine.h"
#include "plan/bounds.h"
#include "plan/coverage.h"
#include "plan/intersect.h"
#include "plan/source_index.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

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
      conflicting_(target.tensors().size()) {
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
  if (!index_.known(tensor)) {
    add(FindingKind::kUnknownTensor, tiles[0], to_bounds(Box::whole(shape)),
        "tensor \"" + target_.tensors()[tensor].name + "\": expected in one of " +
            std::to_string(sources_.size()) + " source layouts, found in none");
    return;
  }
  if (tensor + 1 < conflicting_.size()) prefetch_tiles(tensor + 1);
  for (const Tile& tile : tiles) {
    cells_.build(tile, index_.of(tensor));
    check_dtypes(tile);
    if (!cells_.complete()) {
      for (const Cell& cell : cells_.cells()) {
        if (cell.holder_count > 0) continue;
        add(FindingKind::kGap, tile, cell.bounds,
            "elements " + to_box(cell.bounds, cells_.rank()).to_string() + " of tensor \"" +
                target_.tensors()[tensor].name + "\" " + shape.to_string() +
                ": expected a source that holds them, found none");
      }
    }
    if (full()) return;
    if (findings_.empty()) visit(tile, shape, cells_);
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

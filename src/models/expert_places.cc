// Where the experts of a layer lie in the stack of one rank: shares of them, and copies by a map.
#include "models/expert_places.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

// The layers that have experts: the last ones.
int64_t first_expert_layer(const Model& model) { return model.config.dense_layers; }

// Every place holds an expert, every expert has a place.
Result<void> check_row(const ExpertMap& map, int64_t layer, const std::vector<int64_t>& row,
                       int64_t experts, int64_t physical) {
  if (static_cast<int64_t>(row.size()) != physical) {
    return invalid(
        fmt::format("expert map version {}: layer {} has {} places, expected {} experts and the "
                    "redundant ones together = {}",
                    map.version, layer, row.size(), experts, physical));
  }
  std::vector<bool> held(static_cast<size_t>(experts));
  for (size_t place = 0; place < row.size(); ++place) {
    const int64_t expert = row[place];
    if (expert < 0 || expert >= experts) {
      return invalid(
          fmt::format("expert map version {}: layer {}: place {} holds expert {}: expected 0 to {}",
                      map.version, layer, place, expert, experts - 1));
    }
    held[static_cast<size_t>(expert)] = true;
  }
  const auto hole = std::ranges::find(held, false);
  if (hole == held.end()) return {};
  return invalid(
      fmt::format("expert map version {}: layer {}: no place holds expert {}: expected at least "
                  "one of {} on some rank",
                  map.version, layer, hole - held.begin(), physical));
}

// The layer of the map's first row: engines list all decoder layers, or those with experts.
Result<int64_t> check_map(const Model& model, const ParallelSpec& spec, int64_t physical) {
  const ExpertMap& map = spec.expert_map;
  const int64_t layers = model.config.num_hidden_layers;
  const int64_t first = first_expert_layer(model);
  const auto rows = static_cast<int64_t>(map.physical_to_logical.size());
  if (rows != layers && rows != layers - first) {
    return invalid(fmt::format(
        "expert map version {}: {} layers, expected num_hidden_layers = {}{}", map.version, rows,
        layers, first > 0 ? fmt::format(" or the {} with experts", layers - first) : ""));
  }
  const int64_t first_mapped = rows == layers ? 0 : first;
  for (int64_t layer = first; layer < layers; ++layer) {
    TRANSFUSE_RETURN_IF_ERROR(
        check_row(map, layer, map.physical_to_logical[static_cast<size_t>(layer - first_mapped)],
                  model.expert_count(), physical));
  }
  return first_mapped;
}

}  // namespace

Result<ExpertPlaces> ExpertPlaces::make(const Model& model, const ParallelSpec& spec, int64_t rank,
                                        int64_t size) {
  ExpertPlaces places(model, spec);
  places.rank_ = rank;
  places.size_ = size;
  const int64_t experts = model.expert_count();
  const int64_t physical = experts + spec.redundant;
  const bool mapped = !spec.expert_map.physical_to_logical.empty();
  if (!mapped && !spec.expert_map_path.empty()) {
    return invalid(fmt::format("{} expert_map={}: the file has not been read into the spec",
                               spec.family, spec.expert_map_path));
  }
  if (!mapped && spec.redundant == 0) {
    const int64_t spare = experts % size;
    places.begin_ = rank * (experts / size) + std::min(rank, spare);
    places.end_ = places.begin_ + experts / size + (rank < spare ? 1 : 0);
    return places;
  }
  if (experts == 0) {
    return invalid(
        fmt::format("{}: redundant experts or an expert map: expected a model with "
                    "experts, found {} without",
                    spec.family, model.config.architecture));
  }
  if (spec.round_robin) {
    return invalid(
        fmt::format("{} placement=round_robin: expected no redundant experts and no "
                    "expert map: physical experts are placed linearly",
                    spec.family));
  }
  if (physical % size != 0) {
    return invalid(
        fmt::format("{} redundant={}: {} + {} physical experts, expected a multiple of "
                    "the {} ranks that share them",
                    spec.family, spec.redundant, experts, spec.redundant, size));
  }
  places.begin_ = rank * (physical / size);
  places.end_ = places.begin_ + physical / size;
  if (!mapped) return places;
  TRANSFUSE_ASSIGN_OR_RETURN(places.first_mapped_layer_, check_map(model, spec, physical));
  return places;
}

int64_t ExpertPlaces::logical(int64_t layer, int64_t physical) const {
  const auto& map = spec_->expert_map.physical_to_logical;
  if (map.empty()) return physical % model_->expert_count();
  return map[static_cast<size_t>(layer - first_mapped_layer_)][static_cast<size_t>(physical)];
}

std::vector<int64_t> ExpertPlaces::of(int64_t layer, int64_t expert) const {
  if (spec_->round_robin) {
    if (expert % size_ != rank_) return {};
    return {expert / size_};
  }
  std::vector<int64_t> places;
  for (int64_t physical = begin_; physical < end_; ++physical) {
    if (logical(layer, physical) == expert) places.push_back(physical - begin_);
  }
  return places;
}

}  // namespace transfuse

// Which decoder layer runs on which pipeline stage, and where in it.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

std::vector<StagePlace> places_of_layers(const Pipeline& pipeline) {
  std::vector<StagePlace> places;
  for (size_t i = 0; i < pipeline.layers.size(); ++i) {
    const auto at = static_cast<int64_t>(i);
    for (int64_t layer = 0; layer < pipeline.layers[i]; ++layer) {
      places.push_back(
          {.stage = at % pipeline.stages, .chunk = at / pipeline.stages, .layer = layer});
    }
  }
  return places;
}

Result<Pipeline> explicit_pipeline(const ParallelSpec& spec, const ModelConfig& config) {
  int64_t sum = 0;
  for (const int64_t count : spec.layers) {
    if (count < 0 || count > config.num_hidden_layers) {
      return Error{
          ErrorCode::kInvalidArgument,
          fmt::format("{} layers={}: expected 0 to {} layers a stage, found {}", spec.family,
                      fmt::join(spec.layers, "/"), config.num_hidden_layers, count)};
    }
    sum += count;
  }
  if (sum != config.num_hidden_layers) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{} layers={}: {} layers together, expected num_hidden_layers = {}",
                    spec.family, fmt::join(spec.layers, "/"), sum, config.num_hidden_layers)};
  }
  return Pipeline{.stages = spec.pp, .layers = spec.layers};
}

}  // namespace transfuse

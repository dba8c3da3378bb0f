// Expert maps from JSON, as engines dump them.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using nlohmann::json;

constexpr const char* kMapField = "physical_to_logical_map";
constexpr int64_t kMaxNumber = int64_t{1} << 30;

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, "expert map: " + std::move(message)}};
}

bool is_small(const json& number) {
  return number.is_number_unsigned() && number.get<uint64_t>() <= uint64_t{kMaxNumber};
}

}  // namespace

Result<ExpertMap> parse_expert_map(std::string_view text) {
  const json document = json::parse(text, nullptr, false);
  ExpertMap map;
  const json* layers = &document;
  if (document.is_object()) {
    const auto version = document.find("version");
    if (version != document.end()) {
      if (!is_small(*version)) {
        return invalid(fmt::format("field \"version\" is {}: expected a whole number from 0 to {}",
                                   version->dump(), kMaxNumber));
      }
      map.version = version->get<int64_t>();
    }
    const auto found = document.find(kMapField);
    if (found == document.end()) return invalid(fmt::format("field \"{}\" is missing", kMapField));
    layers = &*found;
  }
  if (!layers->is_array() || layers->empty()) {
    return invalid("expected a list of layers, each a list of the experts in its places");
  }
  for (size_t layer = 0; layer < layers->size(); ++layer) {
    const json& row = (*layers)[layer];
    if (!row.is_array()) return invalid(fmt::format("layer {}: expected a list", layer));
    auto& places = map.physical_to_logical.emplace_back();
    for (size_t place = 0; place < row.size(); ++place) {
      if (!is_small(row[place])) {
        return invalid(fmt::format("layer {}: place {} holds {}: expected the number of an expert",
                                   layer, place, row[place].dump()));
      }
      places.push_back(row[place].get<int64_t>());
    }
  }
  return map;
}

}  // namespace transfuse

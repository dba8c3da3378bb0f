// The shape of a parameter, which layouts leave out: from its tiles.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

constexpr std::string_view kExperts = ".experts.";

// "3" of "model.layers.0.mlp.experts.3.up_proj.weight"; empty where a name has no expert.
std::string_view expert_of(std::string_view name) {
  const size_t at = name.find(kExperts);
  if (at == std::string_view::npos) {
    constexpr std::string_view kShared = "shared_experts";  // one that engines may stack too
    return name.find(kShared) == std::string_view::npos ? std::string_view() : kShared;
  }
  const std::string_view rest = name.substr(at + kExperts.size());
  const std::string_view number = rest.substr(0, rest.find('.'));
  return number.find_first_not_of("0123456789") == std::string_view::npos ? number
                                                                          : std::string_view();
}

// The name itself stands for one expert: numbered modules, or Megatron's "weight7".
bool names_one_expert(std::string_view name) {
  if (!expert_of(name).empty() || name.find(".local_experts.") != std::string_view::npos) {
    return true;
  }
  const char last = name.empty() ? '\0' : name.back();
  return last >= '0' && last <= '9';
}

// What the tiles of one parameter say of its shape.
struct Rows {
  std::optional<Dims> row;    // lengths of all dimensions but the first
  bool irregular = false;     // not all tiles are whole rows of one width
  int64_t width = 0;          // of rows in memory, however their tensors lie; -1: tiles differ
  std::set<int64_t> stacked;  // experts of a tensor that holds all of them
  std::map<std::string_view, int64_t> tiles;    // of a tensor
  std::map<std::string_view, int64_t> experts;  // copies of each: tiles of any of its tensors

  int64_t expert_count() const {
    int64_t count = 0;
    for (const auto& [expert, copies] : experts) count += copies;
    return count;
  }

  void add(const Tile& tile, std::string_view tensor) {
    const std::string_view expert = expert_of(tensor);
    if (!expert.empty()) {
      int64_t& copies = experts[expert];
      copies = std::max(copies, ++tiles[tensor]);
    }
    const Dims& length = tile.box.length;
    if (length.rank() == 0) {
      irregular = true;
      return;
    }
    const Dims found(length.values().subspan(1));
    if (length[0] != 1 && tile.element_strides[0] != found.product()) irregular = true;
    const Dims inside = row_major_strides(found);
    int64_t closest = 1;
    int dimensions = 0;
    for (int d = 0; d < length.rank(); ++d) {
      if (length[d] == 1) continue;
      ++dimensions;
      if (tile.element_strides[d] == 1) closest = length[d];
      if (d > 0 && tile.element_strides[d] != inside[d - 1]) irregular = true;
    }
    if (dimensions < 2 || (width != 0 && width != closest)) closest = -1;
    width = closest;
    if (length.rank() > 2 && length[0] == 1) stacked.insert(tile.box.offset[0]);
    if (row && !(*row == found)) irregular = true;
    row = found;
  }
};

Dims shape_of(const Layout& layout, const ParameterSpec& spec, const Rows& rows) {
  std::optional<Dims> row = rows.irregular ? std::nullopt : rows.row;
  const auto tensor = layout.find_tensor(spec.name);
  const Dims* const whole = tensor ? &layout.tensors()[*tensor].shape : nullptr;
  if (whole != nullptr && whole->rank() == 0) return {};
  if (!rows.row && whole != nullptr && spec.element_count == 0) {  // a rank without rows
    row = Dims(whole->values().subspan(1));
  }
  if (rows.irregular && rows.width > 1 && spec.element_count % rows.width == 0) {
    const int64_t all = spec.element_count / rows.width;
    const auto experts = static_cast<int64_t>(rows.stacked.size());
    const bool stack = experts > 0 && all % experts == 0 && !names_one_expert(spec.name);
    return stack ? Dims{experts, all / experts, rows.width} : Dims{all, rows.width};
  }
  const int64_t width = row ? row->product() : 0;
  if (!row || (width > 0 && spec.element_count % width != 0)) return {spec.element_count};
  Dims shape{width == 0 ? 0 : spec.element_count / width};
  const int64_t experts = rows.expert_count();
  const bool stack = spec.name.find(kExperts) != std::string::npos && !names_one_expert(spec.name);
  if (experts > 0 && stack && shape[0] % experts == 0) {
    shape = {experts, shape[0] / experts};
  }
  for (const int64_t length : row->values()) {
    if (shape.rank() < kMaxRank) shape.push_back(length);
  }
  return shape;
}

}  // namespace

std::vector<Dims> parameter_shapes(const Layout& layout) {
  std::vector<Rows> rows(layout.parameters().size());
  for (const Tile& tile : layout.tiles()) {
    rows[tile.parameter].add(tile, layout.tensors()[tile.tensor].name);
  }
  std::vector<Dims> shapes;
  shapes.reserve(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    shapes.push_back(shape_of(layout, layout.parameters()[i], rows[i]));
  }
  return shapes;
}

}  // namespace transfuse

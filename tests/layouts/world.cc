// A model on the ranks of one framework, and a refit between two such worlds.
#include "layouts/world.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse::frameworks {
namespace {

constexpr int32_t kGarbage = -7;
constexpr int32_t kUntouched = -9;

// Calls visit(index) for every index below `length`.
template <typename Visit>
void for_each(const Dims& length, const Visit& visit) {
  for (int64_t n = 0; n < length.product(); ++n) {
    Dims index = length;
    int64_t rest = n;
    for (int d = length.rank() - 1; d >= 0; --d) {
      index[d] = rest % length[d];
      rest /= length[d];
    }
    visit(index);
  }
}

int64_t place(int64_t offset, const Dims& index, const Dims& strides) {
  for (int d = 0; d < index.rank(); ++d) offset += index[d] * strides[d];
  return offset;
}

void set_fills(const Layout& layout, StateDict& state, int32_t value) {
  for (const Fill& fill : layout.fills()) {
    Tensor& parameter = state.at(layout.parameters()[fill.parameter].name);
    for_each(fill.length, [&](const Dims& index) {
      const auto at = static_cast<size_t>(place(fill.element_offset, index, fill.element_strides));
      parameter.data.at(at) = value;
    });
  }
}

}  // namespace

World make_world(const ModelConfig& config, const StateDict& hf, const std::string& text) {
  World world = make_world(config, hf, parse_parallel_spec(text).value());
  world.name = text;
  return world;
}

World make_world(const ModelConfig& config, const StateDict& hf, ParallelSpec spec) {
  spec.dtype = Dtype::kF32;  // engines hold some tensors so; the values are whole numbers
  World world{.name = spec.family, .layouts = make_layouts(config, spec).value(), .states = {}};
  for (int64_t rank = 0; rank < spec.rank_count(); ++rank) {
    world.states.push_back(rank_state(config, hf, spec, rank));
  }
  return world;
}

std::vector<std::string> compare(const Layout& layout, const StateDict& state,
                                 const StateDict& hf) {
  std::vector<std::string> wrong;
  std::map<std::string, std::vector<int>> covered;
  for (const ParameterSpec& parameter : layout.parameters()) {
    const auto at = state.find(parameter.name);
    if (at == state.end()) {
      wrong.push_back("unexpected parameter " + parameter.name);
    } else if (static_cast<int64_t>(at->second.data.size()) != parameter.element_count) {
      wrong.push_back(parameter.name + " has " + std::to_string(parameter.element_count) +
                      " elements, expected " + std::to_string(at->second.data.size()));
    }
    covered[parameter.name].resize(static_cast<size_t>(parameter.element_count));
  }
  for (const auto& [name, tensor] : state) {
    if (!layout.find_parameter(name)) wrong.push_back("missing parameter " + name);
  }
  if (!wrong.empty()) return wrong;
  const auto visit = [&](uint32_t parameter, int64_t offset, int32_t expected) {
    const std::string& name = layout.parameters()[parameter].name;
    const auto at = static_cast<size_t>(offset);
    ++covered[name].at(at);
    if (state.at(name).data.at(at) != expected) {
      wrong.push_back(name + "[" + std::to_string(offset) + "] is another element");
    }
  };
  for (const Tile& tile : layout.tiles()) {
    const TensorSpec& tensor = layout.tensors()[tile.tensor];
    for_each(tile.box.length, [&](const Dims& index) {
      int64_t linear = 0;
      for (int d = 0; d < index.rank(); ++d) {
        linear = linear * tensor.shape[d] + tile.box.offset[d] + index[d];
      }
      visit(tile.parameter, place(tile.element_offset, index, tile.element_strides),
            hf.at(tensor.name).data.at(static_cast<size_t>(linear)));
    });
  }
  for (const Fill& fill : layout.fills()) {
    for_each(fill.length, [&](const Dims& index) {
      visit(fill.parameter, place(fill.element_offset, index, fill.element_strides), 0);
    });
  }
  for (const auto& [name, counts] : covered) {
    if (!std::ranges::all_of(counts, [](int n) { return n == 1; })) {
      wrong.push_back(name + " is not covered exactly once");
    }
  }
  return wrong;
}

StateDict refit(const Plan& plan, const World& sources, const StateDict& shapes) {
  std::map<Digest, StateDict> held;
  for (size_t rank = 0; rank < sources.layouts.size(); ++rank) {
    StateDict& state = held[sources.layouts[rank].digest()];
    state = sources.states[rank];
    set_fills(sources.layouts[rank], state, kGarbage);
  }
  StateDict target = shapes;
  for (auto& [name, tensor] : target) std::ranges::fill(tensor.data, kUntouched);
  set_fills(plan.target(), target, 0);
  size_t turn = 0;
  for (const Run& run : plan.runs()) {
    const std::span<const Holder> holders = plan.holders_of(run);
    const Holder& holder = holders[turn++ % holders.size()];
    const Layout& source = plan.source_layouts()[holder.source_layout];
    const auto& from = held.at(source.digest()).at(source.parameters()[holder.parameter].name).data;
    auto& to = target.at(plan.target().parameters()[run.parameter].name).data;
    const Strides3& read = plan.pattern(holder.source_pattern);
    const Strides3& write = plan.pattern(run.target_pattern);
    const auto at = [](int64_t offset, const Strides3& s, int64_t a, int64_t b, int64_t c) {
      return static_cast<size_t>(offset + a * s.level[0] + b * s.level[1] + c * s.level[2]);
    };
    for (int64_t a = 0; a < run.count[0]; ++a) {
      for (int64_t b = 0; b < run.count[1]; ++b) {
        for (int64_t c = 0; c < run.count[2]; ++c) {
          int32_t& element = to.at(at(run.target_offset, write, a, b, c));
          TRANSFUSE_CHECK(element == kUntouched);  // written once
          element = from.at(at(holder.source_offset, read, a, b, c));
        }
      }
    }
  }
  return target;
}

}  // namespace transfuse::frameworks

// Layouts of live Megatron-Core modules: what a module says of itself completes the spec, and every
// tensor of it must be what the spec's layout has under that name.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/live_module.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr size_t kMostFindings = 6;  // that a message lists

Unexpected mismatch(std::string message) {
  return {Error{ErrorCode::kLayoutMismatch, std::move(message)}};
}

std::string layer_prefix(const LiveModule& module, size_t chunk, size_t layer) {
  return module.layers.size() > 1 ? fmt::format("{}:decoder.layers.{}", chunk, layer)
                                  : fmt::format("decoder.layers.{}", layer);
}

Result<void> check_layers(const ModelConfig& config, const LiveModule& module, size_t chunk,
                          int64_t lowest, int64_t highest) {
  const std::vector<int64_t>& numbers = module.layers[chunk];
  for (size_t i = 0; i < numbers.size(); ++i) {
    const std::string name = layer_prefix(module, chunk, i);
    if (i > 0) lowest = highest = numbers[i - 1] + 1;
    if (numbers[i] >= lowest && numbers[i] <= highest && numbers[i] < config.num_hidden_layers) {
      continue;
    }
    return mismatch(
        fmt::format("{}: expected layer_number {} of num_hidden_layers = {}, found {}", name,
                    lowest == highest ? fmt::to_string(lowest + 1)
                                      : fmt::format("{} to {}", lowest + 1, highest + 1),
                    config.num_hidden_layers, numbers[i] + 1));
  }
  return {};
}

// The layers of every chunk of every stage such that this stage has those of the module. How the
// other stages share theirs does not matter to this one's layout.
Result<std::vector<int64_t>> pipeline_of(const ModelConfig& config, const ParallelSpec& spec,
                                         const ParallelRanks& ranks, const LiveModule& module) {
  std::vector<int64_t> counts(static_cast<size_t>(spec.pp * spec.vpp), 0);
  int64_t next = 0;  // the first layer that no chunk has yet
  for (size_t chunk = 0; chunk < module.layers.size(); ++chunk) {
    const std::vector<int64_t>& numbers = module.layers[chunk];
    const size_t place = chunk * static_cast<size_t>(spec.pp) + static_cast<size_t>(ranks.pp);
    // Nobody can have a layer before the first chunk of the first stage.
    const int64_t highest = place == 0 ? 0 : config.num_hidden_layers - 1;
    TRANSFUSE_RETURN_IF_ERROR(check_layers(config, module, chunk, next, highest));
    counts[place] = static_cast<int64_t>(numbers.size());
    if (numbers.empty()) continue;
    if (place > 0) counts[place - 1] += numbers.front() - next;
    next = numbers.back() + 1;
  }
  const int64_t left = config.num_hidden_layers - next;
  const bool ends_here = ranks.pp == spec.pp - 1;
  if (left > 0 && ends_here && (spec.pp == 1 || counts.back() > 0)) {
    return mismatch(fmt::format(
        "the last chunk of the last of {} pipeline stages: expected to end with layer_number {} = "
        "num_hidden_layers, found {}",
        spec.pp, config.num_hidden_layers, next));
  }
  counts[counts.size() - (ends_here && spec.pp > 1 ? 2 : 1)] += left;
  return counts;
}

std::string_view without_chunk(std::string_view name) {
  const size_t colon = name.find(':');
  return colon == std::string_view::npos ? name : name.substr(colon + 1);
}

// The spec with the names and the padding that the module has.
Result<ParallelSpec> completed(const ModelConfig& config, const ParallelSpec& spec,
                               const ParallelRanks& ranks, const LiveModule& module,
                               PipelineFrom pipeline) {
  ParallelSpec out = spec;
  bool separate = false;
  bool fused = false;
  bool predicts_further = false;
  for (const LiveTensor& tensor : module.tensors) {
    const std::string_view name = without_chunk(tensor.name);
    if (name.find(".experts.local_experts.") != std::string_view::npos) {
      out.sequential_experts = true;
    } else if (name.find(".experts.linear_fc") != std::string_view::npos) {
      out.sequential_experts = false;
    }
    separate = separate || name.ends_with(".input_layernorm.weight");
    fused = fused || name.ends_with(".layer_norm_weight");
    predicts_further = predicts_further || name.starts_with("mtp.");
    const bool vocabulary =
        name == "embedding.word_embeddings.weight" || name == "output_layer.weight";
    if (!vocabulary || tensor.shape.rank() != 2) continue;
    out.padded_vocab = tensor.shape[0] * spec.tp;
    if (out.padded_vocab < config.vocab_size) {
      return mismatch(
          fmt::format("{}: {} rows on each of tp = {} ranks, expected vocab_size = {} or more "
                      "together",
                      tensor.name, tensor.shape[0], spec.tp, config.vocab_size));
    }
  }
  out.separate_norms = separate && !fused;
  if (!predicts_further) out.mtp = MtpTensors::kNone;
  if (static_cast<int64_t>(module.layers.size()) != spec.vpp) {
    return mismatch(fmt::format("model chunks of this rank: expected vpp = {}, found {}", spec.vpp,
                                module.layers.size()));
  }
  if (pipeline == PipelineFrom::kModule) {
    TRANSFUSE_ASSIGN_OR_RETURN(out.layers, pipeline_of(config, spec, ranks, module));
  }
  return out;
}

// What a layout has under the name of one parameter.
struct Expected {
  int64_t elements = 0;
  std::vector<const Tile*> tiles;
  bool padded = false;  // has fills
};

class Comparison {
 public:
  Comparison(const Layout& layout, const LiveModule& module, int64_t tp)
      : layout_(layout), module_(module), tp_(tp) {
    expected_.resize(layout.parameters().size());
    for (size_t i = 0; i < expected_.size(); ++i) {
      expected_[i].elements = layout.parameters()[i].element_count;
    }
    for (const Tile& tile : layout.tiles()) expected_[tile.parameter].tiles.push_back(&tile);
    for (const Fill& fill : layout.fills()) expected_[fill.parameter].padded = true;
    marks_partitions_ = std::ranges::any_of(
        module.tensors, [](const LiveTensor& t) { return t.tensor_model_parallel; });
    marks_strides_ = std::ranges::any_of(
        module.tensors, [](const LiveTensor& t) { return t.partition_stride > 1; });
  }

  Result<void> run(std::string_view whom) {
    compare_layers();  // first: where they differ, most names do
    std::vector<bool> seen(expected_.size(), false);
    for (const LiveTensor& live : module_.tensors) {
      const auto parameter = layout_.find_parameter(live.name);
      if (!parameter) {
        found(fmt::format("{}: extra, {}; expected no such tensor in this rank", live.name,
                          live.shape.to_string()));
        continue;
      }
      if (seen[*parameter]) found(fmt::format("{}: twice in the module", live.name));
      seen[*parameter] = true;
      compare(live, expected_[*parameter]);
    }
    for (size_t i = 0; i < seen.size(); ++i) {
      if (seen[i]) continue;
      found(fmt::format("{}: missing; expected {} of {}", layout_.parameters()[i].name,
                        shape_of(expected_[i]).to_string(), tensor_of(expected_[i])));
    }
    if (findings_ == 0) return {};
    return mismatch(fmt::format("{}: the module does not agree in {} point{}: {}{}", whom,
                                findings_, findings_ == 1 ? "" : "s", text_,
                                findings_ > kMostFindings ? "; ..." : ""));
  }

 private:
  void found(const std::string& what) {
    if (++findings_ > kMostFindings) return;
    if (!text_.empty()) text_ += "; ";
    text_ += what;
  }

  std::string_view tensor_of(const Expected& expected) const {
    if (expected.tiles.empty()) return "padding";
    return tensor(*expected.tiles[0]).name;
  }
  const TensorSpec& tensor(const Tile& tile) const { return layout_.tensors()[tile.tensor]; }

  // Rows as long as those of what lies there: a layout itself knows no shapes.
  static Dims shape_of(const Expected& expected) {
    if (expected.tiles.empty()) return {expected.elements};
    const auto largest = std::ranges::max_element(
        expected.tiles, {}, [](const Tile* t) { return t->box.element_count(); });
    return shape_with(expected.elements, **largest);
  }
  static Dims shape_with(int64_t elements, const Tile& tile) {
    Dims shape = tile.box.length;
    if (shape.rank() < 2) return {elements};
    int64_t width = 1;
    bool row_major = true;
    for (int d = shape.rank() - 1; d > 0; --d) {
      row_major = row_major && (shape[d] == 1 || tile.element_strides[d] == width);
      width *= shape[d];
    }
    row_major = row_major && (shape[0] == 1 || tile.element_strides[0] == width);
    if (!row_major) {
      width = *std::ranges::max_element(tile.element_strides.values());
      return {elements / width, width};
    }
    shape[0] = elements / width;
    return shape;
  }

  void compare(const LiveTensor& live, const Expected& expected) {
    // A rank that holds nothing but padding has no tile to tell the width of its rows.
    const Dims shape = shape_of(expected);
    const bool same =
        expected.tiles.empty() ? live.shape.product() == expected.elements : live.shape == shape;
    if (!same) {
      found(fmt::format("{}: expected {}, found {}", live.name, shape.to_string(),
                        live.shape.to_string()));
      return;
    }
    compare_partition(live, expected);
  }

  // The dimension that the layout cuts over ranks; -1 where nothing in it tells.
  int split_dimension(const Expected& expected) const {
    if (expected.padded && tp_ > 1) return 0;  // a vocabulary
    std::map<uint32_t, int64_t> held;
    for (const Tile* tile : expected.tiles) held[tile->tensor] += tile->box.element_count();
    for (const Tile* tile : expected.tiles) {
      const Dims& whole = tensor(*tile).shape;
      if (held[tile->tensor] == whole.product()) continue;
      for (int d = 0; d < whole.rank(); ++d) {
        if (tile->box.length[d] != whole[d]) return d;
      }
    }
    return -1;
  }

  void compare_partition(const LiveTensor& live, const Expected& expected) {
    const int split = split_dimension(expected);
    // A module made without initialization has no marks. Grouped experts have none either:
    // TransformerEngine, which makes them, is not told of their partition.
    if (!marks_partitions_ || split < 0 ||
        live.name.find(".experts.linear_fc") != std::string::npos)
      return;
    if (!live.tensor_model_parallel || live.partition_dim != split) {
      found(fmt::format(
          "{}: expected tensor_model_parallel with partition_dim {}, found {}", live.name, split,
          live.tensor_model_parallel ? fmt::format("partition_dim {}", live.partition_dim)
                                     : "a tensor that is whole on every rank"));
      return;
    }
    // Before 0.16 Megatron-Core did not mark the two halves of a gated linear.
    const bool gated = live.name.ends_with("linear_fc1.weight") && expected.tiles.size() == 2;
    const int64_t stride = gated ? 2 : 1;
    if (marks_strides_ && live.partition_stride != stride) {
      found(fmt::format("{}: expected partition_stride {}, found {}", live.name, stride,
                        live.partition_stride));
    }
  }

  // The number of the layer that the layout has under a name, by the names of its tensors.
  void compare_layers() {
    for (size_t chunk = 0; chunk < module_.layers.size(); ++chunk) {
      for (size_t i = 0; i < module_.layers[chunk].size(); ++i) {
        const std::string prefix = layer_prefix(module_, chunk, i);
        const int64_t expected = layer_at(prefix + ".");
        const int64_t number = module_.layers[chunk][i];
        if (expected < 0 || expected == number) continue;
        found(fmt::format("{}: expected layer_number {}, found {}", prefix, expected + 1,
                          number + 1));
      }
    }
  }
  int64_t layer_at(const std::string& prefix) const {
    const auto parameters = layout_.parameters();
    const auto at = std::ranges::lower_bound(parameters, prefix, {}, &ParameterSpec::name);
    if (at == parameters.end() || !at->name.starts_with(prefix)) return -1;
    const auto index = static_cast<size_t>(at - parameters.begin());
    if (expected_[index].tiles.empty()) return -1;
    const std::string_view name = tensor(*expected_[index].tiles[0]).name;
    constexpr std::string_view kLayers = "layers.";
    const size_t found_at = name.find(kLayers);
    int64_t number = -1;
    if (found_at != std::string_view::npos) {
      const char* begin = name.data() + found_at + kLayers.size();
      std::from_chars(begin, name.data() + name.size(), number);
    }
    return number;
  }

  const Layout& layout_;
  const LiveModule& module_;
  const int64_t tp_;
  std::vector<Expected> expected_;
  bool marks_partitions_ = false;
  bool marks_strides_ = false;
  size_t findings_ = 0;
  std::string text_;
};

// The same layout with the dtypes of the module.
Result<Layout> with_dtypes(const Layout& layout, const LiveModule& module) {
  LayoutBuilder builder;
  std::vector<uint32_t> tensors;
  std::vector<uint32_t> parameters(layout.parameters().size());
  for (const TensorSpec& tensor : layout.tensors()) tensors.push_back(builder.tensor(tensor));
  for (const LiveTensor& live : module.tensors) {
    const uint32_t at = layout.find_parameter(live.name).value();
    ParameterSpec parameter = layout.parameters()[at];
    parameter.dtype = live.dtype;
    parameters[at] = builder.parameter(parameter);
  }
  for (const Tile& tile : layout.tiles()) {
    builder.tile(tensors[tile.tensor], tile.box, parameters[tile.parameter], tile.element_offset,
                 tile.element_strides);
  }
  for (const Fill& fill : layout.fills()) {
    builder.fill(parameters[fill.parameter], fill.element_offset, fill.length,
                 fill.element_strides);
  }
  return builder.build();
}

}  // namespace

Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec,
                           const ParallelRanks& ranks, const LiveModule& module,
                           PipelineFrom pipeline) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  TRANSFUSE_RETURN_IF_ERROR(check_ranks(spec, ranks));
  TRANSFUSE_RETURN_IF_ERROR(check_model_config(config));
  const bool says_layers = spec.first > 0 || spec.last > 0 || !spec.layers.empty() ||
                           spec.account_for_embedding || spec.account_for_loss;
  if (spec.family != "megatron" || (pipeline == PipelineFrom::kModule && says_layers)) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("live Megatron module: expected a megatron spec{}, found one of {}",
                    says_layers ? " without layers, which the module gives" : "", spec.family)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec whole,
                             completed(config, spec, ranks, module, pipeline));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, make_layout(config, whole, ranks));
  const std::string whom =
      fmt::format("{} under megatron:tp={},pp={},vpp={},ep={}, rank tp {} pp {} etp {} ep {}",
                  config.architecture, spec.tp, spec.pp, spec.vpp, spec.ep, ranks.tp, ranks.pp,
                  ranks.etp, ranks.ep);
  TRANSFUSE_RETURN_IF_ERROR(Comparison(layout, module, spec.tp).run(whom));
  return with_dtypes(layout, module);
}

}  // namespace transfuse

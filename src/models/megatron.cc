// Megatron-Core layouts: interleaved QKV, gated fc1, pipeline chunks, expert parallelism
// (docs/layouts.md, "Megatron-Core").
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 14> kOptions = {
    "tp",   "pp",     "vpp",           "ep",    "etp",     "cp",          "dp", "first",
    "last", "layers", "vocab_divisor", "norms", "experts", "padded_vocab"};
constexpr std::array<std::string_view, 2> kFlags = {"account_for_embedding", "account_for_loss"};

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

// As Megatron-Core does where expert_tensor_parallel_size is not given.
int64_t expert_tp(const ParallelSpec& spec) { return spec.etp == 0 ? spec.tp : spec.etp; }

// What the even division of layers counts besides them.
int64_t counted_as_layers(const ParallelSpec& spec) {
  return (spec.account_for_embedding ? 1 : 0) + (spec.account_for_loss ? 1 : 0);
}

// Ranks of one pipeline stage: as few as both grids need, more where dp asks for them.
int64_t stage_ranks(const ParallelSpec& spec) {
  const int64_t dense = bounded_product({spec.tp, spec.cp});
  const int64_t expert = bounded_product({spec.ep, expert_tp(spec)});
  const int64_t fewest = std::lcm(dense, expert);
  return std::min(std::max(fewest, bounded_product({dense, spec.dp})), kTooManyRanks);
}

Result<void> check(const ParallelSpec& spec) {
  const int64_t expert = spec.ep * expert_tp(spec);
  if (stage_ranks(spec) % expert != 0) {
    return invalid(
        fmt::format("megatron dp={}: tp x cp x dp = {} ranks a stage, expected a "
                    "multiple of ep x etp = {}",
                    spec.dp, spec.tp * spec.cp * spec.dp, expert));
  }
  if (spec.vpp > 1 && spec.pp == 1) {
    return invalid(fmt::format("megatron vpp={}: expected pp of 2 or more, found 1", spec.vpp));
  }
  if ((spec.first > 0 || spec.last > 0) && (spec.pp == 1 || !spec.layers.empty())) {
    return invalid(
        fmt::format("megatron first={},last={}: expected pp of 2 or more and no "
                    "layers=, found pp={}{}",
                    spec.first, spec.last, spec.pp, spec.layers.empty() ? "" : " and layers="));
  }
  if (counted_as_layers(spec) > 0 && (spec.first > 0 || spec.last > 0 || !spec.layers.empty())) {
    return invalid(
        "megatron account_for_embedding, account_for_loss: expected no first=, last= or layers=, "
        "which say the layers of a stage themselves");
  }
  return {};
}

// Order of ranks tp-cp-ep-dp-pp, tp fastest: one stage is one range of ranks, which the dense and
// the expert grid cut each in its own way.
ParallelRanks ranks_of(const ParallelSpec& spec, int64_t rank) {
  const int64_t size = stage_ranks(spec);
  const int64_t in_stage = rank % size;
  const int64_t etp = expert_tp(spec);
  return {.tp = in_stage % spec.tp,
          .pp = rank / size,
          .dp = in_stage / (spec.tp * spec.cp),
          .cp = in_stage / spec.tp % spec.cp,
          .etp = in_stage % etp,
          .ep = in_stage / etp % spec.ep,
          .edp = in_stage / (etp * spec.ep)};
}

// `count` layers in equal chunks; `what` says whose.
Result<int64_t> divide_layers(const ParallelSpec& spec, int64_t count, int64_t parts,
                              const char* what) {
  if (parts == 0 ? count == 0 : count >= 0 && count % parts == 0) {
    return parts == 0 ? 0 : count / parts;
  }
  return invalid(
      fmt::format("megatron pp={},vpp={},first={},last={}: {} layers {} for {} chunks, "
                  "expected a multiple (layers=A/B/... gives them one by one)",
                  spec.pp, spec.vpp, spec.first, spec.last, count, what, parts));
}

Result<Pipeline> pipeline_of(const ParallelSpec& spec, const ModelConfig& config) {
  if (!spec.layers.empty()) return explicit_pipeline(spec, config);
  const int64_t given = (spec.first > 0 ? 1 : 0) + (spec.last > 0 ? 1 : 0);
  TRANSFUSE_ASSIGN_OR_RETURN(
      const int64_t middle,
      divide_layers(spec,
                    config.num_hidden_layers + counted_as_layers(spec) - spec.first - spec.last,
                    (spec.pp - given) * spec.vpp,
                    counted_as_layers(spec) > 0 ? "with those that count as one"
                    : given > 0                 ? "left"
                                                : "in the model"));
  TRANSFUSE_ASSIGN_OR_RETURN(const int64_t first,
                             divide_layers(spec, spec.first, spec.vpp, "in the first stage"));
  TRANSFUSE_ASSIGN_OR_RETURN(const int64_t last,
                             divide_layers(spec, spec.last, spec.vpp, "in the last stage"));
  Pipeline pipeline{.stages = spec.pp, .layers = {}};
  for (int64_t chunk = 0; chunk < spec.vpp; ++chunk) {
    for (int64_t stage = 0; stage < spec.pp; ++stage) {
      const bool is_first = stage == 0 && spec.first > 0;
      const bool is_last = stage == spec.pp - 1 && spec.last > 0;
      pipeline.layers.push_back(is_first ? first : is_last ? last : middle);
    }
  }
  if (spec.account_for_embedding) --pipeline.layers.front();
  if (spec.account_for_loss) --pipeline.layers.back();
  if (pipeline.layers.front() < 0 || pipeline.layers.back() < 0) {
    return invalid(fmt::format(
        "megatron account_for_embedding, account_for_loss: {} layers for {} chunks leave fewer "
        "than none for the first or the last",
        config.num_hidden_layers, spec.pp * spec.vpp));
  }
  return pipeline;
}

struct Share {
  int64_t rank = 0;
  int64_t size = 1;
  const char* option = "tp";
};

// One rank's layout in the making.
class MegatronRank {
 public:
  MegatronRank(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks)
      : model_(model),
        spec_(spec),
        ranks_(ranks),
        tp_{.rank = ranks.tp, .size = spec.tp},
        etp_{.rank = ranks.etp, .size = expert_tp(spec), .option = "etp"} {}

  Result<Layout> build() {
    TRANSFUSE_RETURN_IF_ERROR(check_experts());
    TRANSFUSE_RETURN_IF_ERROR(check_heads());
    TRANSFUSE_ASSIGN_OR_RETURN(const Pipeline pipeline, pipeline_of(spec_, model_.config));
    const std::vector<StagePlace> places = places_of_layers(pipeline);
    for (const ModelTensor& tensor : model_.tensors) {
      if (tensor.layer < 0) {
        TRANSFUSE_RETURN_IF_ERROR(place_outer(tensor));
        continue;
      }
      const StagePlace& at = places[static_cast<size_t>(tensor.layer)];
      if (at.stage != ranks_.pp) continue;
      const std::string prefix = fmt::format("{}decoder.layers.{}.", chunk(at.chunk), at.layer);
      TRANSFUSE_RETURN_IF_ERROR(tensor.expert >= 0 ? place_expert(tensor, prefix)
                                                   : place_in_layer(tensor, prefix));
    }
    return builder_.build();
  }

 private:
  Result<void> check_experts() const {
    const int64_t experts = model_.expert_count();
    if (experts == 0 && spec_.ep > 1) {
      return invalid(fmt::format("megatron ep={}: expected a model with experts, found {} without",
                                 spec_.ep, model_.config.architecture));
    }
    if (experts % spec_.ep != 0) {
      return invalid(
          fmt::format("megatron ep={} does not divide num_experts = {}", spec_.ep, experts));
    }
    return {};
  }

  Result<void> check_heads() const {
    const int64_t heads = model_.config.num_attention_heads;
    const int64_t groups = model_.config.num_key_value_heads;
    if (heads % spec_.tp != 0) {
      return invalid(
          fmt::format("megatron tp={} does not divide num_attention_heads = {}", spec_.tp, heads));
    }
    if (groups % spec_.tp != 0 && spec_.tp % groups != 0) {
      return invalid(
          fmt::format("megatron tp={}: expected a multiple or a divisor of "
                      "num_key_value_heads = {}",
                      spec_.tp, groups));
    }
    return {};
  }

  // Model chunks are separate modules, each with names of its own.
  std::string chunk(int64_t index) const {
    return spec_.vpp > 1 ? fmt::format("{}:", index) : std::string();
  }

  Result<void> place_outer(const ModelTensor& tensor) {
    const bool last = ranks_.pp == spec_.pp - 1;
    const std::string last_chunk = chunk(spec_.vpp - 1);
    if (tensor.role == Role::kFinalNorm) {
      if (last) put(tensor, whole(tensor), last_chunk + "decoder.final_layernorm.weight");
      return {};
    }
    if (tensor.role == Role::kEmbedding && ranks_.pp == 0) {
      TRANSFUSE_RETURN_IF_ERROR(
          place_vocabulary(tensor, chunk(0) + "embedding.word_embeddings.weight"));
    }
    // Tied: a last stage without the embedding has its own copy of it.
    const bool output =
        tensor.role == Role::kOutput || (model_.config.tie_word_embeddings && spec_.pp > 1);
    if (last && output) return place_vocabulary(tensor, last_chunk + "output_layer.weight");
    return {};
  }

  Result<void> place_in_layer(const ModelTensor& tensor, const std::string& prefix) {
    const bool moe = model_.expert_count() > 0;
    const bool fused_norms = !spec_.separate_norms;
    const std::string suffix = tensor.is_bias() ? "bias" : "weight";
    switch (tensor.role) {
      case Role::kAttentionNorm:
        put(tensor, whole(tensor),
            prefix + (fused_norms ? "self_attention.linear_qkv.layer_norm_weight"
                                  : "input_layernorm.weight"));
        return {};
      case Role::kMlpNorm:
        put(tensor, whole(tensor),
            prefix + (fused_norms && !moe ? "mlp.linear_fc1.layer_norm_weight"
                                          : "pre_mlp_layernorm.weight"));
        return {};
      case Role::kQueryNorm:
        put(tensor, whole(tensor), prefix + "self_attention.q_layernorm.weight");
        return {};
      case Role::kKeyNorm:
        put(tensor, whole(tensor), prefix + "self_attention.k_layernorm.weight");
        return {};
      case Role::kRouter:
        put(tensor, whole(tensor), prefix + "mlp.router.weight");
        return {};
      case Role::kQuery:
      case Role::kKey:
      case Role::kValue:
        return place_qkv(tensor, prefix + "self_attention.linear_qkv." + suffix);
      case Role::kAttentionOutput:
        return place_columns(tensor, prefix + "self_attention.linear_proj.weight", tp_);
      case Role::kGate:
      case Role::kUp:
        return place_gated(tensor, prefix + "mlp.linear_fc1.weight", tp_);
      case Role::kDown:
        return place_columns(tensor, prefix + "mlp.linear_fc2.weight", tp_);
      case Role::kEmbedding:
      case Role::kOutput:
      case Role::kFinalNorm:
        break;
    }
    check_failed(__FILE__, __LINE__, "a tensor of no layer inside one");
  }

  Result<void> place_expert(const ModelTensor& tensor, const std::string& prefix) {
    const int64_t held = model_.expert_count() / spec_.ep;
    if (tensor.expert / held != ranks_.ep) return {};
    const bool down = tensor.role == Role::kDown;
    const char* linear = down ? "linear_fc2" : "linear_fc1";
    const int64_t local = tensor.expert % held;
    const std::string name =
        spec_.sequential_experts
            ? fmt::format("{}mlp.experts.local_experts.{}.{}.weight", prefix, local, linear)
            : fmt::format("{}mlp.experts.{}.weight{}", prefix, linear, local);
    return down ? place_columns(tensor, name, etp_) : place_gated(tensor, name, etp_);
  }

  // All query groups one after another, each [its queries | key | value], cut evenly over the ranks
  // wherever that falls.
  Result<void> place_qkv(const ModelTensor& tensor, const std::string& name) {
    const ModelConfig& c = model_.config;
    const int64_t queries = c.num_attention_heads / c.num_key_value_heads * c.head_dim;
    const int64_t group_rows = queries + 2 * c.head_dim;
    TRANSFUSE_ASSIGN_OR_RETURN(const int64_t held, divide(tensor, "rows of the linear_qkv",
                                                          c.num_key_value_heads * group_rows, tp_));
    const int64_t begin = tp_.rank * held;
    const int64_t run = tensor.role == Role::kQuery ? queries : c.head_dim;
    const int64_t in_group = tensor.role == Role::kQuery ? 0
                             : tensor.role == Role::kKey ? queries
                                                         : queries + c.head_dim;
    for (int64_t group = 0; group < c.num_key_value_heads; ++group) {
      const int64_t at = group * group_rows + in_group;
      const int64_t from = std::max(at, begin);
      const int64_t to = std::min(at + run, begin + held);
      if (from >= to) continue;
      Box box = Box::whole(tensor.shape);
      box.offset[0] = group * run + from - at;
      box.length[0] = to - from;
      put(tensor, box, name, held, from - begin);
    }
    return {};
  }

  // Gate rows of this rank, then its up rows.
  Result<void> place_gated(const ModelTensor& tensor, const std::string& name, Share share) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Box box, slice(tensor, 0, share));
    const int64_t rows = box.length[0];
    put(tensor, box, name, 2 * rows, tensor.role == Role::kUp ? rows : 0);
    return {};
  }

  Result<void> place_columns(const ModelTensor& tensor, const std::string& name, Share share) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Box box, slice(tensor, 1, share));
    put(tensor, box, name);
    return {};
  }

  Result<void> place_vocabulary(const ModelTensor& tensor, const std::string& name) {
    const int64_t rows = tensor.shape[0];
    const int64_t multiple = tp_.size > 1 ? spec_.vocab_divisor * tp_.size : 1;
    const int64_t padded =
        spec_.padded_vocab > 0 ? spec_.padded_vocab : (rows + multiple - 1) / multiple * multiple;
    if (padded < rows || padded % tp_.size != 0) {
      return invalid(
          fmt::format("megatron padded_vocab={}: expected a multiple of tp = {} and at least the "
                      "{} rows of {}",
                      padded, tp_.size, rows, tensor.name));
    }
    const int64_t held = padded / tp_.size;
    Box box = Box::whole(tensor.shape);
    box.offset[0] = std::min(tp_.rank * held, rows);
    box.length[0] = std::min((tp_.rank + 1) * held, rows) - box.offset[0];
    const uint32_t parameter = put(tensor, box, name, held, 0);
    const Dims length = {held - box.length[0], tensor.shape[1]};
    builder_.fill(parameter, box.element_count(), length, row_major_strides(length));
    return {};
  }

  Result<int64_t> divide(const ModelTensor& tensor, const char* what, int64_t count,
                         const Share& share) const {
    if (count % share.size == 0) return count / share.size;
    return invalid(fmt::format("megatron {}={} does not divide the {} {} of {}", share.option,
                               share.size, count, what, tensor.name));
  }

  Result<Box> slice(const ModelTensor& tensor, int dim, const Share& share) const {
    Box box = whole(tensor);
    TRANSFUSE_ASSIGN_OR_RETURN(
        box.length[dim], divide(tensor, dim == 0 ? "rows" : "columns", tensor.shape[dim], share));
    box.offset[dim] = share.rank * box.length[dim];
    return box;
  }

  static Box whole(const ModelTensor& tensor) { return Box::whole(tensor.shape); }

  // `box` from row `first_row` of a parameter of `rows` rows, each as long as the box's.
  uint32_t put(const ModelTensor& tensor, const Box& box, const std::string& parameter,
               int64_t rows, int64_t first_row) {
    const int64_t width = box.length.rank() > 1 ? box.length[1] : 1;
    const uint32_t p = builder_.parameter({parameter, spec_.dtype, rows * width});
    builder_.tile(builder_.tensor({tensor.name, model_.config.dtype, tensor.shape}), box, p,
                  first_row * width);
    return p;
  }
  void put(const ModelTensor& tensor, const Box& box, const std::string& parameter) {
    put(tensor, box, parameter, box.length[0], 0);
  }

  const Model& model_;
  const ParallelSpec& spec_;
  const ParallelRanks& ranks_;
  const Share tp_;
  const Share etp_;
  LayoutBuilder builder_;
};

}  // namespace

constinit const Framework kMegatron = {
    .name = "megatron",
    .options = kOptions,
    .flags = kFlags,
    .rank_count = [](const ParallelSpec& s) { return bounded_product({stage_ranks(s), s.pp}); },
    .ranks = ranks_of,
    .check = check,
    .make_layout =
        [](const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
          return MegatronRank(model, spec, ranks).build();
        }};

}  // namespace transfuse

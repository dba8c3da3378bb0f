// vLLM layouts: fused QKV, gate/up and experts, repeated KV heads, padded vocabulary, expert
// parallelism, pipeline stages (docs/layouts.md, "vLLM").
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr int64_t kVocabularyMultiple = 64;  // of vLLM's VocabParallelEmbedding, whatever tp is
constexpr std::array<std::string_view, 6> kOptions = {"tp",  "pp",        "dp",
                                                      "w13", "placement", "layers"};
constexpr std::array<std::string_view, 1> kFlags = {"ep"};

struct Share {
  int64_t rank = 0;
  int64_t size = 1;
};

// Experts of one rank, which take their places in its stack in ascending order.
struct ExpertShare {
  Share of;
  bool round_robin = false;

  int64_t count(int64_t experts) const {
    return experts / of.size + (of.rank < experts % of.size ? 1 : 0);
  }
  // -1: another rank's.
  int64_t local(int64_t expert, int64_t experts) const {
    if (round_robin) return expert % of.size == of.rank ? expert / of.size : -1;
    const int64_t first = of.rank * (experts / of.size) + std::min(of.rank, experts % of.size);
    return expert >= first && expert < first + count(experts) ? expert - first : -1;
  }
};

// The last part of a module's path exchanged: "a.q_proj.bias" -> "a.qkv_proj.bias".
std::string with_module(const std::string& name, std::string_view module) {
  const size_t suffix = name.rfind('.');
  const size_t begin = name.rfind('.', suffix - 1) + 1;
  return fmt::format("{}{}{}", std::string_view(name).substr(0, begin), module,
                     std::string_view(name).substr(suffix));
}

// One rank's layout in the making.
class VllmRank {
 public:
  VllmRank(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks)
      : model_(model),
        spec_(spec),
        tp_{.rank = ranks.tp, .size = spec.tp},
        stage_(ranks.pp),
        expert_tp_{.rank = ranks.etp, .size = spec.expert_parallel ? 1 : spec.tp * spec.dp},
        expert_share_{
            .of = {.rank = ranks.ep, .size = spec.expert_parallel ? spec.tp * spec.dp : 1},
            .round_robin = spec.round_robin} {}

  Result<Layout> build() {
    if (spec_.expert_parallel && model_.expert_count() == 0) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("vllm ep: expected a model with experts, found {} without",
                               model_.config.architecture)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const auto places, stages());
    for (const ModelTensor& tensor : model_.tensors) {
      const bool mine = tensor.layer >= 0
                            ? places[static_cast<size_t>(tensor.layer)].stage == stage_
                            : holds_outer(tensor);
      if (mine) TRANSFUSE_RETURN_IF_ERROR(place(tensor));
    }
    return builder_.build();
  }

 private:
  // N / P layers each; the spare ones go to the stages before the last, the nearest first.
  Result<std::vector<StagePlace>> stages() const {
    if (!spec_.layers.empty()) {
      TRANSFUSE_ASSIGN_OR_RETURN(const Pipeline pipeline, explicit_pipeline(spec_, model_.config));
      return places_of_layers(pipeline);
    }
    const int64_t layers = model_.config.num_hidden_layers;
    Pipeline even{.stages = spec_.pp,
                  .layers = std::vector<int64_t>(static_cast<size_t>(spec_.pp), layers / spec_.pp)};
    for (int64_t spare = 0; spare < layers % spec_.pp; ++spare) {
      ++even.layers[static_cast<size_t>(spec_.pp - 2 - spare)];
    }
    return places_of_layers(even);
  }

  bool holds_outer(const ModelTensor& tensor) const {
    if (model_.family->outer_tensors_on_every_stage) return true;
    const bool last = stage_ == spec_.pp - 1;
    if (tensor.role != Role::kEmbedding) return last;
    return stage_ == 0 || (last && model_.config.tie_word_embeddings);
  }

  Result<void> place(const ModelTensor& tensor) {
    if (tensor.expert >= 0) return place_expert(tensor);
    switch (tensor.role) {
      case Role::kEmbedding:
      case Role::kOutput:
        return place_vocabulary(tensor);
      case Role::kQuery:
      case Role::kKey:
      case Role::kValue:
        return place_qkv(tensor);
      case Role::kGate:
      case Role::kUp: {
        TRANSFUSE_ASSIGN_OR_RETURN(const Box box, slice(tensor, 0, tp_));
        const int64_t rows = box.length[0];
        put(tensor, box, with_module(tensor.name, "gate_up_proj"), 2 * rows,
            tensor.role == Role::kUp ? rows : 0);
        return {};
      }
      case Role::kAttentionOutput:
      case Role::kDown: {
        TRANSFUSE_ASSIGN_OR_RETURN(const Box box, slice(tensor, 1, tp_));
        put(tensor, box, tensor.name, box.length[0], 0);
        return {};
      }
      default:
        put(tensor, Box::whole(tensor.shape), tensor.name, tensor.shape[0], 0);
        return {};
    }
  }

  Result<void> place_vocabulary(const ModelTensor& tensor) {
    const int64_t rows = tensor.shape[0];
    const int64_t padded =
        (rows + kVocabularyMultiple - 1) / kVocabularyMultiple * kVocabularyMultiple;
    TRANSFUSE_ASSIGN_OR_RETURN(const int64_t held, divide(tensor, "padded rows", padded, tp_));
    Box box = Box::whole(tensor.shape);
    box.offset[0] = std::min(tp_.rank * held, rows);
    box.length[0] = std::min((tp_.rank + 1) * held, rows) - box.offset[0];
    const uint32_t parameter = put(tensor, box, tensor.name, held, 0);
    const Dims length = {held - box.length[0], tensor.shape[1]};
    builder_.fill(parameter, box.element_count(), length, row_major_strides(length));
    return {};
  }

  Result<void> place_qkv(const ModelTensor& tensor) {
    const ModelConfig& c = model_.config;
    TRANSFUSE_ASSIGN_OR_RETURN(const Share q, heads("num_attention_heads", c.num_attention_heads));
    TRANSFUSE_ASSIGN_OR_RETURN(const Share kv, heads("num_key_value_heads", c.num_key_value_heads));
    const bool is_query = tensor.role == Role::kQuery;
    Box box = Box::whole(tensor.shape);
    box.offset[0] = (is_query ? q : kv).rank * c.head_dim;
    box.length[0] = (is_query ? q : kv).size * c.head_dim;
    const int64_t before = is_query ? 0 : q.size + (tensor.role == Role::kValue ? kv.size : 0);
    put(tensor, box, with_module(tensor.name, "qkv_proj"), (q.size + 2 * kv.size) * c.head_dim,
        before * c.head_dim);
    return {};
  }

  // The first head that this rank holds of `count`, and how many. Fewer heads than ranks: one,
  // which several ranks repeat.
  Result<Share> heads(const char* field, int64_t count) const {
    if (count % tp_.size == 0) {
      return Share{.rank = tp_.rank * (count / tp_.size), .size = count / tp_.size};
    }
    if (tp_.size % count == 0) return Share{.rank = tp_.rank / (tp_.size / count), .size = 1};
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm tp={}: expected a multiple or a divisor of {} = {}", tp_.size,
                             field, count)};
  }

  // One matrix into the stack of all experts of this rank.
  Result<void> place_expert(const ModelTensor& tensor) {
    const int64_t experts = model_.expert_count();
    const int64_t local = expert_share_.local(tensor.expert, experts);
    if (local < 0) return {};
    const bool down = tensor.role == Role::kDown;
    TRANSFUSE_ASSIGN_OR_RETURN(const Box box, slice(tensor, down ? 1 : 0, expert_tp_));
    const int64_t rows = box.length[0];
    const int64_t expert_rows = down ? rows : 2 * rows;
    const bool second = !down && (tensor.role == Role::kUp) != spec_.up_before_gate;
    const size_t stem = tensor.name.find(".experts.");
    const std::string name =
        fmt::format("{}.experts.routed_experts.{}", std::string_view(tensor.name).substr(0, stem),
                    down ? "w2_weight" : "w13_weight");
    put(tensor, box, name, expert_share_.count(experts) * expert_rows,
        local * expert_rows + (second ? rows : 0));
    return {};
  }

  Result<int64_t> divide(const ModelTensor& tensor, const char* what, int64_t count,
                         Share share) const {
    if (count % share.size != 0) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("vllm tp={}{} does not divide the {} {} of {}", spec_.tp,
                               share.size == spec_.tp ? "" : fmt::format(" x dp={}", spec_.dp),
                               count, what, tensor.name)};
    }
    return count / share.size;
  }

  Result<Box> slice(const ModelTensor& tensor, int dim, Share share) const {
    Box box = Box::whole(tensor.shape);
    TRANSFUSE_ASSIGN_OR_RETURN(
        box.length[dim], divide(tensor, dim == 0 ? "rows" : "columns", tensor.shape[dim], share));
    box.offset[dim] = share.rank * box.length[dim];
    return box;
  }

  // `box` from row `first_row` of a parameter of `rows` rows, each as long as the box's.
  uint32_t put(const ModelTensor& tensor, const Box& box, const std::string& parameter,
               int64_t rows, int64_t first_row) {
    const int64_t width = box.length.rank() > 1 ? box.length[1] : 1;
    const uint32_t p = builder_.parameter({parameter, spec_.dtype, rows * width});
    builder_.tile(builder_.tensor({tensor.name, model_.config.dtype, tensor.shape}), box, p,
                  first_row * width);
    return p;
  }

  const Model& model_;
  const ParallelSpec& spec_;
  const Share tp_;
  const int64_t stage_;
  const Share expert_tp_;
  const ExpertShare expert_share_;
  LayoutBuilder builder_;
};

// tp fastest, then stages, then dp. Experts see all tp and dp ranks of a stage as one group.
ParallelRanks ranks_of(const ParallelSpec& spec, int64_t rank) {
  ParallelRanks ranks{
      .tp = rank % spec.tp, .pp = rank / spec.tp % spec.pp, .dp = rank / (spec.tp * spec.pp)};
  (spec.expert_parallel ? ranks.ep : ranks.etp) = ranks.dp * spec.tp + ranks.tp;
  return ranks;
}

}  // namespace

constinit const Framework kVllm = {
    .name = "vllm",
    .options = kOptions,
    .flags = kFlags,
    .rank_count = [](const ParallelSpec& s) { return bounded_product({s.tp, s.pp, s.dp}); },
    .ranks = ranks_of,
    .make_layout = [](const Model& model, const ParallelSpec& spec,
                      const ParallelRanks& ranks) { return VllmRank(model, spec, ranks).build(); }};

}  // namespace transfuse

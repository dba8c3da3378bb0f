// vLLM layouts: fused QKV, gate/up and experts, repeated KV heads, padded vocabulary, expert
// parallelism, pipeline stages (docs/layouts.md, "vLLM").
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/family.h"
#include "models/slices.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr int64_t kVocabularyMultiple = 64;  // of vLLM's VocabParallelEmbedding, whatever tp is
constexpr std::array<std::string_view, 6> kOptions = {"tp",  "pp",        "dp",
                                                      "w13", "placement", "layers"};
constexpr std::array<std::string_view, 1> kFlags = {"ep"};

// Modules that hold several matrices one after another. What has no row here has its own.
struct Fused {
  Role role;
  std::string_view module;
  int64_t place;
};
constexpr std::array<Fused, 9> kFused = {{{Role::kQuery, "qkv_proj", 0},
                                          {Role::kKey, "qkv_proj", 1},
                                          {Role::kValue, "qkv_proj", 2},
                                          {Role::kQueryDown, "fused_qkv_a_proj", 0},
                                          {Role::kKeyValueDown, "fused_qkv_a_proj", 1},
                                          {Role::kGate, "gate_up_proj", 0},
                                          {Role::kUp, "gate_up_proj", 1},
                                          {Role::kSharedGate, "gate_up_proj", 0},
                                          {Role::kSharedUp, "gate_up_proj", 1}}};

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
        traits_(model.family->vllm),
        spec_(spec),
        tp_{.rank = ranks.tp, .size = spec.tp},
        stage_(ranks.pp),
        expert_tp_{.rank = ranks.etp, .size = spec.expert_parallel ? 1 : spec.tp * spec.dp},
        expert_share_{
            .of = {.rank = ranks.ep, .size = spec.expert_parallel ? spec.tp * spec.dp : 1},
            .round_robin = spec.round_robin},
        slices_(model) {}

  Result<Layout> build() {
    if (spec_.expert_parallel && model_.expert_count() == 0) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("vllm ep: expected a model with experts, found {} without",
                               model_.config.architecture)};
    }
    TRANSFUSE_RETURN_IF_ERROR(check_class());
    TRANSFUSE_ASSIGN_OR_RETURN(const auto places, stages());
    for (const ModelTensor& tensor : model_.tensors) {
      // Layers that predict further tokens are a model of their own.
      if (model_.is_mtp(tensor)) continue;
      if (traits_.lacks != nullptr && traits_.lacks(model_.config, tensor.role)) continue;
      const bool mine = tensor.layer >= 0
                            ? places[static_cast<size_t>(tensor.layer)].stage == stage_
                            : holds_outer(tensor);
      if (!mine) continue;
      TRANSFUSE_RETURN_IF_ERROR(for_each_piece(
          tensor, [&](const Piece& piece) { return place_matrices(tensor, piece); }));
    }
    return slices_.build();
  }

 private:
  // What the family's own class cannot do.
  Result<void> check_class() const {
    const ModelConfig& c = model_.config;
    if (!traits_.ties && c.tie_word_embeddings) {
      return unsupported(
          fmt::format("its {} has an output of its own, found \"tie_word_embeddings\"",
                      model_.family->model_class));
    }
    if (!traits_.repeats_heads && c.num_key_value_heads % spec_.tp != 0) {
      return unsupported(
          fmt::format("its {} does not repeat heads: expected tp to divide "
                      "\"num_key_value_heads\", which is {}",
                      model_.family->model_class, c.num_key_value_heads));
    }
    if (!traits_.equal_expert_ranges) return {};
    const bool even = !spec_.expert_parallel || c.num_experts % expert_share_.of.size == 0;
    if (!even || spec_.round_robin || spec_.up_before_gate) {
      return unsupported(
          fmt::format("its {} gives every rank an equal range of the {} experts, gate and up in "
                      "turns: expected {}",
                      model_.family->model_class, c.num_experts,
                      even ? "neither placement=round_robin nor w13=up_gate"
                           : fmt::format("their number to be a multiple of tp x dp = {}",
                                         expert_share_.of.size)));
    }
    return {};
  }

  Error unsupported(const std::string& message) const {
    return {ErrorCode::kUnsupported, fmt::format("vllm tp={}: {}", spec_.tp, message)};
  }

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
    const bool last = stage_ == spec_.pp - 1;
    if (tensor.role == Role::kFinalNorm && traits_.final_norm_on_last_stage) return last;
    if (traits_.outer_tensors_on_every_stage) return true;
    if (tensor.role != Role::kEmbedding) return last;
    return stage_ == 0 || (last && model_.config.tie_word_embeddings);
  }

  // All matrices that take turns stay as they are but those of the convolution, which do so once.
  Result<void> place_matrices(const ModelTensor& tensor, const Piece& piece) {
    if (piece.role != Role::kLinearConv) return place(tensor, piece);
    for (const Piece& matrix : apart(tensor, piece)) {
      TRANSFUSE_RETURN_IF_ERROR(place(tensor, matrix));
    }
    return {};
  }

  Result<void> place(const ModelTensor& tensor, const Piece& piece) {
    if (piece.expert >= 0) return place_expert(tensor, piece);
    TRANSFUSE_ASSIGN_OR_RETURN(const Slice slice, cut(tensor, piece, tp_));
    const auto fused = std::ranges::find(kFused, piece.role, &Fused::role);
    const bool own = fused == kFused.end();
    const Destination to =
        destination(tensor, piece, own ? tensor.name : with_module(tensor.name, fused->module),
                    own ? piece.turn : fused->place);
    TRANSFUSE_RETURN_IF_ERROR(slices_.add(to, tensor, piece, slice));
    if (split_of(piece.role) == Split::kVocabulary) add_padding(to, piece, slice);
    return {};
  }

  Destination destination(const ModelTensor& tensor, const Piece& piece, std::string name,
                          int64_t place) const {
    const bool f32 = std::ranges::find(traits_.f32_roles, piece.role) != traits_.f32_roles.end();
    return {.parameter = renamed(std::move(name), traits_.renames),
            .dtype = f32 ? Dtype::kF32 : held_dtype(tensor, spec_),
            .place = place};
  }

  // What this rank holds of a matrix, of which each of `share.size` ranks has a part.
  Result<Slice> cut(const ModelTensor& tensor, const Piece& piece, Share share) const {
    Slice slice = whole_slice(piece);
    const int64_t rows = piece.shape[0];
    switch (split_of(piece.role)) {
      case Split::kReplicated:
        return slice;
      case Split::kVocabulary: {
        TRANSFUSE_ASSIGN_OR_RETURN(const Range padded,
                                   part_of(tensor, "padded rows", padded_rows(rows), share));
        slice.rows = {std::min(padded.begin, rows), std::min(padded.end, rows)};
        return slice;
      }
      case Split::kColumn: {
        const int64_t together = rows_together(tensor, piece);
        TRANSFUSE_ASSIGN_OR_RETURN(
            slice.rows,
            part_of(tensor, together > 1 ? "groups of rows" : "rows", rows / together, share));
        slice.rows = {slice.rows.begin * together, slice.rows.end * together};
        return slice;
      }
      case Split::kHeads: {
        TRANSFUSE_ASSIGN_OR_RETURN(slice.rows, heads(piece));
        return slice;
      }
      case Split::kRow: {
        if (tensor.content == Content::kBias) return slice;
        TRANSFUSE_ASSIGN_OR_RETURN(slice.columns,
                                   part_of(tensor, "columns", piece.shape[1], share));
        return slice;
      }
    }
    check_failed(__FILE__, __LINE__, "a Split outside the enum");
  }

  static int64_t padded_rows(int64_t rows) {
    return (rows + kVocabularyMultiple - 1) / kVocabularyMultiple * kVocabularyMultiple;
  }

  void add_padding(Destination to, const Piece& piece, const Slice& slice) {
    const int64_t held = padded_rows(piece.shape[0]) / tp_.size;
    to.place = 1;
    slices_.add_zeros(to, held - slice.rows.count());
  }

  // Keys and values have fewer heads than queries: where those are fewer than ranks, several ranks
  // repeat one.
  Result<Range> heads(const Piece& piece) const {
    const bool repeats = piece.role == Role::kKey || piece.role == Role::kValue;
    const int64_t count =
        repeats ? model_.config.num_key_value_heads : model_.config.num_attention_heads;
    const int64_t head_rows = piece.shape[0] / count;
    if (count % tp_.size == 0) return share_of(piece.shape[0], tp_.rank, tp_.size);
    if (repeats && tp_.size % count == 0) {
      const int64_t head = tp_.rank / (tp_.size / count);
      return Range{head * head_rows, (head + 1) * head_rows};
    }
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm tp={}: expected a {}divisor of {} = {}", tp_.size,
                             repeats ? "multiple or a " : "",
                             repeats ? "num_key_value_heads" : "num_attention_heads", count)};
  }

  // One matrix into the stack of all experts of this rank.
  Result<void> place_expert(const ModelTensor& tensor, const Piece& piece) {
    const int64_t local = expert_share_.local(piece.expert, model_.expert_count());
    if (local < 0) return {};
    const bool down = piece.role == Role::kDown;
    TRANSFUSE_ASSIGN_OR_RETURN(const Slice slice, cut(tensor, piece, expert_tp_));
    const bool second = !down && (piece.role == Role::kUp) != spec_.up_before_gate;
    const std::string_view stem =
        std::string_view(tensor.name).substr(0, tensor.name.find(".experts."));
    const char* content = tensor.content == Content::kBias          ? "bias"
                          : tensor.content == Content::kScale       ? "weight_scale_inv"
                          : tensor.content == Content::kPackedScale ? "weight_scale"
                                                                    : "weight";
    const std::string name =
        fmt::format("{}.experts.routed_experts.{}_{}", stem, down ? "w2" : "w13", content);
    const Destination to = destination(tensor, piece, name, 2 * local + (second ? 1 : 0));
    // The bias is added to a sum over the ranks.
    if (down && tensor.content == Content::kBias && expert_tp_.rank > 0) {
      slices_.add_zeros(to, slice.rows.count(), 1);
      return {};
    }
    return slices_.add(to, tensor, piece, slice);
  }

  Result<Range> part_of(const ModelTensor& tensor, const char* what, int64_t count,
                        Share share) const {
    if (count % share.size == 0) return share_of(count, share.rank, share.size);
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm tp={}{} does not divide the {} {} of {}", spec_.tp,
                             share.size == spec_.tp ? "" : fmt::format(" x dp={}", spec_.dp), count,
                             what, tensor.name)};
  }

  const Model& model_;
  const EngineTraits& traits_;
  const ParallelSpec& spec_;
  const Share tp_;
  const int64_t stage_;
  const Share expert_tp_;
  const ExpertShare expert_share_;
  Slices slices_;
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

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
#include "models/slices.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 16> kOptions = {
    "tp",   "pp",     "vpp",           "ep",    "etp",     "cp",           "dp",  "first",
    "last", "layers", "vocab_divisor", "norms", "experts", "padded_vocab", "mtp", "out_norm"};
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

// Where a matrix of a layer goes: the parameter below the layer's prefix, with the modules of
// TransformerEngine and without, and its place among those that share it.
struct Rule {
  Role role;
  std::string_view parameter;
  std::string_view separate = {};  // empty: the same
  int64_t place = 0;
};
constexpr std::array<Rule, 40> kRules = {
    {{Role::kAttentionNorm, "self_attention.linear_qkv.layer_norm_weight",
      "input_layernorm.weight"},
     {Role::kLatentAttentionNorm, "input_layernorm.weight"},
     {Role::kLinearAttentionNorm, "self_attention.in_proj.layer_norm_weight",
      "input_layernorm.weight"},
     {Role::kLinearQkvz, "self_attention.in_proj.weight"},
     {Role::kLinearBa, "self_attention.in_proj.weight", {}, 4},
     {Role::kLinearConv, "self_attention.conv1d.weight"},
     {Role::kLinearDecay, "self_attention.A_log"},
     {Role::kLinearStep, "self_attention.dt_bias"},
     {Role::kLinearNorm, "self_attention.out_norm.weight_plus_one"},
     {Role::kLinearOutput, "self_attention.out_proj.weight"},
     {Role::kSinks, "self_attention.core_attention.softmax_offset"},
     {Role::kSharedRouter, "mlp.shared_experts.gate_weight"},
     {Role::kGateUp, "mlp.linear_fc1.weight"},
     {Role::kAfterAttentionNorm, "self_attention.linear_proj.post_layernorm.weight"},
     {Role::kQuery, "self_attention.linear_qkv.weight"},
     {Role::kKey, "self_attention.linear_qkv.weight"},
     {Role::kValue, "self_attention.linear_qkv.weight"},
     {Role::kQueryNorm, "self_attention.q_layernorm.weight"},
     {Role::kKeyNorm, "self_attention.k_layernorm.weight"},
     {Role::kAttentionOutput, "self_attention.linear_proj.weight"},
     {Role::kQueryDown, "self_attention.linear_q_down_proj.weight"},
     {Role::kQueryDownNorm, "self_attention.linear_q_up_proj.layer_norm_weight",
      "self_attention.q_layernorm.weight"},
     {Role::kQueryUp, "self_attention.linear_q_up_proj.weight"},
     {Role::kKeyValueDown, "self_attention.linear_kv_down_proj.weight"},
     {Role::kKeyValueDownNorm, "self_attention.linear_kv_up_proj.layer_norm_weight",
      "self_attention.kv_layernorm.weight"},
     {Role::kKeyValueUp, "self_attention.linear_kv_up_proj.weight"},
     {Role::kMlpNorm, "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"},
     {Role::kExpertsNorm, "pre_mlp_layernorm.weight"},
     {Role::kAfterMlpNorm, "mlp.linear_fc2.post_layernorm.weight"},
     {Role::kGate, "mlp.linear_fc1.weight"},
     {Role::kUp, "mlp.linear_fc1.weight", {}, 1},
     {Role::kDown, "mlp.linear_fc2.weight"},
     {Role::kRouter, "mlp.router.weight"},
     {Role::kRouterBias, "mlp.router.expert_bias"},
     {Role::kSharedGate, "mlp.shared_experts.linear_fc1.weight"},
     {Role::kSharedUp, "mlp.shared_experts.linear_fc1.weight", {}, 1},
     {Role::kSharedDown, "mlp.shared_experts.linear_fc2.weight"},
     {Role::kFinalNorm, "decoder.final_layernorm.weight"},
     {Role::kEmbedding, "embedding.word_embeddings.weight"},
     {Role::kOutput, "output_layer.weight"}}};
// Below the prefix of a layer that predicts a further token, beside its own decoder layer. It uses
// the model's embedding and output.
constexpr std::array<Rule, 4> kMtpRules = {{{Role::kMtpEmbeddingNorm, "enorm.weight"},
                                            {Role::kMtpHiddenNorm, "hnorm.weight"},
                                            {Role::kMtpProjection, "eh_proj.weight"},
                                            {Role::kMtpFinalNorm, "final_layernorm.weight"}}};

// One rank's layout in the making.
class MegatronRank {
 public:
  MegatronRank(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks)
      : model_(model),
        spec_(spec),
        ranks_(ranks),
        tp_{.rank = ranks.tp, .size = spec.tp},
        etp_{.rank = ranks.etp, .size = expert_tp(spec), .option = "etp"},
        output_gates_(std::ranges::any_of(model.tensors,
                                          [](const ModelTensor& tensor) {
                                            return tensor.role == Role::kQuery &&
                                                   !tensor.turns.empty();
                                          })),
        slices_(model) {}

  Result<Layout> build() {
    TRANSFUSE_RETURN_IF_ERROR(check_experts());
    TRANSFUSE_RETURN_IF_ERROR(check_heads());
    TRANSFUSE_RETURN_IF_ERROR(check_values());
    if (model_.config.scale_block_rows > 0) {
      return Error{ErrorCode::kUnsupported,
                   fmt::format("megatron: {} with f8 weights and block scales is not described: "
                               "Megatron-Core trains its bf16 form, whose config.json has no "
                               "\"quantization_config\"",
                               model_.config.architecture)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Pipeline pipeline, pipeline_of(spec_, model_.config));
    const std::vector<StagePlace> places = places_of_layers(pipeline);
    for (const ModelTensor& tensor : model_.tensors) {
      if (!is_held(model_, tensor, spec_)) continue;
      const StagePlace* at = tensor.layer < 0 || model_.is_mtp(tensor)
                                 ? nullptr
                                 : &places[static_cast<size_t>(tensor.layer)];
      if (at != nullptr && at->stage != ranks_.pp) continue;
      TRANSFUSE_RETURN_IF_ERROR(for_each_matrix(tensor, [&](const Piece& piece) {
        if (at != nullptr) {
          return place(tensor, piece,
                       fmt::format("{}decoder.layers.{}.", chunk(at->chunk), at->layer));
        }
        return model_.is_mtp(tensor) ? place_mtp(tensor, piece) : place_outer(tensor, piece);
      }));
    }
    return slices_.build();
  }

 private:
  // Nothing takes turns here.
  template <typename Visit>
  static Result<void> for_each_matrix(const ModelTensor& tensor, const Visit& visit) {
    return for_each_piece(tensor, [&](const Piece& piece) -> Result<void> {
      if (tensor.turns.empty()) return visit(piece);
      for (const Piece& matrix : apart(tensor, piece)) TRANSFUSE_RETURN_IF_ERROR(visit(matrix));
      return {};
    });
  }

  // Megatron-Core holds what the checkpoint holds, but for what is said here.
  Result<void> check_values() const {
    if (model_.config.packed_experts) {
      return Error{ErrorCode::kUnsupported,
                   fmt::format("megatron: {} with mxfp4 experts is not described: Megatron-Core "
                               "trains its bf16 form, whose config.json has no "
                               "\"quantization_config\"",
                               model_.config.architecture)};
    }
    for (const ModelTensor& tensor : model_.tensors) {
      if (tensor.role == Role::kLinearNorm && !spec_.out_norm_plus_one) {
        return Error{
            ErrorCode::kUnsupported,
            fmt::format("megatron: {} is held as self_attention.out_norm.weight, less 1 in every "
                        "element: a refit moves elements and calculates none. With "
                        "out_norm=plus_one the layout has a parameter "
                        "self_attention.out_norm.weight_plus_one instead, which the caller fills "
                        "from it (or, of a target, takes it from), and everything else",
                        tensor.name)};
      }
    }
    return {};
  }

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
    const bool latent = model_.config.kv_lora_rank > 0;
    if (heads % spec_.tp != 0) {
      return invalid(
          fmt::format("megatron tp={} does not divide num_attention_heads = {}", spec_.tp, heads));
    }
    if (!latent && groups % spec_.tp != 0 && spec_.tp % groups != 0) {
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

  Result<void> place_outer(const ModelTensor& tensor, const Piece& piece) {
    const bool last = ranks_.pp == spec_.pp - 1;
    const std::string last_chunk = chunk(spec_.vpp - 1);
    if (piece.role != Role::kEmbedding) {
      return last ? place(tensor, piece, last_chunk) : Result<void>();
    }
    if (ranks_.pp == 0) TRANSFUSE_RETURN_IF_ERROR(place(tensor, piece, chunk(0)));
    if (!last || spec_.pp == 1) return {};
    // A last stage has its own copy where it uses one: for tied embeddings, for further tokens.
    if (model_.config.tie_word_embeddings) {
      TRANSFUSE_RETURN_IF_ERROR(place(tensor, piece, last_chunk, Role::kOutput));
    }
    const bool further = model_.config.mtp_layers > 0 && spec_.mtp != MtpTensors::kNone;
    return further ? place(tensor, piece, last_chunk) : Result<void>();
  }

  Result<void> place_mtp(const ModelTensor& tensor, const Piece& piece) {
    const bool copy = piece.role == Role::kMtpEmbedding || piece.role == Role::kMtpOutput;
    if (copy || ranks_.pp != spec_.pp - 1) return {};
    const std::string prefix = fmt::format("{}mtp.layers.{}.", chunk(spec_.vpp - 1),
                                           tensor.layer - model_.config.num_hidden_layers);
    const auto rule = std::ranges::find(kMtpRules, piece.role, &Rule::role);
    if (rule == kMtpRules.end()) return place(tensor, piece, prefix + "mtp_model_layer.");
    return put(tensor, piece, prefix + std::string(rule->parameter), 0, tp_);
  }

  Result<void> place(const ModelTensor& tensor, const Piece& piece, const std::string& prefix) {
    return place(tensor, piece, prefix, piece.role);
  }
  Result<void> place(const ModelTensor& tensor, const Piece& piece, const std::string& prefix,
                     Role as) {
    if (piece.expert >= 0) return place_expert(tensor, piece, prefix);
    const auto rule = std::ranges::find(kRules, as, &Rule::role);
    TRANSFUSE_CHECK(rule != kRules.end());
    const bool separate = spec_.separate_norms && !rule->separate.empty();
    std::string name = prefix + std::string(separate ? rule->separate : rule->parameter);
    if (tensor.content == Content::kBias && name.ends_with(".weight")) {
      name.replace(name.size() - 6, 6, "bias");
    }
    if (as == Role::kQuery || as == Role::kKey || as == Role::kValue) {
      return place_qkv(tensor, piece, name);
    }
    return put(tensor, piece, name, rule->place + piece.turn, tp_);
  }

  Result<void> place_expert(const ModelTensor& tensor, const Piece& piece,
                            const std::string& prefix) {
    const int64_t held = model_.expert_count() / spec_.ep;
    if (piece.expert / held != ranks_.ep) return {};
    if (tensor.content == Content::kBias && etp_.size > 1) {
      return invalid(fmt::format("megatron etp={}: expected 1 with biases of experts, found {}",
                                 etp_.size, tensor.name));
    }
    const char* linear = piece.role == Role::kDown ? "linear_fc2" : "linear_fc1";
    const char* content = tensor.content == Content::kBias ? "bias" : "weight";
    const int64_t local = piece.expert % held;
    const std::string name =
        spec_.sequential_experts
            ? fmt::format("{}mlp.experts.local_experts.{}.{}.{}", prefix, local, linear, content)
            : fmt::format("{}mlp.experts.{}.{}{}", prefix, linear, content, local);
    return put(tensor, piece, name, piece.role == Role::kUp ? 1 : piece.turn, etp_);
  }

  // All query groups one after another, each [its queries | their gates | key | value], cut evenly
  // over the ranks wherever that falls.
  Result<void> place_qkv(const ModelTensor& tensor, const Piece& piece, const std::string& name) {
    const ModelConfig& c = model_.config;
    const int64_t queries = c.num_attention_heads / c.num_key_value_heads * c.head_dim;
    const int64_t group_rows = (output_gates_ ? 2 : 1) * queries + 2 * c.head_dim;
    TRANSFUSE_ASSIGN_OR_RETURN(const Range held, part_of(tensor, "rows of the linear_qkv",
                                                         c.num_key_value_heads * group_rows, tp_));
    const int64_t run = piece.role == Role::kQuery ? queries : c.head_dim;
    const int64_t number = piece.role == Role::kQuery ? piece.turn
                           : piece.role == Role::kKey ? 2
                                                      : 3;
    const int64_t in_group = number < 2 ? number * queries : group_rows - (4 - number) * c.head_dim;
    for (int64_t group = 0; group < c.num_key_value_heads; ++group) {
      const int64_t at = group * group_rows + in_group;
      const Range kept{std::max(at, held.begin), std::min(at + run, held.end)};
      if (kept.count() <= 0) continue;
      Slice slice = whole_slice(piece);
      slice.rows = {group * run + kept.begin - at, group * run + kept.end - at};
      TRANSFUSE_RETURN_IF_ERROR(
          slices_.add(destination(tensor, name, 4 * group + number), tensor, piece, slice));
    }
    return {};
  }

  // This rank's share of one matrix.
  Result<void> put(const ModelTensor& tensor, const Piece& piece, const std::string& name,
                   int64_t place, const Share& share) {
    const Destination to = destination(tensor, name, place);
    Slice slice = whole_slice(piece);
    switch (split(piece)) {
      case Split::kReplicated:
        break;
      case Split::kVocabulary:
        return put_vocabulary(to, tensor, piece);
      case Split::kColumn:
      case Split::kHeads: {
        const int64_t together = rows_together(tensor, piece);
        TRANSFUSE_ASSIGN_OR_RETURN(slice.rows,
                                   part_of(tensor, together > 1 ? "groups of rows" : "rows",
                                           piece.shape[0] / together, share));
        slice.rows = {slice.rows.begin * together, slice.rows.end * together};
        break;
      }
      case Split::kRow: {
        if (tensor.content == Content::kBias) break;
        TRANSFUSE_ASSIGN_OR_RETURN(slice.columns,
                                   part_of(tensor, "columns", piece.shape[1], share));
        break;
      }
    }
    return slices_.add(to, tensor, piece, slice);
  }

  // Without TransformerEngine there is no linear module that every rank has whole.
  Split split(const Piece& piece) const {
    const bool down = piece.role == Role::kQueryDown || piece.role == Role::kKeyValueDown;
    return down && spec_.separate_norms ? Split::kColumn : split_of(piece.role);
  }

  Result<void> put_vocabulary(Destination to, const ModelTensor& tensor, const Piece& piece) {
    const int64_t rows = piece.shape[0];
    const int64_t multiple = tp_.size > 1 ? spec_.vocab_divisor * tp_.size : 1;
    const int64_t padded =
        spec_.padded_vocab > 0 ? spec_.padded_vocab : (rows + multiple - 1) / multiple * multiple;
    if (padded < rows || padded % tp_.size != 0) {
      return invalid(
          fmt::format("megatron padded_vocab={}: expected a multiple of tp = {} and at least the "
                      "{} rows of {}",
                      padded, tp_.size, rows, tensor.name));
    }
    const Range held = share_of(padded, tp_.rank, tp_.size);
    Slice slice = whole_slice(piece);
    slice.rows = {std::min(held.begin, rows), std::min(held.end, rows)};
    TRANSFUSE_RETURN_IF_ERROR(slices_.add(to, tensor, piece, slice));
    to.place = 1;
    slices_.add_zeros(to, held.count() - slice.rows.count());
    return {};
  }

  Destination destination(const ModelTensor& tensor, const std::string& name, int64_t place) const {
    return {.parameter = name, .dtype = held_dtype(tensor, spec_), .place = place};
  }

  Result<Range> part_of(const ModelTensor& tensor, const char* what, int64_t count,
                        const Share& share) const {
    if (count % share.size == 0) return share_of(count, share.rank, share.size);
    return invalid(fmt::format("megatron {}={} does not divide the {} {} of {}", share.option,
                               share.size, count, what, tensor.name));
  }

  const Model& model_;
  const ParallelSpec& spec_;
  const ParallelRanks& ranks_;
  const Share tp_;
  const Share etp_;
  const bool output_gates_;  // after the queries of a group
  Slices slices_;
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

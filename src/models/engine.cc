// Engines that fuse matrices into modules: qkv_proj, gate_up_proj, stacks of experts.
#include "models/engine.h"

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

constexpr int64_t kVocabularyMultiple = 64;  // of VocabParallelEmbedding, whatever tp is

// Modules that hold several matrices one after another. What has no row here has its own.
struct Fused {
  Role role;
  std::string_view module;  // empty: the engine's own name
  int64_t place;
};
constexpr std::array<Fused, 9> kFused = {{{Role::kQuery, "qkv_proj", 0},
                                          {Role::kKey, "qkv_proj", 1},
                                          {Role::kValue, "qkv_proj", 2},
                                          {Role::kQueryDown, {}, 0},
                                          {Role::kKeyValueDown, {}, 1},
                                          {Role::kGate, "gate_up_proj", 0},
                                          {Role::kUp, "gate_up_proj", 1},
                                          {Role::kSharedGate, "gate_up_proj", 0},
                                          {Role::kSharedUp, "gate_up_proj", 1}}};

// The last part of a module's path exchanged: "a.q_proj.bias" -> "a.qkv_proj.bias".
std::string with_module(const std::string& name, std::string_view module) {
  const size_t suffix = name.rfind('.');
  const size_t begin = name.rfind('.', suffix - 1) + 1;
  return fmt::format("{}{}{}", std::string_view(name).substr(0, begin), module,
                     std::string_view(name).substr(suffix));
}

bool is_shared(Role role) {
  return role == Role::kSharedGate || role == Role::kSharedUp || role == Role::kSharedDown;
}

// One rank's layout in the making.
class Engine {
 public:
  Engine(const Model& model, const ParallelSpec& spec, const EngineRank& rank)
      : model_(model), spec_(spec), rank_(rank), slices_(model) {}

  Result<Layout> build() {
    const std::vector<StagePlace> places = places_of_layers(rank_.pipeline);
    for (const ModelTensor& tensor : model_.tensors) {
      // Layers that predict further tokens are a model of their own.
      if (model_.is_mtp(tensor)) continue;
      const EngineTraits& traits = *rank_.traits;
      if (traits.lacks != nullptr && traits.lacks(model_.config, tensor.role)) continue;
      if (tensor.layer >= 0 && places[static_cast<size_t>(tensor.layer)].stage != rank_.stage) {
        continue;
      }
      TRANSFUSE_RETURN_IF_ERROR(for_each_piece(tensor, [&](const Piece& piece) {
        return tensor.layer >= 0 ? place_matrices(tensor, piece) : place_outer(tensor, piece);
      }));
    }
    return slices_.build();
  }

 private:
  bool is_last_stage() const { return rank_.stage == rank_.pipeline.stages - 1; }
  bool holds_output() const { return is_last_stage() || rank_.output_on_every_stage; }

  // All matrices that take turns stay as they are but those of the convolution, which do so once.
  Result<void> place_matrices(const ModelTensor& tensor, const Piece& piece) {
    if (piece.role != Role::kLinearConv) return place(tensor, piece, tensor.name, piece.role);
    for (const Piece& matrix : apart(tensor, piece)) {
      TRANSFUSE_RETURN_IF_ERROR(place(tensor, matrix, tensor.name, matrix.role));
    }
    return {};
  }

  Result<void> place_outer(const ModelTensor& tensor, const Piece& piece) {
    const bool everywhere =
        rank_.traits->outer_tensors_on_every_stage &&
        !(tensor.role == Role::kFinalNorm && rank_.traits->final_norm_on_last_stage);
    if (tensor.role != Role::kEmbedding) {
      const bool mine = tensor.role == Role::kOutput ? holds_output() : is_last_stage();
      return mine || everywhere ? place(tensor, piece, tensor.name, piece.role) : Result<void>();
    }
    const bool tied = model_.config.tie_word_embeddings;
    const bool as_output = tied && !rank_.own_output && is_last_stage();
    if (rank_.stage == 0 || as_output || everywhere) {
      TRANSFUSE_RETURN_IF_ERROR(place(tensor, piece, tensor.name, piece.role));
    }
    if (!tied || !rank_.own_output || !holds_output()) return {};
    return place(tensor, piece, "lm_head.weight", Role::kOutput);
  }

  Result<void> place(const ModelTensor& tensor, const Piece& piece, const std::string& name,
                     Role role) {
    if (piece.expert >= 0) return place_expert(tensor, piece);
    if (is_shared(role) && rank_.fused_shared) return place_fused_shared(tensor, piece);
    const Share& share = share_of_role(role);
    TRANSFUSE_ASSIGN_OR_RETURN(const Slice slice, cut(tensor, piece, role, share));
    const auto fused = std::ranges::find(kFused, role, &Fused::role);
    const bool own = fused == kFused.end();
    const std::string_view module =
        own || !fused->module.empty() ? (own ? "" : fused->module) : rank_.latent_module;
    const Destination to = destination(tensor, piece, own ? name : with_module(name, module),
                                       own ? piece.turn : fused->place);
    TRANSFUSE_RETURN_IF_ERROR(slices_.add(to, tensor, piece, slice));
    if (is_padded(role)) add_padding(to, piece, slice, share);
    return {};
  }

  const Share& share_of_role(Role role) const {
    switch (role) {
      case Role::kEmbedding:
        return rank_.embedding;
      case Role::kOutput:
        return rank_.output;
      case Role::kGate:
      case Role::kUp:
      case Role::kDown:
        return rank_.dense;
      case Role::kSharedGate:
      case Role::kSharedUp:
      case Role::kSharedDown:
        return rank_.shared;
      default:
        return rank_.attention;
    }
  }

  Destination destination(const ModelTensor& tensor, const Piece& piece, std::string name,
                          int64_t place) const {
    const auto f32_roles = rank_.traits->f32_roles;
    const bool f32 = std::ranges::find(f32_roles, piece.role) != f32_roles.end();
    return {.parameter = renamed(std::move(name), rank_.traits->renames),
            .dtype = f32 ? Dtype::kF32 : held_dtype(tensor, spec_),
            .place = place};
  }

  // What this rank holds of a matrix, of which each of `share.size` ranks has a part.
  Result<Slice> cut(const ModelTensor& tensor, const Piece& piece, Role role,
                    const Share& share) const {
    Slice slice = whole_slice(piece);
    const int64_t rows = piece.shape[0];
    switch (split_of(role)) {
      case Split::kReplicated:
        return slice;
      case Split::kVocabulary: {
        if (!is_padded(role)) return slice;
        TRANSFUSE_ASSIGN_OR_RETURN(const Range padded,
                                   part_of(tensor, "padded rows", padded_rows(rows, share), share));
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
        TRANSFUSE_ASSIGN_OR_RETURN(slice.rows, heads(piece, share));
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

  bool is_padded(Role role) const {
    return role == Role::kOutput || (role == Role::kEmbedding && !rank_.whole_embedding);
  }

  int64_t padded_rows(int64_t rows, const Share& share) const {
    const auto padded_to = [&](int64_t multiple) {
      return (rows + multiple - 1) / multiple * multiple;
    };
    const int64_t padded = padded_to(kVocabularyMultiple);
    if (!rank_.wider_padding || padded % share.size == 0) return padded;
    return padded_to(kVocabularyMultiple * share.size);
  }

  void add_padding(Destination to, const Piece& piece, const Slice& slice, const Share& share) {
    const int64_t held = padded_rows(piece.shape[0], share) / share.size;
    to.place = 1;
    slices_.add_zeros(to, held - slice.rows.count());
  }

  // Keys and values have fewer heads than queries: where those are fewer than ranks, several ranks
  // repeat one.
  Result<Range> heads(const Piece& piece, const Share& share) const {
    const bool repeats = piece.role == Role::kKey || piece.role == Role::kValue;
    const int64_t count =
        repeats ? model_.config.num_key_value_heads : model_.config.num_attention_heads;
    const int64_t head_rows = piece.shape[0] / count;
    if (count % share.size == 0) return share_of(piece.shape[0], share.rank, share.size);
    if (repeats && share.size % count == 0) {
      const int64_t head = share.rank / (share.size / count);
      return Range{head * head_rows, (head + 1) * head_rows};
    }
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} {}: expected a {}divisor of {} = {}", rank_.name, share.option,
                             repeats ? "multiple or a " : "",
                             repeats ? "num_key_value_heads" : "num_attention_heads", count)};
  }

  // One matrix into the stack of all experts of this rank, as often as it has copies there.
  Result<void> place_expert(const ModelTensor& tensor, const Piece& piece) {
    for (const int64_t local : rank_.experts.of(tensor.layer, piece.expert)) {
      TRANSFUSE_RETURN_IF_ERROR(
          put_expert(tensor, piece, ".experts.", {.role = piece.role, .local = local}));
    }
    return {};
  }

  // After the routed experts of every rank.
  Result<void> place_fused_shared(const ModelTensor& tensor, const Piece& piece) {
    const Role role = piece.role == Role::kSharedGate ? Role::kGate
                      : piece.role == Role::kSharedUp ? Role::kUp
                                                      : Role::kDown;
    return put_expert(tensor, piece, ".shared_experts.",
                      {.role = role, .local = rank_.experts.count()});
  }

  struct InStack {
    Role role;
    int64_t local;
  };
  Result<void> put_expert(const ModelTensor& tensor, const Piece& piece, std::string_view module,
                          const InStack& at) {
    const bool down = at.role == Role::kDown;
    TRANSFUSE_ASSIGN_OR_RETURN(const Slice slice, cut(tensor, piece, at.role, rank_.expert_tp));
    const bool second = !down && (at.role == Role::kUp) != spec_.up_before_gate;
    const std::string_view stem = std::string_view(tensor.name).substr(0, tensor.name.find(module));
    const std::string_view content = tensor.content == Content::kBias          ? rank_.expert_bias
                                     : tensor.content == Content::kScale       ? "weight_scale_inv"
                                     : tensor.content == Content::kPackedScale ? "weight_scale"
                                                                               : "weight";
    Destination to = destination(
        tensor, piece,
        fmt::format("{}.{}.{}_{}", stem, rank_.experts_module, down ? "w2" : "w13", content),
        2 * at.local + (second ? 1 : 0));
    const bool bias = tensor.content == Content::kBias;
    if (bias) to.dtype = rank_.expert_bias_dtype.value_or(to.dtype);
    // The bias is added to a sum over the ranks.
    if (down && bias && rank_.expert_tp.rank > 0) {
      slices_.add_zeros(to, slice.rows.count(), 1);
      return {};
    }
    return slices_.add(to, tensor, piece, slice);
  }

  Result<Range> part_of(const ModelTensor& tensor, const char* what, int64_t count,
                        const Share& share) const {
    if (count % share.size == 0) return share_of(count, share.rank, share.size);
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} {} does not divide the {} {} of {}", rank_.name, share.option,
                             count, what, tensor.name)};
  }

  const Model& model_;
  const ParallelSpec& spec_;
  const EngineRank& rank_;
  Slices slices_;
};

}  // namespace

Result<Layout> engine_layout(const Model& model, const ParallelSpec& spec, const EngineRank& rank) {
  return Engine(model, spec, rank).build();
}

Result<Pipeline> engine_pipeline(const Model& model, const ParallelSpec& spec,
                                 int64_t stages_after_spares) {
  if (!spec.layers.empty()) return explicit_pipeline(spec, model.config);
  const int64_t layers = model.config.num_hidden_layers;
  Pipeline even{.stages = spec.pp,
                .layers = std::vector<int64_t>(static_cast<size_t>(spec.pp), layers / spec.pp)};
  for (int64_t spare = 0; spare < layers % spec.pp; ++spare) {
    ++even.layers[static_cast<size_t>(spec.pp - 1 - stages_after_spares - spare)];
  }
  return even;
}

}  // namespace transfuse

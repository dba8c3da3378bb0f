// SGLang layouts: attention, dense layers and experts each cut over ranks of their own
// (docs/layouts.md, "SGLang").
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "models/engine.h"
#include "models/expert_places.h"
#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 13> kOptions = {
    "tp",     "pp",        "dp",         "cp",    "ep",     "etp",    "w13",
    "layers", "redundant", "expert_map", "dense", "shared", "lm_head"};

// When lm_head is a parameter of its own though embeddings are tied.
enum class OwnOutput : uint8_t { kNever, kWithStages, kAlways };

// What SGLang's own class of a family does in its own way.
struct SglangClass {
  const ModelFamily* family = nullptr;
  EngineTraits engine = {};
  bool attention_dp = false;       // cuts attention over the attention ranks, not over all of tp
  bool pipeline = true;            // knows stages
  bool redundant_experts = false;  // makes room for them
  bool whole_embedding = false;    // a plain embedding, neither cut nor padded
  bool fuses_shared = false;       // may put the shared expert beside the routed ones
  bool output_on_every_stage = false;
  OwnOutput own_output = OwnOutput::kNever;
};

constexpr std::array<Role, 1> kF32Router = {Role::kRouter};
constexpr std::array<SglangClass, 8> kClasses = {{
    {.family = &kLlama, .output_on_every_stage = true},
    {.family = &kQwen2, .own_output = OwnOutput::kWithStages},
    {.family = &kQwen3, .attention_dp = true, .own_output = OwnOutput::kWithStages},
    {.family = &kQwen3Moe,
     .attention_dp = true,
     .redundant_experts = true,
     .output_on_every_stage = true,
     .own_output = OwnOutput::kAlways},
    {.family = &kMixtral, .output_on_every_stage = true, .own_output = OwnOutput::kAlways},
    {.family = &kGemma3, .pipeline = false, .whole_embedding = true},
    {.family = &kGlm4Moe,
     .engine = {.f32_roles = kF32Router},
     .attention_dp = true,
     .fuses_shared = true,
     .output_on_every_stage = true,
     .own_output = OwnOutput::kAlways},
    {.family = &kDeepseekV3,
     .engine = {.lacks = [](const ModelConfig& c,
                            Role role) { return role == Role::kRouterBias && !c.noaux_routing; }},
     .attention_dp = true,
     .redundant_experts = true,
     .fuses_shared = true,
     .own_output = OwnOutput::kWithStages},
}};

Unexpected refuse(ErrorCode code, const Model& model, std::string message) {
  return {Error{code, fmt::format("sglang: {}: {}", model.family->model_class, message)}};
}

Result<const SglangClass*> find_class(const Model& model) {
  const auto at = std::ranges::find(kClasses, model.family, &SglangClass::family);
  if (at != kClasses.end()) return &*at;
  return refuse(ErrorCode::kUnsupported, model, "its class in SGLang is not described here");
}

int64_t expert_tp(const ParallelSpec& spec) { return spec.etp == 0 ? spec.tp / spec.ep : spec.etp; }
int64_t attention_tp(const ParallelSpec& spec) { return spec.tp / spec.dp / spec.cp; }

Result<void> check(const ParallelSpec& spec) {
  const auto not_dividing = [&](std::string_view option, int64_t product) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("sglang {}: expected a divisor of tp = {}, found {}", option, spec.tp,
                             product)};
  };
  const int64_t attention = bounded_product({spec.dp, spec.cp});
  if (spec.tp % attention != 0) return not_dividing("dp x cp", attention);
  if (spec.tp % spec.ep != 0) return not_dividing("ep", spec.ep);
  const int64_t experts = bounded_product({spec.ep, expert_tp(spec)});
  if (spec.tp % experts != 0) return not_dividing("ep x etp", experts);
  return {};
}

// What SGLang's class has no code for, or would do wrong.
Result<void> check_class(const Model& model, const ParallelSpec& spec, const SglangClass& own) {
  const auto unsupported = [&](std::string message) {
    return refuse(ErrorCode::kUnsupported, model, std::move(message));
  };
  if (spec.dp * spec.cp > 1 && !own.attention_dp) {
    return unsupported(
        fmt::format("dp={},cp={}: its attention is cut over all ranks of tp", spec.dp, spec.cp));
  }
  if (spec.pp > 1 && !own.pipeline) {
    return unsupported(fmt::format("pp={}: it has no pipeline stages", spec.pp));
  }
  if (spec.pp > 1 && model.config.tie_word_embeddings && own.own_output == OwnOutput::kNever) {
    return unsupported(
        fmt::format("pp={}: with tied embeddings its last stage has no lm_head", spec.pp));
  }
  if (spec.redundant > 0 && !own.redundant_experts) {
    return unsupported(fmt::format("redundant={}: it has no places for them", spec.redundant));
  }
  return {};
}

Result<void> check_sizes(const Model& model, const ParallelSpec& spec, const SglangClass& own) {
  const auto invalid = [&](std::string message) {
    return refuse(ErrorCode::kInvalidArgument, model, std::move(message));
  };
  const int64_t experts = model.expert_count();
  if (experts == 0 && spec.ep > 1) {
    return invalid(fmt::format("ep={}: expected a model with experts", spec.ep));
  }
  if ((experts + spec.redundant) % spec.ep != 0) {
    return invalid(fmt::format("ep={}: expected a divisor of the {} + {} redundant experts",
                               spec.ep, experts, spec.redundant));
  }
  if (spec.pp > model.config.num_hidden_layers) {
    return invalid(fmt::format("pp={}: expected at most num_hidden_layers = {}", spec.pp,
                               model.config.num_hidden_layers));
  }
  if (spec.shared == SharedExperts::kFused &&
      (!own.fuses_shared || model.config.shared_experts != 1)) {
    return invalid(
        fmt::format("shared=fused: expected a class that fuses its one shared expert, "
                    "found {} shared experts",
                    model.config.shared_experts));
  }
  return {};
}

std::string option(const ParallelSpec& spec, int64_t divisor) {
  return divisor == 1 ? fmt::format("tp={}", spec.tp) : fmt::format("tp={} / {}", spec.tp, divisor);
}

Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
  TRANSFUSE_ASSIGN_OR_RETURN(const SglangClass* own, find_class(model));
  TRANSFUSE_RETURN_IF_ERROR(check_class(model, spec, *own));
  TRANSFUSE_RETURN_IF_ERROR(check_sizes(model, spec, *own));
  TRANSFUSE_ASSIGN_OR_RETURN(const Pipeline pipeline, engine_pipeline(model, spec, 0));
  TRANSFUSE_ASSIGN_OR_RETURN(const ExpertPlaces experts,
                             ExpertPlaces::make(model, spec, ranks.ep, spec.ep));
  const Share tp{.rank = ranks.tp, .size = spec.tp, .option = option(spec, 1)};
  const int64_t attention_size = attention_tp(spec);
  const Share attention{.rank = ranks.tp % attention_size,
                        .size = attention_size,
                        .option = option(spec, spec.dp * spec.cp)};
  const Share expert_share{.rank = ranks.etp,
                           .size = expert_tp(spec),
                           .option = option(spec, spec.tp / expert_tp(spec))};
  const bool by_attention = spec.dp > 1 && own->attention_dp;
  return engine_layout(model, spec,
                       {.name = "sglang",
                        .latent_module = "fused_qkv_a_proj_with_mqa",
                        .experts_module = "experts",
                        .expert_bias = "weight_bias",
                        .expert_bias_dtype = Dtype::kF32,
                        .traits = &own->engine,
                        .attention = attention,
                        .embedding = by_attention ? attention : tp,
                        .output = spec.output_by_attention ? attention : tp,
                        .dense = spec.whole_dense ? Share{} : tp,
                        .shared = spec.shared == SharedExperts::kWhole ? Share{} : tp,
                        .expert_tp = expert_share,
                        .whole_embedding = own->whole_embedding,
                        .wider_padding = true,
                        .fused_shared = spec.shared == SharedExperts::kFused,
                        .output_on_every_stage = own->output_on_every_stage,
                        .own_output = own->own_output == OwnOutput::kAlways ||
                                      (own->own_output == OwnOutput::kWithStages && spec.pp > 1),
                        .stage = ranks.pp,
                        .pipeline = pipeline,
                        .experts = experts});
}

// tp fastest, then stages. The ranks of tp are counted twice more: (dp, cp, attention) and
// (expert replicas, ep, etp), the last one fastest.
ParallelRanks ranks_of(const ParallelSpec& spec, int64_t rank) {
  const int64_t tp = rank % spec.tp;
  const int64_t attention = attention_tp(spec);
  const int64_t etp = expert_tp(spec);
  return {.tp = tp,
          .pp = rank / spec.tp,
          .dp = tp / (attention * spec.cp),
          .cp = tp / attention % spec.cp,
          .etp = tp % etp,
          .ep = tp / etp % spec.ep,
          .edp = tp / (etp * spec.ep)};
}

}  // namespace

constinit const Framework kSglang = {
    .name = "sglang",
    .options = kOptions,
    .rank_count = [](const ParallelSpec& s) { return bounded_product({s.tp, s.pp}); },
    .ranks = ranks_of,
    .check = check,
    .make_layout = make};

}  // namespace transfuse

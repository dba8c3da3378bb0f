// vLLM layouts: tensor, pipeline and expert parallelism over all ranks of a stage
// (docs/layouts.md, "vLLM").
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "models/engine.h"
#include "models/expert_places.h"
#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<std::string_view, 8> kOptions = {
    "tp", "pp", "dp", "w13", "placement", "layers", "redundant", "expert_map"};
constexpr std::array<std::string_view, 1> kFlags = {"ep"};

// What the family's own class cannot do.
Result<void> check_class(const Model& model, const ParallelSpec& spec) {
  const EngineTraits& traits = model.family->vllm;
  const ModelConfig& c = model.config;
  const auto unsupported = [&](const std::string& message) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("vllm tp={}: its {} {}", spec.tp, model.family->model_class, message)};
  };
  if (!traits.ties && c.tie_word_embeddings) {
    return unsupported("has an output of its own, found \"tie_word_embeddings\"");
  }
  if (!traits.repeats_heads && c.num_key_value_heads % spec.tp != 0) {
    return unsupported(fmt::format(
        "does not repeat heads: expected tp to divide \"num_key_value_heads\", which is "
        "{}",
        c.num_key_value_heads));
  }
  if (!traits.equal_expert_ranges) return {};
  const int64_t ranks = spec.tp * spec.dp;
  const bool even = !spec.expert_parallel || c.num_experts % ranks == 0;
  const bool copies = spec.redundant > 0 || !spec.expert_map.physical_to_logical.empty();
  if (!even || spec.round_robin || spec.up_before_gate || copies) {
    return unsupported(
        fmt::format("gives every rank an equal range of the {} experts, gate and up in turns: "
                    "expected {}",
                    c.num_experts,
                    even ? "none of placement=round_robin, w13=up_gate, redundant= and expert_map="
                         : fmt::format("their number to be a multiple of tp x dp = {}", ranks)));
  }
  return {};
}

Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
  if (spec.expert_parallel && model.expert_count() == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm ep: expected a model with experts, found {} without",
                             model.config.architecture)};
  }
  TRANSFUSE_RETURN_IF_ERROR(check_class(model, spec));
  TRANSFUSE_ASSIGN_OR_RETURN(const Pipeline pipeline, engine_pipeline(model, spec, 1));
  const int64_t flat =
      spec.tp * spec.dp;  // Experts see all tp and dp ranks of a stage as one group.
  TRANSFUSE_ASSIGN_OR_RETURN(
      const ExpertPlaces experts,
      ExpertPlaces::make(model, spec, ranks.ep, spec.expert_parallel ? flat : 1));
  const Share tp{.rank = ranks.tp, .size = spec.tp, .option = fmt::format("tp={}", spec.tp)};
  const Share expert_tp{
      .rank = ranks.etp,
      .size = spec.expert_parallel ? 1 : flat,
      .option = spec.dp == 1 ? tp.option : fmt::format("tp={} x dp={}", spec.tp, spec.dp)};
  return engine_layout(model, spec,
                       {.name = "vllm",
                        .latent_module = "fused_qkv_a_proj",
                        .experts_module = "experts.routed_experts",
                        .expert_bias = "bias",
                        .traits = &model.family->vllm,
                        .attention = tp,
                        .embedding = tp,
                        .output = tp,
                        .dense = tp,
                        .shared = tp,
                        .expert_tp = expert_tp,
                        .stage = ranks.pp,
                        .pipeline = pipeline,
                        .experts = experts});
}

// tp fastest, then stages, then dp.
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
    .make_layout = make};

}  // namespace transfuse

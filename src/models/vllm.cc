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

Result<Layout> make(const Model& model, const ParallelSpec& spec, const ParallelRanks& ranks) {
  if (spec.expert_parallel && model.expert_count() == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm ep: expected a model with experts, found {} without",
                             model.config.architecture)};
  }
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

// Engines that fuse matrices into modules and cut those over their ranks: what vLLM and SGLang
// share. Each says in an EngineRank what it does in its own way.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "models/expert_places.h"
#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// A rank's part of matrices that `size` ranks share. `option` says which sizes of the spec that is.
struct Share {
  int64_t rank = 0;
  int64_t size = 1;
  std::string option = "tp=1";
};

// All that one rank's layout depends on, besides the model.
struct EngineRank {
  std::string_view name;            // of the engine, for messages
  std::string_view latent_module;   // that fuses q_a_proj and kv_a_proj_with_mqa
  std::string_view experts_module;  // below the layer's MLP
  std::string_view expert_bias;     // w13_ and w2_ come before it
  std::optional<Dtype> expert_bias_dtype = std::nullopt;  // nullopt: as other parameters
  const EngineTraits* traits = nullptr;
  Share attention = {};
  Share embedding = {};
  Share output = {};
  Share dense = {};  // MLPs without experts
  Share shared = {};
  Share expert_tp = {};
  bool whole_embedding = false;  // neither cut nor padded
  bool wider_padding = false;    // of a vocabulary where 64 rows a step do not divide
  bool fused_shared = false;     // the shared expert is the last of every rank's stack
  bool output_on_every_stage = false;
  bool own_output = false;  // though embeddings are tied; else the last stage uses the embedding
  int64_t stage = 0;
  Pipeline pipeline = {};
  ExpertPlaces experts;
};

Result<Layout> engine_layout(const Model& model, const ParallelSpec& spec, const EngineRank& rank);

// `layers=` of the spec, or else an even cut whose spare layers go to one stage each, from the last
// but `stages_after_spares` on backwards.
Result<Pipeline> engine_pipeline(const Model& model, const ParallelSpec& spec,
                                 int64_t stages_after_spares);

}  // namespace transfuse

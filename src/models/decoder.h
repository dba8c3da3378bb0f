// The decoder that the families share: one description, a few traits a family chooses.
#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {

struct DecoderTraits {
  bool qkv_bias = false;          // q, k and v have one, o has none
  bool qk_norm = false;           // per head, before the rotation
  bool latent_attention = false;  // in place of q, k and v
  bool norms_after = false;       // of attention and of the MLP, besides those before them
  // A router and experts in place of the MLP of every layer but the first `dense_layers`.
  bool experts = false;
  bool router_bias = false;  // in f32
  std::string_view experts_module = "mlp";
  std::array<std::string_view, 3> expert_matrices = {"gate_proj", "up_proj", "down_proj"};
};

// In the order of the layers; names and shapes in docs/layouts.md, "Model families". Where the
// config has block scales, linear weights are f8 and each is followed by its scales.
std::vector<ModelTensor> decoder_tensors(const ModelConfig& config, const DecoderTraits& traits);

}  // namespace transfuse

// The decoder that the families share: one description, a few traits a family chooses.
#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {

struct DecoderTraits {
  bool qkv_bias = false;     // of q, k and v
  bool output_bias = false;  // of o
  bool output_gate = false;  // one for every query, after it in the rows of its head
  bool sinks = false;
  bool qk_norm = false;           // per head, before the rotation
  bool latent_attention = false;  // in place of q, k and v
  bool norms_after = false;       // of attention and of the MLP, besides those before them
  // A router and experts in place of the MLP of every layer but the first `dense_layers`.
  bool experts = false;
  bool router_bias = false;  // in f32
  // All of a layer's router and experts, named below `experts_module`. Null: each expert has
  // tensors of its own.
  std::vector<ModelTensor> (*stacked_experts)(const ModelConfig&) = nullptr;
  bool shared_expert = false;  // one, with a gate of its own
  std::string_view experts_module = "mlp";
  std::array<std::string_view, 3> expert_matrices = {"gate_proj", "up_proj", "down_proj"};
  bool mtp_module = false;  // layers that predict further tokens are in "mtp", not after the others
};

// In the order of the layers; names and shapes in docs/layouts.md, "Model families". Where the
// config has block scales, linear weights are f8 and each is followed by its scales.
std::vector<ModelTensor> decoder_tensors(const ModelConfig& config, const DecoderTraits& traits);

}  // namespace transfuse

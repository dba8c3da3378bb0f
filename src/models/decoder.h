// The decoder that Llama, Qwen2 and Qwen3 share: one description, a few traits a family chooses.
#pragma once

#include <cstdint>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {

struct DecoderTraits {
  bool qkv_bias = false;  // q, k and v have one, o has none
  bool qk_norm = false;   // per head, before the rotation
  bool experts = false;   // a router and experts in place of every layer's MLP
};

int64_t decoder_tensor_count(const ModelConfig& config, const DecoderTraits& traits);
// In the order of the layers; names and shapes in docs/layouts.md, "Model families".
std::vector<ModelTensor> decoder_tensors(const ModelConfig& config, const DecoderTraits& traits);

}  // namespace transfuse

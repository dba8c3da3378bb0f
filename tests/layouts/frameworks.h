// What every rank of a framework holds of a model, made as the framework makes it: by slicing,
// reshaping and concatenating whole tensors. Shares no code and no formula with src/models.
#pragma once

#include <cstdint>
#include <vector>

#include "layouts/tensor.h"
#include "transfuse/model.h"

namespace transfuse::frameworks {

// Of the published checkpoint; every element has a value of its own, none is 0.
StateDict hf_state(const ModelConfig& config);

// What the families have.
bool has_qkv_bias(const ModelConfig& config);
bool has_qk_norm(const ModelConfig& config);
bool is_linear(const ModelConfig& config, int64_t layer);  // attention
bool has_experts(const ModelConfig& config, int64_t layer);

// The experts in an engine's physical places, one after another.
std::vector<int64_t> physical_experts(const ModelConfig& config, const ParallelSpec& spec,
                                      int64_t layer);

// `spec` is read as plain numbers; `rank` counts as the framework's launcher would count it.
StateDict rank_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank);

StateDict fsdp_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank);
StateDict vllm_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank);
StateDict sglang_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                       int64_t rank);
StateDict megatron_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                         int64_t rank);

}  // namespace transfuse::frameworks

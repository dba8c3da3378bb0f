// The models and layout pairs that are measured: real Qwen3 shapes, with fewer layers or narrower
// where memory is short, and a synthetic 1T-class mixture of experts.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::bench {

ModelConfig qwen3_4b(int64_t layers = 36);
ModelConfig qwen3_30b_a3b();
// The 398 and the 18,867 tensors of the two models, narrower, so that both weigh about
// `total_bytes`: only the count of tensors (and so the length of runs) differs.
ModelConfig narrow_qwen3_4b(uint64_t total_bytes);
ModelConfig narrow_qwen3_30b_a3b(uint64_t total_bytes);

// `count` tensors of `tensor_bytes` each, which every process holds whole ("hf").
ModelConfig equal_tensors(int64_t count, uint64_t tensor_bytes);

// Of one rank, also of equal_tensors().
Result<Layout> layout_of(const ModelConfig& config, std::string_view spec, int64_t rank);
Result<std::vector<Layout>> layouts_of(const ModelConfig& config, std::string_view spec);

// 61 layers, 384 experts, 70,824 tensors, about 1.0 T parameters. Sources: 8 pipeline stages x 32
// ranks; a rank holds 12 experts whole of each layer of its stage, and 1/32 of the rows of the
// rest. Target: rank 0 of an engine that spreads experts over 8 ranks and holds the rest whole.
struct LayoutPair {
  std::vector<Layout> sources;
  Layout target;
};
Result<LayoutPair> one_trillion_class(bool tiny);

}  // namespace transfuse::bench

// gpt-oss: biases and sinks of attention; all experts of a layer in one tensor, gate and up column
// by column in turns; bf16, or experts in mxfp4.
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "models/decoder.h"
#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

// Rows and columns of every expert's matrix run along these dimensions of `tensor`.
ModelTensor stack(ModelTensor tensor, const Dims& matrix, int rows, int columns) {
  for (int64_t expert = 0; expert < tensor.shape[0]; ++expert) {
    Piece& piece = tensor.pieces.emplace_back(whole_piece(tensor));
    piece.expert = expert;
    piece.shape = matrix;
    piece.row_count = matrix[0];
    piece.origin[0] = expert;
    piece.row_dimension = rows;
    piece.column_dimension = columns;
  }
  if (tensor.role == Role::kGateUp) tensor.turns = {1, 1};
  return tensor;
}

// Packed weights are [out, in], 32 elements of a row in 16 bytes; the others [in, out].
std::vector<ModelTensor> router_and_experts(const ModelConfig& c) {
  const int64_t h = c.hidden_size;
  const int64_t wide = 2 * c.moe_intermediate_size;
  const int64_t x = c.num_experts;
  std::vector<ModelTensor> out = {
      {"router.weight", {x, h}, Role::kRouter},
      {"router.bias", {x}, Role::kRouter, Content::kBias},
      stack({"experts.gate_up_proj_bias", {x, wide}, Role::kGateUp, Content::kBias}, {wide}, 1, 1),
      stack({"experts.down_proj_bias", {x, h}, Role::kDown, Content::kBias}, {h}, 1, 1)};
  for (const bool down : {false, true}) {
    const std::string name = down ? "experts.down_proj" : "experts.gate_up_proj";
    const Role role = down ? Role::kDown : Role::kGateUp;
    const int64_t rows = down ? h : wide;
    const int64_t columns = down ? c.moe_intermediate_size : h;
    if (!c.packed_experts) {
      out.push_back(stack({name, {x, columns, rows}, role}, {rows, columns}, 2, 1));
      continue;
    }
    const int64_t blocks = columns / 32;
    out.push_back(
        stack({name + "_blocks", {x, rows, blocks, 16}, role, Content::kWeight, Dtype::kU8},
              {rows, blocks}, 1, 2));
    out.push_back(
        stack({name + "_scales", {x, rows, blocks}, role, Content::kPackedScale, Dtype::kU8},
              {rows, blocks}, 1, 2));
  }
  return out;
}

constexpr std::array<RequiredValue, 1> kRequired = {{{"attention_bias", "true"}}};
constexpr std::array<SizeField, 1> kSizes = {
    {{"intermediate_size", &ModelConfig::moe_intermediate_size}}};
constexpr std::array<Rename, 2> kVllmNames = {
    {{".self_attn.", ".attn."}, {".embed_tokens.", ".embedding."}}};

}  // namespace

// GptOssConfig of transformers 4.57: head_dim = 64.
constinit const ModelFamily kGptOss = {
    .architecture = "gpt_oss",
    .model_class = "GptOssForCausalLM",
    .default_head_dim = 64,
    .expert_count = "num_local_experts",
    .packed_experts = true,
    .sizes = kSizes,
    .required_values = kRequired,
    .tensors =
        [](const ModelConfig& c) {
          return decoder_tensors(c, {.qkv_bias = true,
                                     .output_bias = true,
                                     .sinks = true,
                                     .experts = true,
                                     .stacked_experts = router_and_experts});
        },
    .vllm = {.outer_tensors_on_every_stage = true,
             .ties = false,
             .repeats_heads = false,
             .equal_expert_ranges = true,
             .renames = kVllmNames},
};

}  // namespace transfuse

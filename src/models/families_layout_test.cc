// What layouts of Mixtral, Gemma 3, GLM-4.5 and DeepSeek-V3 hold in which dtype, and every mistake
// by name. What the parameters hold is compared with the frameworks' own way in tests/layouts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

ModelConfig glm() {
  return {.architecture = "glm4_moe",
          .hidden_size = 8,
          .intermediate_size = 16,
          .moe_intermediate_size = 8,
          .num_hidden_layers = 3,
          .num_attention_heads = 8,
          .num_key_value_heads = 2,
          .head_dim = 2,
          .vocab_size = 67,
          .num_experts = 6,
          .dense_layers = 1,
          .shared_experts = 1,
          .mtp_layers = 1};
}

ModelConfig deepseek() {
  ModelConfig config = glm();
  config.architecture = "deepseek_v3";
  config.num_key_value_heads = 8;
  config.head_dim = 5;
  config.q_lora_rank = 12;
  config.kv_lora_rank = 7;
  config.qk_nope_head_dim = 4;
  config.qk_rope_head_dim = 1;
  config.v_head_dim = 4;
  return config;
}

ModelConfig deepseek_f8() {
  ModelConfig config = deepseek();
  config.scale_block_rows = 4;
  config.scale_block_columns = 4;
  return config;
}

Layout layout(const ModelConfig& config, const std::string& spec) {
  return make_layout(config, parse_parallel_spec(spec).value(), 0).value();
}

Dtype dtype_of(const Layout& layout, const std::string& parameter) {
  return layout.parameters()[layout.find_parameter(parameter).value()].dtype;
}

TEST(FamilyLayouts, TensorsWithADtypeOfTheirOwnKeepItWhateverTheSpecSays) {
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  const std::string down = "model.layers.0.mlp.down_proj.weight";
  for (const char* spec : {"hf", "fsdp:dp=2,dtype=f16", "vllm", "hf:experts=stacked"}) {
    EXPECT_EQ(dtype_of(layout(glm(), spec), bias), Dtype::kF32) << spec;
  }
  EXPECT_EQ(dtype_of(layout(glm(), "megatron"), "decoder.layers.1.mlp.router.expert_bias"),
            Dtype::kF32);
  for (const char* spec : {"hf:dtype=f32", "fsdp:dp=2", "vllm:dtype=f16"}) {
    EXPECT_EQ(dtype_of(layout(deepseek_f8(), spec), down), Dtype::kF8E4M3) << spec;
    EXPECT_EQ(dtype_of(layout(deepseek_f8(), spec), down + "_scale_inv"), Dtype::kF32) << spec;
  }
  EXPECT_EQ(dtype_of(layout(deepseek_f8(), "vllm:dtype=f16"), "model.norm.weight"), Dtype::kF16);
}

TEST(FamilyLayouts, VllmHoldsTheRouterOfGlmInF32AndThatOfOthersAsTheRest) {
  const std::string router = "model.layers.1.mlp.gate.weight";
  EXPECT_EQ(dtype_of(layout(glm(), "vllm"), router), Dtype::kF32);
  EXPECT_EQ(dtype_of(layout(glm(), "hf"), router), Dtype::kBF16);
  EXPECT_EQ(dtype_of(layout(deepseek(), "vllm"), router), Dtype::kBF16);
}

TEST(FamilyLayouts, VllmHasTheRouterBiasOfDeepseekOnlyWithTheMethodThatUsesIt) {
  const std::string bias = "model.layers.1.mlp.gate.e_score_correction_bias";
  EXPECT_FALSE(layout(deepseek(), "vllm").find_parameter(bias));
  ModelConfig named = deepseek();
  named.noaux_routing = true;
  EXPECT_TRUE(layout(named, "vllm").find_parameter(bias));
  EXPECT_TRUE(layout(deepseek(), "hf").find_parameter(bias));
}

TEST(FamilyLayouts, LayersThatPredictFurtherTokensAreHeldAsTheSpecSays) {
  const auto held = [](const std::string& spec) {
    const Layout found = layout(glm(), spec);
    int64_t count = 0;
    for (const TensorSpec& tensor : found.tensors()) {
      count += tensor.name.starts_with("model.layers.3.") ? 1 : 0;
    }
    return count;
  };
  const int64_t all = 6 + 6 + 2 + 3 * 7;  // of its own, attention with norms, routing, MLPs
  EXPECT_EQ(held("hf"), all);
  EXPECT_EQ(held("hf:mtp=all"), all);
  EXPECT_EQ(held("fsdp:dp=2,mtp=shared"), all - 2);
  EXPECT_EQ(held("hf:mtp=none,experts=stacked"), 0);
  EXPECT_EQ(held("megatron"), all - 2);
  EXPECT_EQ(held("megatron:mtp=none"), 0);
  EXPECT_EQ(held("vllm"), 0);
}

TEST(FamilyLayouts, EveryMistakeIsNamed) {
  struct Mistake {
    ModelConfig config;
    std::string spec;
    std::string words;
    ErrorCode code = ErrorCode::kInvalidArgument;
  };
  ModelConfig dense = glm();
  dense.architecture = "gemma3_text";
  dense.mtp_layers = dense.dense_layers = dense.num_experts = 0;
  ModelConfig wide = deepseek_f8();
  wide.intermediate_size = 18;
  ModelConfig odd = deepseek();
  odd.qk_rope_head_dim = 2;
  const std::vector<Mistake> mistakes = {
      {deepseek(), "vllm:tp=16", "expected a divisor of num_attention_heads = 8"},
      {glm(), "vllm:tp=16", "expected a divisor of num_attention_heads = 8"},
      {deepseek(), "megatron:tp=3", "tp=3 does not divide num_attention_heads = 8"},
      {odd, "megatron:tp=2,norms=separate", "tp=2 does not divide the 9 rows of model.layers.0."},
      {dense, "hf:experts=stacked", "expected a model with experts"},
      {deepseek_f8(), "fsdp:dp=2,experts=stacked", "without block scales"},
      {glm(), "fsdp:tp=2,experts=stacked", "expected tp=1"},
      {dense, "vllm:ep", "gemma3_text without"},
      {deepseek_f8(), "megatron", "f8 weights and block scales", ErrorCode::kUnsupported},
      {wide, "vllm:tp=2", "at row 9 of 18: expected a multiple of 4"},
      {wide, "fsdp:tp=2", "cut every 9 of 18 rows: expected a multiple of 4"},
  };
  for (const Mistake& mistake : mistakes) {
    const auto layouts = make_layouts(mistake.config, parse_parallel_spec(mistake.spec).value());
    ASSERT_FALSE(layouts) << mistake.spec;
    EXPECT_EQ(layouts.error().code, mistake.code) << mistake.spec;
    EXPECT_THAT(layouts.error().message, HasSubstr(mistake.words)) << mistake.spec;
  }
}

TEST(ParallelSpec, WordsOfExpertsAndMtpAreThoseOfTheFramework) {
  EXPECT_TRUE(parse_parallel_spec("hf:experts=stacked")->stacked_experts);
  EXPECT_FALSE(parse_parallel_spec("fsdp:experts=single")->stacked_experts);
  EXPECT_TRUE(parse_parallel_spec("megatron:experts=sequential")->sequential_experts);
  EXPECT_EQ(parse_parallel_spec("megatron:mtp=shared")->mtp, MtpTensors::kShared);
  const std::vector<std::pair<std::string, std::string>> mistakes = {
      {"hf:experts=sequential", "expected single or stacked"},
      {"megatron:experts=stacked", "expected grouped or sequential"},
      {"vllm:experts=stacked", "vllm has no experts"},
      {"vllm:mtp=none", "vllm has no mtp"},
      {"hf:mtp=some", "expected one of all, shared, none"},
  };
  for (const auto& [text, words] : mistakes) {
    const auto spec = parse_parallel_spec(text);
    ASSERT_FALSE(spec) << text;
    EXPECT_THAT(spec.error().message, HasSubstr(words)) << text;
  }
  // Specs are also made by hand.
  for (const ParallelSpec& bad : {ParallelSpec{.family = "vllm", .stacked_experts = true},
                                  ParallelSpec{.family = "megatron", .stacked_experts = true},
                                  ParallelSpec{.family = "hf", .sequential_experts = true},
                                  ParallelSpec{.family = "vllm", .mtp = MtpTensors::kNone}}) {
    EXPECT_FALSE(make_layouts(glm(), bad)) << bad.family;
  }
}

}  // namespace
}  // namespace transfuse

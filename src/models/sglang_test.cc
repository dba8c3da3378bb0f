// SGLang: names and sizes at real scale, and what its classes cannot do.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
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

ModelConfig qwen3_30b_a3b() {
  return {.architecture = "qwen3_moe",
          .hidden_size = 2048,
          .intermediate_size = 6144,
          .moe_intermediate_size = 768,
          .num_hidden_layers = 48,
          .num_attention_heads = 32,
          .num_key_value_heads = 4,
          .head_dim = 128,
          .vocab_size = 151936,
          .num_experts = 128};
}

ModelConfig small(const std::string& architecture, bool tied = false) {
  return {.architecture = architecture,
          .hidden_size = 6,
          .intermediate_size = 16,
          .num_hidden_layers = 2,
          .num_attention_heads = 8,
          .num_key_value_heads = 2,
          .head_dim = 2,
          .vocab_size = 67,
          .tie_word_embeddings = tied};
}

ModelConfig small_moe(const std::string& architecture) {
  ModelConfig config = small(architecture);
  config.moe_intermediate_size = 8;
  config.num_experts = 4;
  return config;
}

ParallelSpec spec(const std::string& text) { return parse_parallel_spec(text).value(); }

int64_t elements(const Layout& layout, const std::string& name) {
  const auto at = layout.find_parameter(name);
  EXPECT_TRUE(at) << name;
  return at ? layout.parameters()[*at].element_count : -1;
}

TEST(SglangLayout, NamesAndSizesOfQwen3_30B_A3BWithAttentionRanksAndExpertRanks) {
  const Layout layout = make_layout(qwen3_30b_a3b(), spec("sglang:tp=8,dp=4,ep=4"), 5).value();
  // Embedding, norm, lm_head; 9 of every layer.
  EXPECT_EQ(layout.parameters().size(), 3U + 48U * 9U);
  const std::string layer = "model.layers.47.";
  EXPECT_EQ(elements(layout, layer + "self_attn.qkv_proj.weight"), (16 + 2 + 2) * 128 * 2048);
  EXPECT_EQ(elements(layout, layer + "self_attn.o_proj.weight"), 2048 * 2048);
  EXPECT_EQ(elements(layout, layer + "mlp.experts.w13_weight"), 32 * 768 * 2048);
  EXPECT_EQ(elements(layout, layer + "mlp.experts.w2_weight"), 32 * 2048 * 384);
  EXPECT_EQ(elements(layout, layer + "mlp.gate.weight"), 128 * 2048);
  EXPECT_EQ(elements(layout, "model.embed_tokens.weight"), 151936 / 2 * 2048);
  EXPECT_EQ(elements(layout, "lm_head.weight"), 151936 / 8 * 2048);
}

TEST(SglangLayout, RanksAreCountedByAttentionAndByExperts) {
  const ParallelSpec s = spec("sglang:tp=8,dp=2,cp=2,ep=2,etp=2,pp=2");
  const ParallelRanks last = parallel_ranks(s, 15).value();
  EXPECT_EQ(last, (ParallelRanks{.tp = 7, .pp = 1, .dp = 1, .cp = 1, .etp = 1, .ep = 1, .edp = 1}));
  const ParallelRanks ranks = parallel_ranks(s, 10).value();
  EXPECT_EQ(ranks,
            (ParallelRanks{.tp = 2, .pp = 1, .dp = 0, .cp = 1, .etp = 0, .ep = 1, .edp = 0}));
  EXPECT_EQ(make_layout(qwen3_30b_a3b(), s, ranks)->digest(),
            make_layout(qwen3_30b_a3b(), s, 10)->digest());
}

TEST(SglangLayout, TheLastStagesHaveTheSpareLayers) {
  ModelConfig config = small("qwen2");
  config.num_hidden_layers = 7;
  const std::vector<std::string> firsts = {"0", "1", "3", "5"};
  const auto layouts = make_layouts(config, spec("sglang:pp=4")).value();
  for (size_t stage = 0; stage < 4; ++stage) {
    EXPECT_TRUE(
        layouts[stage].find_parameter("model.layers." + firsts[stage] + ".input_layernorm.weight"));
    EXPECT_EQ(layouts[stage]
                  .find_parameter("model.layers." + std::to_string(stage == 0 ? 1 : 0) +
                                  ".input_layernorm.weight")
                  .has_value(),
              false);
  }
}

TEST(SglangLayout, VocabulariesThatRanksDoNotDivideArePaddedFurther) {
  ModelConfig config = small("llama");
  config.num_attention_heads = 6;
  config.num_key_value_heads = 3;
  config.intermediate_size = 18;
  const auto layouts = make_layouts(config, spec("sglang:tp=3")).value();
  EXPECT_EQ(elements(layouts[0], "lm_head.weight"), 192 / 3 * 6);
  config.vocab_size = 190;  // 192 rows already
  EXPECT_EQ(elements(make_layouts(config, spec("sglang:tp=3")).value()[0], "lm_head.weight"),
            192 / 3 * 6);
}

TEST(SglangLayout, DtypesOfRoutersAreThoseOfItsClasses) {
  ModelConfig config = small_moe("glm4_moe");
  config.shared_experts = 1;
  const Layout layout = make_layout(config, spec("sglang"), 0).value();
  const auto dtype = [&](const std::string& name) {
    return layout.parameters()[layout.find_parameter(name).value()].dtype;
  };
  EXPECT_EQ(dtype("model.layers.0.mlp.gate.weight"), Dtype::kF32);
  EXPECT_EQ(dtype("model.layers.0.mlp.gate.e_score_correction_bias"), Dtype::kF32);
  EXPECT_EQ(dtype("model.layers.0.mlp.experts.w13_weight"), Dtype::kBF16);
}

TEST(SglangLayout, SizesThatDoNotDivideAreNamed) {
  const std::vector<std::pair<std::string, std::string>> specs = {
      {"sglang:tp=4,dp=3", "dp x cp: expected a divisor of tp = 4, found 3"},
      {"sglang:tp=4,dp=2,cp=4", "dp x cp: expected a divisor of tp = 4, found 8"},
      {"sglang:tp=4,ep=3", "ep: expected a divisor of tp = 4, found 3"},
      {"sglang:tp=4,ep=8", "ep: expected a divisor of tp = 4, found 8"},
      {"sglang:tp=4,ep=2,etp=4", "ep x etp: expected a divisor of tp = 4, found 8"},
      {"sglang:tp=2,shared=both", "shared=both: expected one of split, whole, fused"},
      {"sglang:tp=2,placement=linear", "sglang has no placement"},
      {"sglang:tp=2,ep", "expected key=value"},
      {"sglang:tp=2,dense=some", "dense=some: expected split or whole"},
  };
  for (const auto& [text, message] : specs) {
    const auto parsed = parse_parallel_spec(text);
    ASSERT_FALSE(parsed) << text;
    EXPECT_EQ(parsed.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(parsed.error().message, HasSubstr(message));
  }
  const std::vector<std::pair<std::string, std::string>> layouts = {
      {"sglang:tp=8,ep=8", "ep=8: expected a divisor of the 4"},
      {"sglang:tp=16", "num_attention_heads = 8"},
      {"sglang:tp=16,dp=2,ep=1", "tp=16 does not divide the 8 rows"},
      {"sglang:pp=3", "pp=3: expected at most num_hidden_layers = 2"},
      {"sglang:shared=fused", "shared=fused"},
      {"sglang:pp=2,layers=2/1", "3 layers together"},
  };
  for (const auto& [text, message] : layouts) {
    const auto made = make_layouts(small_moe("qwen3_moe"), spec(text));
    ASSERT_FALSE(made) << text;
    EXPECT_EQ(made.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(made.error().message, HasSubstr(message));
  }
  EXPECT_THAT(make_layouts(small("qwen3"), spec("sglang:tp=2,ep=2")).error().message,
              HasSubstr("Qwen3ForCausalLM: ep=2: expected a model with experts"));
}

TEST(SglangLayout, WhatAClassOfSglangCannotDoIsRefusedByName) {
  const std::vector<std::pair<ModelConfig, std::string>> refused = {
      {small("llama"), "sglang:tp=4,dp=2"},
      {small("qwen2"), "sglang:tp=4,cp=2"},
      {small_moe("mixtral"), "sglang:tp=4,dp=2"},
      {small("gemma3_text", true), "sglang:tp=2,dp=2"},
      {small("gemma3_text", true), "sglang:pp=2"},
      {small("llama", true), "sglang:pp=2"},
      {small_moe("mixtral"), "sglang:tp=2,ep=2,redundant=2"},
      {small_moe("glm4_moe"), "sglang:tp=2,ep=2,redundant=2"},
  };
  for (const auto& [config, text] : refused) {
    const auto made = make_layouts(config, spec(text));
    ASSERT_FALSE(made) << config.architecture << " " << text;
    EXPECT_EQ(made.error().code, ErrorCode::kUnsupported);
    EXPECT_THAT(made.error().message, HasSubstr("ForCausalLM"));
  }
}

}  // namespace
}  // namespace transfuse

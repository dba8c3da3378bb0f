// Megatron-Core specs: ranks, names, sizes, and every mistake by name. What the parameters hold is
// compared with the framework's own way in tests/layouts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

ParallelSpec spec(const std::string& text) { return parse_parallel_spec(text).value(); }

ModelConfig dense() {
  return {.architecture = "qwen2",
          .hidden_size = 6,
          .intermediate_size = 16,
          .num_hidden_layers = 7,
          .num_attention_heads = 8,
          .num_key_value_heads = 2,
          .head_dim = 2,
          .vocab_size = 67};
}

ModelConfig moe() {
  ModelConfig config = dense();
  config.architecture = "qwen3_moe";
  config.num_hidden_layers = 4;
  config.moe_intermediate_size = 8;
  config.num_experts = 6;
  return config;
}

std::map<std::string, int64_t> sizes(const Layout& layout) {
  std::map<std::string, int64_t> out;
  for (const ParameterSpec& p : layout.parameters()) out[p.name] = p.element_count;
  return out;
}

TEST(MegatronRanks, TensorRanksAreFastestAndStagesSlowest) {
  const ParallelSpec s = spec("megatron:tp=2,cp=2,pp=2,dp=2");
  ASSERT_EQ(s.rank_count(), 16);
  int64_t rank = 0;
  for (int64_t pp = 0; pp < 2; ++pp) {
    for (int64_t dp = 0; dp < 2; ++dp) {
      for (int64_t cp = 0; cp < 2; ++cp) {
        for (int64_t tp = 0; tp < 2; ++tp) {
          const ParallelRanks found = parallel_ranks(s, rank++).value();
          EXPECT_EQ(found.tp, tp);
          EXPECT_EQ(found.cp, cp);
          EXPECT_EQ(found.dp, dp);
          EXPECT_EQ(found.pp, pp);
          EXPECT_EQ(found.etp, tp);  // as tp where a spec does not say
          EXPECT_EQ(found.edp, 2 * dp + cp);
        }
      }
    }
  }
}

TEST(MegatronRanks, ExpertsCutTheSameRanksIntoAGridOfTheirOwn) {
  const ParallelSpec s = spec("megatron:tp=2,ep=2,etp=1");
  ASSERT_EQ(s.rank_count(), 2);
  EXPECT_EQ(parallel_ranks(s, 1).value(), (ParallelRanks{.tp = 1, .ep = 1}));
  const ParallelSpec wide = spec("megatron:tp=2,pp=3,ep=3,etp=4");
  ASSERT_EQ(wide.rank_count(), 36);
  EXPECT_EQ(parallel_ranks(wide, 12 + 7).value(),
            (ParallelRanks{.tp = 1, .pp = 1, .dp = 3, .etp = 3, .ep = 1}));
}

TEST(MegatronRanks, AStageHasAsFewRanksAsBothGridsNeedUnlessDpAsksForMore) {
  const std::map<std::string, int64_t> counts = {
      {"megatron", 1},
      {"megatron:tp=4", 4},
      {"megatron:tp=2,ep=4", 8},
      {"megatron:tp=2,ep=4,etp=1", 4},
      {"megatron:tp=4,ep=6,etp=1", 12},
      {"megatron:tp=2,cp=3,ep=4,etp=1", 12},
      {"megatron:tp=2,ep=4,etp=1,dp=2", 4},
      {"megatron:tp=2,ep=4,etp=1,dp=4", 8},
      {"megatron:tp=2,pp=2,ep=4,etp=1,dp=4,replicas=3", 48},
  };
  for (const auto& [text, count] : counts) EXPECT_EQ(spec(text).rank_count(), count) << text;
}

TEST(MegatronRanks, RanksFromTheCallersOwnGroupsGiveTheSameLayouts) {
  for (const char* text : {"megatron:tp=2,pp=2,ep=3,etp=1,dp=3", "vllm:tp=2,pp=2,dp=2,ep",
                           "vllm:tp=2,dp=2", "fsdp:dp=3,tp=2"}) {
    const ParallelSpec s = spec(text);
    for (int64_t rank = 0; rank < s.rank_count(); ++rank) {
      const ParallelRanks ranks = parallel_ranks(s, rank).value();
      EXPECT_EQ(make_layout(moe(), s, ranks)->digest(), make_layout(moe(), s, rank)->digest());
    }
  }
  const auto beyond = make_layout(moe(), spec("megatron:tp=2,ep=2"), ParallelRanks{.ep = 2});
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(beyond.error().message, HasSubstr("ep rank 2"));
}

TEST(MegatronLayout, HasTheNamesAndSizesOfTransformerEngineModules) {
  ModelConfig config = dense();
  config.num_hidden_layers = 1;
  const auto found = sizes(make_layout(config, spec("megatron:tp=2"), 1).value());
  const std::map<std::string, int64_t> expected = {
      {"embedding.word_embeddings.weight", 128 * 6},  // 67 rows padded to 256
      {"output_layer.weight", 128 * 6},
      {"decoder.final_layernorm.weight", 6},
      {"decoder.layers.0.self_attention.linear_qkv.weight", 12 * 6},
      {"decoder.layers.0.self_attention.linear_qkv.bias", 12},
      {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", 6},
      {"decoder.layers.0.self_attention.linear_proj.weight", 8 * 6},
      {"decoder.layers.0.mlp.linear_fc1.weight", 16 * 6},
      {"decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 6},
      {"decoder.layers.0.mlp.linear_fc2.weight", 8 * 6},
  };
  EXPECT_EQ(found, expected);
}

TEST(MegatronLayout, ChunksOfAStageHaveNamesOfTheirOwnAndLayersCountFromZeroInEach) {
  const Layout first = make_layout(moe(), spec("megatron:pp=2,vpp=2"), 0).value();
  const Layout last = make_layout(moe(), spec("megatron:pp=2,vpp=2"), 1).value();
  EXPECT_TRUE(first.find_parameter("0:embedding.word_embeddings.weight"));
  EXPECT_FALSE(first.find_parameter("1:output_layer.weight"));
  EXPECT_TRUE(last.find_parameter("1:output_layer.weight"));
  EXPECT_TRUE(last.find_parameter("1:decoder.final_layernorm.weight"));
  const auto layer_of = [](const Layout& layout, const std::string& parameter) {
    const uint32_t p =
        layout.find_parameter(parameter + ":decoder.layers.0.mlp.router.weight").value();
    for (const Tile& tile : layout.tiles()) {
      if (tile.parameter == p) return layout.tensors()[tile.tensor].name;
    }
    return std::string();
  };
  EXPECT_EQ(layer_of(first, "0"), "model.layers.0.mlp.gate.weight");
  EXPECT_EQ(layer_of(last, "0"), "model.layers.1.mlp.gate.weight");
  EXPECT_EQ(layer_of(first, "1"), "model.layers.2.mlp.gate.weight");
  EXPECT_EQ(layer_of(last, "1"), "model.layers.3.mlp.gate.weight");
}

TEST(MegatronLayout, TheVocabularyIsPaddedOnlyUnderTensorParallelism) {
  const auto rows = [](const std::string& text) {
    const Layout layout = make_layout(dense(), spec(text), 0).value();
    return sizes(layout).at("embedding.word_embeddings.weight") / 6;
  };
  EXPECT_EQ(rows("megatron"), 67);
  EXPECT_EQ(rows("megatron:vocab_divisor=64"), 67);
  EXPECT_EQ(rows("megatron:tp=2"), 128);
  EXPECT_EQ(rows("megatron:tp=2,vocab_divisor=5"), 35);
  const auto layouts = make_layouts(dense(), spec("megatron:tp=8,vocab_divisor=16")).value();
  const Layout& last = layouts[7];  // 128 rows: ranks 5 to 7 are all padding
  EXPECT_FALSE(last.fills().empty());
  EXPECT_TRUE(last.tiles_of(last.find_tensor("lm_head.weight").value()).empty());
}

TEST(MegatronLayout, APaddedVocabularyCanBeGivenAsItIs) {
  const auto rows = [](const std::string& text) {
    return sizes(make_layout(dense(), spec(text), 0).value())
               .at("embedding.word_embeddings.weight") /
           6;
  };
  EXPECT_EQ(rows("megatron:padded_vocab=128"), 128);
  EXPECT_EQ(rows("megatron:tp=2,padded_vocab=68"), 34);
  for (const char* text : {"megatron:padded_vocab=66", "megatron:tp=2,padded_vocab=69"}) {
    const auto layout = make_layout(dense(), spec(text), 0);
    ASSERT_FALSE(layout) << text;
    EXPECT_THAT(layout.error().message, HasSubstr("at least the 67 rows of model.embed_tokens"));
  }
}

TEST(MegatronLayout, EmbeddingAndLossMayCountAsLayers) {
  const auto counts = [](const std::string& options, int64_t layers, size_t chunks) {
    ModelConfig config = dense();
    config.num_hidden_layers = layers;
    std::vector<int64_t> held;
    for (const Layout& layout : make_layouts(config, spec("megatron:" + options)).value()) {
      for (size_t chunk = 0; chunk < chunks; ++chunk) {
        const std::string prefix = chunks > 1 ? std::to_string(chunk) + ":" : "";
        int64_t norms = 0;
        for (const ParameterSpec& p : layout.parameters()) {
          norms += p.name.starts_with(prefix + "decoder.layers.") &&
                   p.name.ends_with("linear_qkv.layer_norm_weight");
        }
        held.push_back(norms);
      }
    }
    return held;  // [stage][chunk]
  };
  using Counts = std::vector<int64_t>;
  EXPECT_EQ(counts("pp=2,account_for_embedding", 7, 1), (Counts{3, 4}));
  EXPECT_EQ(counts("pp=2,account_for_loss", 7, 1), (Counts{4, 3}));
  EXPECT_EQ(counts("pp=3,account_for_embedding,account_for_loss", 7, 1), (Counts{2, 3, 2}));
  EXPECT_EQ(counts("pp=2,vpp=2,account_for_embedding,account_for_loss", 6, 2),
            (Counts{1, 2, 2, 1}));
  EXPECT_EQ(counts("account_for_loss", 3, 1), (Counts{3}));
  EXPECT_EQ(counts("pp=2,account_for_loss", 1, 1), (Counts{1, 0}));
}

TEST(MegatronLayout, TiedEmbeddingsHaveACopyOfTheirOwnOnTheLastStageOnly) {
  ModelConfig config = dense();
  config.tie_word_embeddings = true;
  EXPECT_FALSE(make_layout(config, spec("megatron"), 0)->find_parameter("output_layer.weight"));
  const auto stages = make_layouts(config, spec("megatron:pp=7")).value();
  for (size_t stage = 0; stage < 7; ++stage) {
    EXPECT_EQ(stages[stage].find_parameter("output_layer.weight").has_value(), stage == 6);
    EXPECT_EQ(stages[stage].find_tensor("model.embed_tokens.weight").has_value(),
              stage == 0 || stage == 6);
  }
}

TEST(MegatronLayout, EveryMistakeIsNamed) {
  ModelConfig config = moe();
  config.num_key_value_heads = 4;
  const std::map<std::string, std::string> mistakes = {
      {"megatron:tp=3", "tp=3 does not divide num_attention_heads = 8"},
      {"megatron:tp=16", "tp=16 does not divide num_attention_heads = 8"},
      {"megatron:ep=4", "ep=4 does not divide num_experts = 6"},
      {"megatron:etp=3", "etp=3 does not divide the 8 rows of model.layers.0.mlp.experts.0.gate"},
      {"megatron:pp=3", "4 layers in the model for 3 chunks"},
      {"megatron:pp=2,vpp=3", "4 layers in the model for 6 chunks"},
      {"megatron:pp=2,first=1,last=2", "1 layers left for 0 chunks"},
      {"megatron:pp=2,first=3,last=3", "-2 layers left for 0 chunks"},
      {"megatron:pp=4,first=2", "2 layers left for 3 chunks"},
      {"megatron:pp=2,vpp=2,first=1", "3 layers left for 2 chunks"},
      {"megatron:pp=3,vpp=2,first=1,last=1", "1 layers in the first stage for 2 chunks"},
      {"megatron:pp=2,account_for_loss", "5 layers with those that count as one for 2 chunks"},
      {"megatron:pp=2,layers=3/2", "5 layers together, expected num_hidden_layers = 4"},
      {"megatron:pp=2,layers=9/2", "expected 0 to 4 layers a stage, found 9"},
  };
  for (const auto& [text, words] : mistakes) {
    const auto layouts = make_layouts(config, spec(text));
    ASSERT_FALSE(layouts) << text;
    EXPECT_EQ(layouts.error().code, ErrorCode::kInvalidArgument) << text;
    EXPECT_THAT(layouts.error().message, HasSubstr(words)) << text;
  }
  config = dense();
  EXPECT_THAT(make_layouts(config, spec("megatron:ep=2")).error().message,
              HasSubstr("qwen2 without"));
  config.num_attention_heads = 12;
  config.num_key_value_heads = 3;
  EXPECT_THAT(make_layouts(config, spec("megatron:tp=4")).error().message,
              HasSubstr("num_key_value_heads = 3"));
  config.num_attention_heads = 8;
  config.num_key_value_heads = 1;  // (8 + 2) x 2 rows
  EXPECT_THAT(make_layouts(config, spec("megatron:tp=8")).error().message,
              HasSubstr("20 rows of the linear_qkv of model.layers.0.self_attn.q_proj.weight"));
}

TEST(VllmLayout, SpareLayersGoToTheStagesBeforeTheLast) {
  const auto held = [](int64_t layers, int64_t stages) {
    ModelConfig config = dense();
    config.num_hidden_layers = layers;
    std::vector<size_t> counts;
    for (const Layout& layout :
         make_layouts(config, spec("vllm:pp=" + std::to_string(stages))).value()) {
      size_t norms = 0;
      for (const TensorSpec& t : layout.tensors())
        norms += t.name.ends_with("input_layernorm.weight");
      counts.push_back(norms);
    }
    return counts;
  };
  EXPECT_EQ(held(7, 3), (std::vector<size_t>{2, 3, 2}));
  EXPECT_EQ(held(8, 3), (std::vector<size_t>{3, 3, 2}));
  EXPECT_EQ(held(10, 4), (std::vector<size_t>{2, 3, 3, 2}));
  EXPECT_EQ(held(2, 3), (std::vector<size_t>{1, 1, 0}));
}

TEST(VllmLayout, ExpertsThatRanksDoNotDivideAreSpreadUnevenly) {
  const auto count = [](const std::string& text, int64_t rank) {
    const auto found = sizes(make_layout(moe(), spec(text), rank).value());
    return found.at("model.layers.0.mlp.experts.routed_experts.w13_weight") / (2 * 8 * 6);
  };
  for (const char* text : {"vllm:tp=4,ep", "vllm:tp=4,ep,placement=round_robin"}) {
    EXPECT_EQ(count(text, 0), 2) << text;
    EXPECT_EQ(count(text, 1), 2) << text;
    EXPECT_EQ(count(text, 2), 1) << text;
    EXPECT_EQ(count(text, 3), 1) << text;
  }
  const Layout linear = make_layout(moe(), spec("vllm:tp=4,ep"), 2).value();
  EXPECT_TRUE(linear.find_tensor("model.layers.0.mlp.experts.4.up_proj.weight"));
  const Layout robin = make_layout(moe(), spec("vllm:tp=4,ep,placement=round_robin"), 2).value();
  EXPECT_TRUE(robin.find_tensor("model.layers.0.mlp.experts.2.up_proj.weight"));
}

}  // namespace
}  // namespace transfuse

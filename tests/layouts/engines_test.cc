// SGLang, and engines that keep copies of experts: layouts against what their workers hold, refits
// from trainers on real bytes, plans against the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "layouts/world.h"
#include "plan/oracle.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"

namespace transfuse::frameworks {
namespace {

// Odd vocabulary, A * D != h, grouped KV heads.
ModelConfig small(const std::string& architecture, int64_t layers, int64_t groups, bool tied) {
  return {.architecture = architecture,
          .hidden_size = 8,
          .intermediate_size = 16,
          .num_hidden_layers = layers,
          .num_attention_heads = 8,
          .num_key_value_heads = groups,
          .head_dim = 2,
          .vocab_size = 67,
          .tie_word_embeddings = tied};
}

ModelConfig small_moe(const std::string& architecture, int64_t layers, int64_t experts, bool tied) {
  ModelConfig config = small(architecture, layers, 2, tied);
  config.moe_intermediate_size = 8;
  config.num_experts = experts;
  return config;
}

// A dense layer, then one shared expert beside the routed ones; a layer that predicts a token.
ModelConfig small_glm() {
  ModelConfig config = small_moe("glm4_moe", 3, 6, false);
  config.dense_layers = 1;
  config.shared_experts = 1;
  config.mtp_layers = 1;
  config.attention_bias = true;
  config.qk_norm = true;
  return config;
}

ModelConfig small_deepseek() {
  ModelConfig config = small_glm();
  config.architecture = "deepseek_v3";
  config.attention_bias = config.qk_norm = false;
  config.num_key_value_heads = 8;
  config.head_dim = 5;
  config.q_lora_rank = 12;
  config.kv_lora_rank = 7;
  config.qk_nope_head_dim = 4;
  config.qk_rope_head_dim = 1;
  config.v_head_dim = 3;
  config.noaux_routing = true;
  return config;
}

// Blocks of 2 x 4; the last ones of 11 rows and of 6 columns are short.
ModelConfig small_deepseek_f8() {
  ModelConfig config = small_deepseek();
  config.kv_lora_rank = 10;
  config.v_head_dim = 4;
  config.moe_intermediate_size = 16;
  config.scale_block_rows = 2;
  config.scale_block_columns = 4;
  return config;
}

std::string problems(const std::vector<std::string>& lines) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(lines.size(), 5); ++i) text += lines[i] + "\n";
  return text + std::to_string(lines.size()) + " problems";
}

void expect_described(const World& world, const StateDict& hf) {
  ASSERT_EQ(world.layouts.size(), world.states.size());
  for (size_t rank = 0; rank < world.layouts.size(); ++rank) {
    const auto wrong = compare(world.layouts[rank], world.states[rank], hf);
    ASSERT_TRUE(wrong.empty()) << world.name << " rank " << rank << ": " << problems(wrong);
  }
}

void expect_exact(const World& source, const World& target) {
  for (size_t rank = 0; rank < target.layouts.size(); ++rank) {
    SCOPED_TRACE(testing::Message() << source.name << " -> " << target.name << " rank " << rank);
    const auto plan = compile(target.layouts[rank], source.layouts);
    ASSERT_TRUE(plan) << plan.error().message;
    const StateDict got = refit(*plan, source, target.states[rank]);
    for (const auto& [name, tensor] : target.states[rank]) {
      ASSERT_EQ(got.at(name).data, tensor.data) << name;
    }
    const Oracle oracle(target.layouts[rank], source.layouts);
    ASSERT_TRUE(oracle.consistent());
    const auto failures = judge(*plan, oracle);
    ASSERT_TRUE(failures.empty()) << problems(failures);
  }
}

struct Case {
  std::string name;
  ModelConfig config;
  std::vector<std::string> sources;
  std::vector<std::string> targets;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

const std::vector<std::string> kDenseSources = {"hf", "fsdp:dp=3", "fsdp:dp=2,tp=2",
                                                "megatron:tp=8,vocab_divisor=3",
                                                "megatron:tp=2,pp=3,vocab_divisor=5"};
const std::vector<std::string> kOneHeadSources = {"hf", "fsdp:dp=2,tp=2", "megatron:tp=2,pp=3",
                                                  "megatron:tp=4,vocab_divisor=1"};
const std::vector<std::string> kMoeSources = {
    "hf", "fsdp:dp=3", "megatron:tp=2,ep=3", "megatron:ep=2,etp=4,pp=3",
    "megatron:tp=4,pp=3,ep=6,etp=2,experts=sequential,norms=separate,vocab_divisor=1"};
// KV groups < TP, EP x TP, attention ranks of their own, vocabularies padded beyond 64, stages.
const std::vector<std::string> kStages = {"sglang:tp=2,pp=2", "sglang:tp=8,pp=3",
                                          "sglang:pp=2,layers=1/2"};
const std::vector<std::string> kExperts = {"sglang",
                                           "sglang:tp=2",
                                           "sglang:tp=4,ep=2",
                                           "sglang:tp=4,ep=2,etp=1",  // experts twice
                                           "sglang:tp=2,ep=2,w13=up_gate",
                                           "sglang:tp=2,ep=2,pp=2",
                                           "sglang:tp=8,ep=2"};
const std::vector<std::string> kAttentionDp = {
    "sglang:tp=4,dp=2,ep=2", "sglang:tp=8,dp=4,ep=2", "sglang:tp=4,dp=2,lm_head=attention,pp=2",
    "sglang:tp=8,dp=2,cp=2,lm_head=attention", "sglang:tp=4,dp=4,ep=2,etp=2"};

std::vector<std::string> with(std::vector<std::string> specs,
                              const std::vector<std::string>& more) {
  specs.insert(specs.end(), more.begin(), more.end());
  return specs;
}

std::vector<Case> cases() {
  const std::vector<std::string> one_stage = {"sglang", "sglang:tp=2", "sglang:tp=8"};
  const std::vector<std::string> dense_dp = {"sglang:tp=4,dp=2", "sglang:tp=8,dp=2,cp=2,pp=2"};
  const std::vector<std::string> shared = {"sglang:tp=2,shared=fused",
                                           "sglang:tp=4,ep=2,shared=fused",
                                           "sglang:tp=4,dp=2,ep=2,shared=whole,dense=whole",
                                           "sglang:tp=8,dp=8,ep=2,shared=fused,w13=up_gate"};
  ModelConfig wide = small("qwen3", 3, 1, false);  // 3 ranks: 64 rows are padded to 192
  wide.num_attention_heads = 6;
  wide.intermediate_size = 18;
  ModelConfig without_bias = small_deepseek();
  without_bias.noaux_routing = false;
  return {
      {"Llama", small("llama", 3, 2, false), kDenseSources, with(one_stage, kStages)},
      {"LlamaTied", small("llama", 3, 4, true), kDenseSources, one_stage},
      {"Qwen2", small("qwen2", 3, 2, false), kDenseSources, with(one_stage, kStages)},
      {"Qwen2Tied", small("qwen2", 3, 8, true), kDenseSources, with(one_stage, kStages)},
      {"Qwen3", small("qwen3", 3, 2, false), kDenseSources,
       with(with(one_stage, kStages), dense_dp)},
      {"Qwen3Tied", small("qwen3", 3, 1, true), kOneHeadSources,
       with(with(one_stage, kStages), dense_dp)},
      {"ThreeRanks", wide, {"hf", "fsdp:dp=2"}, {"sglang:tp=3", "sglang:tp=6,dp=2,pp=3"}},
      {"UnevenLayers", small("qwen2", 7, 2, true), {"hf", "megatron:pp=7"}, {"sglang:pp=4,tp=2"}},
      {"Gemma3", small("gemma3_text", 3, 1, true), kOneHeadSources, one_stage},
      {"Gemma3Untied", small("gemma3_text", 3, 4, false), kDenseSources, one_stage},
      {"Qwen3Moe", small_moe("qwen3_moe", 3, 6, false), kMoeSources,
       with(with(kExperts, kAttentionDp), {"sglang:tp=2,ep=2,redundant=2"})},
      {"Qwen3MoeTied", small_moe("qwen3_moe", 3, 6, true), kMoeSources, kExperts},
      {"Mixtral", small_moe("mixtral", 3, 6, false), kMoeSources, kExperts},
      {"Glm", small_glm(), kMoeSources, with(with(kExperts, kAttentionDp), shared)},
      {"Deepseek", small_deepseek(), kMoeSources,
       with(with(kExperts, kAttentionDp),
            with(shared, {"sglang:tp=4,ep=4,redundant=2,shared=fused"}))},
      {"DeepseekWithoutBias", without_bias, {"hf"}, {"sglang:tp=2"}},
      {"DeepseekF8",
       small_deepseek_f8(),
       {"hf", "fsdp:dp=3"},
       {"sglang", "sglang:tp=2", "sglang:tp=4,ep=2,dp=2", "sglang:tp=2,shared=fused"}},
  };
}

class Sglang : public testing::TestWithParam<Case> {};

TEST_P(Sglang, EveryLayoutHoldsWhatItsWorkersHold) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  for (const std::string& spec : c.targets) expect_described(make_world(c.config, hf, spec), hf);
}

TEST_P(Sglang, EveryRefitIsByteExactAndItsPlanIsThatOfTheOracle) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  std::vector<World> targets;
  for (const std::string& spec : c.targets) targets.push_back(make_world(c.config, hf, spec));
  for (const std::string& spec : c.sources) {
    const World source = make_world(c.config, hf, spec);
    for (const World& target : targets) expect_exact(source, target);
  }
}

// An engine is a source too: of a replica, of a checkpoint.
TEST_P(Sglang, TheCheckpointComesBackFromEveryWorldOfWorkers) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  const World checkpoint = make_world(c.config, hf, c.config.mtp_layers > 0 ? "hf:mtp=none" : "hf");
  if (c.name == "DeepseekWithoutBias") return;  // its workers do not have all of it
  for (const std::string& spec : c.targets) {
    expect_exact(make_world(c.config, hf, spec), checkpoint);
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Sglang, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

// Every expert at least once, the other places at random.
ExpertMap random_map(int64_t layers, int64_t experts, int64_t places, std::mt19937_64& random) {
  ExpertMap map{.version = 1, .physical_to_logical = {}};
  for (int64_t layer = 0; layer < layers; ++layer) {
    auto& row = map.physical_to_logical.emplace_back();
    for (int64_t place = 0; place < places; ++place) {
      row.push_back(place < experts
                        ? place
                        : static_cast<int64_t>(random() % static_cast<uint64_t>(experts)));
    }
    std::ranges::shuffle(row, random);
  }
  return map;
}

struct MappedCase {
  ModelConfig config;
  std::string spec;
};

std::vector<MappedCase> mapped_cases() {
  const ModelConfig qwen = small_moe("qwen3_moe", 3, 6, false);
  return {{qwen, "vllm:tp=4,ep,redundant=2"},
          {qwen, "vllm:tp=2,dp=2,ep,pp=2,redundant=6"},
          {qwen, "vllm:tp=2,redundant=3"},
          {qwen, "sglang:tp=4,ep=2,redundant=4"},
          {qwen, "sglang:tp=4,dp=2,ep=4,pp=2,redundant=2,w13=up_gate"},
          {qwen, "sglang:tp=2,ep=2"},  // moved, without copies
          {small_deepseek(), "vllm:tp=4,ep,redundant=2"},
          {small_deepseek(), "sglang:tp=4,ep=2,redundant=8"},
          {small_deepseek(), "sglang:tp=2,ep=2,redundant=2,shared=fused"}};
}

TEST(ExpertCopies, EveryPlaceOfARandomMapHoldsItsExpertByteForByte) {
  std::mt19937_64 random(20);
  for (const MappedCase& c : mapped_cases()) {
    SCOPED_TRACE(c.spec);
    const StateDict hf = hf_state(c.config);
    const World source = make_world(c.config, hf, "megatron:tp=2,ep=3,pp=3");
    for (int version = 0; version < 3; ++version) {
      ParallelSpec spec = parse_parallel_spec(c.spec).value();
      // Both ways to list the layers.
      const int64_t layers =
          c.config.num_hidden_layers - (version == 1 ? c.config.dense_layers : 0);
      spec.expert_map =
          random_map(layers, c.config.num_experts, c.config.num_experts + spec.redundant, random);
      const World target = make_world(c.config, hf, spec);
      expect_described(target, hf);
      expect_exact(source, target);
      if (!HasFailure()) continue;
      FAIL() << "version " << version;
    }
  }
}

// Section by section: what an engine's ranks hold between them is the model, copies and all.
TEST(ExpertCopies, EnginesWithDifferentMapsRefitEachOther) {
  std::mt19937_64 random(21);
  const ModelConfig config = small_moe("qwen3_moe", 2, 6, false);
  const StateDict hf = hf_state(config);
  ParallelSpec a = parse_parallel_spec("vllm:tp=4,ep,redundant=2").value();
  ParallelSpec b = parse_parallel_spec("sglang:tp=4,ep=2,redundant=4").value();
  a.expert_map = random_map(2, 6, 8, random);
  b.expert_map = random_map(2, 6, 10, random);
  const World first = make_world(config, hf, a);
  const World second = make_world(config, hf, b);
  expect_exact(first, second);
  expect_exact(second, first);
}

TEST(ExpertCopies, AMapThatMovesAnExpertGivesTheRanksThatItTouchesAnotherPlan) {
  const ModelConfig config = small_moe("qwen3_moe", 2, 4, false);
  const Catalog catalog = make_catalog(config).value();
  ParallelSpec spec = parse_parallel_spec("sglang:tp=4,ep=4,redundant=4").value();
  const auto initial = make_layouts(config, spec).value();
  std::vector<int64_t> row = {0, 1, 2, 3, 0, 1, 2, 3};
  spec.expert_map = {.version = 1, .physical_to_logical = {row, row}};
  const auto same = make_layouts(config, spec).value();
  std::swap(spec.expert_map.physical_to_logical[1][1], spec.expert_map.physical_to_logical[1][2]);
  spec.expert_map.version = 2;
  const auto moved = make_layouts(config, spec).value();
  for (size_t rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(initial[rank].digest(), same[rank].digest());
    EXPECT_EQ(same[rank].digest() == moved[rank].digest(), rank > 1) << rank;
  }
}

}  // namespace
}  // namespace transfuse::frameworks

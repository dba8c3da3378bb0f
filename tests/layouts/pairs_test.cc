// Every family from every trainer layout to every engine layout, with the ratios that break things:
// layouts against what the frameworks hold, refits on real bytes, plans against the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "layouts/world.h"
#include "plan/oracle.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"

namespace transfuse::frameworks {
namespace {

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(lines.size(), 5); ++i) text += lines[i] + "\n";
  return text + std::to_string(lines.size()) + " failures";
}

// Odd vocabulary, A * D != h, grouped KV heads.
ModelConfig small(const std::string& architecture, int64_t layers, int64_t groups, bool tied) {
  return {.architecture = architecture,
          .hidden_size = 6,
          .intermediate_size = 16,
          .num_hidden_layers = layers,
          .num_attention_heads = 8,
          .num_key_value_heads = groups,
          .head_dim = 2,
          .vocab_size = 67,
          .tie_word_embeddings = tied};
}

// `experts` is no multiple of 4: engines hold them unevenly.
ModelConfig small_moe(int64_t layers, int64_t experts, bool tied) {
  ModelConfig config = small("qwen3_moe", layers, 2, tied);
  config.moe_intermediate_size = 8;
  config.num_experts = experts;
  return config;
}

ModelConfig small_mixtral(int64_t experts) {
  ModelConfig config = small_moe(4, experts, false);
  config.architecture = "mixtral";
  return config;
}

// A dense layer, then experts of which some are shared; a layer that predicts a further token.
ModelConfig small_glm(bool bias, bool norms, int64_t experts) {
  ModelConfig config = small_moe(4, experts, false);
  config.architecture = "glm4_moe";
  config.hidden_size = 8;
  config.dense_layers = 1;
  config.shared_experts = 2;
  config.mtp_layers = 1;
  config.attention_bias = bias;
  config.qk_norm = norms;
  return config;
}

// Every width of latent attention is another one.
ModelConfig small_deepseek(int64_t mtp_layers) {
  ModelConfig config = small_glm(false, false, 6);
  config.architecture = "deepseek_v3";
  config.mtp_layers = mtp_layers;
  config.shared_experts = 1;
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

// Blocks of 2 x 4, wide enough for two ranks; the last ones of 11 rows and of 6 columns are short.
ModelConfig small_deepseek_f8() {
  ModelConfig config = small_deepseek(1);
  config.kv_lora_rank = 10;
  config.v_head_dim = 4;
  config.moe_intermediate_size = 16;
  config.scale_block_rows = 2;
  config.scale_block_columns = 4;
  return config;
}

// A stack of experts whose matrices are as wide as high where `width` is 3: no shape tells rows
// from columns.
ModelConfig small_gpt_oss(int64_t width) {
  ModelConfig config = small("gpt_oss", 3, 4, false);
  config.moe_intermediate_size = width;
  config.num_experts = 4;
  return config;
}

ModelConfig small_gpt_oss_packed() {
  ModelConfig config = small_gpt_oss(64);
  config.hidden_size = 96;
  config.num_hidden_layers = 1;
  config.num_experts = 2;
  config.packed_experts = true;
  return config;
}

// Layers of both kinds in no regular order. Where there are 8 key heads, 8 ranks cut within heads
// of the one query group.
ModelConfig small_qwen3_next(int64_t groups, int64_t key_heads, int64_t mtp_layers) {
  ModelConfig config = small("qwen3_next", 5, groups, false);
  config.hidden_size = 8;
  config.head_dim = groups == 1 ? 4 : 3;
  config.moe_intermediate_size = 8;
  config.shared_expert_intermediate_size = 16;
  config.num_experts = 6;
  config.mtp_layers = mtp_layers;
  config.linear_key_heads = key_heads;
  config.linear_value_heads = 2 * key_heads;
  config.linear_key_head_dim = 3;
  config.linear_value_head_dim = 2;
  config.linear_conv_kernel = 3;
  config.linear_layers = {true, false, true, true, false};
  return config;
}

struct Case {
  std::string name;
  ModelConfig config;
  std::vector<std::string> sources;
  std::vector<std::string> targets;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

const std::vector<std::string> kDenseSources = {
    "hf",
    "fsdp:dp=3",
    "fsdp:dp=2,tp=2",
    "megatron:tp=2",
    "megatron:tp=8,vocab_divisor=3",  // ranks with a piece of a head group
    "megatron:tp=2,pp=2,vocab_divisor=5",
    "megatron:tp=4,pp=2,vpp=2,cp=2,dp=2,vocab_divisor=1",
    "megatron:pp=4,norms=separate",
};
const std::vector<std::string> kDenseTargets = {
    "hf",
    "fsdp:dp=5",
    "vllm",
    "vllm:tp=2",
    "vllm:tp=8",
    "vllm:tp=2,pp=3",
    "vllm:pp=2,layers=1/3,dp=2",
    "megatron:tp=4,vocab_divisor=2",
    "megatron:tp=2,pp=2,vpp=2,vocab_divisor=7",
};
const std::vector<std::string> kMoeSources = {
    "hf",
    "fsdp:dp=3",
    "fsdp:dp=2,tp=2",
    "megatron:tp=2,ep=3",
    "megatron:tp=2,ep=2,etp=1,vocab_divisor=3",
    "megatron:ep=2,etp=4,pp=2",
    "megatron:tp=2,pp=2,vpp=2,ep=2,etp=1,dp=4,vocab_divisor=5",
    "megatron:tp=4,pp=2,ep=6,etp=2,experts=sequential,norms=separate,vocab_divisor=1",
};
const std::vector<std::string> kMoeTargets = {
    "hf",
    "vllm",
    "vllm:tp=2",
    "vllm:tp=4,ep",
    "vllm:tp=8",
    "vllm:tp=4,ep,placement=round_robin,w13=up_gate",
    "vllm:tp=2,dp=2,pp=3",
    "vllm:tp=2,dp=4,ep,pp=2",
    "megatron:tp=2,pp=4,ep=3,etp=1,vocab_divisor=2",
    "megatron:tp=4,ep=2,etp=2,vocab_divisor=3",
};
const std::vector<std::string> kUnevenSources = {
    "megatron:pp=3,tp=2,first=2,last=1,vocab_divisor=9",
    "megatron:pp=3,first=1",
    "megatron:pp=4,last=1",
    "megatron:pp=2,first=3,last=4",
    "megatron:pp=3,layers=0/6/1",
    "megatron:pp=2,vpp=2,layers=1/3/2/1",
    "megatron:pp=3,vpp=2,layers=1/0/1/2/2/1,tp=2,vocab_divisor=1",
};
const std::vector<std::string> kUnevenTargets = {"hf", "vllm:tp=4,pp=3", "megatron:pp=7,tp=2",
                                                 "megatron:pp=3,last=3"};
const std::vector<std::string> kUnevenChunks = {
    "megatron:pp=2,vpp=2,first=2",
    "megatron:pp=3,vpp=2,first=2,last=4,tp=2,vocab_divisor=1",
    "megatron:pp=3,vpp=2,last=2",
    "megatron:pp=5,vpp=2",
};

// The layers that predict further tokens, with and without their copies of the embedding.
const std::vector<std::string> kMtpSources = {
    "hf",
    "fsdp:dp=3",
    "fsdp:dp=2,tp=2",
    "fsdp:dp=4,experts=stacked",
    "fsdp:dp=7,experts=stacked",  // more ranks than experts
};
const std::vector<std::string> kMtpTargets = {
    "hf",
    "hf:experts=stacked",
    "hf:mtp=none",
    "fsdp:dp=5,mtp=shared",
    "vllm:tp=2",
    "vllm:tp=4,ep",
    "vllm:tp=8",
    "vllm:tp=4,ep,placement=round_robin,w13=up_gate",
    "vllm:tp=2,dp=2,pp=3",
    "vllm:tp=2,dp=4,ep,pp=2",
    "megatron:tp=2,pp=4,ep=3,etp=1,vocab_divisor=2",
    "megatron:tp=4,ep=2,etp=2,vocab_divisor=3,norms=separate",
    "megatron:tp=2,pp=2,vpp=2,ep=2,etp=1,dp=4,vocab_divisor=5,mtp=none",
};
const std::vector<std::string> kMegatronMtpSources = {
    "megatron:tp=2,ep=3",
    "megatron:ep=2,etp=4,pp=2,mtp=shared",
    "megatron:tp=2,pp=2,vpp=2,ep=2,etp=1,dp=4,vocab_divisor=5",
    "megatron:tp=4,pp=2,ep=6,etp=2,experts=sequential,vocab_divisor=1",
};
const std::vector<std::string> kMegatronMtpTargets = {
    "hf:mtp=shared",
    "hf:mtp=none,experts=stacked",
    "fsdp:dp=2,mtp=shared,experts=stacked",
    "vllm:tp=4,ep",
    "vllm:tp=2,dp=2,pp=3",
    "megatron:tp=4,ep=2,etp=2,vocab_divisor=3,norms=separate",
};
const std::vector<std::string> kF8Sources = {"hf", "fsdp:dp=3", "fsdp:dp=2,tp=2"};
const std::vector<std::string> kF8Targets = {"hf",        "fsdp:dp=5",    "vllm",
                                             "vllm:tp=2", "vllm:tp=4,ep", "vllm:tp=2,dp=2,ep,pp=2"};

std::vector<std::string> with(std::vector<std::string> specs,
                              const std::vector<std::string>& more) {
  specs.insert(specs.end(), more.begin(), more.end());
  return specs;
}

const std::vector<std::string> kGptOssSources = {
    "hf",
    "fsdp:dp=3",
    "fsdp:dp=7",  // more ranks than experts
    "megatron:tp=2,ep=2,etp=1,vocab_divisor=3",
    "megatron:tp=8,pp=3,etp=1,ep=4,vocab_divisor=1",
    "megatron:pp=3,ep=4,experts=sequential,norms=separate",
};
const std::vector<std::string> kGptOssTargets = {
    "hf",           "fsdp:dp=5",         "vllm",
    "vllm:tp=4,ep", "vllm:tp=2,dp=2,ep", "megatron:tp=4,ep=2,etp=1,vocab_divisor=2",
};
const std::vector<std::string> kNextSources = {
    "hf",
    "fsdp:dp=3",
    "fsdp:dp=2,tp=2",
    "megatron:tp=2,ep=3,out_norm=plus_one",
    "megatron:tp=4,pp=2,layers=2/3,ep=2,etp=1,vocab_divisor=3,out_norm=plus_one",
    "megatron:pp=5,ep=6,experts=sequential,norms=separate,out_norm=plus_one",
};
const std::vector<std::string> kNextTargets = {
    "hf",
    "fsdp:dp=5",
    "vllm",
    "vllm:tp=2,pp=3",
    "vllm:tp=4,ep",
    "vllm:tp=4,ep,placement=round_robin,w13=up_gate",
    "megatron:tp=4,ep=2,etp=2,vocab_divisor=2,out_norm=plus_one",
};

std::vector<Case> cases() {
  return {
      {"GptOss", small_gpt_oss(8), kGptOssSources,
       with(kGptOssTargets, {"vllm:tp=4", "vllm:tp=2,dp=2,pp=3"})},
      {"GptOssSquare", small_gpt_oss(3), kGptOssSources, kGptOssTargets},
      {"GptOssPacked",
       small_gpt_oss_packed(),
       {"hf", "fsdp:dp=3"},
       {"hf", "fsdp:dp=2", "vllm", "vllm:tp=2", "vllm:tp=2,ep"}},
      {"Qwen3Next", small_qwen3_next(2, 4, 1), kNextSources, kNextTargets},
      {"Qwen3NextCutHeads",
       small_qwen3_next(1, 8, 0),
       {"hf", "megatron:tp=8,vocab_divisor=1,out_norm=plus_one"},
       {"hf", "vllm:tp=8", "megatron:tp=8,vocab_divisor=1,out_norm=plus_one",
        "megatron:tp=2,etp=1,out_norm=plus_one"}},
      {"Qwen3NextWithoutMtp",
       small_qwen3_next(2, 4, 1),
       {"fsdp:dp=2,mtp=none", "megatron:tp=2,mtp=none,out_norm=plus_one"},
       {"hf:mtp=none", "vllm:tp=2"}},
      {"Qwen3NextStacked",
       small_qwen3_next(2, 4, 1),
       {"hf:experts=stacked", "fsdp:dp=2,experts=stacked"},
       {"hf", "vllm:tp=2,ep", "megatron:tp=2,out_norm=plus_one"}},
      {"Mixtral", small_mixtral(6), with(kMoeSources, {"fsdp:dp=4,experts=stacked"}),
       with(kMoeTargets, {"hf:experts=stacked"})},
      {"Qwen3MoeStacked",
       small_moe(3, 5, true),
       {"hf:experts=stacked", "fsdp:dp=2,experts=stacked"},
       {"hf", "fsdp:dp=3,experts=stacked", "fsdp:dp=7", "vllm:tp=2,ep", "megatron:tp=2"}},
      {"Gemma3",
       small("gemma3_text", 4, 1, true),
       {"hf", "fsdp:dp=3", "fsdp:dp=2,tp=2", "megatron:tp=2", "megatron:tp=4,pp=2,vocab_divisor=1",
        "megatron:pp=4,norms=separate"},
       {"hf", "vllm:tp=8", "vllm:tp=2,pp=3", "megatron:tp=2,pp=2,vpp=2,vocab_divisor=7"}},
      {"Gemma3Untied",
       small("gemma3_text", 3, 4, false),
       {"fsdp:dp=2", "megatron:tp=2,pp=3"},
       {"hf", "vllm:tp=4"}},
      {"Glm", small_glm(true, false, 6), kMtpSources, kMtpTargets},
      {"GlmNorms", small_glm(false, true, 6), kMegatronMtpSources, kMegatronMtpTargets},
      {"GlmBoth", small_glm(true, true, 6), {"megatron:tp=8,ep=2,etp=2"}, {"vllm:tp=8,ep"}},
      {"Deepseek", small_deepseek(1), kMtpSources, kMtpTargets},
      {"DeepseekMegatron", small_deepseek(2), kMegatronMtpSources, kMegatronMtpTargets},
      {"DeepseekSeparate", small_deepseek(0), {"megatron:norms=separate,pp=2"}, {"hf", "vllm"}},
      {"DeepseekF8", small_deepseek_f8(), kF8Sources, kF8Targets},
      {"Qwen3", small("qwen3", 4, 2, false), kDenseSources, kDenseTargets},
      {"Qwen3Tied", small("qwen3", 4, 4, true), kDenseSources, kDenseTargets},
      {"Qwen3OneKvHead",
       small("qwen3", 4, 1, true),
       {"hf", "megatron:tp=2", "megatron:tp=4,vocab_divisor=1"},
       {"hf", "vllm:tp=8", "megatron:tp=4,pp=2"}},
      {"Qwen2", small("qwen2", 4, 2, false), kDenseSources, kDenseTargets},
      {"Qwen2Tied", small("qwen2", 4, 8, true), kDenseSources, kDenseTargets},
      {"Llama", small("llama", 4, 2, false), kDenseSources, kDenseTargets},
      {"LlamaTied", small("llama", 4, 4, true), kDenseSources, kDenseTargets},
      {"Qwen3Moe", small_moe(4, 6, false), kMoeSources, kMoeTargets},
      {"Qwen3MoeTied", small_moe(4, 6, true), kMoeSources, kMoeTargets},
      {"UnevenLayers", small("llama", 7, 2, false), kUnevenSources, kUnevenTargets},
      {"UnevenLayersTied", small("qwen2", 7, 2, true), kUnevenSources, kUnevenTargets},
      {"UnevenLayersMoe", small_moe(7, 2, false), kUnevenSources, kUnevenTargets},
      {"UnevenChunks", small("qwen3", 10, 2, true), kUnevenChunks, {"hf", "vllm:tp=2,pp=4"}},
  };
}

class Pairs : public testing::TestWithParam<Case> {};

TEST_P(Pairs, EveryLayoutHoldsWhatTheFrameworkHolds) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  for (const auto* specs : {&c.sources, &c.targets}) {
    for (const std::string& spec : *specs) {
      const World world = make_world(c.config, hf, spec);
      ASSERT_EQ(world.layouts.size(), world.states.size());
      for (size_t rank = 0; rank < world.layouts.size(); ++rank) {
        const auto wrong = compare(world.layouts[rank], world.states[rank], hf);
        ASSERT_TRUE(wrong.empty()) << spec << " rank " << rank << ": " << joined(wrong);
      }
    }
  }
}

TEST_P(Pairs, EveryRefitIsByteExactAndItsPlanIsThatOfTheOracle) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  std::vector<World> targets;
  for (const std::string& spec : c.targets) targets.push_back(make_world(c.config, hf, spec));
  for (const std::string& spec : c.sources) {
    const World source = make_world(c.config, hf, spec);
    for (const World& target : targets) {
      for (size_t rank = 0; rank < target.layouts.size(); ++rank) {
        SCOPED_TRACE(testing::Message()
                     << source.name << " -> " << target.name << " rank " << rank);
        const auto plan = compile(target.layouts[rank], source.layouts);
        ASSERT_TRUE(plan) << plan.error().message;
        const StateDict got = refit(*plan, source, target.states[rank]);
        for (const auto& [name, tensor] : target.states[rank]) {
          ASSERT_EQ(got.at(name).data, tensor.data) << name;
        }
        const Oracle oracle(target.layouts[rank], source.layouts);
        ASSERT_TRUE(oracle.consistent());
        const auto failures = judge(*plan, oracle);
        ASSERT_TRUE(failures.empty()) << joined(failures);
      }
    }
  }
}

// HF -> trainer -> HF: nothing is lost on the way, whatever the trainer's ranks are.
TEST_P(Pairs, ARoundTripThroughEveryTrainerGivesTheCheckpointBack) {
  const Case& c = GetParam();
  const StateDict hf = hf_state(c.config);
  const World checkpoint = make_world(c.config, hf, "hf");
  for (const std::string& spec : c.sources) {
    World trainer = make_world(c.config, hf, spec);
    for (size_t rank = 0; rank < trainer.layouts.size(); ++rank) {
      const auto plan = compile(trainer.layouts[rank], checkpoint.layouts);
      ASSERT_TRUE(plan) << plan.error().message;
      trainer.states[rank] = refit(*plan, checkpoint, trainer.states[rank]);
    }
    // Megatron-Core has no copies of the embedding in layers that predict further tokens.
    const bool copies = c.config.mtp_layers == 0 || !spec.starts_with("megatron");
    const bool none = spec.find("mtp=none") != std::string::npos;
    const World end = make_world(c.config, hf,
                                 none     ? "hf:mtp=none"
                                 : copies ? "hf"
                                          : "hf:mtp=shared");
    const auto back = compile(end.layouts[0], trainer.layouts);
    ASSERT_TRUE(back) << spec << ": " << back.error().message;
    const StateDict got = refit(*back, trainer, end.states[0]);
    EXPECT_EQ(got.size(), end.states[0].size());
    for (const auto& [name, tensor] : got) {
      ASSERT_EQ(tensor.data, hf.at(name).data) << spec << ": " << name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Pairs, testing::ValuesIn(cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace transfuse::frameworks

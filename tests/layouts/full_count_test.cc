// Qwen3-4B and Qwen3-30B-A3B with all of their tensors, narrow, refit through Megatron-Core ranks.
#include <gtest/gtest.h>

#include <cstddef>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "layouts/world.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"

namespace transfuse::frameworks {
namespace {

ModelConfig narrow_4b() {
  return {.architecture = "qwen3",
          .hidden_size = 12,
          .intermediate_size = 16,
          .num_hidden_layers = 36,
          .num_attention_heads = 32,
          .num_key_value_heads = 8,
          .head_dim = 2,
          .vocab_size = 151,
          .tie_word_embeddings = true};
}

ModelConfig narrow_30b_a3b() {
  return {.architecture = "qwen3_moe",
          .hidden_size = 6,
          .intermediate_size = 24,
          .moe_intermediate_size = 4,
          .num_hidden_layers = 48,
          .num_attention_heads = 32,
          .num_key_value_heads = 4,
          .head_dim = 2,
          .vocab_size = 151,
          .num_experts = 128};
}

// Refits every rank of every target and counts the catalog tensors that arrived.
void expect_all_tensors(const ModelConfig& config, const std::string& from,
                        const std::vector<std::string>& to, size_t count) {
  const StateDict hf = hf_state(config);
  ASSERT_EQ(hf.size(), count);
  ASSERT_EQ(make_catalog(config)->size(), count);
  const World source = make_world(config, hf, from);
  for (const std::string& spec : to) {
    const World target = make_world(config, hf, spec);
    std::set<std::string> arrived;
    for (size_t rank = 0; rank < target.layouts.size(); ++rank) {
      SCOPED_TRACE(testing::Message() << from << " -> " << spec << " rank " << rank);
      const auto plan = compile(target.layouts[rank], source.layouts);
      ASSERT_TRUE(plan) << plan.error().message;
      const StateDict got = refit(*plan, source, target.states[rank]);
      for (const auto& [name, tensor] : target.states[rank]) {
        ASSERT_EQ(got.at(name).data, tensor.data) << name;
      }
      for (const Run& run : plan->runs()) {
        arrived.insert(plan->target().tensors()[run.tensor].name);
      }
    }
    EXPECT_EQ(arrived.size(), count) << from << " -> " << spec;
  }
}

TEST(FullCount, All398TensorsOfQwen3_4BArriveWhateverTheDegrees) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> pairs = {
      {"megatron:tp=1", {"vllm:tp=2", "megatron:tp=2,pp=2"}},
      {"megatron:tp=2", {"vllm:tp=1", "vllm:tp=4", "megatron:tp=4,pp=3"}},
      {"megatron:tp=2,pp=2,vpp=3,vocab_divisor=8", {"hf", "vllm:tp=2", "vllm:tp=4,pp=3"}},
      {"fsdp:dp=8", {"vllm:tp=4", "megatron:tp=2,pp=4"}},
      {"hf", {"megatron:tp=2,pp=5,first=8,last=7", "vllm:tp=16"}},
  };
  for (const auto& [from, to] : pairs) expect_all_tensors(narrow_4b(), from, to, 398);
}

TEST(FullCount, All18867TensorsOfQwen3_30B_A3BArriveFromTensorPipelineAndExpertRanks) {
  expect_all_tensors(narrow_30b_a3b(), "megatron:tp=2,pp=2,ep=4",
                     {"vllm:tp=4,ep", "vllm:tp=2", "hf"}, 18867);
}

TEST(FullCount, All18867TensorsOfQwen3_30B_A3BReachMegatronFromFsdp) {
  expect_all_tensors(narrow_30b_a3b(), "fsdp:dp=3",
                     {"megatron:tp=4,pp=3,ep=8,etp=1,vocab_divisor=4"}, 18867);
}

ModelConfig narrow_mixtral() {
  return {.architecture = "mixtral",
          .hidden_size = 6,
          .moe_intermediate_size = 8,
          .num_hidden_layers = 32,
          .num_attention_heads = 32,
          .num_key_value_heads = 8,
          .head_dim = 2,
          .vocab_size = 151,
          .num_experts = 8};
}

ModelConfig narrow_gemma3() {
  return {.architecture = "gemma3_text",
          .hidden_size = 6,
          .intermediate_size = 8,
          .num_hidden_layers = 26,
          .num_attention_heads = 4,
          .num_key_value_heads = 1,
          .head_dim = 2,
          .vocab_size = 151,
          .tie_word_embeddings = true};
}

TEST(FullCount, All995TensorsOfMixtralAndAll340OfGemma3Arrive) {
  expect_all_tensors(narrow_mixtral(), "megatron:tp=2,pp=2,ep=4,etp=1",
                     {"vllm:tp=4,ep", "hf:experts=stacked"}, 995);
  expect_all_tensors(narrow_mixtral(), "fsdp:dp=3,experts=stacked", {"vllm:tp=8", "hf"}, 995);
  expect_all_tensors(narrow_gemma3(), "megatron:tp=2,pp=2", {"vllm:tp=4", "hf"}, 340);
}

}  // namespace
}  // namespace transfuse::frameworks

// Catalogs of Llama and Qwen2 from the config.json files of published models.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>

#include "transfuse/layout.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

constexpr const char* kLlama318B = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
  "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "use_cache": true, "vocab_size": 128256})";

constexpr const char* kLlama321B = R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 64,
  "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256})";

constexpr const char* kQwen257B = R"({
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
  "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
  "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
  "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "use_cache": true, "use_sliding_window": false, "vocab_size": 152064})";

constexpr const char* kQwen2505B = R"({
  "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864,
  "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
  "num_key_value_heads": 2, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
  "vocab_size": 151936})";

std::map<std::string, Dims> shapes(const char* config) {
  std::map<std::string, Dims> out;
  for (const TensorSpec& tensor : make_catalog(parse_model_config(config).value()).value()) {
    EXPECT_TRUE(out.emplace(tensor.name, tensor.shape).second) << tensor.name << " twice";
    EXPECT_EQ(tensor.dtype, Dtype::kBF16);
  }
  return out;
}

int64_t elements(const std::map<std::string, Dims>& shapes) {
  int64_t sum = 0;
  for (const auto& [name, shape] : shapes) sum += shape.product();
  return sum;
}

TEST(Catalog, Llama31_8BHas291TensorsAnd8_03BillionParameters) {
  const auto shape = shapes(kLlama318B);
  EXPECT_EQ(shape.size(), 291U);
  EXPECT_EQ(elements(shape), 8030261248);
  const std::string layer = "model.layers.31.";
  const std::map<std::string, Dims> expected = {
      {"model.embed_tokens.weight", {128256, 4096}},
      {"model.norm.weight", {4096}},
      {"lm_head.weight", {128256, 4096}},
      {layer + "input_layernorm.weight", {4096}},
      {layer + "post_attention_layernorm.weight", {4096}},
      {layer + "self_attn.q_proj.weight", {4096, 4096}},
      {layer + "self_attn.k_proj.weight", {1024, 4096}},
      {layer + "self_attn.v_proj.weight", {1024, 4096}},
      {layer + "self_attn.o_proj.weight", {4096, 4096}},
      {layer + "mlp.gate_proj.weight", {14336, 4096}},
      {layer + "mlp.up_proj.weight", {14336, 4096}},
      {layer + "mlp.down_proj.weight", {4096, 14336}},
  };
  for (const auto& [name, dims] : expected) {
    ASSERT_TRUE(shape.contains(name)) << name;
    EXPECT_EQ(shape.at(name), dims) << name;
  }
  EXPECT_FALSE(shape.contains("model.layers.32.input_layernorm.weight"));
  EXPECT_EQ(3U + 32U * 9U, shape.size());
}

TEST(Catalog, Llama32_1BIsTiedAndHasNoOutputTensor) {
  const auto shape = shapes(kLlama321B);
  EXPECT_EQ(shape.size(), 9U * 16U + 2U);
  EXPECT_EQ(elements(shape), 1235814400);
  EXPECT_FALSE(shape.contains("lm_head.weight"));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.k_proj.weight"), (Dims{512, 2048}));
}

TEST(Catalog, Qwen25_7BHas339TensorsOf7_62BillionParameters) {
  const auto shape = shapes(kQwen257B);
  EXPECT_EQ(shape.size(), 339U);
  EXPECT_EQ(elements(shape), 7615616512);
  const std::string attention = "model.layers.27.self_attn.";
  EXPECT_EQ(shape.at(attention + "q_proj.weight"), (Dims{3584, 3584}));
  EXPECT_EQ(shape.at(attention + "q_proj.bias"), (Dims{3584}));
  EXPECT_EQ(shape.at(attention + "k_proj.bias"), (Dims{512}));
  EXPECT_EQ(shape.at(attention + "v_proj.bias"), (Dims{512}));
  EXPECT_FALSE(shape.contains(attention + "o_proj.bias"));
  EXPECT_FALSE(shape.contains(attention + "q_norm.weight"));
  EXPECT_TRUE(shape.contains("lm_head.weight"));
}

TEST(Catalog, Qwen25_05BIsTied) {
  const auto shape = shapes(kQwen2505B);
  EXPECT_EQ(shape.size(), 12U * 24U + 2U);
  EXPECT_EQ(elements(shape), 494032768);
  EXPECT_FALSE(shape.contains("lm_head.weight"));
}

TEST(Catalog, TheConfigSaysWhatAFamilyLeavesOpen) {
  const auto llama = parse_model_config(kLlama318B).value();
  EXPECT_EQ(llama.architecture, "llama");
  EXPECT_EQ(llama.head_dim, 128);
  EXPECT_EQ(parse_model_config(kLlama321B)->head_dim, 64);
  EXPECT_EQ(parse_model_config(kQwen257B)->head_dim, 128);
  EXPECT_EQ(parse_model_config(kQwen2505B)->head_dim, 64);
}

}  // namespace
}  // namespace transfuse

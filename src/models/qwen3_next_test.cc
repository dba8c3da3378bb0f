// Qwen3-Next from the config.json of a published model, and what is refused of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json qwen3_next_80b() {
  return json::parse(R"({
    "architectures": ["Qwen3NextForCausalLM"], "attention_bias": false, "decoder_sparse_step": 1,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "mlp_only_layers": [], "model_type": "qwen3_next", "moe_intermediate_size": 512,
    "num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10,
    "num_hidden_layers": 48, "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 151936})");
}

ModelConfig read(const json& config) { return parse_model_config(config.dump()).value(); }

std::map<std::string, TensorSpec> catalog_of(const json& config) {
  std::map<std::string, TensorSpec> out;
  for (const TensorSpec& tensor : make_catalog(read(config)).value()) {
    EXPECT_TRUE(out.emplace(tensor.name, tensor).second) << tensor.name << " twice";
  }
  return out;
}

TEST(Catalog, Qwen3NextHas74391TensorsAnd1553MoreOfItsMtpModule) {
  json config = qwen3_next_80b();
  const auto catalog = catalog_of(config);
  // A layer: 2 norms, router, 3 x 512 and 4 of the shared expert; linear attention 7, full 6.
  constexpr size_t kLayer = 2 + 1 + 3 * 512 + 4;
  EXPECT_EQ(48 * kLayer + 36 * 7 + 12 * 6 + 3, 74391U);
  EXPECT_EQ(catalog.size(), 74391U + kLayer + 6 + 4);
  config["num_nextn_predict_layers"] = 0;
  const auto without = catalog_of(config);
  EXPECT_EQ(without.size(), 74391U);
  int64_t elements = 0;
  for (const auto& [name, tensor] : without) elements += tensor.shape.product();
  EXPECT_EQ(elements, 79674391296);
  const std::vector<std::pair<std::string, Dims>> expected = {
      {"model.layers.0.linear_attn.in_proj_qkvz.weight", {12288, 2048}},
      {"model.layers.0.linear_attn.in_proj_ba.weight", {64, 2048}},
      {"model.layers.0.linear_attn.conv1d.weight", {8192, 1, 4}},
      {"model.layers.0.linear_attn.A_log", {32}},
      {"model.layers.0.linear_attn.dt_bias", {32}},
      {"model.layers.0.linear_attn.norm.weight", {128}},
      {"model.layers.0.linear_attn.out_proj.weight", {2048, 4096}},
      {"model.layers.3.self_attn.q_proj.weight", {8192, 2048}},
      {"model.layers.3.self_attn.k_proj.weight", {512, 2048}},
      {"model.layers.3.self_attn.o_proj.weight", {2048, 4096}},
      {"model.layers.3.self_attn.q_norm.weight", {256}},
      {"model.layers.47.mlp.shared_expert_gate.weight", {1, 2048}},
      {"model.layers.47.mlp.shared_expert.down_proj.weight", {2048, 512}},
      {"mtp.fc.weight", {2048, 4096}},
      {"mtp.pre_fc_norm_embedding.weight", {2048}},
      {"mtp.pre_fc_norm_hidden.weight", {2048}},
      {"mtp.norm.weight", {2048}},
      {"mtp.layers.0.self_attn.q_proj.weight", {8192, 2048}},
      {"mtp.layers.0.mlp.experts.511.up_proj.weight", {512, 2048}}};
  for (const auto& [name, shape] : expected) {
    ASSERT_TRUE(catalog.contains(name)) << name;
    EXPECT_EQ(catalog.at(name), (TensorSpec{name, Dtype::kBF16, shape}));
  }
  EXPECT_FALSE(catalog.contains("model.layers.0.self_attn.q_proj.weight"));
  EXPECT_FALSE(catalog.contains("model.layers.3.linear_attn.A_log"));
}

TEST(Qwen3Next, LayerTypesComeBeforeTheIntervalAndMustNotContradictIt) {
  json config = qwen3_next_80b();
  config["num_hidden_layers"] = 3;
  config.erase("full_attention_interval");
  EXPECT_EQ(read(config).linear_layers, (std::vector<bool>{true, true, true}));
  config["layer_types"] = {"full_attention", "linear_attention", "full_attention"};
  EXPECT_EQ(read(config).linear_layers, (std::vector<bool>{false, true, false}));
  config["full_attention_interval"] = 2;
  const auto contradiction = parse_model_config(config.dump());
  ASSERT_FALSE(contradiction);
  EXPECT_THAT(contradiction.error().message,
              HasSubstr("\"full_attention\" for layer 0, field \"full_attention_interval\" is 2"));
  config["layer_types"] = {"linear_attention", "full_attention", "linear_attention"};
  EXPECT_EQ(read(config).linear_layers, (std::vector<bool>{true, false, true}));
}

TEST(Qwen3Next, BadFieldsAreNamed) {
  const std::vector<std::pair<json, const char*>> changes = {
      {{{"linear_num_key_heads", nullptr}}, "\"linear_num_key_heads\" is missing"},
      {{{"linear_num_value_heads", 24}}, "\"linear_num_value_heads\" is 24"},
      {{{"linear_key_head_dim", 1 << 28}}, "\"linear_key_head_dim\""},
      {{{"shared_expert_intermediate_size", nullptr}}, "\"shared_expert_intermediate_size\""},
      {{{"layer_types", {"full_attention"}}}, "one for each of 48 layers"},
      {{{"layer_types", json(std::vector<std::string>(48, "sliding"))}}, "\"sliding\" for layer 0"},
      {{{"full_attention_interval", 0}}, "\"full_attention_interval\" is 0"},
      {{{"num_nextn_predict_layers", 2}}, "\"num_nextn_predict_layers\" is 2"},
      {{{"mlp_only_layers", {0}}}, "\"mlp_only_layers\""},
      {{{"decoder_sparse_step", 2}}, "\"decoder_sparse_step\""},
  };
  for (const auto& [change, text] : changes) {
    json config = qwen3_next_80b();
    config.update(change);
    const auto config_read = parse_model_config(config.dump());
    ASSERT_FALSE(config_read) << change.dump();
    EXPECT_THAT(config_read.error().message, HasSubstr(text));
  }
}

json narrow() {
  json config = qwen3_next_80b();
  config["num_experts"] = 4;
  config["num_hidden_layers"] = 4;
  return config;
}

TEST(Qwen3Next, MegatronIsRefusedUntilTheCallerTakesTheNormThatIsCalculated) {
  const auto spec = [](const char* text) { return parse_parallel_spec(text).value(); };
  const auto refused = make_layouts(read(narrow()), spec("megatron:tp=2"));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  EXPECT_THAT(refused.error().message, HasSubstr("model.layers.0.linear_attn.norm.weight"));
  EXPECT_THAT(refused.error().message, HasSubstr("out_norm=plus_one"));
  const auto layout = make_layout(read(narrow()), spec("megatron:tp=2,out_norm=plus_one"), 1);
  ASSERT_TRUE(layout) << layout.error().message;
  EXPECT_TRUE(layout->find_parameter("decoder.layers.0.self_attention.out_norm.weight_plus_one"));
  EXPECT_FALSE(parse_parallel_spec("vllm:out_norm=plus_one"));
  EXPECT_FALSE(parse_parallel_spec("megatron:out_norm=plus_two"));
}

TEST(Qwen3Next, HeadsOfLinearAttentionMustDivide) {
  for (const char* spec : {"vllm:tp=32", "megatron:tp=32,out_norm=plus_one"}) {
    json config = narrow();
    config["num_attention_heads"] = 32;
    const auto layouts = make_layouts(read(config), parse_parallel_spec(spec).value());
    ASSERT_FALSE(layouts) << spec;
    EXPECT_THAT(layouts.error().message, HasSubstr("does not divide the 16 groups of rows of "
                                                   "model.layers.0.linear_attn.in_proj_qkvz"));
  }
}

TEST(Qwen3Next, VllmHoldsTheDecayInF32) {
  const Layout layout =
      make_layout(read(narrow()), parse_parallel_spec("vllm:tp=2").value(), 0).value();
  const auto dtype = [&](const std::string& name) {
    return layout.parameters()[*layout.find_parameter("model.layers.0.linear_attn." + name)].dtype;
  };
  EXPECT_EQ(dtype("A_log"), Dtype::kF32);
  EXPECT_EQ(dtype("dt_bias"), Dtype::kBF16);
  EXPECT_FALSE(layout.find_tensor("mtp.fc.weight"));
}

}  // namespace
}  // namespace transfuse

// Catalogs of Mixtral, Gemma 3, GLM-4.5 and DeepSeek-V3 from the config.json files of published
// models, and what is refused of them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

json mixtral_8x7b() {
  return json::parse(R"({
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000})");
}

json gemma3_1b() {
  return json::parse(R"({
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "torch_dtype": "bfloat16",
    "vocab_size": 262144})");
}

json glm_45_air() {
  return json::parse(R"({
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": true, "first_k_dense_replace": 1,
    "head_dim": 128, "hidden_size": 4096, "intermediate_size": 10944, "model_type": "glm4_moe",
    "moe_intermediate_size": 1408, "n_routed_experts": 128, "n_shared_experts": 1,
    "num_attention_heads": 96, "num_hidden_layers": 46, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "use_qk_norm": false, "vocab_size": 151552})");
}

json deepseek_v3() {
  return json::parse(R"({
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false,
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_attention_heads": 128, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic",
    "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "tie_word_embeddings": false, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "v_head_dim": 128, "vocab_size": 129280})");
}

std::map<std::string, TensorSpec> catalog_of(const json& config) {
  std::map<std::string, TensorSpec> out;
  for (const TensorSpec& tensor : make_catalog(parse_model_config(config.dump()).value()).value()) {
    EXPECT_TRUE(out.emplace(tensor.name, tensor).second) << tensor.name << " twice";
  }
  return out;
}

void expect_tensors(const std::map<std::string, TensorSpec>& catalog,
                    const std::vector<TensorSpec>& expected) {
  for (const TensorSpec& tensor : expected) {
    ASSERT_TRUE(catalog.contains(tensor.name)) << tensor.name;
    EXPECT_EQ(catalog.at(tensor.name), tensor) << tensor.name;
  }
}

int64_t elements(const std::map<std::string, TensorSpec>& catalog) {
  int64_t sum = 0;
  for (const auto& [name, tensor] : catalog) sum += tensor.shape.product();
  return sum;
}

TEST(Catalog, Mixtral8x7BHas995TensorsAnd46_7BillionParameters) {
  const auto catalog = catalog_of(mixtral_8x7b());
  EXPECT_EQ(catalog.size(), 995U);
  EXPECT_EQ(elements(catalog), 46702792704);
  const std::string moe = "model.layers.31.block_sparse_moe.";
  expect_tensors(catalog, {{moe + "gate.weight", Dtype::kBF16, {8, 4096}},
                           {moe + "experts.7.w1.weight", Dtype::kBF16, {14336, 4096}},
                           {moe + "experts.7.w2.weight", Dtype::kBF16, {4096, 14336}},
                           {moe + "experts.7.w3.weight", Dtype::kBF16, {14336, 4096}}});
}

TEST(Catalog, Gemma3_1BHas340TensorsAndIsTiedUnlessTheConfigSaysOtherwise) {
  const auto catalog = catalog_of(gemma3_1b());
  EXPECT_EQ(catalog.size(), 340U);
  EXPECT_EQ(elements(catalog), 999885952);
  const std::string layer = "model.layers.25.";
  for (const char* norm : {"input_layernorm", "post_attention_layernorm",
                           "pre_feedforward_layernorm", "post_feedforward_layernorm"}) {
    EXPECT_TRUE(catalog.contains(layer + norm + ".weight")) << norm;
  }
  expect_tensors(catalog, {{layer + "self_attn.q_norm.weight", Dtype::kBF16, {256}},
                           {layer + "self_attn.k_proj.weight", Dtype::kBF16, {256, 1152}}});
  json untied = gemma3_1b();
  untied["tie_word_embeddings"] = false;
  EXPECT_EQ(catalog_of(untied).size(), 341U);
  untied.erase("head_dim");
  EXPECT_EQ(parse_model_config(untied.dump())->head_dim, 256);
}

TEST(Catalog, Glm45AirHas17925TensorsAnd404MoreOfItsMtpLayer) {
  const auto catalog = catalog_of(glm_45_air());
  EXPECT_EQ(catalog.size(), 17925U + 404U);
  json without = glm_45_air();
  without["num_nextn_predict_layers"] = 0;
  EXPECT_EQ(catalog_of(without).size(), 17925U);
  const std::string moe = "model.layers.1.mlp.";
  expect_tensors(catalog,
                 {{moe + "gate.weight", Dtype::kBF16, {128, 4096}},
                  {moe + "gate.e_score_correction_bias", Dtype::kF32, {128}},
                  {moe + "shared_experts.gate_proj.weight", Dtype::kBF16, {1408, 4096}},
                  {"model.layers.0.mlp.gate_proj.weight", Dtype::kBF16, {10944, 4096}},
                  {"model.layers.0.self_attn.q_proj.bias", Dtype::kBF16, {12288}},
                  {"model.layers.46.eh_proj.weight", Dtype::kBF16, {4096, 8192}},
                  {"model.layers.46.shared_head.head.weight", Dtype::kBF16, {151552, 4096}}});
  EXPECT_FALSE(catalog.contains("model.layers.0.mlp.gate.weight"));
  EXPECT_FALSE(catalog.contains("model.layers.1.self_attn.q_norm.weight"));
  json normed = without;
  normed["use_qk_norm"] = true;
  EXPECT_EQ(catalog_of(normed).size(), 17925U + 2U * 46U);
}

TEST(Catalog, DeepseekV3Has45395TensorsWithoutScalesAndMtp) {
  json config = deepseek_v3();
  config.erase("quantization_config");
  EXPECT_EQ(catalog_of(config).size(), 45395U + 788U);
  config["num_nextn_predict_layers"] = 0;
  const auto catalog = catalog_of(config);
  EXPECT_EQ(catalog.size(), 45395U);
  EXPECT_EQ(elements(catalog), 671026419200);
  const std::string attention = "model.layers.60.self_attn.";
  expect_tensors(catalog, {{attention + "q_a_proj.weight", Dtype::kBF16, {1536, 7168}},
                           {attention + "q_b_proj.weight", Dtype::kBF16, {24576, 1536}},
                           {attention + "kv_a_proj_with_mqa.weight", Dtype::kBF16, {576, 7168}},
                           {attention + "kv_b_proj.weight", Dtype::kBF16, {32768, 512}},
                           {attention + "o_proj.weight", Dtype::kBF16, {7168, 16384}},
                           {attention + "q_a_layernorm.weight", Dtype::kBF16, {1536}},
                           {"model.layers.2.mlp.up_proj.weight", Dtype::kBF16, {18432, 7168}}});
}

TEST(Catalog, BlockScalesAreTensorsBesideTheirF8Weights) {
  const auto catalog = catalog_of(deepseek_v3());
  // A dense layer has 8 linear weights, one with experts 5 + 3 x 257, as has the MTP layer.
  EXPECT_EQ(catalog.size(), 45395U + 788U + 3U * 8U + 59U * 776U);
  const std::string layer = "model.layers.5.";
  expect_tensors(catalog,
                 {{layer + "self_attn.kv_a_proj_with_mqa.weight", Dtype::kF8E4M3, {576, 7168}},
                  {layer + "self_attn.kv_a_proj_with_mqa.weight_scale_inv", Dtype::kF32, {5, 56}},
                  {layer + "mlp.experts.255.down_proj.weight", Dtype::kF8E4M3, {7168, 2048}},
                  {layer + "mlp.experts.255.down_proj.weight_scale_inv", Dtype::kF32, {56, 16}},
                  {layer + "mlp.gate.weight", Dtype::kBF16, {256, 7168}},
                  {layer + "mlp.gate.e_score_correction_bias", Dtype::kF32, {256}},
                  {layer + "input_layernorm.weight", Dtype::kBF16, {7168}},
                  {"model.layers.61.eh_proj.weight", Dtype::kBF16, {7168, 14336}},
                  {"lm_head.weight", Dtype::kBF16, {129280, 7168}}});
  EXPECT_FALSE(catalog.contains("lm_head.weight_scale_inv"));
  EXPECT_FALSE(catalog.contains(layer + "mlp.gate.weight_scale_inv"));
  EXPECT_FALSE(catalog.contains("model.layers.61.eh_proj.weight_scale_inv"));
}

Error config_error(const json& object) {
  const auto config = parse_model_config(object.dump());
  EXPECT_FALSE(config) << object.dump();
  return config ? Error{} : config.error();
}

TEST(ModelConfig, MissingFieldsOfAFamilyAreNamed) {
  const std::vector<std::pair<json, std::vector<const char*>>> needed = {
      {mixtral_8x7b(), {"intermediate_size", "num_local_experts"}},
      {gemma3_1b(), {"intermediate_size"}},
      {glm_45_air(), {"intermediate_size", "moe_intermediate_size", "n_routed_experts"}},
      {deepseek_v3(),
       {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_routed_experts"}},
  };
  for (const auto& [config, fields] : needed) {
    for (const char* field : fields) {
      json changed = config;
      changed.erase(field);
      const Error error = config_error(changed);
      EXPECT_EQ(error.code, ErrorCode::kInvalidArgument) << field;
      EXPECT_THAT(error.message, HasSubstr("\"" + std::string(field) + "\" is missing"));
    }
  }
}

TEST(ModelConfig, ContradictionsOfAFamilyAreNamed) {
  json config = glm_45_air();
  config["first_k_dense_replace"] = 47;
  EXPECT_THAT(config_error(config).message, HasSubstr("\"first_k_dense_replace\" is 47"));
  config = glm_45_air();
  config["num_nextn_predict_layers"] = -1;
  EXPECT_THAT(config_error(config).message, HasSubstr("\"num_nextn_predict_layers\" is -1"));
  config = glm_45_air();
  config["num_experts"] = 64;
  EXPECT_THAT(config_error(config).message,
              HasSubstr("\"num_experts\" is 64, field \"n_routed_experts\" is 128"));
  config = deepseek_v3();
  config["v_head_dim"] = 1 << 29;
  EXPECT_THAT(config_error(config).message, HasSubstr("\"v_head_dim\""));
  config = deepseek_v3();
  config["n_shared_experts"] = 1 << 29;
  EXPECT_THAT(config_error(config).message, HasSubstr("\"n_shared_experts\""));
}

TEST(ModelConfig, OtherQuantisationsAreRefusedByField) {
  json config = deepseek_v3();
  const std::vector<std::pair<const char*, json>> changes = {
      {"quant_method", "awq"},         {"fmt", "e5m2"},
      {"weight_block_size", nullptr},  {"weight_block_size", {128}},
      {"weight_block_size", {0, 128}}, {"weight_block_size", {"a", "b"}},
  };
  for (const auto& [field, value] : changes) {
    json changed = config;
    changed["quantization_config"][field] = value;
    const Error error = config_error(changed);
    EXPECT_EQ(error.code, ErrorCode::kUnsupported) << field;
    EXPECT_THAT(error.message, HasSubstr(field));
  }
  config = glm_45_air();
  config["quantization_config"] = deepseek_v3()["quantization_config"];
  EXPECT_EQ(config_error(config).code, ErrorCode::kUnsupported);
}

}  // namespace
}  // namespace transfuse

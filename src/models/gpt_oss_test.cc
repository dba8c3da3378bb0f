// gpt-oss from the config.json of the published models, and what is refused of it.
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

json gpt_oss_20b() {
  return json::parse(R"({
    "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "intermediate_size": 2880, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "quantization_config": {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
    "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"}, "sliding_window": 128,
    "swiglu_limit": 7.0, "tie_word_embeddings": false, "vocab_size": 201088})");
}

json bf16_20b() {
  json config = gpt_oss_20b();
  config.erase("quantization_config");
  return config;
}

std::map<std::string, TensorSpec> catalog_of(const json& config) {
  std::map<std::string, TensorSpec> out;
  for (const TensorSpec& tensor : make_catalog(parse_model_config(config.dump()).value()).value()) {
    EXPECT_TRUE(out.emplace(tensor.name, tensor).second) << tensor.name << " twice";
  }
  return out;
}

TEST(Catalog, GptOss20BHas411TensorsAnd20_9BillionParametersInBf16) {
  const auto catalog = catalog_of(bf16_20b());
  EXPECT_EQ(catalog.size(), 411U);
  int64_t elements = 0;
  for (const auto& [name, tensor] : catalog) elements += tensor.shape.product();
  EXPECT_EQ(elements, 20914757184);
  const std::string layer = "model.layers.23.";
  const std::vector<std::pair<std::string, Dims>> expected = {
      {"self_attn.q_proj.bias", {4096}},
      {"self_attn.o_proj.bias", {2880}},
      {"self_attn.sinks", {64}},
      {"mlp.router.weight", {32, 2880}},
      {"mlp.router.bias", {32}},
      {"mlp.experts.gate_up_proj", {32, 2880, 5760}},
      {"mlp.experts.gate_up_proj_bias", {32, 5760}},
      {"mlp.experts.down_proj", {32, 2880, 2880}},
      {"mlp.experts.down_proj_bias", {32, 2880}}};
  for (const auto& [name, shape] : expected) {
    ASSERT_TRUE(catalog.contains(layer + name)) << name;
    EXPECT_EQ(catalog.at(layer + name), (TensorSpec{layer + name, Dtype::kBF16, shape}));
  }
}

TEST(Catalog, GptOss20BHas459TensorsWithPackedExperts) {
  const auto catalog = catalog_of(gpt_oss_20b());
  EXPECT_EQ(catalog.size(), 459U);
  const std::string experts = "model.layers.0.mlp.experts.";
  const std::vector<std::pair<std::string, Dims>> expected = {
      {"gate_up_proj_blocks", {32, 5760, 90, 16}},
      {"gate_up_proj_scales", {32, 5760, 90}},
      {"down_proj_blocks", {32, 2880, 90, 16}},
      {"down_proj_scales", {32, 2880, 90}}};
  for (const auto& [name, shape] : expected) {
    EXPECT_EQ(catalog.at(experts + name), (TensorSpec{experts + name, Dtype::kU8, shape}));
  }
  EXPECT_FALSE(catalog.contains(experts + "gate_up_proj"));
  EXPECT_EQ(catalog.at(experts + "gate_up_proj_bias").dtype, Dtype::kBF16);
}

Error layout_error(const json& config, const std::string& spec) {
  const auto layouts =
      make_layouts(parse_model_config(config.dump()).value(), parse_parallel_spec(spec).value());
  EXPECT_FALSE(layouts) << spec;
  return layouts ? Error{} : layouts.error();
}

TEST(GptOss, WhatNoFrameworkHoldsIsRefusedByName) {
  const std::vector<std::pair<std::string, const char*>> refused = {
      {"vllm:tp=16", "\"num_key_value_heads\", which is 8"},
      {"vllm:tp=1,dp=3,ep", "multiple of tp x dp = 3"},
      {"vllm:tp=2,ep,placement=round_robin", "placement=round_robin"},
      {"vllm:tp=2,w13=up_gate", "w13=up_gate"},
      {"vllm:dp=7", "groups of rows of model.layers.0.mlp.experts.gate_up_proj"},
      {"megatron:etp=2", "etp=2: expected 1 with biases of experts"},
      {"fsdp:tp=2", "model.layers.0.mlp.experts."},
  };
  for (const auto& [spec, text] : refused) {
    EXPECT_THAT(layout_error(bf16_20b(), spec).message, HasSubstr(text)) << spec;
  }
  json tied = bf16_20b();
  tied["tie_word_embeddings"] = true;
  EXPECT_THAT(layout_error(tied, "vllm").message, HasSubstr("\"tie_word_embeddings\""));
}

TEST(GptOss, FilesStackExpertsAsModulesDo) {
  const ModelConfig config = parse_model_config(bf16_20b().dump()).value();
  for (const char* spec : {"hf", "fsdp:dp=3"}) {
    const std::string stacked =
        std::string(spec) + (spec[0] == 'h' ? ":" : ",") + "experts=stacked";
    EXPECT_EQ(make_layout(config, parse_parallel_spec(spec).value(), 0)->digest(),
              make_layout(config, parse_parallel_spec(stacked).value(), 0)->digest());
  }
}

TEST(GptOss, PackedExpertsAreRefusedWhereTheyAreMoreThanMoved) {
  EXPECT_EQ(layout_error(gpt_oss_20b(), "megatron:tp=2").code, ErrorCode::kUnsupported);
  // 90 blocks of 32 do not divide by 4: vLLM pads them.
  EXPECT_THAT(layout_error(gpt_oss_20b(), "vllm:tp=4").message,
              HasSubstr("does not divide the 90 columns of model.layers.0.mlp.experts.down_proj"));
  EXPECT_TRUE(make_layouts(parse_model_config(gpt_oss_20b().dump()).value(),
                           parse_parallel_spec("vllm:tp=4,ep").value()));
}

TEST(GptOss, ContradictionsAndOtherQuantisationsAreNamed) {
  const std::vector<std::pair<json, const char*>> changes = {
      {{{"attention_bias", false}}, "\"attention_bias\" is false"},
      {{{"quantization_config", {{"quant_method", "fp8"}}}}, "\"quant_method\" is \"fp8\""},
      {{{"quantization_config", {{"bits", 4}}}}, "\"quant_method\" is missing"},
      {{{"intermediate_size", 2881}}, "\"intermediate_size\" (2881)"},
      {{{"num_local_experts", nullptr}}, "\"num_local_experts\" is missing"},
      {{{"num_experts", 16}}, "\"num_local_experts\" is 32"},
  };
  for (const auto& [change, text] : changes) {
    json config = gpt_oss_20b();
    config.update(change);
    const auto read = parse_model_config(config.dump());
    ASSERT_FALSE(read) << change.dump();
    EXPECT_THAT(read.error().message, HasSubstr(text));
  }
}

}  // namespace
}  // namespace transfuse

// config.json and parallel specs: what is read, and what is refused by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json dense() {
  return json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false,
    "head_dim": 128, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "vocab_size": 151936, "rope_scaling": null})");
}

json moe() {
  return json::parse(R"({
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 128, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
    "num_experts": 128, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 151936})");
}

Error config_error(const json& object) {
  const auto config = parse_model_config(object.dump());
  EXPECT_FALSE(config) << object.dump();
  return config ? Error{} : config.error();
}

TEST(ModelConfig, ReadsADenseModel) {
  const auto c = parse_model_config(dense().dump()).value();
  EXPECT_EQ(c.architecture, "qwen3");
  EXPECT_EQ(c.hidden_size, 2560);
  EXPECT_EQ(c.intermediate_size, 9728);
  EXPECT_EQ(c.num_hidden_layers, 36);
  EXPECT_EQ(c.num_attention_heads, 32);
  EXPECT_EQ(c.num_key_value_heads, 8);
  EXPECT_EQ(c.head_dim, 128);
  EXPECT_EQ(c.vocab_size, 151936);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.dtype, Dtype::kBF16);
}

TEST(ModelConfig, ReadsAMixtureOfExperts) {
  const auto c = parse_model_config(moe().dump()).value();
  EXPECT_EQ(c.num_experts, 128);
  EXPECT_EQ(c.moe_intermediate_size, 768);
  EXPECT_FALSE(c.tie_word_embeddings);
}

TEST(ModelConfig, TheNumberOfExpertsHasTwoNamesThatMustAgree) {
  json object = moe();
  object["num_local_experts"] = 128;
  EXPECT_EQ(parse_model_config(object.dump())->num_experts, 128);
  object.erase("num_experts");
  EXPECT_EQ(parse_model_config(object.dump())->num_experts, 128);
  object["num_experts"] = 64;
  EXPECT_THAT(config_error(object).message, HasSubstr("\"num_local_experts\" is 128"));
}

TEST(ModelConfig, AMissingHeadDimIsThatOfTheModelClass) {
  json object = dense();
  object.erase("head_dim");
  object["hidden_size"] = 64;
  EXPECT_EQ(parse_model_config(object.dump())->head_dim, 128);
  object = moe();
  object["head_dim"] = nullptr;
  EXPECT_EQ(parse_model_config(object.dump())->head_dim, 64);
  object["hidden_size"] = 2050;
  EXPECT_THAT(config_error(object).message, HasSubstr("\"head_dim\""));
}

TEST(ModelConfig, DtypeComesFromEitherFieldButNotFromTwoThatDiffer) {
  json object = dense();
  object["torch_dtype"] = "float32";
  EXPECT_EQ(parse_model_config(object.dump())->dtype, Dtype::kF32);
  object["dtype"] = "float32";
  EXPECT_EQ(parse_model_config(object.dump())->dtype, Dtype::kF32);
  object["dtype"] = "float16";
  EXPECT_THAT(config_error(object).message, HasSubstr("\"torch_dtype\" is f32"));
  object.erase("torch_dtype");
  EXPECT_EQ(parse_model_config(object.dump())->dtype, Dtype::kF16);
  object["dtype"] = "int4";
  EXPECT_THAT(config_error(object).message, HasSubstr("\"int4\""));
}

TEST(ModelConfig, EveryMissingFieldIsNamed) {
  for (const json& object : {dense(), moe()}) {
    for (const char* field : {"model_type", "hidden_size", "num_hidden_layers", "vocab_size",
                              "num_attention_heads", "num_key_value_heads"}) {
      json changed = object;
      changed.erase(field);
      const Error error = config_error(changed);
      EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
      EXPECT_THAT(error.message, HasSubstr("\"" + std::string(field) + "\" is missing"));
    }
  }
  json object = dense();
  object.erase("intermediate_size");
  EXPECT_THAT(config_error(object).message, HasSubstr("\"intermediate_size\" is missing"));
  for (const char* field : {"num_experts", "moe_intermediate_size"}) {
    object = moe();
    object.erase(field);
    EXPECT_THAT(config_error(object).message, HasSubstr(std::string(field) + "\" is missing"));
  }
}

TEST(ModelConfig, SizesThatAreNoSmallPositiveWholeNumbersAreNamed) {
  for (const json& value : {json(0), json(-1), json(2.5), json("8"), json(true), json(UINT64_MAX),
                            json(int64_t{1} << 31), json(json::array())}) {
    for (const char* field :
         {"hidden_size", "num_hidden_layers", "num_experts", "head_dim", "vocab_size"}) {
      json object = moe();
      object[field] = value;
      const Error error = config_error(object);
      EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
      EXPECT_THAT(error.message, HasSubstr("\"" + std::string(field) + "\" is " + value.dump()));
    }
  }
}

TEST(ModelConfig, ContradictionsAreNamed) {
  json object = dense();
  object["num_key_value_heads"] = 5;
  EXPECT_THAT(config_error(object).message, HasSubstr("num_key_value_heads"));
  object = dense();
  object["head_dim"] = 1 << 30;
  EXPECT_THAT(config_error(object).message, HasSubstr("head_dim"));
  object = moe();
  object["num_experts"] = 1 << 20;
  EXPECT_THAT(config_error(object).message, HasSubstr("num_experts"));
  object = dense();
  object["tie_word_embeddings"] = "yes";
  EXPECT_THAT(config_error(object).message, HasSubstr("tie_word_embeddings"));
}

TEST(ModelConfig, WhatWouldChangeTheTensorsIsRefused) {
  const std::vector<std::pair<std::string, json>> changes = {
      {"attention_bias", true},
      {"quantization_config", {{"quant_method", "fp8"}}},
      {"decoder_sparse_step", 2},
      {"mlp_only_layers", {0}},
      {"architectures", {"Qwen3MoeForSequenceClassification"}},
      {"architectures", json::array()},
      {"model_type", "gpt2"},
  };
  for (const auto& [field, value] : changes) {
    json object = moe();
    object[field] = value;
    const Error error = config_error(object);
    EXPECT_EQ(error.code, ErrorCode::kUnsupported) << field;
    EXPECT_THAT(error.message, HasSubstr(field));
  }
  json object = moe();
  object["model_type"] = "gpt2";
  EXPECT_THAT(config_error(object).message, HasSubstr("llama, qwen2, qwen3, qwen3_moe"));
  EXPECT_THAT(config_error(object).message, HasSubstr("live modules"));
  object["model_type"] = "llama";
  EXPECT_THAT(config_error(object).message, HasSubstr("LlamaForCausalLM"));
  object["architectures"] = {"LlamaForCausalLM"};
  object["mlp_bias"] = true;
  EXPECT_THAT(config_error(object).message, HasSubstr("mlp_bias"));
}

TEST(ModelConfig, TextThatIsNoJsonObjectIsRefused) {
  for (const char* text : {"", "{", "[]", "3", "\"qwen3\"", "{\"model_type\": \"\xFF\"}", "nul"}) {
    const auto config = parse_model_config(text);
    ASSERT_FALSE(config) << text;
    EXPECT_EQ(config.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(ModelConfig, OneMadeByHandIsCheckedToo) {
  ModelConfig config;
  EXPECT_EQ(make_catalog(config).error().code, ErrorCode::kUnsupported);
  config.architecture = "qwen3";
  EXPECT_THAT(make_catalog(config).error().message, HasSubstr("hidden_size"));
}

TEST(ParallelSpec, ReadsFamilyAndSizes) {
  const auto hf = parse_parallel_spec("hf").value();
  EXPECT_EQ(hf.family, "hf");
  EXPECT_EQ(hf.rank_count(), 1);
  EXPECT_EQ(hf.dtype, Dtype::kBF16);
  const auto fsdp = parse_parallel_spec("fsdp:dp=4,tp=2,replicas=3,dtype=f32").value();
  EXPECT_EQ(fsdp.dp, 4);
  EXPECT_EQ(fsdp.tp, 2);
  EXPECT_EQ(fsdp.replicas, 3);
  EXPECT_EQ(fsdp.rank_count(), 24);
  EXPECT_EQ(fsdp.dtype, Dtype::kF32);
  EXPECT_EQ(parse_parallel_spec("vllm:tp=8")->tp, 8);
}

TEST(ParallelSpec, EveryMistakeIsNamed) {
  const std::map<std::string, std::string> mistakes = {
      {"", "family \"\""},
      {"deepspeed:tp=2", "hf, fsdp, vllm, sglang, megatron"},
      {"fsdp:", "key=value"},
      {"fsdp:dp", "\"dp\""},
      {"fsdp:dp=2,", "key=value"},
      {"fsdp:dp=2,dp=2", "twice"},
      {"fsdp:pp=2", "\"pp\""},
      {"fsdp:dp=0", "dp=0"},
      {"fsdp:dp=-2", "dp=-2"},
      {"fsdp:dp=two", "dp=two"},
      {"fsdp:dp=2x", "dp=2x"},
      {"fsdp:dp= 2", "dp= 2"},
      {"fsdp:dp=", "dp="},
      {"fsdp:dp=99999999999999999999", "dp=9999"},
      {"fsdp:dp=65536,tp=2", "more than 65536 ranks"},
      {"fsdp:dtype=float32", "float32"},
      {"hf:tp=2", "hf has no tp"},
      {"vllm:etp=2", "vllm has no etp"},
      {"vllm:ep=2", "takes no value"},
      {"vllm:w13=down", "gate_up or up_gate"},
      {"vllm:pp=2,layers=1/2/3", "expected pp x vpp = 2"},
      {"vllm:pp=2,layers=1/x", "layers=x"},
      {"hf:layers=1", "hf has no layers"},
      {"megatron:ep", "key=value"},
      {"megatron:vpp=2", "vpp=2: expected pp"},
      {"megatron:first=2", "first=2,last=0: expected pp"},
      {"megatron:pp=2,first=2,layers=1/2", "no layers="},
      {"megatron:tp=2,ep=4,etp=1,dp=3", "6 ranks a stage, expected a multiple of ep x etp = 4"},
      {"megatron:vocab_divisor=0", "vocab_divisor=0"},
      {"megatron:norms=rms", "te or separate"},
      {"megatron:padded_vocab=0", "padded_vocab=0"},
      {"megatron:padded_vocab=4294967296", "from 1 to 2147483648"},
      {"megatron:account_for_loss=1", "takes no value"},
      {"megatron:pp=2,first=1,account_for_embedding", "expected no first="},
      {"vllm:account_for_loss", "key=value"},
      {"megatron:tp=65536,ep=65535", "more than 65536 ranks"},
  };
  for (const auto& [text, word] : mistakes) {
    const auto spec = parse_parallel_spec(text);
    ASSERT_FALSE(spec) << text;
    EXPECT_EQ(spec.error().code, ErrorCode::kInvalidArgument) << text;
    EXPECT_THAT(spec.error().message, HasSubstr(word)) << text;
  }
}

}  // namespace
}  // namespace transfuse

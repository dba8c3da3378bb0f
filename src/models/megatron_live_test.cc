// Live Megatron-Core modules against specs: what the module may decide, and every disagreement by
// name. Real modules of Megatron-Core are compared in tests/python/test_megatron.py.
#include "transfuse/live_module.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;
using Numbers = std::vector<std::vector<int64_t>>;

ParallelSpec spec(const std::string& text) { return parse_parallel_spec(text).value(); }

ModelConfig dense() {
  return {.architecture = "qwen2",
          .hidden_size = 6,
          .intermediate_size = 16,
          .num_hidden_layers = 2,
          .num_attention_heads = 8,
          .num_key_value_heads = 2,
          .head_dim = 2,
          .vocab_size = 67};
}

ModelConfig moe() {
  ModelConfig config = dense();
  config.architecture = "qwen3_moe";
  config.moe_intermediate_size = 8;
  config.num_experts = 6;
  return config;
}

// Qwen2 under tp=2 as Megatron-Core's local modules say it, rank by rank the same.
LiveModule dense_of_two() {
  LiveModule module{
      .tensors = {{"embedding.word_embeddings.weight", Dtype::kBF16, {40, 6}, true, 0},
                  {"output_layer.weight", Dtype::kBF16, {40, 6}, true, 0},
                  {"decoder.final_layernorm.weight", Dtype::kF32, {6}}},
      .layers = {{0, 1}}};
  for (const std::string layer : {"decoder.layers.0.", "decoder.layers.1."}) {
    module.tensors.insert(
        module.tensors.end(),
        {{layer + "input_layernorm.weight", Dtype::kF32, {6}},
         {layer + "self_attention.linear_qkv.weight", Dtype::kBF16, {12, 6}, true, 0},
         {layer + "self_attention.linear_qkv.bias", Dtype::kBF16, {12}, true, 0},
         {layer + "self_attention.linear_proj.weight", Dtype::kBF16, {6, 8}, true, 1},
         {layer + "pre_mlp_layernorm.weight", Dtype::kF32, {6}},
         {layer + "mlp.linear_fc1.weight", Dtype::kBF16, {16, 6}, true, 0, 2},
         {layer + "mlp.linear_fc2.weight", Dtype::kBF16, {6, 8}, true, 1}});
  }
  return module;
}

LiveTensor& tensor_of(LiveModule& module, const std::string& name) {
  for (LiveTensor& tensor : module.tensors) {
    if (tensor.name == name) return tensor;
  }
  ADD_FAILURE() << name;
  return module.tensors[0];
}

// The parameters of a spec's layout, as a module without attributes would describe them.
LiveModule described(const Layout& layout, Numbers layers) {
  LiveModule module{.tensors = {}, .layers = std::move(layers)};
  for (const ParameterSpec& parameter : layout.parameters()) {
    Dims shape = {parameter.element_count};
    for (const Tile& tile : layout.tiles()) {
      if (layout.parameters()[tile.parameter].name != parameter.name) continue;
      if (tile.box.length.rank() != 2) continue;
      shape = {parameter.element_count / tile.box.length[1], tile.box.length[1]};
    }
    module.tensors.push_back({parameter.name, parameter.dtype, shape});
  }
  return module;
}

std::string layer_under(const Layout& layout, const std::string& parameter) {
  const auto at = layout.find_parameter(parameter);
  for (const Tile& tile : layout.tiles()) {
    if (at && tile.parameter == *at) return layout.tensors()[tile.tensor].name;
  }
  return {};
}

TEST(LiveMegatron, NamesDtypesAndPaddingAreTheModules) {
  const LiveModule module = dense_of_two();
  for (const PipelineFrom from : {PipelineFrom::kSpec, PipelineFrom::kModule}) {
    const Layout found =
        make_layout(dense(), spec("megatron:tp=2"), {.tp = 1}, module, from).value();
    const Layout plain = make_layout(dense(), spec("megatron:tp=2,norms=separate,padded_vocab=80"),
                                     ParallelRanks{.tp = 1})
                             .value();
    ASSERT_EQ(found.parameters().size(), module.tensors.size());
    for (const LiveTensor& tensor : module.tensors) {
      EXPECT_EQ(found.parameters()[found.find_parameter(tensor.name).value()].dtype, tensor.dtype);
    }
    EXPECT_EQ(std::vector<Tile>(found.tiles().begin(), found.tiles().end()),
              std::vector<Tile>(plain.tiles().begin(), plain.tiles().end()));
    EXPECT_EQ(std::vector<Fill>(found.fills().begin(), found.fills().end()),
              std::vector<Fill>(plain.fills().begin(), plain.fills().end()));
  }
}

TEST(LiveMegatron, AVocabularyMayBePaddedWithoutTensorParallelism) {
  const auto module =
      described(make_layout(dense(), spec("megatron:padded_vocab=128"), 0).value(), {{0, 1}});
  const Layout found =
      make_layout(dense(), spec("megatron"), ParallelRanks{}, module, PipelineFrom::kSpec).value();
  EXPECT_EQ(found.fills().size(), 2u);
}

TEST(LiveMegatron, AnyDivisionOfLayersIsTakenFromTheModule) {
  ModelConfig config = moe();
  config.num_hidden_layers = 7;
  const struct {
    std::string sizes;
    std::string layers;  // the whole division
    int64_t pp;
    Numbers numbers;
  } cases[] = {
      {"pp=3", "3/2/2", 1, {{3, 4}}},
      {"pp=3", "7/0/0", 0, {{0, 1, 2, 3, 4, 5, 6}}},
      {"pp=3", "0/7/0", 0, {{}}},
      {"pp=3", "0/0/7", 2, {{0, 1, 2, 3, 4, 5, 6}}},
      {"pp=2,vpp=2", "1/2/3/1", 0, {{0}, {3, 4, 5}}},
      {"pp=2,vpp=2", "1/2/3/1", 1, {{1, 2}, {6}}},
      {"pp=2,vpp=3", "0/1/1/2/3/0", 1, {{0}, {2, 3}, {}}},
  };
  for (const auto& c : cases) {
    const ParallelRanks ranks{.pp = c.pp};
    const Layout expected =
        make_layout(config, spec("megatron:" + c.sizes + ",layers=" + c.layers), ranks).value();
    const auto found = make_layout(config, spec("megatron:" + c.sizes), ranks,
                                   described(expected, c.numbers), PipelineFrom::kModule);
    ASSERT_TRUE(found) << c.layers << ": " << found.error().message;
    EXPECT_EQ(found->digest(), expected.digest()) << c.layers;
  }
}

TEST(LiveMegatron, LayersThatNoDivisionGivesAreNamed) {
  ModelConfig config = moe();
  config.num_hidden_layers = 7;
  const struct {
    std::string sizes;
    int64_t pp;
    Numbers numbers;
    std::string words;
  } cases[] = {
      {"pp=2",
       0,
       {{1, 2}},
       "decoder.layers.0: expected layer_number 1 of num_hidden_layers = 7, "
       "found 2"},
      {"pp=2", 1, {{3, 5}}, "decoder.layers.1: expected layer_number 5 of"},
      {"pp=2", 1, {{3, 4, 5}}, "expected to end with layer_number 7 = num_hidden_layers, found 6"},
      {"pp=2",
       1,
       {{5, 6, 7}},
       "decoder.layers.2: expected layer_number 8 of num_hidden_layers = 7, "
       "found 8"},
      {"pp=2", 1, {{-1, 0}}, "decoder.layers.0: expected layer_number 1 to 7 of"},
      {"pp=2,vpp=2", 0, {{0, 1}, {1, 2}}, "1:decoder.layers.0: expected layer_number 3 to 7 of"},
      {"pp=2,vpp=2", 0, {{0, 1}}, "expected vpp = 2, found 1"},
      {"pp=1", 0, {{0, 1, 2}}, "expected to end with layer_number 7"},
  };
  for (const auto& c : cases) {
    const auto found = make_layout(config, spec("megatron:" + c.sizes), {.pp = c.pp},
                                   {.tensors = {}, .layers = c.numbers}, PipelineFrom::kModule);
    ASSERT_FALSE(found) << c.words;
    EXPECT_EQ(found.error().code, ErrorCode::kLayoutMismatch);
    EXPECT_THAT(found.error().message, HasSubstr(c.words));
  }
}

TEST(LiveMegatron, ADivisionThatTheSpecDoesNotSayIsNamed) {
  ModelConfig config = moe();
  config.num_hidden_layers = 4;
  const Layout even = make_layout(config, spec("megatron:pp=2"), ParallelRanks{.pp = 1}).value();
  const auto found = make_layout(config, spec("megatron:pp=2"), {.pp = 1},
                                 described(even, {{1, 2}}), PipelineFrom::kSpec);
  ASSERT_FALSE(found);
  EXPECT_EQ(found.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_THAT(found.error().message,
              HasSubstr("decoder.layers.0: expected layer_number 3, found 2"));
  EXPECT_THAT(found.error().message,
              HasSubstr("rank tp 0 pp 1 etp 0 ep 0: the module does not agree in 2 "));
  const auto agreed = make_layout(config, spec("megatron:pp=2"), {.pp = 1},
                                  described(even, {{2, 3}}), PipelineFrom::kSpec);
  EXPECT_EQ(agreed->digest(), even.digest());
}

TEST(LiveMegatron, EveryDisagreementNamesTensorExpectedAndFound) {
  const std::string layer = "decoder.layers.1.";
  const struct {
    std::function<void(LiveModule&)> change;
    std::string words;
  } cases[] = {
      {[&](LiveModule& m) { tensor_of(m, layer + "mlp.linear_fc1.weight").shape = {32, 6}; },
       layer + "mlp.linear_fc1.weight: expected [16, 6], found [32, 6]"},
      {[&](LiveModule& m) { tensor_of(m, layer + "mlp.linear_fc2.weight").shape = {8, 6}; },
       layer + "mlp.linear_fc2.weight: expected [6, 8], found [8, 6]"},
      {[&](LiveModule& m) { tensor_of(m, "output_layer.weight").shape = {64, 6}; },
       "embedding.word_embeddings.weight: expected [64, 6], found [40, 6]"},
      {[&](LiveModule& m) { tensor_of(m, "output_layer.weight").shape = {32, 6}; },
       "output_layer.weight: 32 rows on each of tp = 2 ranks, expected vocab_size = 67 or more"},
      {[&](LiveModule& m) {
         std::erase_if(m.tensors, [](const LiveTensor& t) {
           return t.name.ends_with("1.self_attention.linear_qkv.bias");
         });
       },
       layer + "self_attention.linear_qkv.bias: missing; expected [12] of "
               "model.layers.1.self_attn."},
      {[&](LiveModule& m) {
         m.tensors.push_back({layer + "mlp.router.expert_bias", Dtype::kF32, {6}});
       },
       layer + "mlp.router.expert_bias: extra, [6]; expected no such tensor"},
      {[&](LiveModule& m) { m.tensors.push_back(m.tensors[2]); },
       "decoder.final_layernorm.weight: twice"},
      {[&](LiveModule& m) {
         tensor_of(m, layer + "self_attention.linear_proj.weight").partition_dim = 0;
       },
       layer + "self_attention.linear_proj.weight: expected tensor_model_parallel with "
               "partition_dim 1, found partition_dim 0"},
      {[&](LiveModule& m) {
         tensor_of(m, layer + "mlp.linear_fc1.weight").tensor_model_parallel = false;
       },
       layer + "mlp.linear_fc1.weight: expected tensor_model_parallel with partition_dim 0, found "
               "a tensor that is whole"},
      {[&](LiveModule& m) { tensor_of(m, layer + "mlp.linear_fc1.weight").partition_stride = 1; },
       layer + "mlp.linear_fc1.weight: expected partition_stride 2, found 1"},
      {[&](LiveModule& m) {
         tensor_of(m, layer + "self_attention.linear_qkv.weight").partition_stride = 3;
       },
       layer + "self_attention.linear_qkv.weight: expected partition_stride 1, found 3"},
  };
  for (const auto& c : cases) {
    LiveModule module = dense_of_two();
    c.change(module);
    const auto found =
        make_layout(dense(), spec("megatron:tp=2"), {.tp = 1}, module, PipelineFrom::kModule);
    ASSERT_FALSE(found) << c.words;
    EXPECT_EQ(found.error().code, ErrorCode::kLayoutMismatch) << c.words;
    EXPECT_THAT(found.error().message, HasSubstr(c.words));
  }
}

TEST(LiveMegatron, AModuleThatMarksNothingIsNotRefusedForIt) {
  LiveModule module = dense_of_two();
  for (LiveTensor& tensor : module.tensors) tensor.partition_stride = 1;
  EXPECT_TRUE(
      make_layout(dense(), spec("megatron:tp=2"), {.tp = 0}, module, PipelineFrom::kModule));
  for (LiveTensor& tensor : module.tensors) tensor.tensor_model_parallel = false;
  EXPECT_TRUE(
      make_layout(dense(), spec("megatron:tp=2"), {.tp = 0}, module, PipelineFrom::kModule));
}

TEST(LiveMegatron, ALongListOfDisagreementsIsCutButCounted) {
  const LiveModule none{.tensors = {}, .layers = {{0, 1}}};
  const auto found =
      make_layout(dense(), spec("megatron:tp=2"), {.tp = 0}, none, PipelineFrom::kModule);
  ASSERT_FALSE(found);
  EXPECT_THAT(found.error().message, HasSubstr("does not agree in 17 points"));
  EXPECT_TRUE(found.error().message.ends_with("; ...")) << found.error().message;
}

TEST(LiveMegatron, GroupedAndSequentialExpertsAreTakenAsTheyAre) {
  for (const char* style : {"grouped", "sequential"}) {
    const Layout expected =
        make_layout(moe(), spec(std::string("megatron:ep=3,tp=2,etp=1,experts=") + style),
                    ParallelRanks{.tp = 1, .ep = 2})
            .value();
    LiveModule module = described(expected, {{0, 1}});
    for (LiveTensor& tensor : module.tensors) {
      // TransformerEngine marks no grouped experts; everything else has its attributes.
      if (tensor.name.find(".experts.") != std::string::npos) continue;
      if (tensor.name.ends_with("norm.weight") || tensor.name.ends_with("layer_norm_weight") ||
          tensor.name.ends_with("router.weight")) {
        continue;
      }
      tensor.tensor_model_parallel = true;
      tensor.partition_dim = tensor.name.ends_with("linear_proj.weight") ? 1 : 0;
    }
    const auto found = make_layout(moe(), spec("megatron:ep=3,tp=2,etp=1"), {.tp = 1, .ep = 2},
                                   module, PipelineFrom::kModule);
    ASSERT_TRUE(found) << style << ": " << found.error().message;
    EXPECT_EQ(found->digest(), expected.digest());
    EXPECT_EQ(layer_under(*found, std::string("decoder.layers.1.mlp.experts.") +
                                      (style[0] == 'g' ? "linear_fc2.weight1"
                                                       : "local_experts.1.linear_fc2.weight")),
              "model.layers.1.mlp.experts.5.down_proj.weight");
  }
}

TEST(LiveMegatron, SpecsThatCannotBeMeantAreRefused) {
  const LiveModule module = dense_of_two();
  const std::map<std::string, std::string> mistakes = {
      {"vllm:tp=2", "expected a megatron spec, found one of vllm"},
      {"megatron:pp=2,first=1", "a megatron spec without layers, which the module gives"},
      {"megatron:pp=2,layers=1/1", "a megatron spec without layers"},
      {"megatron:pp=2,account_for_loss", "a megatron spec without layers"},
  };
  for (const auto& [text, words] : mistakes) {
    const auto found = make_layout(dense(), spec(text), {}, module, PipelineFrom::kModule);
    ASSERT_FALSE(found) << text;
    EXPECT_EQ(found.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(found.error().message, HasSubstr(words));
  }
}

}  // namespace
}  // namespace transfuse

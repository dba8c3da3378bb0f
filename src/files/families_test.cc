// Checkpoints of the families whose tensors have several dtypes, through layouts and back.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "files/file_fixture.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::testing {
namespace {

using Families = FilesTest;

constexpr const char* kCommon =
    R"("hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 70,
       "num_attention_heads": 4, "tie_word_embeddings": false, "torch_dtype": "bfloat16")";

std::string mixtral() {
  return std::string(R"({"model_type": "mixtral", "num_key_value_heads": 2,
                         "num_local_experts": 3, )") +
         kCommon + "}";
}

std::string glm(int mtp_layers) {
  return std::string(R"({"model_type": "glm4_moe", "num_key_value_heads": 2, "head_dim": 8,
                         "moe_intermediate_size": 8, "n_routed_experts": 3, "n_shared_experts": 1,
                         "first_k_dense_replace": 1, "attention_bias": true, "use_qk_norm": true,
                         "num_nextn_predict_layers": )") +
         std::to_string(mtp_layers) + ", " + kCommon + "}";
}

std::string deepseek(const std::string& more) {
  return std::string(R"({"model_type": "deepseek_v3", "num_key_value_heads": 4,
                         "moe_intermediate_size": 16, "n_routed_experts": 3, "n_shared_experts": 1,
                         "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 6,
                         "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4,
                         "topk_method": "noaux_tc", )") +
         more + kCommon + "}";
}

std::string deepseek_f8() {
  return deepseek(R"("quantization_config": {"quant_method": "fp8",
                     "weight_block_size": [4, 8]}, )");
}

// Numbers: a NaN would not come back from a wider dtype as it was.
std::vector<HandMade> numbers(const std::string& config) {
  const std::map<Dtype, std::string> names = {
      {Dtype::kBF16, "BF16"}, {Dtype::kF32, "F32"}, {Dtype::kF8E4M3, "F8_E4M3"}};
  std::vector<HandMade> tensors;
  uint64_t state = 1;
  for (const TensorSpec& spec : make_catalog(parse_model_config(config).value()).value()) {
    const auto shape = spec.shape.values();
    HandMade& tensor = tensors.emplace_back(
        HandMade{spec.name, names.at(spec.dtype), {shape.begin(), shape.end()}, {}});
    for (int64_t i = 0; i < spec.shape.product() * dtype_size_bytes(spec.dtype); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      tensor.bytes.push_back(static_cast<char>((state >> 56) & 0x3F));
    }
  }
  return tensors;
}

TEST_F(Families, GoThroughTrainersAndEnginesAndComeBackAsTheyWere) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> chains = {
      {mixtral(),
       {"hf", "megatron:tp=2,pp=3,ep=3,etp=1", "vllm:tp=2,ep", "fsdp:dp=2,experts=stacked",
        "hf:experts=stacked", "hf"}},
      {glm(0),
       {"hf", "megatron:tp=2,pp=3,ep=3,etp=1", "vllm:tp=2,pp=2", "fsdp:dp=2,experts=stacked",
        "hf:experts=stacked", "hf"}},
      {deepseek(""),
       {"hf", "megatron:tp=2,ep=3,etp=1", "vllm:tp=2,ep", "megatron:tp=2,norms=separate", "hf"}},
      {deepseek_f8(), {"hf", "fsdp:dp=3", "vllm:tp=2", "fsdp:dp=2,tp=2", "hf"}},
      {glm(1), {"hf", "fsdp:dp=5,experts=stacked", "hf:experts=stacked", "fsdp:tp=2", "hf"}},
  };
  for (const auto& [config, chain] : chains) {
    const auto tensors = numbers(config);
    write_hf("start", tensors);
    std::string source = "start";
    for (size_t i = 1; i < chain.size(); ++i) {
      const std::string target = "step" + std::to_string(i);
      auto step = request(chain[i - 1], source, chain[i], target);
      step.config_json = config;
      const auto report = convert_checkpoint(step);
      ASSERT_TRUE(report) << chain[i] << ": " << report.error().to_string();
      EXPECT_EQ(report->tensor_count, tensors.size());
      source = target;
    }
    for (const HandMade& tensor : tensors) {
      EXPECT_EQ(tensor_bytes(folder_ / source / "model.safetensors", tensor.name), tensor.bytes)
          << tensor.name;
    }
    for (const std::string& name : names()) std::filesystem::remove_all(folder_ / name);
  }
}

std::string gpt_oss() {
  return std::string(R"({"model_type": "gpt_oss", "num_key_value_heads": 2, "head_dim": 4,
                         "num_local_experts": 2, )") +
         kCommon + "}";
}

TEST_F(Families, TransposedStacksHaveTheShapesOfTheParametersAndComeBack) {
  const auto tensors = numbers(gpt_oss());
  write_hf("start", tensors);
  const std::vector<std::string> chain = {"hf", "vllm:tp=2", "megatron:tp=2,ep=2,etp=1", "hf"};
  for (size_t i = 1; i < chain.size(); ++i) {
    auto step = request(chain[i - 1], i == 1 ? "start" : "step" + std::to_string(i - 1), chain[i],
                        "step" + std::to_string(i));
    step.config_json = gpt_oss();
    const auto report = convert_checkpoint(step);
    ASSERT_TRUE(report) << chain[i] << ": " << report.error().to_string();
  }
  const auto shape = [&](const char* folder, const std::string& name) {
    const auto listing = list_checkpoint((folder_ / folder).string());
    const auto held = std::ranges::find(listing->tensors, name, &StoredTensor::name);
    return held == listing->tensors.end() ? Dims{} : held->shape;
  };
  const std::string experts = "model.layers.0.mlp.experts.routed_experts.";
  EXPECT_EQ(shape("step1", experts + "w13_weight"), (Dims{2, 32, 16}));
  EXPECT_EQ(shape("step1", experts + "w2_weight"), (Dims{2, 16, 16}));
  EXPECT_EQ(shape("step2", "decoder.layers.0.mlp.experts.linear_fc1.weight0"), (Dims{64, 16}));
  EXPECT_EQ(shape("step2", "decoder.layers.0.mlp.experts.linear_fc2.weight0"), (Dims{16, 32}));
  for (const HandMade& tensor : tensors) {
    EXPECT_EQ(tensor_bytes(folder_ / "step3" / "model.safetensors", tensor.name), tensor.bytes)
        << tensor.name;
  }
}

TEST_F(Families, StackedExpertsWithOtherModuleNamesAreReadWithoutBeingTold) {
  const auto tensors = numbers(mixtral());
  write_hf("start", tensors);
  auto write = request("hf", "start", "fsdp:dp=2,experts=stacked", "stacked");
  auto read = request("fsdp:dp=2", "stacked", "hf", "end");
  for (ConvertRequest* step : {&write, &read}) {
    step->config_json = mixtral();
    const auto report = convert_checkpoint(*step);
    ASSERT_TRUE(report) << report.error().to_string();
  }
  for (const HandMade& tensor : tensors) {
    EXPECT_EQ(tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name), tensor.bytes);
  }
}

TEST_F(Families, ATrainerThatSharesTheEmbeddingGivesAnMtpLayerWithoutItsCopies) {
  const auto tensors = numbers(glm(1));
  write_hf("start", tensors);
  auto there = request("hf", "start", "megatron:pp=3,tp=2", "ranks");
  auto back = request("megatron:pp=3,tp=2", "ranks", "hf:mtp=shared", "end");
  auto whole = request("megatron:pp=3,tp=2", "ranks", "hf", "whole");
  for (ConvertRequest* step : {&there, &back, &whole}) step->config_json = glm(1);
  ASSERT_TRUE(convert_checkpoint(there));
  const auto report = convert_checkpoint(back);
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->fingerprints.size(), tensors.size() - 2);
  for (const HandMade& tensor : tensors) {
    if (tensor.name == "model.layers.3.embed_tokens.weight") continue;
    if (tensor.name == "model.layers.3.shared_head.head.weight") continue;
    EXPECT_EQ(tensor_bytes(folder_ / "end" / "model.safetensors", tensor.name), tensor.bytes);
  }
  const auto refused = convert_checkpoint(whole);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_NE(refused.error().message.find("model.layers.3."), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "whole"));
}

TEST_F(Families, ScalesOfEnginesAreStacksOfTheirOwnInTheirFiles) {
  write_hf("start", numbers(deepseek_f8()));
  auto step = request("hf", "start", "vllm:tp=2,ep", "ranks");
  step.config_json = deepseek_f8();
  const auto report = convert_checkpoint(step);
  ASSERT_TRUE(report) << report.error().to_string();
  const auto listing = list_checkpoint((folder_ / "ranks").string());
  ASSERT_TRUE(listing);
  const std::string experts = "model.layers.1.mlp.experts.routed_experts.";
  const auto held =
      std::ranges::find(listing->tensors, experts + "w13_weight_scale_inv", &StoredTensor::name);
  ASSERT_NE(held, listing->tensors.end());
  EXPECT_EQ(held->dtype, Dtype::kF32);
  EXPECT_EQ(held->shape, (Dims{2, 8, 2}));  // of [2, 32, 16] in blocks of 4 x 8
  step.to = "vllm:tp=4";                    // a head's 6 rows of q_b are no whole blocks of 4
  step.target = (folder_ / "cut").string();
  const auto refused = convert_checkpoint(step);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_NE(refused.error().message.find("expected a multiple of 4"), std::string::npos)
      << refused.error().message;
}

}  // namespace
}  // namespace transfuse::testing

// Expert maps: read from JSON, and refused by layer and expert where they do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// 4 experts a layer; with `dense` layers before the first that has some.
ModelConfig small_moe(int64_t dense = 0) {
  ModelConfig config{.architecture = "qwen3_moe",
                     .hidden_size = 6,
                     .intermediate_size = 16,
                     .moe_intermediate_size = 8,
                     .num_hidden_layers = 3,
                     .num_attention_heads = 8,
                     .num_key_value_heads = 2,
                     .head_dim = 2,
                     .vocab_size = 67,
                     .num_experts = 4};
  if (dense > 0) {
    config.architecture = "glm4_moe";
    config.dense_layers = dense;
    config.shared_experts = 1;
  }
  return config;
}

ParallelSpec mapped(const std::string& text, std::vector<std::vector<int64_t>> rows) {
  ParallelSpec spec = parse_parallel_spec(text).value();
  spec.expert_map = {.version = 7, .physical_to_logical = std::move(rows)};
  return spec;
}

const std::vector<int64_t> kRow = {0, 1, 2, 3, 1, 0};

Error error_of(const ModelConfig& config, const ParallelSpec& spec) {
  const auto layouts = make_layouts(config, spec);
  EXPECT_FALSE(layouts);
  return layouts ? Error{} : layouts.error();
}

TEST(ExpertMap, ReadsWhatEnginesDumpAndAPlainList) {
  const auto map = parse_expert_map(
      R"({"version": 3, "physical_to_logical_map": [[0, 1, 0], [1, 0, 1]], "other": {}})");
  ASSERT_TRUE(map) << map.error().message;
  EXPECT_EQ(map->version, 3);
  EXPECT_EQ(map->physical_to_logical, (std::vector<std::vector<int64_t>>{{0, 1, 0}, {1, 0, 1}}));
  const auto list = parse_expert_map("[[2, 1, 0]]");
  ASSERT_TRUE(list);
  EXPECT_EQ(list->version, 0);
  EXPECT_EQ(list->physical_to_logical, (std::vector<std::vector<int64_t>>{{2, 1, 0}}));
}

TEST(ExpertMap, WhatIsNoMapIsNamed) {
  const std::vector<std::pair<const char*, const char*>> bad = {
      {"", "expected a list of layers"},
      {"[]", "expected a list of layers"},
      {"{}", "\"physical_to_logical_map\" is missing"},
      {R"({"physical_to_logical_map": 3})", "expected a list of layers"},
      {R"({"version": -1, "physical_to_logical_map": [[0]]})", "\"version\" is -1"},
      {R"({"version": "a", "physical_to_logical_map": [[0]]})", "\"version\" is \"a\""},
      {"[[0], 1]", "layer 1: expected a list"},
      {"[[0], [1, -1]]", "layer 1: place 1 holds -1"},
      {"[[0], [1.5]]", "layer 1: place 0 holds 1.5"},
      {"[[0], [null]]", "layer 1: place 0 holds null"},
      {"[[18446744073709551615]]", "layer 0: place 0 holds 18446744073709551615"},
  };
  for (const auto& [json, text] : bad) {
    const auto map = parse_expert_map(json);
    ASSERT_FALSE(map) << json;
    EXPECT_EQ(map.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(map.error().message, HasSubstr(text)) << json;
  }
}

TEST(ExpertMap, AnExpertWithoutAPlaceIsNamedWithItsLayer) {
  for (const char* text : {"vllm:tp=2,ep,redundant=2", "sglang:tp=2,ep=2,redundant=2"}) {
    const Error error = error_of(small_moe(), mapped(text, {kRow, {0, 1, 3, 3, 1, 0}, kRow}));
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(
        error.message,
        HasSubstr("version 7: layer 1: no place holds expert 2: expected at least one of 6"));
  }
}

// The hole is the set's, not a rank's: each rank says so, whichever experts it holds itself.
TEST(ExpertMap, EveryRankRefusesAMapWithAHole) {
  const ParallelSpec spec =
      mapped("sglang:tp=3,ep=3,redundant=2", {kRow, kRow, {0, 1, 2, 2, 1, 0}});
  for (int64_t rank = 0; rank < 3; ++rank) {
    const auto layout = make_layout(small_moe(), spec, rank);
    ASSERT_FALSE(layout);
    EXPECT_THAT(layout.error().message, HasSubstr("layer 2: no place holds expert 3"));
  }
}

TEST(ExpertMap, ExpertsThatTheModelDoesNotHaveAreNamed) {
  for (const int64_t expert : {int64_t{4}, int64_t{-1}, int64_t{1} << 40}) {
    const Error error = error_of(
        small_moe(), mapped("vllm:tp=2,ep,redundant=2", {kRow, kRow, {0, 1, 2, 3, expert, 0}}));
    EXPECT_EQ(error.code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(error.message, HasSubstr("layer 2: place 4 holds expert " + std::to_string(expert) +
                                         ": expected 0 to 3"));
  }
}

TEST(ExpertMap, WrongNumbersOfLayersAndPlacesAreNamed) {
  EXPECT_THAT(error_of(small_moe(), mapped("vllm:tp=2,ep,redundant=2", {kRow, kRow})).message,
              HasSubstr("2 layers, expected num_hidden_layers = 3"));
  EXPECT_THAT(
      error_of(small_moe(1), mapped("vllm:tp=2,ep,redundant=2", {kRow, kRow, kRow, kRow})).message,
      HasSubstr("4 layers, expected num_hidden_layers = 3 or the 2 with experts"));
  const std::vector<int64_t> shorter = {0, 1, 2, 3};
  EXPECT_THAT(
      error_of(small_moe(), mapped("vllm:tp=2,ep,redundant=2", {kRow, shorter, kRow})).message,
      HasSubstr("layer 1 has 4 places, expected 4 experts and the redundant ones together = 6"));
  // Copies that the spec does not announce.
  EXPECT_THAT(error_of(small_moe(), mapped("sglang:tp=2,ep=2", {kRow, kRow, kRow})).message,
              HasSubstr("layer 0 has 6 places"));
}

TEST(ExpertMap, ListsAllLayersOrThoseWithExperts) {
  const std::vector<int64_t> nothing = {};
  const auto all =
      make_layouts(small_moe(1), mapped("vllm:tp=2,ep,redundant=2", {nothing, kRow, kRow}));
  ASSERT_TRUE(all) << all.error().message;
  const auto some = make_layouts(small_moe(1), mapped("vllm:tp=2,ep,redundant=2", {kRow, kRow}));
  ASSERT_TRUE(some) << some.error().message;
  EXPECT_EQ((*all)[1].digest(), (*some)[1].digest());
}

TEST(ExpertMap, CopiesThatTheRanksOrThePlacementDoNotTakeAreNamed) {
  const auto message = [](const std::string& text, const ModelConfig& config = small_moe()) {
    return error_of(config, parse_parallel_spec(text).value()).message;
  };
  EXPECT_THAT(message("vllm:tp=4,ep,redundant=2"),
              AllOf(HasSubstr("4 + 2 physical experts"), HasSubstr("the 4 ranks")));
  EXPECT_THAT(message("sglang:tp=4,ep=4,redundant=2"), HasSubstr("4 + 2 redundant experts"));
  EXPECT_THAT(message("vllm:tp=2,ep,placement=round_robin,redundant=2"),
              HasSubstr("placement=round_robin"));
  ModelConfig dense = small_moe();
  dense.architecture = "llama";
  dense.num_experts = dense.moe_intermediate_size = 0;
  EXPECT_THAT(message("vllm:tp=2,redundant=2", dense), HasSubstr("llama without"));
  EXPECT_THAT(message("vllm:tp=2,ep,expert_map=map.json"),
              HasSubstr("expert_map=map.json: the file has not been read"));
  EXPECT_THAT(parse_parallel_spec("vllm:expert_map=").error().message, HasSubstr("expert_map="));
  EXPECT_THAT(parse_parallel_spec("fsdp:redundant=2").error().message, HasSubstr("redundant"));
  EXPECT_THAT(parse_parallel_spec("megatron:expert_map=a").error().message,
              HasSubstr("expert_map"));
  ParallelSpec by_hand{.family = "hf"};
  by_hand.expert_map = {.version = 0, .physical_to_logical = {kRow}};
  EXPECT_THAT(error_of(small_moe(), by_hand).message, HasSubstr("expert_map"));
}

}  // namespace
}  // namespace transfuse

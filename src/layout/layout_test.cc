// What LayoutBuilder accepts, how it orders, and what a digest depends on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/random.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

void expect_error(LayoutBuilder& builder, ErrorCode code, const std::vector<std::string>& words) {
  const auto layout = builder.build();
  ASSERT_FALSE(layout);
  EXPECT_EQ(layout.error().code, code) << layout.error().message;
  for (const auto& word : words) EXPECT_THAT(layout.error().message, HasSubstr(word));
}

// Two tensors fused into one parameter, one spread over two parameters, one padded.
Layout example(uint64_t seed) {
  LayoutBuilder builder;
  uint32_t gate = 0;
  uint32_t up = 0;
  uint32_t embed = 0;
  uint32_t fused = 0;
  uint32_t head = 0;
  uint32_t left = 0;
  std::vector<std::function<void()>> specs = {
      [&] { gate = builder.tensor({"gate", Dtype::kBF16, {4, 6}}); },
      [&] { up = builder.tensor({"up", Dtype::kBF16, {4, 6}}); },
      [&] { embed = builder.tensor({"embed", Dtype::kF32, {5, 3}}); },
      [&] { fused = builder.parameter({"gate_up", Dtype::kBF16, 48}); },
      [&] { head = builder.parameter({"head", Dtype::kBF16, 24}); },
      [&] { left = builder.parameter({"left", Dtype::kBF16, 8}); },
  };
  std::vector<std::function<void()>> pieces = {
      [&] { builder.tile(gate, Box::whole({4, 6}), fused, 0); },
      [&] { builder.tile(up, Box::whole({4, 6}), fused, 24); },
      [&] { builder.tile(up, Box{{0, 0}, {4, 2}}, left, 0, {1, 4}); },
      [&] { builder.tile(embed, Box::whole({5, 3}), head, 0); },
      [&] { builder.fill(head, 15, {3, 3}, {3, 1}); },
  };
  Random random(seed);
  for (auto* list : {&specs, &pieces}) {
    for (size_t i = list->size(); i > 1; --i) std::swap((*list)[i - 1], (*list)[random.below(i)]);
    for (const auto& add : *list) add();
  }
  return builder.build().value();
}

TEST(Layout, IsSortedByNameAndBoxWhateverTheOrderOfInsertion) {
  const Layout layout = example(1);
  ASSERT_EQ(layout.tensors().size(), 3U);
  EXPECT_EQ(layout.tensors()[0].name, "embed");
  EXPECT_EQ(layout.tensors()[1].name, "gate");
  EXPECT_EQ(layout.tensors()[2].name, "up");
  ASSERT_EQ(layout.parameters().size(), 3U);
  EXPECT_EQ(layout.parameters()[0].name, "gate_up");
  ASSERT_EQ(layout.tiles_of(2).size(), 2U);
  EXPECT_EQ(layout.tiles_of(2)[0].box, (Box{{0, 0}, {4, 2}}));
  EXPECT_EQ(layout.tiles_of(2)[0].element_strides, (Dims{1, 4}));
  EXPECT_EQ(layout.tiles_of(2)[1].element_strides, (Dims{6, 1}));
  EXPECT_EQ(layout.tiles_of(2)[1].element_offset, 24);
  EXPECT_EQ(layout.tile_bytes(), (24U + 24U + 8U + 15U) * 2U);
  EXPECT_EQ(layout.parameter_bytes(), (48U + 24U + 8U) * 2U);
}

TEST(Layout, FindsNamesAndOnlyThose) {
  const Layout layout = example(1);
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(layout.find_tensor(layout.tensors()[i].name), i);
    EXPECT_EQ(layout.find_parameter(layout.parameters()[i].name), i);
  }
  EXPECT_FALSE(layout.find_tensor("gate_up"));
  EXPECT_FALSE(layout.find_tensor(""));
  EXPECT_FALSE(layout.find_tensor("zzz"));
  EXPECT_FALSE(layout.find_parameter("gate"));
}

TEST(Layout, DigestIsEqualForEveryOrderOfInsertion) {
  const Digest digest = example(0).digest();
  for (uint64_t seed = 1; seed < 50; ++seed) ASSERT_EQ(example(seed).digest(), digest) << seed;
}

TEST(Layout, DigestIsEqualInAnotherProcess) {
  const Digest digest = example(7).digest();
  std::array<int, 2> channel{};
  ASSERT_EQ(pipe(channel.data()), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const std::string text = example(8).digest().to_string();
    _exit(write(channel[1], text.data(), text.size()) == ssize_t{32} ? 0 : 1);
  }
  std::array<char, 32> text{};
  EXPECT_EQ(read(channel[0], text.data(), text.size()), 32);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(std::string(text.data(), text.size()), digest.to_string());
  close(channel[0]);
  close(channel[1]);
}

// The digest keys plans on other machines: a change of the encoding must come with a new version.
TEST(Layout, DigestOfTheExampleNeverChangesWithinOneVersionOfTheFormat) {
  EXPECT_EQ(example(3).digest().to_string(), "6359e9614559443435f34f441ee5e1a6");
}

TEST(Layout, DigestDependsOnEveryFact) {
  struct Facts {
    std::string tensor = "t";
    std::string parameter = "p";
    Dtype tensor_dtype = Dtype::kBF16;
    Dtype parameter_dtype = Dtype::kBF16;
    int64_t columns = 4;
    int64_t first_row = 0;
    int64_t element_count = 100;
    int64_t element_offset = 0;
    int64_t row_stride = 4;
    int64_t fill_offset = 90;
    int64_t fill_length = 2;
  };
  const auto digest = [](const Facts& f) {
    LayoutBuilder builder;
    const auto t = builder.tensor({f.tensor, f.tensor_dtype, {4, f.columns}});
    const auto p = builder.parameter({f.parameter, f.parameter_dtype, f.element_count});
    builder.tile(t, Box{{f.first_row, 0}, {2, 4}}, p, f.element_offset, {f.row_stride, 1});
    builder.fill(p, f.fill_offset, {f.fill_length}, {1});
    return builder.build().value().digest();
  };
  std::vector<Digest> digests = {digest({})};
  digests.push_back(digest({.tensor = "u"}));
  digests.push_back(digest({.parameter = "t"}));
  digests.push_back(digest({.tensor_dtype = Dtype::kF16}));
  digests.push_back(digest({.parameter_dtype = Dtype::kF32}));
  digests.push_back(digest({.columns = 5}));
  digests.push_back(digest({.first_row = 1}));
  digests.push_back(digest({.element_count = 101}));
  digests.push_back(digest({.element_offset = 1}));
  digests.push_back(digest({.row_stride = 5}));
  digests.push_back(digest({.fill_offset = 91}));
  digests.push_back(digest({.fill_length = 3}));
  std::ranges::sort(digests);
  EXPECT_EQ(std::ranges::adjacent_find(digests), digests.end());
}

TEST(Layout, StridesOfLengthOneDimensionsMeanNothing) {
  const auto build = [](Dims strides) {
    LayoutBuilder builder;
    const auto t = builder.tensor({"t", Dtype::kBF16, {1, 4}});
    const auto p = builder.parameter({"p", Dtype::kBF16, 4});
    builder.tile(t, Box::whole({1, 4}), p, 0, strides);
    return builder.build().value();
  };
  EXPECT_EQ(build({0, 1}).digest(), build({1 << 20, 1}).digest());
  EXPECT_EQ(build({-3, 1}).tiles()[0].element_strides, (Dims{1, 1}));
}

TEST(Layout, EmptyTilesAndFillsAreDropped) {
  LayoutBuilder builder;
  const auto t = builder.tensor({"t", Dtype::kBF16, {4, 6}});
  const auto p = builder.parameter({"p", Dtype::kBF16, 0});
  builder.tile(t, Box{{4, 0}, {0, 6}}, p, 0);
  builder.fill(p, 0, {0, 6}, {6, 1});
  const Layout layout = builder.build().value();
  EXPECT_TRUE(layout.tiles().empty());
  EXPECT_TRUE(layout.fills().empty());
  EXPECT_TRUE(layout.tiles_of(0).empty());
}

TEST(Layout, AScalarIsOneElement) {
  LayoutBuilder builder;
  const auto t = builder.tensor({"step", Dtype::kI64, {}});
  const auto p = builder.parameter({"step", Dtype::kI64, 1});
  builder.tile(t, Box::whole({}), p, 0);
  EXPECT_EQ(builder.build().value().tile_bytes(), 8U);
}

TEST(Layout, ADefaultLayoutEqualsAnEmptyBuild) {
  EXPECT_EQ(Layout().digest(), LayoutBuilder().build().value().digest());
  EXPECT_TRUE(Layout().tensors().empty());
}

TEST(LayoutBuilder, AddingTheSameTwiceReturnsTheSameHandle) {
  LayoutBuilder builder;
  EXPECT_EQ(builder.tensor({"t", Dtype::kBF16, {4}}), 0U);
  EXPECT_EQ(builder.tensor({"u", Dtype::kBF16, {4}}), 1U);
  EXPECT_EQ(builder.tensor({"t", Dtype::kBF16, {4}}), 0U);
  EXPECT_EQ(builder.parameter({"t", Dtype::kBF16, 4}), 0U);
  EXPECT_EQ(builder.parameter({"t", Dtype::kBF16, 4}), 0U);
  EXPECT_EQ(builder.build().value().tensors().size(), 2U);
}

TEST(LayoutBuilder, IsEmptyAfterBuild) {
  LayoutBuilder builder;
  builder.tensor({"t", Dtype::kBF16, {4}});
  ASSERT_TRUE(builder.build());
  EXPECT_TRUE(builder.build().value().tensors().empty());
  EXPECT_EQ(builder.tensor({"t", Dtype::kF32, {5}}), 0U);
  EXPECT_TRUE(builder.build());
}

TEST(LayoutBuilder, AddingATensorAgainWithAnotherShapeFails) {
  LayoutBuilder builder;
  builder.tensor({"t", Dtype::kBF16, {4}});
  builder.tensor({"t", Dtype::kBF16, {5}});
  expect_error(builder, ErrorCode::kInvalidArgument, {"tensor t", "[4]", "[5]"});
}

TEST(LayoutBuilder, AddingAParameterAgainWithAnotherDtypeFails) {
  LayoutBuilder builder;
  builder.parameter({"p", Dtype::kBF16, 4});
  builder.parameter({"p", Dtype::kF32, 4});
  expect_error(builder, ErrorCode::kInvalidArgument, {"parameter p", "bf16", "f32"});
}

TEST(LayoutBuilder, BadNamesFail) {
  for (const std::string& name :
       {std::string(), std::string(2000, 'x'), std::string("a\nb"), std::string("a\xFF")}) {
    LayoutBuilder tensors;
    tensors.tensor({name, Dtype::kBF16, {4}});
    expect_error(tensors, ErrorCode::kInvalidArgument, {"tensor"});
    LayoutBuilder parameters;
    parameters.parameter({name, Dtype::kBF16, 4});
    expect_error(parameters, ErrorCode::kInvalidArgument, {"parameter"});
  }
}

TEST(LayoutBuilder, ShapesThatAreNegativeOrTooLargeFail) {
  for (const Dims& shape : {Dims{-1}, Dims{INT64_MAX}, Dims{int64_t{1} << 32, int64_t{1} << 32},
                            Dims{0, int64_t{1} << 32, int64_t{1} << 32}}) {
    LayoutBuilder builder;
    builder.tensor({"t", Dtype::kBF16, shape});
    expect_error(builder, ErrorCode::kInvalidArgument, {"tensor t", shape.to_string()});
  }
}

TEST(LayoutBuilder, ParameterSizesThatAreNegativeOrTooLargeFail) {
  for (const int64_t count : {int64_t{-1}, INT64_MAX}) {
    LayoutBuilder builder;
    builder.parameter({"p", Dtype::kBF16, count});
    expect_error(builder, ErrorCode::kInvalidArgument, {"parameter p", std::to_string(count)});
  }
  LayoutBuilder builder;
  for (int i = 0; i < 3; ++i) {
    builder.parameter({"p" + std::to_string(i), Dtype::kI64, INT64_MAX / 8});
  }
  expect_error(builder, ErrorCode::kInvalidArgument, {"2^63 bytes"});
}

struct BadTile {
  Box box;
  int64_t element_offset;
  Dims strides;
  ErrorCode code;
  const char* word;
};

TEST(LayoutBuilder, TilesOutsideTheirTensorOrParameterFail) {
  constexpr auto kInvalid = ErrorCode::kInvalidArgument;
  constexpr auto kMismatch = ErrorCode::kLayoutMismatch;
  const std::vector<BadTile> tiles = {
      {{{0}, {4}}, 0, {1}, kInvalid, "rank"},
      {{{0, 0}, {4, 6}}, 0, {1}, kInvalid, "rank"},
      {{{0, 0}, {5, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{1, 0}, {4, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{-1, 0}, {4, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{0, 0}, {-1, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{INT64_MAX, 0}, {INT64_MAX, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{5, 0}, {0, 6}}, 0, {6, 1}, kInvalid, "[4, 6]"},
      {{{0, 0}, {4, 6}}, 0, {0, 1}, kInvalid, "strides [0, 1]"},
      {{{0, 0}, {4, 6}}, 0, {6, -1}, kInvalid, "strides [6, -1]"},
      {{{0, 0}, {4, 6}}, -1, {6, 1}, kInvalid, "element -1"},
      {{{0, 0}, {4, 6}}, 1, {6, 1}, kMismatch, "element 24"},
      {{{0, 0}, {4, 6}}, 0, {7, 1}, kMismatch, "element 26"},
      {{{0, 0}, {4, 6}}, 0, {INT64_MAX, 1}, kMismatch, "2^63"},
      {{{0, 0}, {4, 6}}, INT64_MAX, {6, 1}, kMismatch, "2^63"},
      {{{0, 0}, {2, 1}}, INT64_MAX - 1, {1, 1}, kMismatch, "2^63"},
  };
  for (const BadTile& bad : tiles) {
    LayoutBuilder builder;
    const auto t = builder.tensor({"weight", Dtype::kBF16, {4, 6}});
    const auto p = builder.parameter({"p", Dtype::kBF16, 24});
    builder.tile(t, bad.box, p, bad.element_offset, bad.strides);
    expect_error(builder, bad.code, {"weight", bad.word});
  }
}

TEST(LayoutBuilder, FillsOutsideTheirParameterFail) {
  const auto fill = [](int64_t offset, Dims length, Dims strides) {
    LayoutBuilder builder;
    builder.fill(builder.parameter({"pads", Dtype::kBF16, 24}), offset, length, strides);
    const auto layout = builder.build();
    EXPECT_FALSE(layout);
    EXPECT_THAT(layout.error().message, HasSubstr("pads"));
    return layout.error().code;
  };
  EXPECT_EQ(fill(20, {5}, {1}), ErrorCode::kLayoutMismatch);
  EXPECT_EQ(fill(0, {5}, {6}), ErrorCode::kLayoutMismatch);
  EXPECT_EQ(fill(-1, {5}, {1}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(fill(0, {5}, {0}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(fill(0, {-5}, {1}), ErrorCode::kInvalidArgument);
  EXPECT_EQ(fill(0, {5}, {1, 1}), ErrorCode::kInvalidArgument);
}

TEST(LayoutBuilder, UnknownHandlesFail) {
  LayoutBuilder tiles;
  tiles.tile(3, Box::whole({4}), 0, 0);
  expect_error(tiles, ErrorCode::kInvalidArgument, {"tensor 3"});
  LayoutBuilder fills;
  fills.fill(5, 0, {4}, {1});
  expect_error(fills, ErrorCode::kInvalidArgument, {"parameter 5"});
}

}  // namespace
}  // namespace transfuse

// Boxes to runs: what is merged, which dimension is innermost, and the common refinement of sources
// that are cut differently.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "plan/oracle.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

struct TileAt {
  Box box;
  int64_t offset = 0;
  Dims strides;
};

Layout layout_of(const Dims& shape, int64_t elements, const std::vector<TileAt>& tiles) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, shape});
  const uint32_t parameter = builder.parameter({"p", Dtype::kBF16, elements});
  for (const TileAt& tile : tiles) {
    builder.tile(tensor, tile.box, parameter, tile.offset, tile.strides);
  }
  return builder.build().value();
}

Layout whole(const Dims& shape) {
  return layout_of(shape, shape.product(), {{Box::whole(shape), 0, row_major_strides(shape)}});
}

Plan checked(const Layout& target, const std::vector<Layout>& sources) {
  auto plan = compile(target, sources);
  EXPECT_TRUE(plan) << plan.error().message;
  for (const std::string& failure : judge(*plan, Oracle(target, sources))) ADD_FAILURE() << failure;
  return std::move(plan).value();
}

TEST(Lower, MergesDimensionsThatAreContiguousOnBothSides) {
  const Plan plan = checked(whole({4, 5, 6}), {whole({4, 5, 6})});
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].count[2], 120u);
  EXPECT_EQ(plan.runs()[0].count[1], 1u);
}

TEST(Lower, MergesRowsThatTouchIntoOneSegment) {
  const Layout by_rows = layout_of({3, 8}, 24,
                                   {{{{0, 0}, {1, 8}}, 0, {8, 1}},
                                    {{{1, 0}, {1, 8}}, 8, {8, 1}},
                                    {{{2, 0}, {1, 8}}, 16, {8, 1}}});
  const Plan plan = checked(by_rows, {whole({3, 8})});
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].count[2], 24u);
}

// A layout that lists every row of a column slice as a tile of its own still has no entry per row.
TEST(Lower, MergesRowsAtEqualDistanceIntoOneRun) {
  std::vector<TileAt> tiles;
  for (int64_t r = 0; r < 50; ++r) tiles.push_back({{{r, 2}, {1, 3}}, r * 3, {3, 1}});
  const Plan plan = checked(layout_of({50, 8}, 150, tiles), {whole({50, 8})});
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].count[1], 50u);
  EXPECT_EQ(plan.runs()[0].count[2], 3u);
}

TEST(Lower, MergesInterleavedRowsIntoOneRun) {
  const Layout interleaved =
      layout_of({2, 8}, 16, {{{{0, 0}, {1, 8}}, 0, {16, 2}}, {{{1, 0}, {1, 8}}, 1, {16, 2}}});
  EXPECT_EQ(checked(interleaved, {whole({2, 8})}).runs().size(), 1u);
}

TEST(Lower, DoesNotMergeWhatTouchesAtTheTargetOnly) {
  const Layout swapped =
      layout_of({4, 8}, 32, {{{{0, 0}, {2, 8}}, 16, {8, 1}}, {{{2, 0}, {2, 8}}, 0, {8, 1}}});
  EXPECT_EQ(checked(swapped, {whole({4, 8})}).runs().size(), 2u);
}

TEST(Lower, ATransposedTargetIsOneRunThatWritesInItsOwnOrder) {
  const Layout transposed = layout_of({5, 7}, 35, {{Box::whole({5, 7}), 0, {1, 5}}});
  const Plan plan = checked(transposed, {whole({5, 7})});
  ASSERT_EQ(plan.runs().size(), 1u);
  const transfuse::Run& run = plan.runs()[0];
  EXPECT_EQ(plan.pattern(run.target_pattern), (Strides3{{0, 5, 1}}));
  EXPECT_EQ(plan.pattern(plan.holders_of(run)[0].source_pattern), (Strides3{{0, 1, 7}}));
  EXPECT_EQ(plan.pattern(run.index_pattern), (Strides3{{0, 1, 7}}));
}

TEST(Lower, BeyondThreeLevelsTheShortestAreEnumerated) {
  const Dims shape{2, 3, 4, 5, 6};
  const Layout reversed = layout_of(shape, 720, {{Box::whole(shape), 0, {1, 2, 6, 24, 120}}});
  const Plan plan = checked(reversed, {whole(shape)});
  EXPECT_EQ(plan.runs().size(), 3u * 4u);  // 2 is innermost at the target; 6 and 5 stay levels
}

TEST(Lower, AHolderWithOtherStridesKeepsTheDimensionsApart) {
  const Layout columns_padded = layout_of(
      {4, 6}, 32, {{Box::whole({4, 6}), 0, {8, 1}}});  // as a source: padding is no matter
  const Plan plan = checked(whole({4, 6}), {whole({4, 6}), columns_padded});
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].holder_count, 2u);
  EXPECT_EQ(plan.runs()[0].count[1], 4u);
  EXPECT_EQ(plan.runs()[0].count[2], 6u);
}

TEST(Intersect, SourcesCutDifferentlyGiveTheirCommonRefinement) {
  const Layout top = layout_of({4, 6}, 12, {{{{0, 0}, {2, 6}}, 0, {6, 1}}});
  const Layout bottom = layout_of({4, 6}, 12, {{{{2, 0}, {2, 6}}, 0, {6, 1}}});
  const Layout left = layout_of({4, 6}, 12, {{{{0, 0}, {4, 3}}, 0, {3, 1}}});
  const Layout right = layout_of({4, 6}, 12, {{{{0, 3}, {4, 3}}, 0, {3, 1}}});
  const Plan plan = checked(whole({4, 6}), {top, bottom, left, right});
  EXPECT_EQ(plan.runs().size(), 4u);
  for (const transfuse::Run& run : plan.runs()) EXPECT_EQ(run.holder_count, 2u);
}

TEST(Intersect, TiedCopiesInOneSourceAreOneHolder) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {4, 6}});
  for (const char* name : {"embedding", "head"}) {
    builder.tile(tensor, Box::whole({4, 6}), builder.parameter({name, Dtype::kBF16, 24}), 0);
  }
  const Plan plan = checked(whole({4, 6}), {builder.build().value()});
  ASSERT_EQ(plan.runs().size(), 1u);
  EXPECT_EQ(plan.runs()[0].holder_count, 1u);
}

TEST(Intersect, ACutThatSeparatesNothingIsUndone) {
  // The second source overlaps the middle rows; first and last stay one piece each.
  const Layout middle = layout_of({6, 6}, 12, {{{{2, 0}, {2, 6}}, 0, {6, 1}}});
  EXPECT_EQ(checked(whole({6, 6}), {whole({6, 6}), middle}).runs().size(), 3u);
}

}  // namespace
}  // namespace transfuse

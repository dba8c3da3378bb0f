// I1 for interleaved, strided and awkward footprints: accepted where exact, refused where not.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "plan/coverage.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

using ::testing::HasSubstr;

struct Placed {
  int64_t offset = 0;
  Dims length;
  Dims strides;
};

// A parameter covered by fills alone: coverage treats them like tiles, and they need no tensors.
Layout filled(int64_t elements, const std::vector<Placed>& fills) {
  LayoutBuilder builder;
  const uint32_t parameter = builder.parameter({"p", Dtype::kBF16, elements});
  for (const Placed& f : fills) builder.fill(parameter, f.offset, f.length, f.strides);
  return builder.build().value();
}

std::vector<Finding> findings_of(const Layout& layout, size_t limit = 100) {
  std::vector<Finding> findings;
  check_coverage(layout, limit, findings);
  return findings;
}

// The whole parameter as one cluster.
bool proved(const Layout& layout) {
  std::vector<Footprint> cluster;
  for (const Fill& fill : layout.fills()) cluster.push_back(footprint_of(fill));
  return proved_exact_as_boxes(cluster);
}

TEST(Coverage, InterleavedGateAndUpRowsAreProvedAsBoxes) {
  const Layout layout =
      filled(2 * 768 * 2048, {{0, {768, 2048}, {4096, 1}}, {2048, {768, 2048}, {4096, 1}}});
  EXPECT_TRUE(proved(layout));
  EXPECT_TRUE(findings_of(layout).empty());
}

TEST(Coverage, ColumnBlocksOf256ExpertsAreProvedAsBoxes) {
  std::vector<Placed> experts;
  for (int64_t e = 0; e < 256; ++e) experts.push_back({e * 64, {512, 64}, {256 * 64, 1}});
  const Layout layout = filled(512 * 256 * 64, experts);
  EXPECT_TRUE(proved(layout));
  experts[17].offset += 1;
  EXPECT_EQ(findings_of(filled(512 * 256 * 64, experts)).front().kind, FindingKind::kOverlap);
}

TEST(Coverage, EverySecondElementAndItsFillAreProvedAsBoxes) {
  EXPECT_TRUE(proved(filled(20, {{0, {10}, {2}}, {1, {10}, {2}}})));
}

TEST(Coverage, ASpanOverWholeRowsIsThoseRows) {
  // Rows of 8: a dense block of two rows between two halves of every row.
  const Layout layout =
      filled(48, {{0, {2, 8}, {8, 1}}, {16, {4, 4}, {8, 1}}, {20, {4, 4}, {8, 1}}});
  EXPECT_TRUE(findings_of(layout).empty());
  EXPECT_TRUE(proved(filled(16, {{0, {16}, {1}}})));
}

TEST(Coverage, ATransposedTileIsDense) {
  const Layout layout = filled(35, {{0, {5, 7}, {1, 5}}});
  EXPECT_TRUE(footprint_of(layout.fills()[0]).dense);
}

TEST(Coverage, EqualVolumeAndSpanDoNotMakeATileDense) {
  // 0 1 1 2 and 5 6 6 7: eight elements between 0 and 7, two of them twice, two never.
  const Layout layout = filled(8, {{0, {2, 2, 2}, {5, 1, 1}}});
  EXPECT_FALSE(footprint_of(layout.fills()[0]).dense);
  const auto findings = findings_of(layout);
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].kind, FindingKind::kOverlap);
  EXPECT_THAT(findings[0].reason, HasSubstr("itself"));
  EXPECT_EQ(findings[1].kind, FindingKind::kUncovered);
  EXPECT_EQ(findings[1].box, (Box{{3}, {2}}));
}

// Steps 2 and 3 are no digits of one number; counting proves it all the same.
TEST(Coverage, WhatIsNoBoxIsCounted) {
  const std::vector<Placed> awkward{{0, {2, 2}, {2, 3}}, {1, {1}, {1}}, {4, {1}, {1}}};
  const Layout layout = filled(6, awkward);
  EXPECT_FALSE(proved(layout));
  EXPECT_TRUE(findings_of(layout).empty());
  const auto missing = findings_of(filled(6, {awkward[0], awkward[2]}));
  ASSERT_EQ(missing.size(), 1u);
  EXPECT_EQ(missing[0].box, (Box{{1}, {1}}));
}

TEST(Coverage, WhatIsTooLargeToCountIsReportedAsNotProved) {
  const int64_t half = int64_t{1} << 30;
  const auto findings = findings_of(filled(3 * half, {{0, {half}, {2}}, {1, {half}, {3}}}));
  ASSERT_FALSE(findings.empty());
  EXPECT_EQ(findings[0].kind, FindingKind::kOverlap);
  EXPECT_THAT(findings[0].reason, HasSubstr("not proved"));
}

TEST(Coverage, ATileThatWritesEverythingAMillionTimesIsNotCounted) {
  const int64_t side = int64_t{1} << 20;
  const auto findings = findings_of(filled(2 * side - 1, {{0, {side, side}, {1, 1}}}));
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_THAT(findings[0].reason, HasSubstr("not proved"));
}

TEST(Coverage, AnEmptyParameterNeedsNothing) { EXPECT_TRUE(findings_of(filled(0, {})).empty()); }

TEST(Coverage, StopsAtTheLimit) {
  std::vector<Placed> sparse;
  for (int64_t i = 0; i < 50; ++i) sparse.push_back({2 * i, {1}, {1}});
  EXPECT_EQ(findings_of(filled(100, sparse), 5).size(), 5u);
  EXPECT_EQ(findings_of(filled(100, sparse)).size(), 50u);
}

}  // namespace
}  // namespace transfuse

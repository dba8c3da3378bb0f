// Shapes that split dimensions of another: which do, and what a tile is in them.
#include "layout/refine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {
namespace {

TEST(Splits, OnlyAShapeThatGroupsIntoTheOtherSplitsIt) {
  EXPECT_TRUE(splits({4, 3, 2}, {4, 6}));
  EXPECT_TRUE(splits({2, 2, 3, 2}, {4, 6}));
  EXPECT_TRUE(splits({4, 6}, {24}));
  EXPECT_TRUE(splits({4, 1, 6}, {4, 6}));
  EXPECT_TRUE(splits({4, 6}, {1, 4, 6, 1}));
  EXPECT_TRUE(splits({}, {1}));
  EXPECT_FALSE(splits({4, 6}, {4, 3, 2}));
  EXPECT_FALSE(splits({6, 4}, {4, 6}));
  EXPECT_FALSE(splits({4, 6, 2}, {4, 6}));
  EXPECT_FALSE(splits({4}, {4, 6}));
  EXPECT_FALSE(splits({4, 0}, {4, 6}));
  EXPECT_FALSE(splits({0, 2}, {2, 0}));
  EXPECT_TRUE(splits({0, 2}, {0, 2}));
  constexpr int64_t kLarge = int64_t{1} << 40;
  EXPECT_FALSE(splits({kLarge, kLarge}, {kLarge, kLarge, kLarge}));
}

// Row-major index -> place in the parameter.
std::map<int64_t, int64_t> places(const Tile& tile, const Dims& shape) {
  std::map<int64_t, int64_t> out;
  const Dims index_strides = row_major_strides(shape);
  for (int64_t n = 0; n < tile.box.element_count(); ++n) {
    int64_t rest = n;
    int64_t linear = 0;
    int64_t place = tile.element_offset;
    for (int d = shape.rank() - 1; d >= 0; --d) {
      const int64_t at = rest % tile.box.length[d];
      rest /= tile.box.length[d];
      linear += (tile.box.offset[d] + at) * index_strides[d];
      place += at * tile.element_strides[d];
    }
    out.emplace(linear, place);
  }
  return out;
}

TEST(AppendSplit, EveryBoxOfASmallTensorKeepsEveryElementAndItsPlace) {
  const Dims coarse{12, 6};
  size_t pieces = 0;
  for (const Dims& fine : {Dims{12, 3, 2}, Dims{2, 2, 3, 2, 3}, Dims{3, 4, 1, 6}, Dims{12, 6, 1}}) {
    for (int64_t row = 0; row < 12; ++row) {
      for (int64_t row_end = row + 1; row_end <= 12; ++row_end) {
        for (int64_t column = 0; column < 6; ++column) {
          for (int64_t column_end = column + 1; column_end <= 6; ++column_end) {
            const Tile tile{.box = {{row, column}, {row_end - row, column_end - column}},
                            .element_offset = 5,
                            .element_strides = {2, 40}};
            std::vector<Tile> parts;
            append_split(tile, coarse, fine, parts);
            std::map<int64_t, int64_t> found;
            Box around;
            for (const Tile& part : parts) {
              for (const auto& [linear, place] : places(part, fine)) {
                ASSERT_TRUE(found.emplace(linear, place).second);
              }
              around = joined_box(part.box, fine, coarse);
              ASSERT_EQ(around, intersect(around, tile.box));
            }
            ASSERT_EQ(found, places(tile, coarse)) << fine.to_string() << tile.box.to_string();
            if (parts.size() == 1) {
              ASSERT_EQ(around, tile.box);
            }
            pieces = std::max(pieces, parts.size());
          }
        }
      }
    }
  }
  EXPECT_EQ(pieces, 8U);  // four ranges of rows times two of columns
}

}  // namespace
}  // namespace transfuse

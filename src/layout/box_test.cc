// Dims, boxes and dtypes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

TEST(Dtype, NamesAreDistinctAndParseBack) {
  std::set<std::string> names;
  for (int i = 0; i < kDtypeCount; ++i) {
    const auto dtype = static_cast<Dtype>(i);
    names.insert(std::string(dtype_name(dtype)));
    EXPECT_EQ(parse_dtype(dtype_name(dtype)).value(), dtype);
  }
  EXPECT_EQ(names.size(), size_t{kDtypeCount});
}

TEST(Dtype, AnUnknownNameIsAnErrorThatListsTheKnownOnes) {
  const auto dtype = parse_dtype("float");
  ASSERT_FALSE(dtype);
  EXPECT_EQ(dtype.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(dtype.error().message, testing::HasSubstr("\"float\""));
  EXPECT_THAT(dtype.error().message, testing::HasSubstr("bf16"));
}

TEST(Dtype, SizesAreThoseOfTheFormats) {
  EXPECT_EQ(dtype_size_bytes(Dtype::kF32), 4U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kF16), 2U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kBF16), 2U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kF8E4M3), 1U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kF8E5M2), 1U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kI8), 1U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kU8), 1U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kI32), 4U);
  EXPECT_EQ(dtype_size_bytes(Dtype::kI64), 8U);
}

TEST(Dtype, OnlyEqualTypesAndF32FromAndToItsHalvesAreCastable) {
  for (int i = 0; i < kDtypeCount; ++i) {
    for (int j = 0; j < kDtypeCount; ++j) {
      const auto source = static_cast<Dtype>(i);
      const auto target = static_cast<Dtype>(j);
      const auto is_half = [](Dtype d) { return d == Dtype::kBF16 || d == Dtype::kF16; };
      const bool rounds = source == Dtype::kF32 && is_half(target);
      const bool widens = is_half(source) && target == Dtype::kF32;
      EXPECT_EQ(castable(source, target), source == target || rounds || widens)
          << dtype_name(source) << " -> " << dtype_name(target);
    }
  }
}

TEST(Dims, ProductIsOneForAScalarAndStopsAtTheLargestNumber) {
  EXPECT_EQ(Dims{}.product(), 1);
  EXPECT_EQ((Dims{4, 6}).product(), 24);
  EXPECT_EQ((Dims{INT64_MAX, 0, INT64_MAX}).product(), 0);
  EXPECT_EQ((Dims{int64_t{1} << 40, int64_t{1} << 40}).product(), INT64_MAX);
  EXPECT_EQ((Dims{4, 6}).to_string(), "[4, 6]");
  EXPECT_FALSE((Dims{4, 6}) == (Dims{4, 6, 1}));
}

TEST(Dims, RowMajorStridesCountElements) {
  EXPECT_EQ(row_major_strides({4, 6, 5}), (Dims{30, 5, 1}));
  EXPECT_EQ(row_major_strides({}), Dims{});
}

TEST(DimsDeathTest, MoreThanEightDimensionsAbort) {
  Dims dims{1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_DEATH(dims.push_back(9), "check failed");
}

// Every pair of boxes of a 3x3 grid against membership of each cell.
TEST(Box, IntersectionHoldsExactlyTheCommonElements) {
  const auto inside = [](const Box& box, int64_t row, int64_t column) {
    return row >= box.offset[0] && row < box.offset[0] + box.length[0] && column >= box.offset[1] &&
           column < box.offset[1] + box.length[1];
  };
  std::vector<Box> boxes;
  for (int64_t r = 0; r < 3; ++r)
    for (int64_t c = 0; c < 3; ++c)
      for (int64_t h = 0; r + h <= 3; ++h)
        for (int64_t w = 0; c + w <= 3; ++w) boxes.push_back(Box{{r, c}, {h, w}});
  for (const Box& a : boxes) {
    for (const Box& b : boxes) {
      const auto meet = intersect(a, b);
      int64_t common = 0;
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t c = 0; c < 3; ++c) {
          const bool both = inside(a, r, c) && inside(b, r, c);
          common += both ? 1 : 0;
          ASSERT_EQ(both, meet.has_value() && inside(*meet, r, c))
              << a.to_string() << " and " << b.to_string();
        }
      }
      ASSERT_EQ(meet ? meet->element_count() : 0, common);
    }
  }
}

TEST(Box, TwoScalarsMeetInTheirOneElement) {
  EXPECT_EQ(intersect(Box::whole({}), Box::whole({})), Box{});
}

TEST(Box, PrintsHalfOpenRanges) { EXPECT_EQ((Box{{0, 2}, {4, 4}}).to_string(), "[0:4, 2:6]"); }

}  // namespace
}  // namespace transfuse

// Boxes of a run of elements against counting the elements one by one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// The row-major places of a box's elements, in its own row-major order.
std::vector<int64_t> places(const Dims& shape, const Box& box) {
  std::vector<int64_t> found = {0};
  for (int d = 0; d < shape.rank(); ++d) {
    std::vector<int64_t> next;
    for (const int64_t place : found) {
      for (int64_t i = 0; i < box.length[d]; ++i) {
        next.push_back(place * shape[d] + box.offset[d] + i);
      }
    }
    found = std::move(next);
  }
  return found;
}

TEST(FlatRange, BoxesOneAfterAnotherAreTheElementsOfTheRunInOrder) {
  for (const Dims& shape : {Dims{}, Dims{7}, Dims{3, 4}, Dims{1, 5}, Dims{4, 1}, Dims{2, 3, 4},
                            Dims{3, 1, 2, 2}, Dims{2, 2, 2, 2}}) {
    for (int64_t begin = 0; begin <= shape.product(); ++begin) {
      for (int64_t end = begin; end <= shape.product(); ++end) {
        const auto boxes = flat_range_boxes(shape, begin, end).value();
        std::vector<int64_t> found;
        for (const Box& box : boxes) {
          const auto here = places(shape, box);
          found.insert(found.end(), here.begin(), here.end());
        }
        std::vector<int64_t> expected;
        for (int64_t i = begin; i < end; ++i) expected.push_back(i);
        ASSERT_EQ(found, expected) << shape.to_string() << " " << begin << " " << end;
        EXPECT_LE(boxes.size(), static_cast<size_t>(std::max(1, 2 * shape.rank() - 1)));
      }
    }
  }
}

TEST(FlatRange, ARunThatLeavesTheTensorIsRefused) {
  using Run = std::pair<int64_t, int64_t>;
  for (const auto& [begin, end] : {Run{-1, 2}, Run{3, 2}, Run{0, 13}}) {
    const auto boxes = flat_range_boxes({3, 4}, begin, end);
    ASSERT_FALSE(boxes);
    EXPECT_EQ(boxes.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(boxes.error().message,
                testing::HasSubstr("shape [3, 4]: expected a part of its 12"));
  }
}

}  // namespace
}  // namespace transfuse

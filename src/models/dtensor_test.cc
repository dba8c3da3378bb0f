// dtensor_box against the values that torch gives and against lists that are cut one by one.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

const Placement kReplicate{};
Placement shard(int dim) { return {.kind = PlacementKind::kShard, .dim = dim}; }
Placement strided(int dim, int64_t split_factor) {
  return {.kind = PlacementKind::kStridedShard, .dim = dim, .split_factor = split_factor};
}

using List = std::vector<int64_t>;

List range(int64_t length) {
  List list(static_cast<size_t>(length));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

// torch.chunk of a list, with the empty pieces that it leaves out.
List chunk(const List& list, int64_t n, int64_t index) {
  const auto count = static_cast<int64_t>(list.size());
  const int64_t piece = (count + n - 1) / n;
  List out;
  for (int64_t i = 0; i < count; ++i) {
    if (piece > 0 && i / piece == index) out.push_back(list[static_cast<size_t>(i)]);
  }
  return out;
}

void expect_rows(const Result<Box>& box, const List& rows, const std::string& what) {
  ASSERT_TRUE(box) << what << ": " << box.error().message;
  ASSERT_EQ(box->length[0], static_cast<int64_t>(rows.size())) << what;
  for (size_t i = 0; i < rows.size(); ++i) {
    ASSERT_EQ(box->offset[0] + static_cast<int64_t>(i), rows[i]) << what;
  }
}

std::vector<int64_t> lengths(int64_t rows, int64_t n) {
  std::vector<int64_t> out;
  const std::vector<Placement> placements = {shard(0)};
  const std::vector<int64_t> mesh = {n};
  for (int64_t i = 0; i < n; ++i) {
    const std::vector<int64_t> coordinate = {i};
    out.push_back(dtensor_box({rows, 3}, placements, mesh, coordinate).value().length[0]);
  }
  return out;
}

TEST(DtensorBox, ShardIsTorchChunkWithShortAndEmptyLastRanks) {
  EXPECT_EQ(lengths(9, 4), (std::vector<int64_t>{3, 3, 3, 0}));
  EXPECT_EQ(lengths(5, 4), (std::vector<int64_t>{2, 2, 1, 0}));
  EXPECT_EQ(lengths(1, 4), (std::vector<int64_t>{1, 0, 0, 0}));
  EXPECT_EQ(lengths(0, 3), (std::vector<int64_t>{0, 0, 0}));
}

// FSDP2 after TP on dim 0, nine rows on 2 x 2: TP rank 0 has rows 0-4, of which dp 0 has 0-2.
TEST(DtensorBox, StridedShardCutsAfterTheAxisToItsRight) {
  const std::vector<Placement> placements = {strided(0, 2), shard(0)};
  const std::vector<int64_t> mesh = {2, 2};
  const auto rows = [&](int64_t dp, int64_t tp) {
    const std::vector<int64_t> coordinate = {dp, tp};
    return dtensor_box({9}, placements, mesh, coordinate).value().to_string();
  };
  EXPECT_EQ(rows(0, 0), "[0:3]");
  EXPECT_EQ(rows(1, 0), "[3:5]");
  EXPECT_EQ(rows(0, 1), "[5:7]");
  EXPECT_EQ(rows(1, 1), "[7:9]");
}

TEST(DtensorBox, EmptyShardsLieAtTheEndAndStayInsideTheShape) {
  const std::vector<Placement> placements = {shard(0)};
  const std::vector<int64_t> mesh = {4};
  const std::vector<int64_t> coordinate = {3};
  EXPECT_EQ(dtensor_box({9, 2}, placements, mesh, coordinate).value(), (Box{{9, 0}, {0, 2}}));
}

// Every length to 12 and mesh to 4 x 4, every pair of Replicate, Shard and StridedShard on dim 0.
TEST(DtensorBox, MatchesListsCutOneByOneOnTwoAxes) {
  for (int64_t length = 0; length <= 12; ++length) {
    for (int64_t a = 1; a <= 4; ++a) {
      for (int64_t b = 1; b <= 4; ++b) {
        for (int64_t i = 0; i < a; ++i) {
          for (int64_t j = 0; j < b; ++j) {
            const std::vector<int64_t> mesh = {a, b};
            const std::vector<int64_t> at = {i, j};
            const auto check = [&](std::vector<Placement> placements, const List& rows) {
              expect_rows(dtensor_box({length}, placements, mesh, at), rows,
                          std::to_string(length) + " on " + std::to_string(a) + "x" +
                              std::to_string(b) + " at " + std::to_string(i) + "," +
                              std::to_string(j));
            };
            const List all = range(length);
            check({kReplicate, kReplicate}, all);
            check({shard(0), kReplicate}, chunk(all, a, i));
            check({kReplicate, shard(0)}, chunk(all, b, j));
            check({shard(0), shard(0)}, chunk(chunk(all, a, i), b, j));
            check({strided(0, b), shard(0)}, chunk(chunk(all, b, j), a, i));
          }
        }
      }
    }
  }
}

TEST(DtensorBox, MatchesListsCutOneByOneOnThreeAxesOfOneDimension) {
  const std::vector<int64_t> mesh = {2, 3, 2};
  for (int64_t length = 0; length <= 30; ++length) {
    for (int64_t rank = 0; rank < 12; ++rank) {
      const std::vector<int64_t> at = {rank / 6, rank / 2 % 3, rank % 2};
      const auto cut = [&](const std::vector<size_t>& order) {
        List rows = range(length);
        for (const size_t axis : order) rows = chunk(rows, mesh[axis], at[axis]);
        return rows;
      };
      const auto check = [&](std::vector<Placement> placements, const List& rows) {
        expect_rows(dtensor_box({length}, placements, mesh, at), rows, std::to_string(length));
      };
      check({shard(0), shard(0), shard(0)}, cut({0, 1, 2}));
      check({strided(0, 6), shard(0), shard(0)}, cut({1, 2, 0}));
      check({strided(0, 3), shard(0), shard(0)}, cut({1, 0, 2}));
      check({shard(0), strided(0, 2), shard(0)}, cut({0, 2, 1}));
      check({strided(0, 6), strided(0, 2), shard(0)}, cut({2, 1, 0}));
      check({strided(0, 2), strided(0, 2), shard(0)}, cut({2, 0, 1}));
      check({kReplicate, strided(0, 2), shard(0)}, cut({2, 1}));
      check({strided(0, 2), kReplicate, shard(0)}, cut({2, 0}));
    }
  }
}

TEST(DtensorBox, DimensionsAreCutIndependently) {
  const std::vector<Placement> placements = {kReplicate, shard(0), shard(1)};
  const std::vector<int64_t> mesh = {2, 3, 2};
  const std::vector<int64_t> at = {1, 2, 1};
  EXPECT_EQ(dtensor_box({7, 5, 2}, placements, mesh, at).value(), (Box{{6, 3, 0}, {1, 2, 2}}));
}

TEST(DtensorBox, NoMeshMeansTheWholeTensor) {
  EXPECT_EQ(dtensor_box({4, 6}, {}, {}, {}).value(), Box::whole({4, 6}));
  EXPECT_EQ(dtensor_box({}, {}, {}, {}).value(), Box{});
}

TEST(DtensorBox, HugeExtentsDoNotOverflow) {
  const std::vector<Placement> placements = {shard(0)};
  const std::vector<int64_t> mesh = {INT64_MAX};
  const std::vector<int64_t> at = {INT64_MAX - 1};
  EXPECT_EQ(dtensor_box({INT64_MAX}, placements, mesh, at).value(), (Box{{INT64_MAX - 1}, {1}}));
  EXPECT_EQ(dtensor_box({9}, placements, mesh, at).value(), (Box{{9}, {0}}));
}

TEST(DtensorBox, ShardsThatAreNotOneBoxAreUnsupported) {
  const std::vector<int64_t> mesh = {2, 4};
  const std::vector<int64_t> at = {0, 0};
  for (const std::vector<Placement>& placements :
       {std::vector<Placement>{strided(0, 4), kReplicate},
        {strided(0, 2), shard(0)},
        {strided(0, 3), shard(0)},
        {shard(0), strided(0, 2)},
        {strided(0, 4), shard(1)}}) {
    const auto box = dtensor_box({16, 16}, placements, mesh, at);
    ASSERT_FALSE(box);
    EXPECT_EQ(box.error().code, ErrorCode::kUnsupported);
    EXPECT_THAT(box.error().message, HasSubstr("split_factor"));
  }
}

TEST(DtensorBox, NumbersThatContradictEachOtherAreInvalid) {
  const auto code = [](Dims shape, std::vector<Placement> placements, std::vector<int64_t> mesh,
                       std::vector<int64_t> at) {
    const auto box = dtensor_box(shape, placements, mesh, at);
    return box ? std::string("a box") : std::string(error_code_name(box.error().code));
  };
  EXPECT_EQ(code({4}, {shard(0)}, {2}, {1}), "a box");
  EXPECT_EQ(code({4}, {shard(0)}, {2}, {2}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(0)}, {2}, {-1}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(0)}, {0}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(1)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(-1)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({}, {shard(0)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({-4}, {shard(0)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {strided(0, 0)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(0), shard(0)}, {2}, {0}), "INVALID_ARGUMENT");
  EXPECT_EQ(code({4}, {shard(0)}, {2}, {0, 0}), "INVALID_ARGUMENT");
}

}  // namespace
}  // namespace transfuse

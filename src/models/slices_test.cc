// Logical matrices in published tensors of other forms: interleaved, transposed, in pieces.
#include "models/slices.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// For every element of a parameter: its row-major index in the tensor.
std::vector<int64_t> content(const Layout& layout, const std::string& name) {
  const uint32_t p = layout.find_parameter(name).value();
  std::vector<int64_t> out(static_cast<size_t>(layout.parameters()[p].element_count), -1);
  for (const Tile& tile : layout.tiles()) {
    if (tile.parameter != p) continue;
    const Dims strides = row_major_strides(layout.tensors()[tile.tensor].shape);
    for (int64_t n = 0; n < tile.box.length.product(); ++n) {
      int64_t rest = n;
      int64_t index = 0;
      int64_t at = tile.element_offset;
      for (int d = tile.box.length.rank() - 1; d >= 0; --d) {
        const int64_t i = rest % tile.box.length[d];
        rest /= tile.box.length[d];
        index += (tile.box.offset[d] + i) * strides[d];
        at += i * tile.element_strides[d];
      }
      EXPECT_EQ(out.at(static_cast<size_t>(at)), -1) << name << " " << at;
      out.at(static_cast<size_t>(at)) = index;
    }
  }
  return out;
}

Model model_of(std::vector<ModelTensor> tensors) {
  return {.config = {}, .family = &kLlama, .tensors = std::move(tensors)};
}

// Two experts of one tensor [expert, in 2, gate and up of out 3 in turns].
ModelTensor interleaved_experts() {
  ModelTensor tensor{"experts.gate_up_proj", {2, 2, 6}, Role::kGateUp};
  tensor.turns = {1, 1};
  for (int64_t expert = 0; expert < 2; ++expert) {
    tensor.pieces.push_back({.role = Role::kGateUp,
                             .expert = expert,
                             .shape = {6, 2},
                             .row_count = 6,
                             .origin = {expert, 0, 0},
                             .row_dimension = 2,
                             .column_dimension = 1});
  }
  return tensor;
}

TEST(Slices, ATransposedMatrixIsCutAndConcatenatedLikeAnyOther) {
  const Model model = model_of({interleaved_experts()});
  const ModelTensor& tensor = model.tensors[0];
  Slices slices(model);
  ASSERT_TRUE(slices.add({.parameter = "w13"}, tensor, tensor.pieces[1],
                         {.rows = {2, 6}, .columns = {0, 2}}));
  const Layout layout = slices.build().value();
  EXPECT_EQ(layout.tensors()[0].shape, (Dims{2, 2, 6}));
  // Expert 1 begins at 12; in is 6 apart, out 1.
  EXPECT_THAT(content(layout, "w13"), ElementsAre(14, 20, 15, 21, 16, 22, 17, 23));
}

TEST(Slices, MatricesThatTakeTurnsInTheRowsOfOneAreTakenApart) {
  const Model model = model_of({interleaved_experts()});
  const ModelTensor& tensor = model.tensors[0];
  Slices slices(model);
  for (const Piece& matrix : apart(tensor, tensor.pieces[1])) {
    const Slice last_rows{.rows = {1, 3}, .columns = {0, 2}};
    ASSERT_TRUE(slices.add({.parameter = "fc1", .place = matrix.turn}, tensor, matrix, last_rows));
  }
  const Layout layout = slices.build().value();
  EXPECT_EQ(layout.tensors()[0].shape, (Dims{2, 2, 3, 2}));
  EXPECT_EQ(layout.tiles().size(), 2U);
  EXPECT_THAT(content(layout, "fc1"), ElementsAre(14, 20, 16, 22, 15, 21, 17, 23));
}

TEST(Slices, ACutWithinATurnMakesTilesOfItsEnds) {
  // Three heads, each 2 rows of q and 3 of something else.
  ModelTensor tensor{"q_proj.weight", {15, 1}, Role::kQuery};
  tensor.turns = {2, 3};
  const Model model = model_of({tensor});
  const std::vector<Piece> matrices = apart(tensor, whole_piece(tensor));
  ASSERT_EQ(matrices.size(), 2U);
  EXPECT_EQ(matrices[1].shape, (Dims{9, 1}));
  Slices slices(model);
  ASSERT_TRUE(
      slices.add({.parameter = "q"}, tensor, matrices[0], {.rows = {1, 5}, .columns = {0, 1}}));
  ASSERT_TRUE(
      slices.add({.parameter = "rest"}, tensor, matrices[1], {.rows = {3, 7}, .columns = {0, 1}}));
  const Layout layout = slices.build().value();
  EXPECT_THAT(content(layout, "q"), ElementsAre(1, 5, 6, 10));
  EXPECT_THAT(content(layout, "rest"), ElementsAre(7, 8, 9, 12));
}

TEST(Slices, MatricesThatTakeOneTurnAreRangesOfRows) {
  ModelTensor tensor{"conv1d.weight", {5, 1, 2}, Role::kLinearConv};
  tensor.turns = {2, 3};
  const Model model = model_of({tensor});
  Slices slices(model);
  for (const Piece& matrix : apart(tensor, whole_piece(tensor))) {
    ASSERT_TRUE(slices.add({.parameter = "conv1d", .place = matrix.turn}, tensor, matrix,
                           {.rows = {1, 2}, .columns = {0, 1}}));
  }
  const Layout layout = slices.build().value();
  EXPECT_EQ(layout.tensors()[0].shape, (Dims{5, 1, 2}));
  EXPECT_THAT(content(layout, "conv1d"), ElementsAre(2, 3, 6, 7));
}

TEST(Slices, AMatrixInPiecesIsCutAcrossThem) {
  // Two heads, each 2 rows of q and 2 of a gate.
  ModelTensor tensor{"q_proj.weight", {8, 1}, Role::kQuery};
  for (int64_t head = 0; head < 2; ++head) {
    tensor.pieces.push_back({.role = Role::kQuery,
                             .shape = {4, 1},
                             .first_row = 2 * head,
                             .row_count = 2,
                             .origin = {4 * head, 0}});
  }
  const Model model = model_of({tensor});
  Slices slices(model);
  ASSERT_TRUE(for_each_piece(model.tensors[0], [&](const Piece& piece) {
    return slices.add({.parameter = "q"}, model.tensors[0], piece,
                      {.rows = {1, 4}, .columns = {0, 1}});
  }));
  EXPECT_THAT(content(slices.build().value(), "q"), ElementsAre(1, 4, 5));
}

TEST(Slices, PartsLieInTheOrderOfTheirPlacesWhateverTheOrderOfAdding) {
  const Model model = model_of({{"a", {2, 2}, Role::kKey}, {"b", {1, 2}, Role::kQuery}});
  Slices slices(model);
  slices.add_zeros({.parameter = "p", .place = 9}, 1);
  for (const auto& [tensor, place] :
       {std::pair{&model.tensors[0], int64_t{7}}, std::pair{&model.tensors[1], int64_t{2}}}) {
    const Piece piece = whole_piece(*tensor);
    ASSERT_TRUE(slices.add({.parameter = "p", .place = place}, *tensor, piece, whole_slice(piece)));
  }
  const Layout layout = slices.build().value();
  EXPECT_THAT(content(layout, "p"), ElementsAre(0, 1, 0, 1, 2, 3, -1, -1));
  ASSERT_EQ(layout.fills().size(), 1U);
  EXPECT_EQ(layout.fills()[0].element_offset, 6);
}

TEST(Slices, ScalesAreCutWithTheirWeightAndOnlyBetweenBlocks) {
  ModelTensor scale{
      "down_proj.weight_scale_inv", {2, 3}, Role::kDown, Content::kScale, Dtype::kF32};
  scale.weight_shape = {6, 10};  // blocks of 4 x 4: the last ones are short
  scale.block = {4, 4};
  const Model model = model_of({scale});
  const Piece piece = whole_piece(model.tensors[0]);
  Slices slices(model);
  ASSERT_TRUE(slices.add({.parameter = "s"}, model.tensors[0], piece,
                         {.rows = {4, 6}, .columns = {4, 10}}));
  EXPECT_THAT(content(slices.build().value(), "s"), ElementsAre(4, 5));
  const auto refused =
      slices.add({.parameter = "t"}, model.tensors[0], piece, {.rows = {0, 6}, .columns = {0, 5}});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(refused.error().message, HasSubstr("down_proj.weight_scale_inv"));
  EXPECT_THAT(refused.error().message, HasSubstr("at column 5 of 10: expected a multiple of 4"));
}

}  // namespace
}  // namespace transfuse

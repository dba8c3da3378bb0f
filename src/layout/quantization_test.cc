// What a layout may say of block scales.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

struct Facts {
  Dims shape = {300, 200};
  Dims scales_shape = {3, 2};
  Dtype held = Dtype::kF8E4M3;
  Dtype scales_held = Dtype::kF32;
  int64_t block_rows = 128;
  int64_t block_columns = 128;
  int times = 1;
};

Result<Layout> make(const Facts& facts) {
  LayoutBuilder builder;
  const auto add = [&builder](const std::string& name, Dtype dtype, const Dims& shape) {
    const auto tensor = builder.tensor({name, dtype, shape});
    builder.tile(tensor, Box::whole(shape), builder.parameter({name, dtype, shape.product()}), 0);
    return tensor;
  };
  const auto scales = add("a.scales", facts.scales_held, facts.scales_shape);
  const auto tensor = add("w", facts.held, facts.shape);
  for (int i = 0; i < facts.times; ++i) {
    builder.quantization(tensor, scales, facts.block_rows, facts.block_columns);
  }
  return builder.build();
}

TEST(Quantization, IsPartOfTheLayoutAndItsDigest) {
  const Layout plain = make({.times = 0}).value();
  const Layout layout = make({}).value();
  EXPECT_NE(plain.digest(), layout.digest());
  ASSERT_EQ(layout.quantizations().size(), 1U);
  const uint32_t tensor = layout.find_tensor("w").value();
  const Quantization expected = {.tensor = tensor,
                                 .scales = layout.find_tensor("a.scales").value(),
                                 .block_rows = 128,
                                 .block_columns = 128};
  EXPECT_EQ(layout.quantization_of(tensor), expected);
  EXPECT_EQ(layout.quantization_of(expected.scales), std::nullopt);
  EXPECT_EQ(plain.quantization_of(tensor), std::nullopt);
  const Layout of_kind = layout.with_kind("hf_raw").value();
  EXPECT_EQ(of_kind.quantization_of(tensor), expected);
  EXPECT_EQ(plain.with_quantizations({&expected, 1}).value().digest(), layout.digest());
  EXPECT_EQ(layout.with_quantizations({}).value().digest(), plain.digest());
}

TEST(Quantization, ABlockLargerThanTheTensorIsTheTensor) {
  const Layout layout =
      make({.scales_shape = {1, 1}, .block_rows = 1000, .block_columns = 1000}).value();
  EXPECT_EQ(layout.quantizations()[0].block_rows, 300);
  EXPECT_EQ(layout.quantizations()[0].block_columns, 200);
  const Layout exact =
      make({.scales_shape = {1, 1}, .block_rows = 300, .block_columns = 200}).value();
  EXPECT_EQ(layout.digest(), exact.digest());
  // One scale may have any shape of one element.
  EXPECT_TRUE(make({.scales_shape = {}, .block_rows = 300, .block_columns = 200}));
  EXPECT_TRUE(make({.scales_shape = {1}, .block_rows = 300, .block_columns = 200}));
}

TEST(Quantization, WhatMakesNoSenseIsRefused) {
  const auto refused = [](const Facts& facts, const std::string& words) {
    const auto made = make(facts);
    ASSERT_FALSE(made);
    EXPECT_EQ(made.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(made.error().message, HasSubstr(words));
  };
  refused({.shape = {60000}, .scales_shape = {469}}, "rows and columns");
  refused({.block_rows = 0}, "0 rows");
  refused({.block_columns = -1}, "-1 columns");
  refused({.scales_shape = {2, 3}}, "expected shape [3, 2], found [2, 3]");
  refused({.scales_shape = {1, 1}}, "expected shape [3, 2]");
  refused({.held = Dtype::kBF16}, "expected f8e4m3, found bf16");
  refused({.scales_held = Dtype::kBF16}, "expected f32, found bf16");
  refused({.times = 2}, "twice");
  LayoutBuilder builder;
  builder.quantization(0, 1, 128, 128);
  EXPECT_EQ(builder.build().error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace transfuse

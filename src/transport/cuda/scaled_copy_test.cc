// What becomes of copies with block scales on a GPU.
#include <gtest/gtest.h>

#include <cstddef>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/device_table.h"

namespace transfuse {
namespace {

TEST(DeviceTable, CopiesWithBlockScalesAreRefused) {
  std::byte target{};
  const BlockScales scales{.target = &target};
  StridedCopy copy;
  copy.op = ElementOp::kBF16ToE4M3;
  copy.target = &target;
  copy.scales = &scales;
  DeviceTableBuilder builder;
  const auto added = builder.add(copy, 0, 0);
  ASSERT_FALSE(added);
  EXPECT_EQ(added.error().code, ErrorCode::kUnsupported);
  EXPECT_TRUE(builder.build(0).items.empty());
}

}  // namespace
}  // namespace transfuse

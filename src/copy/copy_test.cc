// The copy engine against a model that moves one element at a time.
#include "copy/copy.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "base/random.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<ElementOp, kElementOpCount> kOps = {
    ElementOp::kCopy1,     ElementOp::kCopy2,    ElementOp::kCopy4,     ElementOp::kCopy8,
    ElementOp::kF32ToBF16, ElementOp::kF32ToF16, ElementOp::kBF16ToF32, ElementOp::kF16ToF32};

std::vector<std::byte> random_bytes(Random& random, uint64_t size) {
  std::vector<std::byte> bytes(size);
  for (auto& b : bytes) b = static_cast<std::byte>(random.next() >> 56);
  return bytes;
}

// A random injective arrangement of the three levels: strides that never let two elements meet.
void random_strides(Random& random, const uint32_t count[3], int64_t stride[3]) {
  std::array<int, 3> order = {0, 1, 2};
  for (size_t i = 2; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  if (random.chance(0.5)) order = {0, 1, 2};
  int64_t span = 1;
  for (size_t i = 3; i-- > 0;) {
    const auto level = static_cast<size_t>(order[i]);
    stride[level] = span + (random.chance(0.5) ? 0 : static_cast<int64_t>(random.below(4)));
    span = stride[level] * count[level];
  }
}

uint64_t span_bytes(const StridedCopy& copy, const int64_t stride[3], uint32_t element_bytes) {
  uint64_t last = 0;
  for (size_t i = 0; i < 3; ++i) last += (copy.count[i] - 1) * static_cast<uint64_t>(stride[i]);
  return (last + 1) * element_bytes;
}

StridedCopy random_copy(Random& random) {
  StridedCopy copy;
  copy.op = kOps[random.below(kOps.size())];
  const uint64_t shape = random.below(5);
  if (shape == 0) {
    copy.count[2] = 1 + static_cast<uint32_t>(random.below(20000));
  } else if (shape == 1) {
    copy.count[1] = 1 + static_cast<uint32_t>(random.below(40));
    copy.count[2] = 1 + static_cast<uint32_t>(random.below(600));
  } else {
    for (auto& count : copy.count) count = 1 + static_cast<uint32_t>(random.below(24));
  }
  random_strides(random, copy.count, copy.source_stride);
  random_strides(random, copy.count, copy.target_stride);
  random_strides(random, copy.count, copy.index_stride);
  copy.fingerprint = random.chance(0.7);
  copy.fingerprint_key = random.next();
  copy.linear_index = random.chance(0.3) ? random.next() >> 8 : random.below(1000);
  // Now and then the upper half of the linear index changes within the copy.
  if (random.chance(0.2)) copy.linear_index = (uint64_t{3} << 32) - random.below(3000);
  return copy;
}

void check_against_model(Random& random, const StridedCopy& shape) {
  StridedCopy copy = shape;
  const uint32_t in = source_element_bytes(copy.op);
  const uint32_t out = target_element_bytes(copy.op);
  const uint64_t source_size = span_bytes(copy, copy.source_stride, in);
  const uint64_t target_size = span_bytes(copy, copy.target_stride, out);
  const uint64_t source_shift = random.below(64);
  const uint64_t target_shift = random.below(64);
  const auto source = random_bytes(random, source_size + source_shift);
  const auto before = random_bytes(random, target_size + target_shift + 64);
  auto expected = before;
  auto found = before;
  copy.source_offset_bytes = source_shift;
  copy.target = found.data() + target_shift;
  ASSERT_EQ(copy.source_end_bytes(), source.size());
  const std::byte* from = source.data() + source_shift;
  const uint64_t sum = slow_copy(copy, from, expected.data() + target_shift);
  EXPECT_EQ(run_copy(copy, from), copy.fingerprint ? sum : 0);
  copy_fence();
  ASSERT_TRUE(found == expected) << "op " << static_cast<int>(copy.op) << " counts "
                                 << copy.count[0] << " " << copy.count[1] << " " << copy.count[2];
  copy.target = nullptr;
  EXPECT_EQ(sum_copy(copy, from), sum);
}

class EveryPath : public testing::TestWithParam<CopyPath> {
 protected:
  void SetUp() override {
    if (!has_copy_path(GetParam())) GTEST_SKIP() << "this CPU lacks the instructions";
    force_copy_path(GetParam());
  }
  void TearDown() override { force_copy_path(best_copy_path()); }
};

TEST_P(EveryPath, WritesWhatTheModelWritesAndSumsTheSame) {
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    check_against_model(random, random_copy(random));
    if (HasFailure()) return;
  }
}

TEST_P(EveryPath, LongRowsAreStreamedWithoutTouchingTheirNeighbours) {
  Random random(11);
  for (const ElementOp op : kOps) {
    for (const bool fingerprint : {false, true}) {
      StridedCopy copy;
      copy.op = op;
      copy.fingerprint = fingerprint;
      copy.fingerprint_key = random.next();
      copy.count[2] = 300000 + static_cast<uint32_t>(random.below(100));
      copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
      check_against_model(random, copy);
    }
  }
}

TEST_P(EveryPath, TransposesAreRight) {
  Random random(12);
  for (const ElementOp op : kOps) {
    StridedCopy copy;
    copy.op = op;
    copy.fingerprint = true;
    copy.count[1] = 70;
    copy.count[2] = 300;
    copy.source_stride[1] = 1;
    copy.source_stride[2] = 70;
    copy.target_stride[1] = 300;
    copy.target_stride[2] = 1;
    copy.index_stride[1] = 300;
    copy.index_stride[2] = 1;
    check_against_model(random, copy);
  }
}

TEST_P(EveryPath, CastsEveryClassOfNumberLikeTheModel) {
  std::vector<uint32_t> bits;
  for (uint32_t high = 0; high < 0x10000; high += 3) {
    for (const uint32_t low :
         {0x0000u, 0x0001u, 0x0FFFu, 0x1000u, 0x1001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      bits.push_back((high << 16) | low);
    }
  }
  std::vector<uint16_t> found(bits.size());
  for (const ElementOp op : {ElementOp::kF32ToBF16, ElementOp::kF32ToF16}) {
    StridedCopy copy;
    copy.op = op;
    copy.count[2] = static_cast<uint32_t>(bits.size());
    copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
    copy.target = reinterpret_cast<std::byte*>(found.data());
    run_copy(copy, reinterpret_cast<const std::byte*>(bits.data()));
    copy_fence();
    for (size_t i = 0; i < bits.size(); ++i) {
      const bool bf16 = op == ElementOp::kF32ToBF16;
      ASSERT_EQ(found[i], bf16 ? slow_bf16(bits[i]) : slow_f16(bits[i])) << std::hex << bits[i];
      ASSERT_EQ(found[i], bf16 ? f32_bits_to_bf16(bits[i]) : f32_bits_to_f16(bits[i]));
    }
  }
}

TEST_P(EveryPath, WidensAll65536NumbersOfEitherHalfLikeTheModel) {
  std::vector<uint16_t> bits(0x10000);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<uint32_t> found(bits.size());
  for (const ElementOp op : {ElementOp::kBF16ToF32, ElementOp::kF16ToF32}) {
    StridedCopy copy;
    copy.op = op;
    copy.count[2] = static_cast<uint32_t>(bits.size());
    copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
    copy.target = reinterpret_cast<std::byte*>(found.data());
    run_copy(copy, reinterpret_cast<const std::byte*>(bits.data()));
    copy_fence();
    const bool bf16 = op == ElementOp::kBF16ToF32;
    for (size_t i = 0; i < bits.size(); ++i) {
      ASSERT_EQ(found[i], bf16 ? slow_from_bf16(bits[i]) : slow_from_f16(bits[i]))
          << std::hex << bits[i];
      ASSERT_EQ(found[i], bf16 ? bf16_bits_to_f32(bits[i]) : f16_bits_to_f32(bits[i]));
      // There and back: every number that is no NaN.
      const bool nan = (found[i] & 0x7FFFFFFF) > 0x7F800000;
      const uint16_t back = bf16 ? f32_bits_to_bf16(found[i]) : f32_bits_to_f16(found[i]);
      ASSERT_EQ(back, nan ? (bf16 ? 0x7FC0 : 0x7E00) : bits[i]);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Copy, EveryPath, testing::ValuesIn(kCopyPaths),
                         [](const auto& path) { return std::string(copy_path_name(path.param)); });

TEST(Copy, AnEmptyCopyReadsAndWritesNothing) {
  StridedCopy copy;
  copy.count[1] = 0;
  copy.source_offset_bytes = 5;
  copy.fingerprint = true;
  EXPECT_EQ(copy.source_end_bytes(), 5u);
  EXPECT_EQ(run_copy(copy, nullptr), 0u);
  EXPECT_EQ(sum_copy(copy, nullptr), 0u);
  EXPECT_TRUE(check_copy(copy, 5));
  EXPECT_FALSE(check_copy(copy, 4));
}

TEST(Copy, I13_ExtentsThatOverflowAreRefused) {
  StridedCopy copy;
  copy.op = ElementOp::kCopy2;
  copy.count[2] = 8;
  copy.source_stride[2] = 1;
  copy.source_offset_bytes = 4;
  EXPECT_TRUE(check_copy(copy, 20));
  EXPECT_FALSE(check_copy(copy, 19));
  copy.source_offset_bytes = std::numeric_limits<uint64_t>::max() - 3;
  EXPECT_EQ(copy.source_end_bytes(), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(check_copy(copy, uint64_t{1} << 40).error().code, ErrorCode::kCorrupt);
  copy.source_offset_bytes = 0;
  copy.source_stride[0] = std::numeric_limits<int64_t>::max();
  copy.count[0] = 3;
  EXPECT_FALSE(check_copy(copy, std::numeric_limits<uint64_t>::max() - 1));
  copy.source_stride[0] = -1;
  EXPECT_EQ(check_copy(copy, 1000).error().code, ErrorCode::kCorrupt);
  copy.source_stride[0] = 0;
  for (auto& count : copy.count) count = std::numeric_limits<uint32_t>::max();
  copy.source_stride[2] = 0;
  EXPECT_EQ(check_copy(copy, 1000).error().code, ErrorCode::kCorrupt);
}

}  // namespace
}  // namespace transfuse

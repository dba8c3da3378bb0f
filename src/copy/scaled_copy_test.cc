// Quantising and dequantising copies against a model that works on one element at a time, and the
// casts of fp8 against arithmetic.
#include "copy/scaled_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"
#include "copy/block_scale.h"
#include "copy/cast.h"
#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::array<ElementOp, kScaledOpCount> kScaledOps = {
    ElementOp::kF32ToE4M3, ElementOp::kBF16ToE4M3, ElementOp::kF16ToE4M3,
    ElementOp::kE4M3ToF32, ElementOp::kE4M3ToBF16, ElementOp::kE4M3ToF16};

TEST(ScaledCopy, All256NumbersOfE4M3WidenToWhatTheyAreWorth) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<uint8_t>(bits);
    const double expected = e4m3_value(byte);
    const auto found = std::bit_cast<float>(e4m3_bits_to_f32(byte));
    if (std::isnan(expected)) {
      EXPECT_EQ(std::bit_cast<uint32_t>(found), byte == 0x7F ? 0x7FF00000u : 0xFFF00000u);
      continue;
    }
    EXPECT_EQ(found, expected) << bits;
    EXPECT_EQ(std::signbit(found), (bits & 0x80) != 0) << bits;
    EXPECT_EQ(f32_bits_to_e4m3(std::bit_cast<uint32_t>(found)), byte);  // there and back
  }
}

TEST(ScaledCopy, EveryClassOfF32RoundsToTheNearestE4M3) {
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const uint32_t bits = (high << 16) | low;
      ASSERT_EQ(f32_bits_to_e4m3(bits), slow_e4m3(std::bit_cast<float>(bits))) << std::hex << bits;
    }
  }
}

TEST(ScaledCopy, All65536NumbersOfF16RoundToTheNearestE4M3) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint32_t wide = f16_bits_to_f32(static_cast<uint16_t>(bits));
    ASSERT_EQ(f32_bits_to_e4m3(wide), slow_e4m3(std::bit_cast<float>(wide))) << std::hex << bits;
  }
}

TEST(ScaledCopy, EveryBoundaryBetweenNeighboursOfE4M3IsTakenToTheEvenOne) {
  for (uint32_t lower = 0; lower < 0x7E; ++lower) {
    const double middle =
        (e4m3_value(static_cast<uint8_t>(lower)) + e4m3_value(static_cast<uint8_t>(lower + 1))) / 2;
    const auto exact = static_cast<float>(middle);
    ASSERT_EQ(exact, middle);
    const uint32_t even = lower % 2 == 0 ? lower : lower + 1;
    const auto cast = [](float value) { return f32_bits_to_e4m3(std::bit_cast<uint32_t>(value)); };
    EXPECT_EQ(cast(exact), even);
    EXPECT_EQ(cast(-exact), even | 0x80);
    EXPECT_EQ(cast(std::nextafter(exact, 0.0F)), lower);
    EXPECT_EQ(cast(std::nextafter(exact, 1000.0F)), lower + 1);
  }
}

// A random copy, its memory, and the scales at the source or at the target.
struct Scenario {
  StridedCopy copy;
  BlockScales scales;
  std::vector<std::byte> source;
  std::vector<std::byte> target;
  std::vector<std::byte> scale_target;
  uint64_t source_shift = 0;

  const std::byte* from() const { return source.data() + source_shift; }
};

uint64_t span_elements(const uint32_t* count, const int64_t* stride, int levels) {
  uint64_t last = 0;
  for (int i = 0; i < levels; ++i) last += (count[i] - 1) * static_cast<uint64_t>(stride[i]);
  return last + 1;
}

// Two strides that never let two elements meet.
void random_strides(Random& random, const uint32_t* count, int64_t* stride) {
  const int inner = random.chance(0.3) ? 0 : 1;
  stride[inner] = 1 + static_cast<int64_t>(random.chance(0.3) ? random.below(3) : 0);
  stride[1 - inner] = stride[inner] * count[inner] + static_cast<int64_t>(random.below(5));
}

uint32_t random_value(Random& random, ElementOp op, float magnitude) {
  const double unit = static_cast<double>(random.next() >> 11) * 0x1p-53;
  auto value = static_cast<float>((2 * unit - 1) * magnitude);
  if (random.chance(0.01)) value = 0;
  const auto bits = std::bit_cast<uint32_t>(value);
  if (op == ElementOp::kF32ToE4M3) return bits;
  return op == ElementOp::kBF16ToE4M3 ? f32_bits_to_bf16(bits) : f32_bits_to_f16(bits);
}

Scenario random_scenario(Random& random, ElementOp op, uint32_t largest_count,
                         uint32_t largest_block) {
  Scenario made;
  StridedCopy& copy = made.copy;
  BlockScales& scales = made.scales;
  copy.op = op;
  copy.fingerprint = random.chance(0.7);
  copy.fingerprint_key = random.next();
  copy.linear_index = random.chance(0.3) ? random.next() >> 8 : random.below(1000);
  for (int axis = 0; axis < 2; ++axis) {
    copy.count[axis + 1] = 1 + static_cast<uint32_t>(random.below(largest_count));
    scales.block[axis] = 1 + static_cast<uint32_t>(random.below(largest_block));
    if (largest_block > 4 && random.chance(0.4)) scales.block[axis] = 128;
    if (!quantizes(op)) {
      scales.phase[axis] = static_cast<uint32_t>(random.below(scales.block[axis]));
    }
  }
  random_strides(random, copy.count + 1, copy.source_stride + 1);
  random_strides(random, copy.count + 1, copy.target_stride + 1);
  random_strides(random, copy.count + 1, copy.index_stride + 1);
  copy.scales = &scales;
  const uint32_t blocks[2] = {static_cast<uint32_t>(copy.block_count(0)),
                              static_cast<uint32_t>(copy.block_count(1))};
  random_strides(random, blocks, scales.stride);
  random_strides(random, blocks, scales.index_stride);
  scales.fingerprint_key = random.next();
  scales.linear_index = random.below(100000);

  const uint32_t in = source_element_bytes(op);
  const uint64_t elements = span_elements(copy.count + 1, copy.source_stride + 1, 2);
  const uint64_t scale_bytes = span_elements(blocks, scales.stride, 2) * 4;
  made.source_shift = random.below(64);
  const uint64_t scales_at = made.source_shift + elements * in + random.below(9);
  made.source.resize(scales_at + (quantizes(op) ? 0 : scale_bytes));
  const float magnitude = std::ldexp(1.0F, static_cast<int>(random.below(20)) - 10);
  for (uint64_t i = 0; i < elements; ++i) {
    const uint32_t value = quantizes(op) ? random_value(random, op, magnitude)
                                         : static_cast<uint32_t>(random.below(256));
    std::memcpy(made.source.data() + made.source_shift + i * in, &value, in);
  }
  if (quantizes(op)) {
    made.source.resize(made.source_shift + elements * in);
    made.scale_target.resize(scale_bytes + 3, std::byte{0x5A});
  } else {
    for (uint64_t i = 0; i < scale_bytes / 4; ++i) {
      const uint32_t scale = random_value(random, ElementOp::kF32ToE4M3, magnitude);
      std::memcpy(made.source.data() + scales_at + i * 4, &scale, 4);
    }
    scales.source_offset_bytes = scales_at;
  }
  copy.source_offset_bytes = made.source_shift;
  made.target.resize(
      span_elements(copy.count + 1, copy.target_stride + 1, 2) * target_element_bytes(op) + 64,
      std::byte{0xA5});
  return made;
}

Scenario random_scenario(Random& random, ElementOp op, uint32_t largest_count) {
  return random_scenario(random, op, largest_count, 2 * largest_count);
}

void check_against_model(Random& random, Scenario& made) {
  const uint64_t target_shift = random.below(64);
  const uint64_t scale_shift = random.below(4);
  auto found = made.target;
  auto found_scales = made.scale_target;
  auto expected = made.target;
  auto expected_scales = made.scale_target;
  made.copy.scales = &made.scales;
  const uint64_t sum =
      slow_scaled_copy(made.copy, made.from(), expected.data() + target_shift,
                       expected_scales.empty() ? nullptr : expected_scales.data() + scale_shift);
  made.copy.target = found.data() + target_shift;
  if (quantizes(made.copy.op)) made.scales.target = found_scales.data() + scale_shift;
  ASSERT_TRUE(check_copy(made.copy, made.source.size()));
  ASSERT_FALSE(check_copy(made.copy, made.source.size() - 1));
  EXPECT_EQ(run_copy(made.copy, made.from()), made.copy.fingerprint ? sum : 0);
  copy_fence();
  ASSERT_TRUE(found == expected);
  ASSERT_TRUE(found_scales == expected_scales);
  made.copy.target = nullptr;
  made.scales.target = nullptr;
  EXPECT_EQ(sum_copy(made.copy, made.from()), sum);
}

TEST(ScaledCopy, WritesWhatTheModelWritesAndSumsTheSame) {
  for (uint64_t seed = 1; seed <= 600; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    const ElementOp op = kScaledOps[random.below(kScaledOps.size())];
    Scenario made = random_scenario(random, op, 24);
    check_against_model(random, made);
    if (HasFailure()) return;
  }
}

// A source that is no memory: what is read of it is copied out by `read`.
TEST(ScaledCopy, StagedThroughABufferItIsTheSame) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    const ElementOp op = kScaledOps[random.below(kScaledOps.size())];
    Scenario made = random_scenario(random, op, 24);
    made.copy.scales = &made.scales;
    auto expected = made.target;
    auto expected_scales = made.scale_target;
    const uint64_t sum =
        slow_scaled_copy(made.copy, made.from(), expected.data(),
                         expected_scales.empty() ? nullptr : expected_scales.data());
    made.copy.target = made.target.data();
    made.scales.target = made.scale_target.empty() ? nullptr : made.scale_target.data();
    std::vector<std::byte> scratch(quantizes(op) ? 16384 : 64 + random.below(500));
    uint64_t found = 0;
    const auto read = [&made](const StridedCopy& plain, std::span<std::byte>) -> Result<void> {
      TRANSFUSE_RETURN_IF_ERROR(check_copy(plain, made.source.size()));
      run_copy(plain, made.source.data() + plain.source_offset_bytes);
      copy_fence();
      return {};
    };
    const auto done = run_staged_scaled_copy(made.copy, scratch, true, &found, read);
    ASSERT_TRUE(done) << done.error().message;
    EXPECT_EQ(found, sum);
    EXPECT_TRUE(made.target == expected);
    EXPECT_TRUE(made.scale_target == expected_scales);
    if (!quantizes(op) || HasFailure()) continue;
    scratch.resize(8);
    const auto refused = run_staged_scaled_copy(made.copy, scratch, true, &found, read);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported);
  }
}

// Numbers and scales that lie apart: scales are fetched band by band, also more than fit one.
TEST(ScaledCopy, WithScalesThatAreFetchedItIsTheSame) {
  uint64_t split_rows = 0;
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    const ElementOp op = kScaledOps[3 + random.below(3)];
    const bool many = seed % 8 == 0;
    Scenario made = random_scenario(random, op, many ? 900 : 24, many ? 2 : 48);
    made.copy.scales = &made.scales;
    made.copy.fingerprint = true;
    auto expected = made.target;
    const uint64_t sum = slow_scaled_copy(made.copy, made.from(), expected.data(), nullptr);
    // Another offset: what it says of the numbers' region is nobody's to read.
    const std::vector<std::byte> apart(
        made.source.begin() + static_cast<int64_t>(made.scales.source_offset_bytes),
        made.source.end());
    made.scales.source_offset_bytes = 0;
    made.copy.target = made.target.data();
    uint64_t found = 0;
    uint64_t bands = 0;
    const auto read_scales = [&](const StridedCopy& plain) -> Result<void> {
      TRANSFUSE_RETURN_IF_ERROR(check_copy(plain, apart.size()));
      run_copy(plain, apart.data() + plain.source_offset_bytes);
      return {};
    };
    const auto read_numbers = [&](const StridedCopy& run) -> Result<void> {
      TRANSFUSE_RETURN_IF_ERROR(check_copy(run, made.source.size(), 0));
      found += run_copy(run, made.source.data() + run.source_offset_bytes);
      ++bands;
      return {};
    };
    const auto done = for_each_band(made.copy, read_scales, read_numbers);
    ASSERT_TRUE(done) << done.error().message;
    copy_fence();
    EXPECT_EQ(found, sum);
    ASSERT_TRUE(made.target == expected);
    split_rows += bands > made.copy.block_count(0) ? 1U : 0U;
  }
  EXPECT_GT(split_rows, 5U);
}

TEST(ScaledCopy, BlocksLargerThanAnyBufferHaveOneScale) {
  for (const ElementOp op : kScaledOps) {
    Random random(7);
    Scenario made = random_scenario(random, op, 2);
    for (const auto& [rows, columns] : {std::array{37U, 140U}, std::array{2U, 5000U}}) {
      StridedCopy& copy = made.copy;
      copy.count[1] = rows;
      copy.count[2] = columns;
      for (auto* stride : {copy.source_stride, copy.target_stride, copy.index_stride}) {
        stride[1] = columns;
        stride[2] = 1;
      }
      made.scales = {.block = {rows, columns}};
      const uint64_t elements = uint64_t{rows} * columns;
      const uint32_t in = source_element_bytes(op);
      made.source_shift = copy.source_offset_bytes = 0;
      made.source.assign(elements * in, std::byte{0});
      for (uint64_t i = 0; i < elements; ++i) {
        const uint32_t value =
            quantizes(op) ? random_value(random, op, 3.0F) : static_cast<uint32_t>(i % 256);
        std::memcpy(made.source.data() + i * in, &value, in);
      }
      if (!quantizes(op)) {
        const float scale = 0.013F;
        made.scales.source_offset_bytes = made.source.size();
        made.source.resize(made.source.size() + 4);
        std::memcpy(made.source.data() + elements, &scale, 4);
      } else {
        made.scale_target.assign(8, std::byte{0});
      }
      made.target.assign(elements * target_element_bytes(op) + 64, std::byte{0});
      check_against_model(random, made);
      if (HasFailure()) return;
    }
  }
}

// One block of f32 values; returns the bytes and the scale.
struct Quantized {
  std::vector<uint8_t> bytes;
  uint32_t scale = 0;
};
Quantized quantize(const std::vector<float>& values) {
  Quantized found{.bytes = std::vector<uint8_t>(values.size())};
  const BlockScales scales{.target = reinterpret_cast<std::byte*>(&found.scale),
                           .block = {1, static_cast<uint32_t>(values.size())}};
  StridedCopy copy;
  copy.op = ElementOp::kF32ToE4M3;
  copy.count[2] = static_cast<uint32_t>(values.size());
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  copy.target = reinterpret_cast<std::byte*>(found.bytes.data());
  copy.scales = &scales;
  run_copy(copy, reinterpret_cast<const std::byte*>(values.data()));
  copy_fence();
  return found;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr uint32_t kOne = 0x3F800000;

TEST(ScaledCopy, ABlockOfZerosHasScaleOneAndKeepsItsSigns) {
  const Quantized found = quantize({0.0F, -0.0F, 0.0F});
  EXPECT_EQ(found.scale, kOne);
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>{0x00, 0x80, 0x00}));
}

TEST(ScaledCopy, TheLargestOfABlockBecomes448) {
  const Quantized found = quantize({0.75F, -3.5F, 1.75F});
  EXPECT_EQ(found.scale, std::bit_cast<uint32_t>(3.5F / 448.0F));
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>{slow_e4m3(96.0F), 0xFE, slow_e4m3(224.0F)}));
}

TEST(ScaledCopy, ABlockWhoseScaleWouldVanishHasScaleOne) {
  const Quantized found = quantize({1e-45F, -1e-43F});  // below 448 * 2^-150
  EXPECT_EQ(found.scale, kOne);
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>{0x00, 0x80}));
}

TEST(ScaledCopy, AScaleThatIsRoundedDownClampsWhatLiesAbove448) {
  // amax / 448 is 1.49 units of the smallest f32, and becomes one of them.
  const auto largest = std::bit_cast<float>(uint32_t{668});
  const Quantized found = quantize({largest, -largest});
  EXPECT_EQ(found.scale, 1U);
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>{0x7E, 0xFE}));
}

TEST(ScaledCopy, ANanMakesAllOfItsBlockOne) {
  const Quantized found = quantize({1.0F, -kNan, 0.0F, kInfinity});
  EXPECT_EQ(found.scale, kF32Nan);
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>(4, 0x7F)));
}

TEST(ScaledCopy, AnInfinityShowsInTheScaleAndInItself) {
  const Quantized found = quantize({1.0F, -kInfinity, -2.0F});
  EXPECT_EQ(found.scale, 0x7F800000U);
  EXPECT_EQ(found.bytes, (std::vector<uint8_t>{0x00, 0x7F, 0x80}));
}

TEST(ScaledCopy, I13_MalformedScalesAreRefused) {
  Random random(3);
  for (const ElementOp op : kScaledOps) {
    Scenario made = random_scenario(random, op, 24);
    made.copy.scales = &made.scales;
    ASSERT_TRUE(check_copy(made.copy, made.source.size()));
    const auto refused = [&](auto&& change) {
      Scenario bad = made;
      bad.copy.scales = &bad.scales;
      change(bad);
      const auto checked = check_copy(bad.copy, bad.source.size());
      EXPECT_TRUE(!checked && checked.error().code == ErrorCode::kCorrupt);
    };
    refused([](Scenario& bad) { bad.copy.scales = nullptr; });
    refused([](Scenario& bad) { bad.copy.op = ElementOp::kCopy1; });
    refused([](Scenario& bad) { bad.copy.count[0] = 2; });
    refused([](Scenario& bad) { bad.scales.block[1] = 0; });
    refused([](Scenario& bad) { bad.scales.phase[0] = bad.scales.block[0]; });
    refused([](Scenario& bad) { bad.scales.stride[0] = -1; });
    refused([](Scenario& bad) {
      bad.copy.source_stride[2] = int64_t{1} << 62;
      bad.copy.count[2] = 3;
    });
    if (quantizes(op)) {
      refused([](Scenario& bad) {
        bad.scales.block[0] = 5;
        bad.scales.phase[0] = 1;
      });
      continue;
    }
    for (const uint64_t offset : {made.scales.source_offset_bytes + 1, made.source.size(),
                                  std::numeric_limits<uint64_t>::max() - 3}) {
      refused([offset](Scenario& bad) { bad.scales.source_offset_bytes = offset; });
    }
    // Numbers and scales each have a region of their own.
    const uint64_t scales_end = made.copy.scales_end_bytes();
    const uint64_t end = made.copy.source_end_bytes();
    EXPECT_TRUE(check_copy(made.copy, end, scales_end));
    EXPECT_FALSE(check_copy(made.copy, end - 1, scales_end));
    EXPECT_FALSE(check_copy(made.copy, end, scales_end - 1));
  }
}

TEST(ScaledCopy, AnEmptyOneReadsAndWritesNothing) {
  BlockScales scales;
  StridedCopy copy;
  copy.op = ElementOp::kBF16ToE4M3;
  copy.scales = &scales;
  copy.count[1] = 0;
  EXPECT_EQ(copy.target_bytes(), 0U);
  EXPECT_TRUE(check_copy(copy, 0));
  EXPECT_EQ(run_copy(copy, nullptr), 0U);
}

}  // namespace
}  // namespace transfuse

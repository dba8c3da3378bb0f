// What the threads of the kernel for block scales do, run on the host lane by lane, against the
// slow model.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/held_units.h"
#include "transport/cuda/scaled_device.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse {
namespace {

// As the kernel does: every lane of every item.
void run_table(Random& random, const ScaledTable& table, const std::array<uint64_t, 2>& bases,
               uint64_t& sum, std::array<uint64_t, 2>& held_lanes) {
  alignas(16) std::array<std::byte, kScaledStageBytes> stage{};
  for (const ScaledItem& item : table.items) {
    const auto lanes = 1 + static_cast<uint32_t>(random.below(random.chance(0.5) ? 70 : 600));
    const ScaledView view = view_of(table.runs[item.run], item, bases.data(), lanes);
    uint32_t scale = 0;
    if (quantizes(view.op)) {
      uint32_t largest = 0;
      for (uint32_t lane = 0; lane < lanes; ++lane) {
        if (!view.held) {
          largest = std::max(largest, scaled_magnitude(view, lane, stage.data()));
          continue;
        }
        uint64_t none = 0;
        const auto find = [&largest](uint32_t magnitude) {
          largest = std::max(largest, magnitude);
          return kF32Nan;  // under which nothing moves
        };
        EXPECT_FALSE(move_held(view, lane, find, none));
      }
      scale = scale_bits_of_block(largest);
      sum += write_scale(view, scale);
    } else {
      scale = read_scale(view);
    }
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      uint64_t part = 0;
      const bool moved =
          view.held && move_held(view, lane, [scale](uint32_t) { return scale; }, part);
      held_lanes[quantizes(view.op) ? 1 : 0] += moved ? 1U : 0U;
      sum += moved ? part : scaled_move(view, lane, stage.data(), scale);
    }
  }
}

// Begins at an address divisible by 256, as an allocation on a device does.
struct Memory {
  explicit Memory(uint64_t size) : bytes(size + 256) {
    data = bytes.data() + (256 - reinterpret_cast<uintptr_t>(bytes.data()) % 256) % 256;
  }
  std::vector<std::byte> bytes;
  std::byte* data = nullptr;
};

// Numbers in every dtype: ones as weights have them, then such of all magnitudes, of which hardly
// any is NaN or infinite, then what the bytes make.
void fill(Random& random, std::span<std::byte> bytes) {
  for (size_t i = 0; i < bytes.size(); ++i) {
    const uint64_t any = random.next() >> 56;
    const uint64_t tame = (any & 0x83) | 0x3C;
    const size_t part = i * 10 / bytes.size();
    bytes[i] = static_cast<std::byte>(part < 6 ? tame : part < 9 ? any & 0x7F : any);
  }
}

struct Scenario {
  StridedCopy copy;
  BlockScales scales;
};

Scenario random_scenario(Random& random, uint64_t source_bytes, bool aligned) {
  Scenario made;
  StridedCopy& copy = made.copy;
  do {
    copy = {};
    made.scales = {};
    copy.op = static_cast<ElementOp>(kElementOpCount + static_cast<int>(random.below(6)));
    copy.fingerprint_key = random.next();
    copy.linear_index =
        random.chance(0.3) ? (uint64_t{3} << 32) - random.below(3000) : random.below(1000);
    const auto length = [&](uint64_t most) {
      const auto any = 1 + static_cast<uint32_t>(random.below(most));
      return aligned ? (any + 15) / 16 * 16 : any;
    };
    for (int axis = 0; axis < 2; ++axis) {
      copy.count[axis + 1] = length(150);
      made.scales.block[axis] = random.chance(0.4) ? 128 : length(60);
      if (!quantizes(copy.op)) {
        made.scales.phase[axis] = static_cast<uint32_t>(random.below(made.scales.block[axis]));
        if (aligned) made.scales.phase[axis] = made.scales.phase[axis] / 16 * 16;
      }
      made.scales.index_stride[axis] = static_cast<int64_t>(random.below(90));
    }
    copy.scales = &made.scales;
    const int64_t gap = aligned ? 16 * static_cast<int64_t>(random.below(3))
                                : static_cast<int64_t>(random.below(9));
    const bool turned = !aligned && random.chance(0.2);
    copy.source_stride[1] = turned ? 1 : copy.count[2] + gap;
    copy.source_stride[2] = turned ? copy.count[1] + gap : 1;
    copy.target_stride[1] = copy.count[2] + gap;
    copy.target_stride[2] = 1;
    copy.index_stride[1] = copy.count[2] + static_cast<int64_t>(random.below(40));
    copy.index_stride[2] = 1;
    made.scales.stride[0] = static_cast<int64_t>(copy.block_count(1));
    made.scales.stride[1] = 1;
    copy.source_offset_bytes = random.below(source_bytes);
    if (aligned) copy.source_offset_bytes = copy.source_offset_bytes / 16 * 16;
    made.scales.source_offset_bytes = random.below(source_bytes);
  } while (!check_copy(copy, source_bytes));
  return made;
}

TEST(ScaledDeviceCopy, LanesDoWhatTheSlowModelDoes) {
  constexpr uint64_t kSize = 300000;
  Memory source(kSize);
  Random bytes(1);
  fill(bytes, {source.data, kSize});
  Memory apart(kSize);
  fill(bytes, {apart.data, kSize});
  uint32_t with_vectors = 0;
  std::array<uint64_t, 2> held_lanes{};  // that dequantised, that quantised
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const bool aligned = seed % 2 == 0;
    Scenario made = random_scenario(random, kSize, aligned);
    StridedCopy& copy = made.copy;
    copy.scales = &made.scales;
    copy.fingerprint = random.chance(0.7);
    const uint64_t size =
        (uint64_t{copy.count[1]} * static_cast<uint64_t>(copy.target_stride[1]) + copy.count[2]) *
        target_element_bytes(copy.op);
    const uint64_t shift = aligned ? 0 : random.below(9);
    Memory target(size + shift);
    Memory expected(size + shift);
    const uint64_t scale_bytes = copy.block_count(0) * copy.block_count(1) * 4;
    std::vector<std::byte> scales(scale_bytes);
    std::vector<std::byte> expected_scales(scale_bytes);
    // Half of the time scales lie apart from the numbers.
    Memory& scale_source = seed % 4 < 2 ? source : apart;
    made.scales.fetched = scale_source.data + made.scales.source_offset_bytes;
    const uint64_t sum = slow_scaled_copy(copy, source.data + copy.source_offset_bytes,
                                          expected.data + shift, expected_scales.data());
    made.scales.fetched = nullptr;
    const std::array<uint64_t, 2> bases = {reinterpret_cast<uint64_t>(scale_source.data),
                                           reinterpret_cast<uint64_t>(source.data)};
    copy.target = target.data + shift;
    made.scales.target = scales.data();
    for (const bool writes : {true, false}) {
      if (!writes && !copy.fingerprint) continue;
      if (!writes) copy.target = made.scales.target = nullptr;
      ScaledTable table;
      ASSERT_TRUE(add_scaled(copy, {.numbers = 1, .scales = 0}, 0, 256, table));
      ASSERT_EQ(table.items.size(), copy.block_count(0) * copy.block_count(1));
      with_vectors += table.runs[0].vectors;
      uint64_t found = 0;
      run_table(random, table, bases, found, held_lanes);
      EXPECT_EQ(found, copy.fingerprint ? sum : 0);
      EXPECT_EQ(std::memcmp(target.data, expected.data, size + shift), 0);
      EXPECT_TRUE(scales == expected_scales);
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(with_vectors, 50U);
  EXPECT_GT(held_lanes[0], 1000U);
  EXPECT_GT(held_lanes[1], 1000U);
}

// The kernel itself; skipped where there is no GPU.
TEST(OnGpuScaledCopy, BlocksAndScalesAreThoseOfTheSlowModel) {
  auto driver = cuda::Driver::load();
  if (!driver) GTEST_SKIP() << driver.error().message;
  const auto device = cuda::Device::open(**driver, 0).value();
  const auto stream = cuda::Stream::create(*device).value();
  const cuda::Current current = device->use();
  const auto move = [&](CUdeviceptr to, CUdeviceptr from, uint64_t size) {
    ASSERT_TRUE(TRANSFUSE_CUDA(**driver, cuMemcpyAsync, to, from, size, stream.get()));
    ASSERT_TRUE(TRANSFUSE_CUDA(**driver, cuStreamSynchronize, stream.get()));
  };
  const auto address = [](const std::byte* memory) {
    return reinterpret_cast<CUdeviceptr>(memory);
  };
  constexpr uint64_t kSize = 300000;
  Memory source(kSize);
  Random bytes(1);
  fill(bytes, {source.data, kSize});
  const auto allocate = [&](uint64_t size) {
    return cuda::Memory::allocate(*device, cuda::MemoryKind::kDevice, size).value();
  };
  const auto on_device = allocate(kSize);
  move(on_device.address(), address(source.data), kSize);
  Memory apart(kSize);
  fill(bytes, {apart.data, kSize});
  const auto apart_on_device = allocate(kSize);
  move(apart_on_device.address(), address(apart.data), kSize);
  for (uint64_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    Scenario made = random_scenario(random, kSize, seed % 2 == 0);
    StridedCopy& copy = made.copy;
    copy.scales = &made.scales;
    copy.fingerprint = random.chance(0.7);
    const uint64_t size =
        (uint64_t{copy.count[1]} * static_cast<uint64_t>(copy.target_stride[1]) + copy.count[2]) *
        target_element_bytes(copy.op);
    const uint64_t scale_bytes = copy.block_count(0) * copy.block_count(1) * 4;
    std::vector<std::byte> expected(size);
    std::vector<std::byte> expected_scales(scale_bytes);
    const bool together = seed % 4 < 2;  // numbers and scales
    made.scales.fetched = (together ? source : apart).data + made.scales.source_offset_bytes;
    const uint64_t sum = slow_scaled_copy(copy, source.data + copy.source_offset_bytes,
                                          expected.data(), expected_scales.data());
    made.scales.fetched = nullptr;
    const auto target = allocate(size);
    const auto scales = allocate(scale_bytes);
    std::vector<std::byte> found(size);
    std::vector<std::byte> found_scales(scale_bytes);
    move(target.address(), address(found.data()), size);
    move(scales.address(), address(found_scales.data()), scale_bytes);
    copy.target = target.as<std::byte>();
    made.scales.target = scales.as<std::byte>();
    const std::array<uint32_t, 1> sources = {0};
    const std::array<uint32_t, 1> scale_sources = {together ? 0U : 1U};
    const std::array<CUdeviceptr, 2> bases = {on_device.address(), apart_on_device.address()};
    auto prepared =
        cuda::PreparedCopies::make(*device, {&copy, 1}, sources, 2, {}, scale_sources).value();
    for (int launch = 0; launch < 2; ++launch) {
      // The second one at a pace, on one multiprocessor.
      ASSERT_TRUE(prepared.launch(bases, {.stream = stream.get(),
                                          .multiprocessors = launch == 0 ? 0U : 1U,
                                          .gigabytes_per_second = launch == 0 ? 0.0 : 2.0}));
      move(address(found.data()), target.address(), size);
      move(address(found_scales.data()), scales.address(), scale_bytes);
      EXPECT_TRUE(found == expected);
      EXPECT_TRUE(found_scales == expected_scales);
      if (copy.fingerprint) {
        EXPECT_EQ(prepared.sums()[0], sum);
      }
    }
    if (HasFailure()) return;
  }
}

// The quotient that needs no division, against the division.
TEST(ScaledDeviceCopy, QuotientsAreExact) {
  Random random(5);
  for (int i = 0; i < 300000; ++i) {
    // A scale as a block has it; now and then one of few bits, so that ties come.
    uint32_t scale =
        static_cast<uint32_t>(random.next()) % (0x5D800000u - 0x21800000u) + 0x21800000u;
    if (random.chance(0.3)) scale &= 0xFFF00000u;
    if (random.chance(0.1)) scale |= 0x007FFFFFu;
    scale = std::min(scale, 0x5D800000u);
    ASSERT_TRUE(ScaleQuotient::exact(scale));
    const ScaleQuotient quotient(scale);
    const float unit = std::bit_cast<float>(scale);
    // Near a number of e4m3, near the middle of two, or anywhere.
    float value = unit * static_cast<float>(random.below(449 * 16)) / 16;
    if (random.chance(0.5)) value = unit * static_cast<float>(random.below(1 << 20)) * 0x1p-12F;
    if (random.chance(0.05)) value = 0;
    auto bits = std::bit_cast<uint32_t>(value);
    if (random.chance(0.5)) bits += static_cast<uint32_t>(random.below(5)) - 2;
    if (random.chance(0.5)) bits ^= 0x80000000u;
    if (random.chance(0.3)) bits &= 0xFFFF0000u;
    if (magnitude_of_f32(bits) > std::bit_cast<uint32_t>(448 * unit)) continue;
    const float expected = std::bit_cast<float>(bits) / unit;
    if (std::fabs(expected) < 0x1p-20F) {  // what is so small rounds to zero, with its sign
      EXPECT_EQ(f32_bits_to_e4m3(bits_of_f32(quotient.of(bits))),
                f32_bits_to_e4m3(bits_of_f32(expected)));
      continue;
    }
    ASSERT_EQ(bits_of_f32(quotient.of(bits)), bits_of_f32(expected))
        << std::hex << bits << " " << scale;
  }
  EXPECT_FALSE(ScaleQuotient::exact(0x00000001u));
  EXPECT_FALSE(ScaleQuotient::exact(0x7F800000u));
  EXPECT_FALSE(ScaleQuotient::exact(kF32Nan));
}

TEST(OnGpuScaledCopy, APaceIsKept) {
  auto driver = cuda::Driver::load();
  if (!driver) GTEST_SKIP() << driver.error().message;
  const auto device = cuda::Device::open(**driver, 0).value();
  const auto stream = cuda::Stream::create(*device).value();
  const cuda::Current current = device->use();
  constexpr uint32_t kSide = 8192;
  constexpr uint64_t kBytes = uint64_t{kSide} * kSide * 2;
  const auto allocate = [&](uint64_t size) {
    return cuda::Memory::allocate(*device, cuda::MemoryKind::kDevice, size).value();
  };
  const auto source = allocate(kBytes);
  const auto target = allocate(kBytes / 2);
  const auto scale_memory = allocate(uint64_t{64} * 64 * 4);
  const BlockScales scales{.target = scale_memory.as<std::byte>(), .stride = {64, 1}};
  StridedCopy copy;
  copy.op = ElementOp::kBF16ToE4M3;
  copy.target = target.as<std::byte>();
  copy.scales = &scales;
  copy.count[1] = copy.count[2] = kSide;
  copy.source_stride[1] = copy.target_stride[1] = kSide;
  copy.source_stride[2] = copy.target_stride[2] = 1;
  const std::array<uint32_t, 1> sources = {0};
  auto prepared = cuda::PreparedCopies::make(*device, {&copy, 1}, sources, 1, {}).value();
  const CUdeviceptr base = source.address();
  const auto start = std::chrono::steady_clock::now();
  ASSERT_TRUE(prepared.launch(
      {&base, 1}, {.stream = stream.get(), .multiprocessors = 4, .gigabytes_per_second = 1.0}));
  ASSERT_TRUE(TRANSFUSE_CUDA(**driver, cuStreamSynchronize, stream.get()));
  // The first blocks of a launch begin at once.
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_GT(took.count(), 0.9 * static_cast<double>(kBytes) / 1e9);
}

TEST(ScaledDeviceCopy, AnEmptyCopyAndOneThatNobodyWantsHaveNoItems) {
  const BlockScales scales;
  StridedCopy copy;
  copy.op = ElementOp::kBF16ToE4M3;
  copy.scales = &scales;
  ScaledTable table;
  EXPECT_TRUE(add_scaled(copy, {}, 0, 256, table));
  copy.fingerprint = true;
  copy.count[1] = 0;
  EXPECT_TRUE(add_scaled(copy, {}, 0, 256, table));
  EXPECT_TRUE(table.items.empty());
}

}  // namespace
}  // namespace transfuse

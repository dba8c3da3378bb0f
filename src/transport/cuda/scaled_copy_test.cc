// What the threads of the kernel for block scales do, run on the host lane by lane, against the
// slow model.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
#include "transport/cuda/scaled_device.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse {
namespace {

// As the kernel does: every lane of every item.
void run_table(Random& random, const ScaledTable& table, const std::array<uint64_t, 2>& bases,
               uint64_t& sum) {
  alignas(16) std::array<std::byte, kScaledStageBytes> stage{};
  for (const ScaledItem& item : table.items) {
    const auto lanes = 1 + static_cast<uint32_t>(random.below(70));
    const ScaledView view = view_of(table.runs[item.run], item, bases.data(), lanes);
    uint32_t scale = 0;
    if (quantizes(view.op)) {
      uint32_t largest = 0;
      for (uint32_t lane = 0; lane < lanes; ++lane) {
        largest = std::max(largest, scaled_magnitude(view, lane, stage.data()));
      }
      scale = scale_bits_of_block(largest);
      sum += write_scale(view, scale);
    } else {
      scale = read_scale(view);
    }
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      sum += scaled_move(view, lane, stage.data(), scale);
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
  // Numbers in every dtype that are mostly no NaN and no infinity.
  for (uint64_t i = 0; i < kSize; ++i) source.data[i] = static_cast<std::byte>(bytes.next() >> 57);
  Memory apart(kSize);
  for (uint64_t i = 0; i < kSize; ++i) apart.data[i] = static_cast<std::byte>(bytes.next() >> 57);
  uint32_t with_vectors = 0;
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
      run_table(random, table, bases, found);
      EXPECT_EQ(found, copy.fingerprint ? sum : 0);
      EXPECT_EQ(std::memcmp(target.data, expected.data, size + shift), 0);
      EXPECT_TRUE(scales == expected_scales);
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(with_vectors, 50U);
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
  for (uint64_t i = 0; i < kSize; ++i) source.data[i] = static_cast<std::byte>(bytes.next() >> 57);
  const auto allocate = [&](uint64_t size) {
    return cuda::Memory::allocate(*device, cuda::MemoryKind::kDevice, size).value();
  };
  const auto on_device = allocate(kSize);
  move(on_device.address(), address(source.data), kSize);
  Memory apart(kSize);
  for (uint64_t i = 0; i < kSize; ++i) apart.data[i] = static_cast<std::byte>(bytes.next() >> 57);
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
      ASSERT_TRUE(prepared.launch(bases, {.stream = stream.get()}));
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

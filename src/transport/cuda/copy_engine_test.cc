// Copies on a GPU against the slow model; skipped where there is none.
#include "transport/cuda/copy_engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::cuda {
namespace {

constexpr std::array<ElementOp, kElementOpCount> kOps = {
    ElementOp::kCopy1,     ElementOp::kCopy2,    ElementOp::kCopy4,     ElementOp::kCopy8,
    ElementOp::kF32ToBF16, ElementOp::kF32ToF16, ElementOp::kBF16ToF32, ElementOp::kF16ToF32};

class OnGpu : public testing::Test {
 protected:
  void SetUp() override {
    auto driver = Driver::load();
    if (!driver) GTEST_SKIP() << driver.error().message;
    auto device = Device::open(**driver, 0);
    ASSERT_TRUE(device.has_value()) << device.error().message;
    device_ = std::move(*device);
    auto stream = Stream::create(*device_);
    ASSERT_TRUE(stream.has_value()) << stream.error().message;
    stream_ = std::move(*stream);
  }

  Memory memory(const Device& device, uint64_t size) {
    auto memory = Memory::allocate(device, MemoryKind::kDevice, size);
    TRANSFUSE_CHECK(memory.has_value());
    return std::move(*memory);
  }
  void send(const Memory& to, const std::vector<std::byte>& from) {
    const Current current = device_->use();
    check(TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync, to.address(),
                         reinterpret_cast<CUdeviceptr>(from.data()), from.size(), stream_.get()));
    synchronize();
  }
  std::vector<std::byte> fetch(const Memory& from) {
    std::vector<std::byte> bytes(from.size_bytes());
    const Current current = device_->use();
    check(TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync,
                         reinterpret_cast<CUdeviceptr>(bytes.data()), from.address(), bytes.size(),
                         stream_.get()));
    synchronize();
    return bytes;
  }
  void synchronize() {
    const Current current = device_->use();
    check(TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream_.get()));
  }
  static void check(const Result<void>& result) {
    ASSERT_TRUE(result.has_value()) << result.error().message;
  }

  std::unique_ptr<Device> device_;
  Stream stream_;
};

std::vector<std::byte> random_bytes(Random& random, uint64_t size) {
  std::vector<std::byte> bytes(size);
  for (auto& b : bytes) b = static_cast<std::byte>(random.next() >> 56);
  return bytes;
}

int64_t dense(Random& random, const uint32_t count[3], int64_t stride[3], int64_t pad,
              bool permute) {
  std::array<int, 3> order = {0, 1, 2};
  if (permute) {
    for (size_t i = 2; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  }
  int64_t span = 1;
  for (size_t i = 3; i-- > 0;) {
    stride[order[i]] = span;
    span *= count[order[i]];
    if (pad > 0) span = (span + pad - 1) / pad * pad;
  }
  return span;
}

// Several copies of several sources into one target; every one its own piece of it.
struct World {
  std::vector<StridedCopy> copies;
  std::vector<uint32_t> sources;
  std::array<uint64_t, 3> source_size{};
  uint64_t target_size = 0;
};
World random_world(Random& random) {
  World world;
  const auto count = 1 + random.below(20);
  for (uint64_t i = 0; i < count; ++i) {
    StridedCopy copy;
    copy.op = kOps[random.below(kOps.size())];
    const bool round = random.chance(0.5);
    for (auto& c : copy.count) c = 1 + static_cast<uint32_t>(random.below(30));
    if (round) copy.count[2] = 16 * (1 + static_cast<uint32_t>(random.below(60)));
    const int64_t pad = round ? 16 : 0;
    const bool permute = random.chance(0.3);
    const auto source = static_cast<uint32_t>(random.below(3));
    uint64_t& source_size = world.source_size[source];
    if (round) source_size = (source_size + 255) / 256 * 256;
    if (round) world.target_size = (world.target_size + 255) / 256 * 256;
    copy.source_offset_bytes = source_size;
    copy.target = reinterpret_cast<std::byte*>(world.target_size);  // an offset until it is known
    source_size +=
        static_cast<uint64_t>(dense(random, copy.count, copy.source_stride, pad, permute)) *
        source_element_bytes(copy.op);
    world.target_size += static_cast<uint64_t>(dense(random, copy.count, copy.target_stride, pad,
                                                     random.chance(0.3))) *
                         target_element_bytes(copy.op);
    dense(random, copy.count, copy.index_stride, 0, false);
    copy.fingerprint = random.chance(0.5);
    copy.fingerprint_key = random.next();
    copy.linear_index =
        random.chance(0.3) ? (uint64_t{1} << 32) - random.below(2000) : random.below(9);
    world.copies.push_back(copy);
    world.sources.push_back(source);
  }
  return world;
}

TEST_F(OnGpu, CopiesAndSumsWhatTheModelDoes) {
  for (uint64_t seed = 1; seed <= 150; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    World world = random_world(random);
    std::vector<std::vector<std::byte>> sources;
    std::vector<Memory> memories;
    std::vector<CUdeviceptr> bases;
    for (const uint64_t size : world.source_size) {
      sources.push_back(random_bytes(random, size + 16));
      memories.push_back(memory(*device_, size + 16));
      send(memories.back(), sources.back());
      bases.push_back(memories.back().address());
    }
    std::vector<std::byte> expected = random_bytes(random, world.target_size + 16);
    const Memory target = memory(*device_, expected.size());
    send(target, expected);
    std::vector<uint64_t> sums;
    for (size_t i = 0; i < world.copies.size(); ++i) {
      StridedCopy& copy = world.copies[i];
      const auto offset = reinterpret_cast<uint64_t>(copy.target);
      const uint64_t sum =
          slow_copy(copy, sources[world.sources[i]].data() + copy.source_offset_bytes,
                    expected.data() + offset);
      sums.push_back(copy.fingerprint ? sum : 0);
      copy.target = reinterpret_cast<std::byte*>(target.address() + offset);
    }
    CopyOptions options{.spread = random.below(7)};
    options.table.item_bytes = 64 + random.below(100000);
    if (random.chance(0.5)) options.engines = {.copy_engines = true, .piece_bytes = 256};
    auto prepared = PreparedCopies::make(*device_, world.copies, world.sources, 3, options);
    ASSERT_TRUE(prepared.has_value()) << prepared.error().message;
    for (int cycle = 0; cycle < 2; ++cycle) {  // again: a second launch sums anew
      auto launched = prepared->launch(
          bases,
          {.stream = stream_.get(), .multiprocessors = static_cast<uint32_t>(random.below(4))});
      ASSERT_TRUE(launched.has_value()) << launched.error().message;
      synchronize();
    }
    ASSERT_TRUE(fetch(target) == expected);
    if (!prepared->sums().empty()) {
      ASSERT_TRUE(std::ranges::equal(prepared->sums(), sums));
    }
  }
}

TEST_F(OnGpu, ASourceThatMovedIsReadAtItsNewPlace) {
  Random random(5);
  const auto first = random_bytes(random, 1 << 20);
  const auto second = random_bytes(random, 1 << 20);
  const Memory a = memory(*device_, first.size());
  const Memory b = memory(*device_, second.size());
  const Memory target = memory(*device_, first.size());
  send(a, first);
  send(b, second);
  const StridedCopy copy{.target = reinterpret_cast<std::byte*>(target.address()),
                         .count = {1, 1, 1 << 20},
                         .source_stride = {0, 0, 1},
                         .target_stride = {0, 0, 1},
                         .index_stride = {0, 0, 1}};
  const std::array<uint32_t, 1> sources = {0};
  for (const bool engines : {false, true}) {
    auto prepared = PreparedCopies::make(*device_, {&copy, 1}, sources, 1,
                                         {.engines = {.copy_engines = engines, .piece_bytes = 1}});
    ASSERT_TRUE(prepared.has_value());
    for (const auto& [base, expected] : {std::pair(&a, &first), std::pair(&b, &second)}) {
      const std::array<CUdeviceptr, 1> bases = {base->address()};
      ASSERT_TRUE(prepared->launch(bases, {.stream = stream_.get()}).has_value());
      EXPECT_TRUE(fetch(target) == *expected);
    }
  }
}

TEST_F(OnGpu, ReadsMemoryOfAnotherGpu) {
  int count = 0;
  ASSERT_EQ(device_->driver().cuDeviceGetCount(&count), CUDA_SUCCESS);
  if (count < 2) GTEST_SKIP() << "one GPU only";
  auto other = Device::open(device_->driver(), 1);
  ASSERT_TRUE(other.has_value());
  if (auto enabled = device_->enable_peer(**other); !enabled) {
    GTEST_SKIP() << enabled.error().message;
  }
  Random random(6);
  const auto bytes = random_bytes(random, 8 << 20);
  const Memory source = memory(**other, bytes.size());
  const Memory target = memory(*device_, bytes.size());
  send(source, bytes);
  const StridedCopy copy{.target = reinterpret_cast<std::byte*>(target.address()),
                         .count = {1, 1, 8 << 20},
                         .source_stride = {0, 0, 1},
                         .target_stride = {0, 0, 1},
                         .index_stride = {0, 0, 1}};
  const std::array<uint32_t, 1> sources = {0};
  const std::array<CUdeviceptr, 1> bases = {source.address()};
  for (const bool engines : {false, true}) {
    auto prepared = PreparedCopies::make(*device_, {&copy, 1}, sources, 1,
                                         {.engines = {.copy_engines = engines}});
    ASSERT_TRUE(prepared.has_value());
    EXPECT_EQ(prepared->engine_bytes(), engines ? bytes.size() : 0);
    ASSERT_TRUE(prepared->launch(bases, {.stream = stream_.get()}).has_value());
    EXPECT_TRUE(fetch(target) == bytes);
  }
}

}  // namespace
}  // namespace transfuse::cuda

// Copies on a GPU against the slow model; skipped where there is none.
#include "transport/cuda/copy_engine.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
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
    // Of several tiles, or with rows that are long enough to be shifted.
    const bool large = random.chance(0.3);
    if (large) {
      copy.count[0] = 1;
      for (size_t k = 1; k < 3; ++k) copy.count[k] = 1 + static_cast<uint32_t>(random.below(300));
    }
    const bool permute = random.chance(large ? 0.6 : 0.3);
    const auto source = static_cast<uint32_t>(random.below(3));
    uint64_t& source_size = world.source_size[source];
    if (round) source_size = (source_size + 255) / 256 * 256;
    if (round) world.target_size = (world.target_size + 255) / 256 * 256;
    if (random.chance(0.7)) {  // whole elements; else anywhere
      source_size = (source_size + 7) / 8 * 8 + 2 * source_element_bytes(copy.op);
      world.target_size = (world.target_size + 7) / 8 * 8 + 3 * target_element_bytes(copy.op);
    }
    copy.source_offset_bytes = source_size;
    copy.target = reinterpret_cast<std::byte*>(world.target_size);  // an offset until it is known
    source_size +=
        static_cast<uint64_t>(dense(random, copy.count, copy.source_stride, pad, permute)) *
        source_element_bytes(copy.op);
    world.target_size += static_cast<uint64_t>(dense(random, copy.count, copy.target_stride, pad,
                                                     random.chance(0.3))) *
                         target_element_bytes(copy.op);
    if (random.chance(0.1)) std::fill_n(copy.source_stride, 3, 0);
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

// What the driver has for graphs, which only tests call.
struct GraphCalls {
#define TRANSFUSE_TEXT_OF(name) #name
#define TRANSFUSE_TEXT(name) TRANSFUSE_TEXT_OF(name)
#define TRANSFUSE_GRAPH_CALL(name)                              \
  decltype(&::name) name = reinterpret_cast<decltype(&::name)>( \
      dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), TRANSFUSE_TEXT(name)))
  TRANSFUSE_GRAPH_CALL(cuStreamBeginCapture);
  TRANSFUSE_GRAPH_CALL(cuStreamEndCapture);
  TRANSFUSE_GRAPH_CALL(cuGraphInstantiate);
  TRANSFUSE_GRAPH_CALL(cuGraphLaunch);
  TRANSFUSE_GRAPH_CALL(cuGraphDestroy);
  TRANSFUSE_GRAPH_CALL(cuGraphExecDestroy);
#undef TRANSFUSE_GRAPH_CALL
#undef TRANSFUSE_TEXT
#undef TRANSFUSE_TEXT_OF
};

// Half a megabyte with a cast and sum, and a plain megabyte that copy engines may take.
struct TwoCopies {
  static constexpr uint64_t kSourceBytes = uint64_t{2} << 20;
  static constexpr uint64_t kTargetBytes = kSourceBytes * 3 / 4;
  static constexpr std::array<uint32_t, 2> kSources = {0, 0};
  std::array<StridedCopy, 2> copies;

  explicit TwoCopies(uint64_t target, bool fingerprint = true)
      : copies{StridedCopy{.target = reinterpret_cast<std::byte*>(target),
                           .fingerprint_key = 77,
                           .count = {1, 1, 1 << 18},
                           .op = ElementOp::kF32ToBF16,
                           .fingerprint = fingerprint,
                           .source_stride = {0, 0, 1},
                           .target_stride = {0, 0, 1},
                           .index_stride = {0, 0, 1}},
               StridedCopy{.source_offset_bytes = 1 << 20,
                           .target = reinterpret_cast<std::byte*>(target + (1 << 19)),
                           .count = {1, 1, 1 << 20},
                           .source_stride = {0, 0, 1},
                           .target_stride = {0, 0, 1},
                           .index_stride = {0, 0, 1}}} {}
  // The target's bytes, and the sum of the first copy.
  std::pair<std::vector<std::byte>, uint64_t> expected(const std::vector<std::byte>& source) const {
    std::vector<std::byte> bytes(kTargetBytes);
    const uint64_t sum = slow_copy(copies[0], source.data(), bytes.data());
    slow_copy(copies[1], source.data() + copies[1].source_offset_bytes, bytes.data() + (1 << 19));
    return {bytes, sum};
  }
};

TEST_F(OnGpu, ACapturedLaunchReadsWhatIsThereAtEveryReplay) {
  const GraphCalls graphs;
  const Driver& driver = device_->driver();
  const Memory a = memory(*device_, TwoCopies::kSourceBytes);
  const Memory b = memory(*device_, TwoCopies::kSourceBytes);
  const Memory target = memory(*device_, TwoCopies::kTargetBytes);
  const TwoCopies two(target.address());
  for (const bool engines : {false, true}) {
    SCOPED_TRACE(engines ? "with copy engines" : "kernel only");
    auto prepared = PreparedCopies::make(*device_, two.copies, TwoCopies::kSources, 1,
                                         {.engines = {.copy_engines = engines}});
    ASSERT_TRUE(prepared.has_value()) << prepared.error().message;
    const std::array<CUdeviceptr, 1> bases = {a.address()};
    check(prepared->set_bases(bases, stream_.get()));
    CUgraph graph = nullptr;
    CUgraphExec exec = nullptr;
    {
      const Current current = device_->use();
      ASSERT_EQ(graphs.cuStreamBeginCapture(stream_.get(), CU_STREAM_CAPTURE_MODE_GLOBAL),
                CUDA_SUCCESS);
      check(prepared->launch(bases, {.stream = stream_.get()}));
      const std::array<CUdeviceptr, 1> others = {b.address()};
      const auto refused = prepared->launch(others, {.stream = stream_.get()});
      ASSERT_FALSE(refused.has_value()) << "other bases were captured";
      EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
      EXPECT_NE(refused.error().message.find("set_bases()"), std::string::npos);
      ASSERT_EQ(graphs.cuStreamEndCapture(stream_.get(), &graph), CUDA_SUCCESS);
      ASSERT_EQ(graphs.cuGraphInstantiate(&exec, graph, 0), CUDA_SUCCESS);
    }
    Random random(11);
    // The last replay reads another source.
    for (int replay = 0; replay < 4; ++replay) {
      const Memory& source = replay == 3 ? b : a;
      const auto bytes = random_bytes(random, TwoCopies::kSourceBytes);
      send(source, bytes);
      const auto [expected, sum] = two.expected(bytes);
      const Current current = device_->use();
      if (replay == 3) {
        const std::array<CUdeviceptr, 1> others = {b.address()};
        check(prepared->set_bases(others, stream_.get()));
      }
      check(driver.check(graphs.cuGraphLaunch(exec, stream_.get()), "cuGraphLaunch"));
      ASSERT_TRUE(fetch(target) == expected) << "replay " << replay;
      EXPECT_EQ(prepared->sums()[0], sum) << "replay " << replay;
    }
    const Current current = device_->use();
    EXPECT_EQ(graphs.cuGraphExecDestroy(exec), CUDA_SUCCESS);
    EXPECT_EQ(graphs.cuGraphDestroy(graph), CUDA_SUCCESS);
  }
}

TEST_F(OnGpu, ALimitedLaunchMovesTheSameBytes) {
  Random random(12);
  const auto bytes = random_bytes(random, TwoCopies::kSourceBytes);
  const Memory source = memory(*device_, TwoCopies::kSourceBytes);
  const Memory target = memory(*device_, TwoCopies::kTargetBytes);
  send(source, bytes);
  const std::array<CUdeviceptr, 1> bases = {source.address()};
  auto begin = Event::create(*device_, EventKind::kTiming);
  auto end = Event::create(*device_, EventKind::kTiming);
  ASSERT_TRUE(begin.has_value() && end.has_value());
  const Driver& driver = device_->driver();
  for (const bool fingerprint : {false, true}) {
    const TwoCopies two(target.address(), fingerprint);
    const auto [expected, sum] = two.expected(bytes);
    auto prepared = PreparedCopies::make(*device_, two.copies, TwoCopies::kSources, 1,
                                         {.engines = {.copy_engines = true}});
    ASSERT_TRUE(prepared.has_value()) << prepared.error().message;
    const CUstream stream = stream_.get();
    for (const PreparedCopies::Launch& limits :
         {PreparedCopies::Launch{.stream = stream, .multiprocessors = 4},
          PreparedCopies::Launch{.stream = stream, .gigabytes_per_second = 1},
          PreparedCopies::Launch{.stream = stream, .gigabytes_per_second = 0.05},
          PreparedCopies::Launch{.stream = stream, .gigabytes_per_second = 1e6},
          PreparedCopies::Launch{
              .stream = stream, .multiprocessors = 1, .gigabytes_per_second = 0.5}}) {
      send(target, std::vector<std::byte>(TwoCopies::kTargetBytes));
      const Current current = device_->use();
      check(TRANSFUSE_CUDA(driver, cuEventRecord, begin->get(), stream));
      check(prepared->launch(bases, limits));
      check(TRANSFUSE_CUDA(driver, cuEventRecord, end->get(), stream));
      ASSERT_TRUE(fetch(target) == expected);
      if (fingerprint) {
        EXPECT_EQ(prepared->sums()[0], sum);
      }
      float ms = 0;
      check(TRANSFUSE_CUDA(driver, cuEventElapsedTime, &ms, begin->get(), end->get()));
      std::printf("%u multiprocessors, %g GB/s asked: %.3f GB/s\n", limits.multiprocessors,
                  limits.gigabytes_per_second,
                  static_cast<double>(TwoCopies::kSourceBytes) / static_cast<double>(ms) / 1e6);
    }
    for (const double rate : {-1.0, 1e-9, std::numeric_limits<double>::infinity(),
                              std::numeric_limits<double>::quiet_NaN()}) {
      const auto refused =
          prepared->launch(bases, {.stream = stream, .gigabytes_per_second = rate});
      ASSERT_FALSE(refused.has_value()) << rate;
      EXPECT_EQ(refused.error().code, ErrorCode::kInvalidArgument);
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

// What copy engines bring is summed where it has landed, while later legs are still on their way.
TEST_F(OnGpu, CopyEnginesBringManyLegsWithTheSumsOfTheKernel) {
  constexpr uint64_t kBytes = uint64_t{256} << 20;
  Random random(11);
  const std::vector<std::byte> bytes = random_bytes(random, kBytes);
  const Memory source = memory(*device_, kBytes);
  const Memory target = memory(*device_, kBytes);
  send(source, bytes);
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < kBytes;) {
    const uint64_t size = std::min(kBytes - at, (1 + random.below(12)) << 20);
    copies.push_back({.source_offset_bytes = at,
                      .target = target.as<std::byte>() + at,
                      .linear_index = at / 2,
                      .fingerprint_key = random.next(),
                      .count = {1, 1, static_cast<uint32_t>(size / 2)},
                      .op = ElementOp::kCopy2,
                      .fingerprint = random.chance(0.8),
                      .source_stride = {0, 0, 1},
                      .target_stride = {0, 0, 1},
                      .index_stride = {0, 0, 1}});
    at += size;
  }
  const std::vector<uint32_t> sources(copies.size(), 0);
  const std::array<CUdeviceptr, 1> bases = {source.address()};
  std::vector<uint64_t> by_kernel;
  for (const bool engines : {false, true}) {
    auto prepared =
        PreparedCopies::make(*device_, copies, sources, 1, {.engines = {.copy_engines = engines}});
    ASSERT_TRUE(prepared.has_value());
    EXPECT_EQ(prepared->engine_bytes(), engines ? kBytes : 0);
    for (int again = 0; again < 3; ++again) {
      ASSERT_TRUE(target.clear().has_value());
      ASSERT_TRUE(prepared->launch(bases, {.stream = stream_.get()}).has_value());
      EXPECT_TRUE(fetch(target) == bytes);
      const std::vector<uint64_t> sums(prepared->sums().begin(), prepared->sums().end());
      if (!engines) by_kernel = sums;
      EXPECT_EQ(sums, by_kernel);
    }
  }
}

}  // namespace
}  // namespace transfuse::cuda

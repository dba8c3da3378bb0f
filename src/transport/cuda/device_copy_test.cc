// What the kernel's threads do, run on the host thread by thread, against the slow model.
#include "transport/cuda/device_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transport/cuda/device_table.h"

namespace transfuse {
namespace {

constexpr std::array<ElementOp, kElementOpCount> kOps = {
    ElementOp::kCopy1,     ElementOp::kCopy2,    ElementOp::kCopy4,     ElementOp::kCopy8,
    ElementOp::kF32ToBF16, ElementOp::kF32ToF16, ElementOp::kBF16ToF32, ElementOp::kF16ToF32};

// Memory that begins at an address divisible by 256, as an allocation on a device does.
class Memory {
 public:
  explicit Memory(uint64_t size) : bytes_(size + 256) {
    data_ = bytes_.data() + (256 - reinterpret_cast<uintptr_t>(bytes_.data()) % 256) % 256;
  }
  std::byte* data() { return data_; }
  void fill(Random& random) {
    for (auto& b : bytes_) b = static_cast<std::byte>(random.next() >> 56);
  }

 private:
  std::vector<std::byte> bytes_;
  std::byte* data_;
};

// As the kernel does: every lane of every item, in any order.
void run_table(Random& random, const DeviceTable& table, const std::vector<const std::byte*>& bases,
               std::vector<uint64_t>& sums) {
  for (const DeviceItem& item : table.items) {
    const DeviceRun& run = table.runs[item.run];
    const auto lanes = 1 + static_cast<uint32_t>(random.below(70));
    const ItemView view = view_of(run, item, bases[run.source], lanes);
    for (uint32_t lane = 0; lane < lanes; ++lane) sums[run.sum] += copy_item<true>(view, lane);
  }
}

void dense_strides(Random& random, const uint32_t count[3], int64_t stride[3], int64_t pad) {
  std::array<int, 3> order = {0, 1, 2};
  if (random.chance(0.3)) {
    for (size_t i = 2; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  }
  int64_t span = 1;
  for (size_t i = 3; i-- > 0;) {
    const int level = order[i];
    stride[level] = span;
    span *= count[level];
    if (pad > 0) span = (span + pad - 1) / pad * pad + pad * static_cast<int64_t>(random.below(2));
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
  const bool round = random.chance(0.5);  // multiples of 16 elements: the wide path
  const int64_t pad = round ? 16 : random.chance(0.5) ? 3 : 0;
  for (auto& count : copy.count) count = 1 + static_cast<uint32_t>(random.below(20));
  if (random.chance(0.3)) copy.count[0] = 1;
  if (round) copy.count[2] = 16 * (1 + static_cast<uint32_t>(random.below(40)));
  dense_strides(random, copy.count, copy.source_stride, pad);
  dense_strides(random, copy.count, copy.target_stride, pad);
  dense_strides(random, copy.count, copy.index_stride, random.chance(0.3) ? 7 : 0);
  copy.fingerprint = random.chance(0.7);
  copy.fingerprint_key = random.next();
  copy.linear_index = random.chance(0.3) ? random.next() >> 8 : random.below(1000);
  if (random.chance(0.2)) copy.linear_index = (uint64_t{3} << 32) - random.below(3000);
  copy.source_offset_bytes = round ? 16 * random.below(9) : random.below(64);
  return copy;
}

TEST(DeviceCopy, WritesWhatTheModelWritesAndSumsTheSame) {
  std::set<RunWalk> walks;
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    StridedCopy copy = random_copy(random);
    const uint64_t target_shift = random.chance(0.5) ? 16 * random.below(4) : random.below(64);
    const uint64_t target_size =
        span_bytes(copy, copy.target_stride, target_element_bytes(copy.op)) + target_shift + 64;
    Memory source(copy.source_end_bytes());
    source.fill(random);
    Memory found(target_size);
    found.fill(random);
    std::vector<std::byte> expected(found.data(), found.data() + target_size);
    copy.target = found.data() + target_shift;
    const uint64_t sum =
        slow_copy(copy, source.data() + copy.source_offset_bytes, expected.data() + target_shift);

    DeviceTableBuilder builder({.item_bytes = 16 + random.below(6000)});
    ASSERT_TRUE(builder.add(copy, 0, 0).has_value());
    const DeviceTable table = builder.build(random.below(5));
    EXPECT_EQ(table.target_bytes, copy.target_bytes());
    walks.insert(table.runs[0].walk);
    std::vector<uint64_t> sums(1);
    run_table(random, table, {source.data()}, sums);
    ASSERT_EQ(std::memcmp(found.data(), expected.data(), target_size), 0)
        << "op " << static_cast<int>(copy.op) << " counts " << copy.count[0] << " " << copy.count[1]
        << " " << copy.count[2];
    ASSERT_EQ(sums[0], copy.fingerprint ? sum : 0);
    copy.target = nullptr;
    copy.fingerprint = true;
    DeviceTableBuilder summing({.item_bytes = 16 + random.below(6000)});
    ASSERT_TRUE(summing.add(copy, 0, 0).has_value());
    sums[0] = 0;
    run_table(random, summing.build(0), {source.data()}, sums);
    ASSERT_EQ(sums[0], sum);
  }
  EXPECT_EQ(walks.size(), 2U) << "the seeds no longer try both walks";
}

StridedCopy contiguous(uint64_t source_offset, std::byte* target, uint32_t elements) {
  return {.source_offset_bytes = source_offset,
          .target = target,
          .count = {1, 1, elements},
          .op = ElementOp::kCopy2,
          .source_stride = {0, 0, 1},
          .target_stride = {0, 0, 1},
          .index_stride = {0, 0, 1}};
}

TEST(DeviceTable, CutsEveryUnitIntoExactlyOneItem) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    Memory target(1);
    StridedCopy copy = random_copy(random);
    copy.target = target.data();
    DeviceTableBuilder builder({.item_bytes = 16 + random.below(3000)});
    ASSERT_TRUE(builder.add(copy, 0, 0).has_value());
    const DeviceTable table = builder.build(seed);
    std::map<std::pair<uint32_t, uint32_t>, int> seen;
    for (const DeviceItem& item : table.items) {
      for (uint32_t r = 0; r < item.rows; ++r) {
        for (uint32_t u = 0; u < item.units; ++u) ++seen[{item.first_row + r, item.first_unit + u}];
      }
    }
    const DeviceRun& run = table.runs[0];
    EXPECT_EQ(seen.size() * unit_elements(run.walk, run.op) * target_bytes_of(run.op),
              copy.target_bytes());
    EXPECT_TRUE(std::ranges::all_of(seen, [](const auto& at) { return at.second == 1; }));
  }
}

TEST(DeviceTable, RowsThatMeetAreOneRow) {
  Memory target(1);
  StridedCopy copy = contiguous(0, target.data(), 64);
  copy.count[1] = 10;
  copy.source_stride[1] = copy.target_stride[1] = copy.index_stride[1] = 64;
  DeviceTableBuilder builder;
  ASSERT_TRUE(builder.add(copy, 0, 0).has_value());
  const DeviceTable table = builder.build(0);
  ASSERT_EQ(table.items.size(), 1U);
  EXPECT_EQ(table.items[0].rows, 1U);
  EXPECT_EQ(table.items[0].units, 80U);  // 16 bytes each
}

TEST(DeviceTable, MisalignmentOfEitherSideFallsBackToElements) {
  Memory target(1);
  const auto walk_of = [](const StridedCopy& copy) {
    DeviceTableBuilder builder;
    EXPECT_TRUE(builder.add(copy, 0, 0).has_value());
    return builder.build(0).runs[0].walk;
  };
  EXPECT_EQ(walk_of(contiguous(32, target.data(), 64)), RunWalk::kVectors);
  EXPECT_EQ(walk_of(contiguous(2, target.data(), 64)), RunWalk::kElements);
  EXPECT_EQ(walk_of(contiguous(32, target.data() + 2, 64)), RunWalk::kElements);
  EXPECT_EQ(walk_of(contiguous(32, target.data(), 63)), RunWalk::kElements);
}

TEST(DeviceTable, SourcesTakeTurnsInProportionToTheirBytes) {
  Memory target(1);
  DeviceTableBuilder builder({.item_bytes = 1024});
  for (int i = 0; i < 300; ++i) ASSERT_TRUE(builder.add(contiguous(0, target.data(), 512), 0, 0));
  for (int i = 0; i < 100; ++i) ASSERT_TRUE(builder.add(contiguous(0, target.data(), 512), 1, 0));
  const DeviceTable table = builder.build(3);
  ASSERT_EQ(table.items.size(), 400U);
  for (size_t begin = 0; begin < 400; begin += 40) {
    const auto second =
        std::count_if(table.items.begin() + static_cast<ptrdiff_t>(begin),
                      table.items.begin() + static_cast<ptrdiff_t>(begin) + 40,
                      [&](const DeviceItem& item) { return table.runs[item.run].source == 1; });
    EXPECT_NEAR(static_cast<double>(second), 10, 1);
  }
}

TEST(DeviceTable, TargetsBeginAtDifferentPlacesOfOneSource) {
  Memory target(1);
  std::set<uint32_t> first;
  for (uint64_t spread = 0; spread < 4; ++spread) {
    DeviceTableBuilder builder({.item_bytes = 1024});
    ASSERT_TRUE(builder.add(contiguous(0, target.data(), 512 * 100), 0, 0));
    first.insert(builder.build(spread).items[0].first_unit);
  }
  EXPECT_EQ(first.size(), 4U);
}

}  // namespace
}  // namespace transfuse

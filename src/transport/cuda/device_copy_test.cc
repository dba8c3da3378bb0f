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
#include "transport/cuda/device_stage.h"
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
  Memory stage(kStageBytes + 1);
  for (const DeviceItem& item : table.items) {
    const DeviceRun& run = table.runs[item.run];
    const auto lanes = 1 + static_cast<uint32_t>(random.below(70));
    const ItemView view = view_of(run, item, bases[run.source], lanes);
    if (!uses_stage(run.walk)) {
      for (uint32_t lane = 0; lane < lanes; ++lane) sums[run.sum] += copy_item<true>(view, lane);
      continue;
    }
    stage.fill(random);  // what is not written is not read
    const std::byte guard = stage.data()[kStageBytes];
    for (uint32_t lane = 0; lane < lanes; ++lane) stage_item(view, lane, stage.data());
    uint64_t sum = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      sum += write_staged_item<true>(view, lane, stage.data());
    }
    if (run.fingerprint) sums[run.sum] += sum;
    ASSERT_EQ(stage.data()[kStageBytes], guard);
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

// Matrices of several tiles, transposed or not, at any place of a vector on either side; and fills.
StridedCopy random_staged_copy(Random& random) {
  StridedCopy copy;
  copy.op = kOps[random.below(kOps.size())];
  const uint32_t bytes = source_element_bytes(copy.op);
  const auto rows = static_cast<uint32_t>(1 + random.below(400));
  const auto columns = static_cast<uint32_t>(1 + random.below(400));
  const int64_t pad = random.chance(0.3) ? 16 : 1;
  const auto padded = [&](uint32_t count) {
    return (count + pad - 1) / pad * pad + pad * static_cast<int64_t>(random.below(3));
  };
  // The level that is contiguous at the target comes second or last, the batch level anywhere.
  const size_t across = random.below(3);
  const size_t along = (across + 1 + random.below(2)) % 3;
  const size_t batch = 3 - across - along;
  copy.count[across] = rows;
  copy.count[along] = columns;
  copy.count[batch] = static_cast<uint32_t>(1 + random.below(3));
  copy.target_stride[along] = 1;
  copy.target_stride[across] = padded(columns);
  copy.target_stride[batch] = copy.target_stride[across] * rows;
  const bool transposes = random.chance(0.6);
  copy.source_stride[transposes ? across : along] = 1;
  copy.source_stride[transposes ? along : across] = padded(transposes ? rows : columns);
  copy.source_stride[batch] =
      copy.source_stride[transposes ? along : across] * (transposes ? columns : rows);
  if (random.chance(0.15)) std::fill_n(copy.source_stride, 3, 0);
  dense_strides(random, copy.count, copy.index_stride, 0);
  copy.fingerprint = random.chance(0.6);
  copy.fingerprint_key = random.next();
  copy.linear_index =
      random.chance(0.2) ? (uint64_t{3} << 32) - random.below(100000) : random.below(1000);
  copy.source_offset_bytes = random.chance(0.7) ? bytes * random.below(40) : random.below(100);
  return copy;
}

TEST(DeviceCopy, WritesWhatTheModelWritesAndSumsTheSame) {
  std::set<RunWalk> walks;
  for (uint64_t seed = 1; seed <= 1600; ++seed) {
    Random random(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    const bool staged = seed > 1400;
    StridedCopy copy = staged ? random_staged_copy(random) : random_copy(random);
    const uint64_t target_shift = staged && random.chance(0.8)
                                      ? target_element_bytes(copy.op) * random.below(20)
                                  : random.chance(0.5) ? 16 * random.below(4)
                                                       : random.below(64);
    const uint64_t most_bytes = staged && random.chance(0.7) ? uint64_t{128} << 10 : 6000;
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

    DeviceTableBuilder builder({.item_bytes = 16 + random.below(most_bytes)});
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
  EXPECT_EQ(walks.size(), 5U) << "the seeds no longer try every walk";
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
    StridedCopy copy = random.chance(0.3) ? random_staged_copy(random) : random_copy(random);
    copy.target = target.data();
    DeviceTableBuilder builder(
        {.item_bytes = 16 + random.below(random.chance(0.5) ? 3000 : 70000)});
    ASSERT_TRUE(builder.add(copy, 0, 0).has_value());
    const DeviceTable table = builder.build(seed);
    std::map<std::pair<uint32_t, uint32_t>, int> seen;
    for (const DeviceItem& item : table.items) {
      for (uint32_t r = 0; r < item.rows; ++r) {
        for (uint32_t u = 0; u < item.units; ++u) ++seen[{item.first_row + r, item.first_unit + u}];
      }
    }
    const DeviceRun& run = table.runs[0];
    for (const DeviceItem& item : table.items) {
      if (!uses_stage(run.walk) || run.walk == RunWalk::kFill) continue;
      const bool columns = run.walk == RunWalk::kTransposed;
      const uint32_t strips = columns ? item.units : item.rows;
      const uint32_t vectors =
          strip_vectors((columns ? item.rows : item.units) * source_bytes_of(run.op));
      const uint32_t end = strip_at(strips - 1, vectors, unit_elements(RunWalk::kVectors, run.op),
                                    columns ? strip_skew(source_bytes_of(run.op)) : 0) +
                           vectors * kVectorBytes;
      ASSERT_LE(end + kStageSlackBytes, kStageBytes);
    }
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

TEST(DeviceTable, MisalignmentOfEitherSideIsShifted) {
  Memory target(1);
  const auto walk_of = [](const StridedCopy& copy) {
    DeviceTableBuilder builder;
    EXPECT_TRUE(builder.add(copy, 0, 0).has_value());
    return builder.build(0).runs[0].walk;
  };
  EXPECT_EQ(walk_of(contiguous(32, target.data(), 64)), RunWalk::kVectors);
  EXPECT_EQ(walk_of(contiguous(2, target.data(), 64)), RunWalk::kShifted);
  EXPECT_EQ(walk_of(contiguous(32, target.data() + 2, 64)), RunWalk::kShifted);
  EXPECT_EQ(walk_of(contiguous(32, target.data(), 63)), RunWalk::kShifted);
  EXPECT_EQ(walk_of(contiguous(32, target.data() + 1, 63)), RunWalk::kShifted);  // as bytes
  EXPECT_EQ(walk_of(contiguous(2, target.data(), 31)), RunWalk::kElements);
}

TEST(DeviceTable, RowsOfSeveralKindsTakeTheirWalk) {
  Memory target(1);
  const auto walk_of = [](const StridedCopy& copy) {
    DeviceTableBuilder builder;
    EXPECT_TRUE(builder.add(copy, 0, 0).has_value());
    return builder.build(0).runs[0].walk;
  };
  StridedCopy copy = contiguous(0, target.data(), 256);
  copy.count[1] = 128;
  copy.target_stride[1] = copy.index_stride[1] = 256;
  copy.source_stride[1] = 1;
  copy.source_stride[2] = 128;
  EXPECT_EQ(walk_of(copy), RunWalk::kTransposed);
  copy.source_offset_bytes = 6;
  EXPECT_EQ(walk_of(copy), RunWalk::kTransposed);
  copy.source_offset_bytes = 1;  // elements lie across the vectors' own
  EXPECT_EQ(walk_of(copy), RunWalk::kElements);
  copy.source_offset_bytes = 0;
  copy.target = nullptr;  // to sum
  copy.fingerprint = true;
  EXPECT_EQ(walk_of(copy), RunWalk::kElements);
  copy.target = target.data();
  // The columns' level comes first.
  std::swap(copy.count[0], copy.count[1]);
  std::swap(copy.source_stride[0], copy.source_stride[1]);
  std::swap(copy.target_stride[0], copy.target_stride[1]);
  copy.count[1] = 2;
  copy.source_stride[1] = 128 * 256;
  copy.target_stride[1] = 256 * 128;
  EXPECT_EQ(walk_of(copy), RunWalk::kTransposed);
  std::fill_n(copy.source_stride, 3, 0);
  EXPECT_EQ(walk_of(copy), RunWalk::kFill);
  copy.source_stride[1] = 1;  // an element a matrix
  EXPECT_EQ(walk_of(copy), RunWalk::kElements);
}

// Four vectors of eight rows, whose elements lie in as many strips: no two words in one bank.
TEST(DeviceTable, AWarpReadsDifferentBanksOfATile) {
  for (const ElementOp op : kOps) {
    SCOPED_TRACE(static_cast<int>(op));
    const uint32_t bytes = source_bytes_of(op);
    const uint32_t unit = unit_elements(RunWalk::kVectors, op);
    const uint32_t vectors = strip_vectors(256);
    std::map<uint32_t, std::set<uint32_t>> words_of_bank;
    for (uint32_t vector = 0; vector < 4; ++vector) {
      for (uint32_t row = 0; row < 8; ++row) {
        const uint32_t at = strip_at(vector * unit, vectors, unit, strip_skew(bytes)) + row * bytes;
        for (uint32_t word = at / 4; word < (at + bytes + 3) / 4; ++word) {
          words_of_bank[word % 32].insert(word);
        }
      }
    }
    for (const auto& [bank, words] : words_of_bank) {
      EXPECT_LE(words.size(), bytes == 8 ? 2U : 1U) << "bank " << bank;  // two passes for 8 bytes
    }
  }
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

TEST(DeviceTable, AnAppendedTableKeepsItsRuns) {
  Memory target(1);
  DeviceTableBuilder first;
  DeviceTableBuilder second;
  for (uint64_t i = 0; i < 3; ++i) {
    ASSERT_TRUE(first.add(contiguous(512 * i, target.data(), 256), 0, 0).has_value());
    ASSERT_TRUE(second.add(contiguous(512 * (3 + i), target.data(), 256), 0, 0).has_value());
  }
  DeviceTable table = first.build(0);
  ASSERT_TRUE(table.append(second.build(0)).has_value());
  ASSERT_EQ(table.items.size(), 6U);
  EXPECT_EQ(table.target_bytes, 6 * 512U);
  EXPECT_EQ(table.source_bytes, 6 * 512U);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(table.runs[table.items[i].run].source_offset, 512 * i);
    EXPECT_EQ(item_bytes(table.runs[table.items[i].run], table.items[i]), 512U);
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

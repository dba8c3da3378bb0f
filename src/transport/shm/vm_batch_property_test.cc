// Random strided reads over both routes against a model that goes element by element.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/transport.h"
#include "transport/shm/child_role.h"

namespace transfuse::shm {
namespace {

constexpr uint64_t kRegionBytes = uint64_t{12} << 20;
constexpr uint64_t kTargetBytes = uint64_t{6} << 20;

// One copy that fits both sides; its target is relative (an offset) until it is placed.
struct RandomCopy {
  StridedCopy copy;
  uint64_t target_bytes = 0;  // the span at the target
};

uint32_t random_count(Random& random, uint64_t most) {
  const uint64_t bound = random.chance(0.3) ? most : std::min<uint64_t>(most, 1 + random.below(40));
  return static_cast<uint32_t>(1 + random.below(bound));
}

// Strides for `copy.count` with the axes nested in a random order, with gaps; returns the span.
uint64_t random_strides(Random& random, const StridedCopy& copy, int64_t (&strides)[3],
                        uint64_t largest_gap) {
  std::array<int, 3> order = {2, 1, 0};
  if (random.chance(0.4)) std::swap(order[random.below(3)], order[random.below(3)]);
  uint64_t span = 1;
  for (const int d : order) {
    const uint64_t gap = random.chance(0.5) ? 0 : random.below(largest_gap + 1);
    strides[d] = static_cast<int64_t>(span + gap);
    span += static_cast<uint64_t>(strides[d]) * (copy.count[d] - 1);
  }
  return span;
}

RandomCopy random_copy(Random& random) {
  while (true) {
    RandomCopy made;
    StridedCopy& copy = made.copy;
    copy.op = static_cast<ElementOp>(random.below(kElementOpCount));
    copy.fingerprint = random.chance(0.5);
    copy.fingerprint_key = random.next();
    copy.linear_index = random.below(1u << 30);
    copy.count[2] = random_count(random, random.chance(0.2) ? 1u << 19 : 3000);
    copy.count[1] = random_count(random, random.chance(0.3) ? 3000 : 20);
    copy.count[0] = random_count(random, 5);
    for (auto& stride : copy.index_stride) stride = static_cast<int64_t>(random.below(5000));
    constexpr std::array<uint64_t, 4> kGaps = {0, 8, 2000, 20000};
    const uint64_t source_span =
        random_strides(random, copy, copy.source_stride, kGaps[random.below(kGaps.size())]) *
        source_element_bytes(copy.op);
    made.target_bytes =
        random_strides(random, copy, copy.target_stride, 3) * target_element_bytes(copy.op);
    if (source_span > kRegionBytes || made.target_bytes > kTargetBytes) continue;
    copy.source_offset_bytes = random.below(kRegionBytes - source_span + 1);
    return made;
  }
}

uint64_t load_bits(const std::byte* at, uint32_t size) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, size);
  return bits;
}

// What `copy` must leave in `target` (whose start is copy.target), and its fingerprint.
uint64_t model(const StridedCopy& copy, const std::byte* region, std::byte* target) {
  const uint32_t wide = source_element_bytes(copy.op);
  const uint32_t narrow = target_element_bytes(copy.op);
  uint64_t sum = 0;
  for (uint64_t i0 = 0; i0 < copy.count[0]; ++i0) {
    for (uint64_t i1 = 0; i1 < copy.count[1]; ++i1) {
      for (uint64_t i2 = 0; i2 < copy.count[2]; ++i2) {
        const auto at = [&](const int64_t(&stride)[3]) {
          return i0 * static_cast<uint64_t>(stride[0]) + i1 * static_cast<uint64_t>(stride[1]) +
                 i2 * static_cast<uint64_t>(stride[2]);
        };
        uint64_t bits =
            load_bits(region + copy.source_offset_bytes + at(copy.source_stride) * wide, wide);
        if (copy.op == ElementOp::kF32ToBF16) bits = f32_bits_to_bf16(static_cast<uint32_t>(bits));
        if (copy.op == ElementOp::kF32ToF16) bits = f32_bits_to_f16(static_cast<uint32_t>(bits));
        if (copy.op == ElementOp::kBF16ToF32) bits = bf16_bits_to_f32(static_cast<uint16_t>(bits));
        if (copy.op == ElementOp::kF16ToF32) bits = f16_bits_to_f32(static_cast<uint16_t>(bits));
        std::memcpy(target + at(copy.target_stride) * narrow, &bits, narrow);
        sum += element_fingerprint(copy.fingerprint_key, copy.linear_index + at(copy.index_stride),
                                   bits, narrow);
      }
    }
  }
  return sum;
}

class RandomReads : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Shm, RandomReads, testing::Values("memfd", "process_vm_readv"));

TEST_P(RandomReads, LandExactlyTheElementsThatAModelWrites) {
  const uint64_t seed = random_identity();
  std::cout << "seed " << seed << '\n';
  Random random(seed);
  const TestFolder folder;
  auto transport = open_shm_transport(folder.path()).value();
  std::vector<std::byte> owned(kRegionBytes);
  auto region = std::string(GetParam()) == "memfd" ? transport->allocate(kRegionBytes).value()
                                                   : transport->register_memory(owned).value();
  for (size_t i = 0; i + 8 <= kRegionBytes; i += 8) {
    const uint64_t word = random.next();
    std::memcpy(region->bytes().data() + i, &word, 8);
  }
  const Deadline deadline = Deadline::after_ms(60000);
  const auto peer = transport->connect(transport->endpoint().value(), "", deadline).value();
  const auto remote = peer->open_region(region->descriptor(), deadline).value();
  ASSERT_EQ(remote->route(), GetParam());

  std::vector<std::byte> target(kTargetBytes);
  std::vector<std::byte> expected(kTargetBytes);
  for (int round = 0; round < 25; ++round) {
    std::vector<StridedCopy> copies;
    std::vector<uint64_t> sums;
    uint64_t used = 0;
    for (uint64_t wanted = 1 + random.below(30); copies.size() < wanted;) {
      const RandomCopy made = random_copy(random);
      if (used + made.target_bytes > kTargetBytes) break;
      copies.push_back(made.copy);
      sums.push_back(model(made.copy, region->bytes().data(), expected.data() + used));
      copies.back().target = target.data() + used;
      used += made.target_bytes;
    }
    std::vector<uint64_t> found(copies.size());
    const bool summed = random.chance(0.8);
    ReadRequest request{remote.get(), copies, {}};
    if (summed) request.fingerprints = found;
    const TicketId ticket = transport->submit(request).value();
    ASSERT_TRUE(transport->wait_any({&ticket, 1}, deadline));
    ASSERT_TRUE(transport->finish(ticket));
    ASSERT_TRUE(std::equal(target.begin(), target.end(), expected.begin())) << "round " << round;
    for (size_t i = 0; summed && i < copies.size(); ++i) {
      ASSERT_EQ(found[i], copies[i].fingerprint ? sums[i] : 0) << "round " << round;
    }
  }
}

}  // namespace
}  // namespace transfuse::shm

// What limits a launch: the pace, played through with a clock of our own, and the grid.
#include "transport/cuda/pace.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "base/random.h"
#include "transport/cuda/copy_kernel.h"

namespace transfuse {
namespace {

TEST(Pace, AnItemIsDueWhenTheBytesBeforeItAre) {
  EXPECT_EQ(due_after_ns(0, 1 / 50.0), 0U);
  EXPECT_EQ(due_after_ns(uint64_t{50} << 30, 1 / 50.0), uint64_t{1} << 30);
  EXPECT_EQ(due_after_ns(uint64_t{1} << 20, 1 / 200.0), 5242U);
  // The slowest rate that is accepted, and more bytes than any memory has.
  EXPECT_EQ(due_after_ns(uint64_t{1} << 50, 1000.0), 1000 * (uint64_t{1} << 50));
}

TEST(Pace, TheRateIsKeptToTheItemWhateverTheSizes) {
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    Random random(seed);
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const double rate = 0.5 + static_cast<double>(random.below(4000)) / 10;  // bytes a nanosecond
    uint64_t begun = 0;
    uint64_t before = 0;
    for (int i = 0; i < 5000; ++i) {
      const uint64_t now = due_after_ns(begun, 1 / rate);
      EXPECT_GE(now, before);
      // What was allowed until now, but for the rounding of the clock.
      EXPECT_LE(static_cast<double>(begun), rate * static_cast<double>(now + 1));
      EXPECT_GE(static_cast<double>(begun) * (1 + 1e-9), rate * static_cast<double>(now));
      before = now;
      begun += 1 + random.below(128 << 10);
    }
  }
}

// The sleeper wakes up between at once and twice as late as it asked.
TEST(Pace, NapsEndNeverLaterThanAsked) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    Random random(seed);
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const uint64_t due = 1 + random.below(random.chance(0.5) ? 5000 : 20000000);
    uint64_t now = 0;
    uint64_t looks = 0;
    while (now < due) {
      const uint64_t nap = nap_ns(due - now);
      ASSERT_LE(nap, kLongestNapNs);
      ASSERT_LE(now + 2 * nap, due);
      now += std::max<uint64_t>(random.below(2 * nap + 1), 10);  // a look takes time too
      ++looks;
    }
    EXPECT_LE(now, due + 9);
    EXPECT_LE(looks, 2000U);
  }
}

TEST(Grid, ALimitIsOneOfMultiprocessorsNotOfBlocks) {
  EXPECT_EQ(block_count(0, 132), 264U);
  EXPECT_EQ(block_count(1, 132), 1U);
  EXPECT_EQ(block_count(66, 132), 66U);
  EXPECT_EQ(block_count(131, 132), 131U);
  EXPECT_EQ(block_count(132, 132), 264U);
  EXPECT_EQ(block_count(500, 132), 264U);
}

TEST(Pace, TakesFewMultiprocessorsAndNeverNone) {
  EXPECT_EQ(multiprocessors_of_pace(0.01), 2U);
  EXPECT_EQ(multiprocessors_of_pace(100), 27U);
  EXPECT_EQ(multiprocessors_of_pace(1e300), multiprocessors_of_pace(1e6));
}

}  // namespace
}  // namespace transfuse

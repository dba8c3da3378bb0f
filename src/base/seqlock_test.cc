// A reader between two equal even counters has seen one generation.
#include "base/seqlock.h"

#include <array>
#include <atomic>
#include <thread>

#include <gtest/gtest.h>

namespace transfuse {
namespace {

TEST(Seqlock, I8_NoReaderAcceptsAMixtureOfTwoGenerations) {
  GenerationWords words;
  std::array<std::atomic<uint64_t>, 64> data{};  // relaxed, as the copies of another process are
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (uint64_t version = 1; version <= 20000; ++version) {
      begin_generation(words);
      for (auto& word : data) word.store(version, std::memory_order_relaxed);
      ASSERT_EQ(end_generation(words), 2 * version);
      // Long enough for a reader to accept some generations even on one core.
      if (version % 64 == 0) std::this_thread::yield();
    }
    stop = true;
  });
  uint64_t accepted = 0;
  while (!stop || accepted == 0) {
    const uint64_t first = load_generation(words).counter;
    std::array<uint64_t, 64> copy{};
    for (size_t i = 0; i < data.size(); ++i) copy[i] = data[i].load(std::memory_order_relaxed);
    const uint64_t second = load_generation(words).counter;
    if (first % 2 != 0 || first != second) continue;
    ++accepted;
    for (const uint64_t word : copy) ASSERT_EQ(word, first / 2);
  }
  writer.join();
  EXPECT_GT(accepted, 0u);
}

}  // namespace
}  // namespace transfuse

// What another process says of its memory is not believed before it is checked, nor while it is
// being written.
#include "transport/cuda/memory_offer.h"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "base/random.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse::cuda {
namespace {

using Place = std::array<std::byte, kOfferBytes>;

Deadline at_once() { return Deadline::after_ms(0); }

MemoryOffer offer() {
  MemoryOffer offer{.process = 5,
                    .identity = 7,
                    .allocation_bytes = 1000,
                    .offset_bytes = 200,
                    .size_bytes = 800,
                    .address = 0x700000};
  offer.device[3] = 9;
  offer.ipc_handle.reserved[5] = 11;
  return offer;
}

MemoryOffer offer_of_handles(uint64_t count, uint64_t handle_bytes) {
  MemoryOffer many = offer();
  many.allocation_bytes = count * handle_bytes;
  many.handles = RegionId{77};
  many.handle_count = count;
  return many;
}

Result<MemoryOffer> published(const MemoryOffer& offer) {
  alignas(8) Place place{};
  publish_offer(place, offer);
  return read_offer(place, at_once());
}

TEST(MemoryOffer, ComesBackAsItWasWritten) {
  const MemoryOffer read = published(offer()).value();
  EXPECT_EQ(read.process, 5U);
  EXPECT_EQ(read.identity, 7U);
  EXPECT_EQ(read.allocation_bytes, 1000U);
  EXPECT_EQ(read.offset_bytes, 200U);
  EXPECT_EQ(read.size_bytes, 800U);
  EXPECT_EQ(read.address, 0x700000U);
  EXPECT_EQ(read.handle_count, 0U);
  EXPECT_EQ(read.device[3], 9);
  EXPECT_EQ(read.ipc_handle.reserved[5], 11);
  const MemoryOffer many = published(offer_of_handles(1500, uint64_t{20} << 20)).value();
  EXPECT_EQ(many.handles, RegionId{77});
  EXPECT_EQ(many.handle_count, 1500U);
}

TEST(MemoryOffer, I13_ARegionBeyondItsAllocationIsCorrupt) {
  const auto code = [](const std::function<void(MemoryOffer&)>& change) {
    MemoryOffer changed = offer();
    change(changed);
    return published(changed).error().code;
  };
  EXPECT_EQ(code([](MemoryOffer& o) { o.size_bytes = 801; }), ErrorCode::kCorrupt);
  EXPECT_EQ(code([](MemoryOffer& o) { o.offset_bytes = UINT64_MAX - 10; }), ErrorCode::kCorrupt);
  EXPECT_EQ(code([](MemoryOffer& o) { o.size_bytes = 0; }), ErrorCode::kCorrupt);
}

TEST(MemoryOffer, I13_MoreHandlesThanTheAllocationsHavePagesAreCorrupt) {
  const uint64_t page = kHandleGranularityBytes;
  EXPECT_TRUE(published(offer_of_handles(1500, page)));
  MemoryOffer many = offer_of_handles(1500, page);
  many.handle_count = 1501;
  EXPECT_EQ(published(many).error().code, ErrorCode::kCorrupt);
  many.handle_count = UINT64_MAX;
  EXPECT_EQ(published(many).error().code, ErrorCode::kCorrupt);
}

TEST(MemoryOffer, I13_RandomBytesAreNoOfferOrAWholeOne) {
  Random random(11);
  for (int round = 0; round < 20000; ++round) {
    alignas(8) Place place{};
    publish_offer(place, offer_of_handles(3, kHandleGranularityBytes));
    for (uint64_t flips = 1 + random.below(4); flips > 0; --flips) {
      place[random.below(120)] = static_cast<std::byte>(random.next());
    }
    const auto read = read_offer(place, at_once());
    if (!read) continue;
    EXPECT_LE(read->offset_bytes, read->allocation_bytes);
    EXPECT_LE(read->size_bytes, read->allocation_bytes - read->offset_bytes);
    EXPECT_LE(read->handle_count, read->allocation_bytes / kHandleGranularityBytes);
  }
}

TEST(MemoryOffer, WithdrawnIsNotFoundAndHalfWrittenIsWaitedForUntilTheDeadline) {
  alignas(8) Place place{};
  EXPECT_EQ(read_offer(place, Deadline::after_ms(20)).error().code, ErrorCode::kUnavailable);
  publish_offer(place, offer());
  EXPECT_EQ(offered_identity(place), 7U);
  withdraw_offer(place);
  EXPECT_NE(offered_identity(place), 7U);
  EXPECT_EQ(read_offer(place, at_once()).error().code, ErrorCode::kNotFound);
  publish_offer(place, offer());
  EXPECT_TRUE(read_offer(place, at_once()));
}

TEST(MemoryOffer, AReaderNeverSeesHalfOfOneAndHalfOfAnother) {
  alignas(8) Place place{};
  std::atomic<bool> stop{false};
  const auto numbered = [](uint64_t number) {
    return MemoryOffer{.process = number,
                       .identity = 1 + number,
                       .allocation_bytes = number + 10,
                       .offset_bytes = number,
                       .size_bytes = 10,
                       .address = number};
  };
  publish_offer(place, numbered(0));
  std::thread writer([&] {
    for (uint64_t number = 1; !stop; ++number) publish_offer(place, numbered(number));
  });
  for (int i = 0; i < 20000; ++i) {
    const auto read = read_offer(place, Deadline::after_ms(20000));
    ASSERT_TRUE(read.has_value()) << read.error().message;
    const uint64_t number = read->process;
    ASSERT_EQ(read->identity, 1 + number);
    ASSERT_EQ(read->allocation_bytes, number + 10);
    ASSERT_EQ(read->offset_bytes, number);
    ASSERT_EQ(read->address, number);
  }
  stop = true;
  writer.join();
}

TEST(MemoryOffer, EveryWordOfWhatIdentifiesMemoryCounts) {
  const std::vector<uint64_t> words = {1, 2, 3, 4};
  const uint64_t identity = make_identity(words);
  EXPECT_EQ(make_identity(words), identity);
  for (size_t i = 0; i < words.size(); ++i) {
    auto other = words;
    ++other[i];
    EXPECT_NE(make_identity(other), identity) << i;
  }
  EXPECT_NE(make_identity(std::vector<uint64_t>{2, 1, 3, 4}), identity);
}

}  // namespace
}  // namespace transfuse::cuda

// What another process says of its memory is not believed before it is checked.
#include "transport/cuda/memory_offer.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "transfuse/result.h"

namespace transfuse::cuda {
namespace {

MemoryOffer offer() {
  MemoryOffer offer{.process = 5,
                    .allocation = 7,
                    .allocation_bytes = 1000,
                    .offset_bytes = 200,
                    .size_bytes = 800,
                    .address = 0x700000};
  offer.device[3] = 9;
  offer.handle.reserved[5] = 11;
  return offer;
}

TEST(MemoryOffer, ComesBackAsItWasWritten) {
  std::array<std::byte, kOfferBytes> bytes{};
  offer().encode(bytes);
  const MemoryOffer read = MemoryOffer::decode(bytes).value();
  EXPECT_EQ(read.process, 5U);
  EXPECT_EQ(read.allocation, 7U);
  EXPECT_EQ(read.allocation_bytes, 1000U);
  EXPECT_EQ(read.offset_bytes, 200U);
  EXPECT_EQ(read.size_bytes, 800U);
  EXPECT_EQ(read.address, 0x700000U);
  EXPECT_EQ(read.device[3], 9);
  EXPECT_EQ(read.handle.reserved[5], 11);
}

TEST(MemoryOffer, I13_ARegionBeyondItsAllocationIsCorrupt) {
  const auto decoded = [](MemoryOffer changed) {
    std::array<std::byte, kOfferBytes> bytes{};
    changed.encode(bytes);
    return MemoryOffer::decode(bytes);
  };
  MemoryOffer beyond = offer();
  beyond.size_bytes = 801;
  EXPECT_EQ(decoded(beyond).error().code, ErrorCode::kCorrupt);
  MemoryOffer wraps = offer();
  wraps.offset_bytes = UINT64_MAX - 10;
  EXPECT_EQ(decoded(wraps).error().code, ErrorCode::kCorrupt);
  MemoryOffer empty = offer();
  empty.size_bytes = 0;
  EXPECT_EQ(decoded(empty).error().code, ErrorCode::kCorrupt);
  const std::array<std::byte, kOfferBytes> zeros{};
  EXPECT_EQ(MemoryOffer::decode(zeros).error().code, ErrorCode::kCorrupt);
}

}  // namespace
}  // namespace transfuse::cuda

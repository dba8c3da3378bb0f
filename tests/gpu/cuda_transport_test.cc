// Memory of GPUs between real processes; skipped where there is no GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "gpu/gpu_fixture.h"
#include "gpu/pattern.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"

namespace transfuse {
namespace {

TEST_F(CudaTransportTest, ReadsWhatAnotherProcessHoldsOnAGpu) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    SCOPED_TRACE(ordinal);
    GpuPeer peer(folder_, ordinal);
    const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
    const RegionDescriptor descriptor = peer.allocate(20000001, 1);
    const auto region = connection->open_region(descriptor, soon());
    ASSERT_TRUE(region.has_value()) << region.error().message;
    EXPECT_EQ((*region)->route(), ordinal == 0 ? "cuda_ipc, one GPU" : "cuda_ipc, peer GPU");
    auto copies = whole(20000001, 1 << 20, true);
    copies[0].fingerprint = false;  // from another GPU, a copy engine moves this one
    constexpr uint64_t kUntouched = 123;
    std::vector<uint64_t> sums(copies.size(), kUntouched);
    for (const uint64_t seed : {1U, 2U, 3U}) {  // through the same handle and the same table
      if (seed != 1) peer.ask(fmt::format("fill {}", seed));
      ASSERT_TRUE(read(**region, copies, sums, 5).has_value());
      const auto expected = pattern(20000001, seed);
      ASSERT_TRUE(held() == expected);
      uint64_t sum = 0;
      for (uint64_t i = 0; i < copies[3].count[2]; ++i) {
        const uint64_t at = copies[3].linear_index + i;
        sum += element_fingerprint(7, at, std::to_integer<uint64_t>(expected[at]), 1);
      }
      EXPECT_EQ(sums[3], sum);
      EXPECT_EQ(sums[0], kUntouched);
    }
    EXPECT_EQ(transport_->stats().tickets, 0U);
  }
}

TEST_F(CudaTransportTest, MemoryThatWasAllocatedAnewIsOpenedAnew) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const auto copies = whole(8 << 20, 1 << 20, false);
  RegionDescriptor old;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const RegionDescriptor descriptor = peer.allocate(8 << 20, seed);
    EXPECT_NE(descriptor.id, old.id);
    old = descriptor;
    const auto region = connection->open_region(descriptor, soon()).value();
    ASSERT_TRUE(read(*region, copies).has_value());
    ASSERT_TRUE(held() == pattern(8 << 20, seed));
    peer.ask("free");
  }
  EXPECT_FALSE(connection->open_region(old, soon()).has_value());
}

TEST_F(CudaTransportTest, I3_AThousandReadsLeaveDeviceMemoryAndHandlesAsTheyWere) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const RegionDescriptor descriptor = peer.allocate(4 << 20, 1);
  const auto copies = whole(4 << 20, 64 << 10, true);
  std::vector<uint64_t> sums(copies.size());
  const auto region = connection->open_region(descriptor, soon()).value();
  uint64_t free = 0;
  TransportStats stats;
  for (int cycle = 0; cycle < 1000; ++cycle) {
    ASSERT_TRUE(read(*region, copies, sums, 1).has_value());
    if (cycle == 1) {
      free = free_bytes();
      stats = transport_->stats();
    }
  }
  EXPECT_EQ(free_bytes(), free);
  stats.read_bytes = transport_->stats().read_bytes;
  EXPECT_EQ(transport_->stats(), stats);
}

TEST_F(CudaTransportTest, ASourceThatIsKilledMidwayEndsTheReadWithoutAHang) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    SCOPED_TRACE(ordinal);
    constexpr uint64_t kSize = uint64_t{1} << 30;
    GpuPeer peer(folder_, ordinal);
    const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
    const auto region = connection->open_region(peer.allocate(kSize, 1), soon()).value();
    const auto copies = whole(kSize, 8 << 20, true);
    std::vector<uint64_t> sums(copies.size());
    std::vector<TicketId> tickets;
    for (int i = 0; i < 8; ++i) {
      tickets.push_back(
          transport_
              ->submit({.region = region.get(), .copies = copies, .fingerprints = sums, .reuse = 1})
              .value());
    }
    peer.kill_it();
    for (const TicketId ticket : tickets) {
      ASSERT_TRUE(transport_->wait_any({&ticket, 1}, soon()));
      const auto outcome = transport_->finish(ticket);
      if (!outcome) {
        fmt::print("killed source, read ended with: {}\n", outcome.error().to_string());
      }
    }
    for (int i = 0; i < 100 && connection->alive(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    EXPECT_FALSE(connection->alive());
  }
}

TEST_F(CudaTransportTest, MemoryOfTheHostGoesThroughTheHostsTransport) {
  std::vector<std::byte> bytes = pattern(1 << 20, 3);
  const auto region = transport_->register_memory(bytes);
  ASSERT_TRUE(region.has_value()) << region.error().message;
  EXPECT_EQ((*region)->descriptor().size_bytes, bytes.size());
}

TEST_F(CudaTransportTest, ABadOfferIsRefused) {
  auto forged = transport_->allocate(cuda::kBoardBytes).value();
  const auto bytes = pattern(cuda::kBoardBytes, 9);
  std::ranges::copy(bytes, forged->bytes().begin());
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const RegionId id = cuda::device_region({.board = forged->descriptor().id, .slot = 3});
  const RegionDescriptor descriptor{.id = id, .size_bytes = 4096};
  EXPECT_EQ(connection->open_region(descriptor, soon()).error().code, ErrorCode::kCorrupt);
}

TEST_F(CudaTransportTest, I13_AnOfferThatNamesThisProcessIsCheckedAgainstItsMemory) {
  const auto memory = cuda::Memory::allocate(*device_, cuda::MemoryPlace::kDevice, 4 << 20).value();
  const auto offered = transport_->register_memory({memory.as<std::byte>(), 4 << 20}).value();
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  ASSERT_TRUE(connection->open_region(offered->descriptor(), soon()));
  // The same offer with another address and the same identity, on a board of somebody else.
  const auto place = cuda::offer_place(offered->descriptor().id).value();
  const auto board =
      connection->open_region({.id = place.board, .size_bytes = cuda::kBoardBytes}, soon()).value();
  auto offer =
      cuda::read_offer(
          board->mapped().subspan(place.slot * cuda::kOfferBytes).first<cuda::kOfferBytes>(),
          soon())
          .value();
  offer.address += 256;
  auto forged = transport_->allocate(cuda::kBoardBytes).value();
  cuda::publish_offer(forged->bytes().first<cuda::kOfferBytes>(), offer);
  const auto opened = connection->open_region(
      {.id = cuda::device_region({.board = forged->descriptor().id, .slot = 0}),
       .size_bytes = 4 << 20},
      soon());
  EXPECT_FALSE(opened) << "it reaches beyond the allocation";
}

}  // namespace
}  // namespace transfuse

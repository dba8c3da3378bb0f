// Memory of virtual memory mapping between real processes: many handles, other pages at the same
// address, engines that sleep; skipped where there is no GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gpu/gpu_fixture.h"
#include "gpu/mapped_memory.h"
#include "gpu/pattern.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

uint64_t open_descriptors(pid_t pid) {
  uint64_t count = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator(fmt::format("/proc/{}/fd", pid)))
    ++count;
  return count;
}

class MappedMemoryTest : public CudaTransportTest {
 protected:
  // What the region holds now is `seed`'s.
  void expect_pattern(const RemoteRegion& region, uint64_t seed) {
    const auto copies = whole(region.size_bytes(), 4 * kMiB, false);
    const auto outcome = read(region, copies);
    ASSERT_TRUE(outcome.has_value()) << outcome.error().to_string();
    ASSERT_TRUE(held() == pattern(region.size_bytes(), seed));
  }
  static std::string map(uint64_t count, uint64_t range_bytes, uint64_t seed) {
    return fmt::format("map {} {} {}", count, range_bytes, seed);
  }
};

TEST_F(MappedMemoryTest, ReadsOneAndManyHandlesOfAnotherProcess) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    const uint64_t fewer = pretends() ? 10 : 1;
    for (const auto& [count, range_bytes] :
         {std::pair(uint64_t{1}, 64 * kMiB), std::pair(300 / fewer, 2 * kMiB),
          std::pair(10 / fewer, 20 * kMiB)}) {
      SCOPED_TRACE(fmt::format("device {}, {} x {}", ordinal, count, range_bytes));
      GpuPeer peer(folder_, ordinal);
      const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
      const RegionDescriptor descriptor = peer.region_of(map(count, range_bytes, 1));
      const auto region = connection->open_region(descriptor, soon());
      ASSERT_TRUE(region.has_value()) << region.error().to_string();
      const std::string_view route = (*region)->route();
      EXPECT_TRUE(ordinal == 0 ? route == "cuda_vmm, one GPU"
                               : route == "cuda_vmm, NVLink" || route == "cuda_vmm, PCIe")
          << route;
      expect_pattern(**region, 1);
      ASSERT_EQ(peer.ask("fill 2"), "done");
      ASSERT_EQ(peer.ask("refresh"), "done");
      EXPECT_TRUE((*region)->current()) << "other bytes, the same memory";
      expect_pattern(**region, 2);
    }
  }
}

TEST_F(MappedMemoryTest, I3_TwoHundredOpensLeaveDeviceMemoryAndDescriptorsAsTheyWere) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const RegionDescriptor descriptor = peer.region_of(map(pretends() ? 2 : 16, 2 * kMiB, 1));
  uint64_t free = 0;
  uint64_t own = 0;
  uint64_t theirs = 0;
  TransportStats stats;
  for (int cycle = 0; cycle < 200; ++cycle) {
    {
      const auto region = connection->open_region(descriptor, soon()).value();
      expect_pattern(*region, 1);
    }
    ASSERT_EQ(peer.ask("refresh"), "done");
    if (cycle == 1) {
      free = free_bytes();
      own = open_descriptors(getpid());
      theirs = open_descriptors(peer.pid());
      stats = transport_->stats();
    }
  }
  EXPECT_EQ(free_bytes(), free);
  EXPECT_EQ(open_descriptors(getpid()), own);
  EXPECT_LE(open_descriptors(peer.pid()), theirs + 1) << "at most one is just being closed";
  stats.read_bytes = transport_->stats().read_bytes;
  EXPECT_EQ(transport_->stats(), stats);
}

TEST_F(MappedMemoryTest, OtherPagesAtTheSameAddressAreNoticedAndOpenedAnew) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    SCOPED_TRACE(ordinal);
    GpuPeer peer(folder_, ordinal);
    const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
    const RegionDescriptor descriptor = peer.region_of(map(5, 2 * kMiB, 1));
    auto region = connection->open_region(descriptor, soon()).value();
    for (uint64_t seed = 2; seed < 12; ++seed) {
      expect_pattern(*region, seed - 1);
      ASSERT_EQ(peer.ask(fmt::format("remap {}", seed)), "done");
      ASSERT_EQ(peer.ask("refresh"), "done");
      EXPECT_FALSE(region->current());
      const auto copies = whole(region->size_bytes(), 4 * kMiB, false);
      EXPECT_EQ(read(*region, copies).error().code, ErrorCode::kTornRead);
      region.reset();
      region = connection->open_region(descriptor, soon()).value();
      EXPECT_TRUE(region->current());
    }
    expect_pattern(*region, 11);
  }
}

TEST_F(MappedMemoryTest, WhoOpensARegionGetsWhatIsMappedNowThoughNobodySaidSo) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const RegionDescriptor descriptor = peer.region_of(map(5, 2 * kMiB, 1));
  auto region = connection->open_region(descriptor, soon()).value();
  expect_pattern(*region, 1);
  ASSERT_EQ(peer.ask("remap 2"), "done");
  // The pages are the reader's as long as it has them open.
  expect_pattern(*region, 1);
  region.reset();
  auto now = connection->open_region(descriptor, soon());
  ASSERT_TRUE(now.has_value()) << now.error().to_string();
  EXPECT_TRUE((*now)->current());
  expect_pattern(**now, 2);
}

TEST_F(MappedMemoryTest, MemoryAtAnotherAddressIsAnotherRegionAndTheOldOneIsGone) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const RegionDescriptor before = peer.region_of(map(5, 2 * kMiB, 1));
  const auto region = connection->open_region(before, soon()).value();
  expect_pattern(*region, 1);
  const RegionDescriptor now = peer.region_of("move 2");
  EXPECT_NE(now.id, before.id);
  EXPECT_FALSE(region->current());
  EXPECT_EQ(connection->open_region(before, soon()).error().code, ErrorCode::kNotFound);
  const auto moved = connection->open_region(now, soon()).value();
  expect_pattern(*moved, 2);
}

TEST_F(MappedMemoryTest, AnEngineThatSleepsWaitsForNobodyAndOffersNothingUntilItWakes) {
  GpuPeer peer(folder_, 0);
  const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
  const RegionDescriptor descriptor = peer.region_of(map(8, 20 * kMiB, 1));
  const uint64_t awake = free_bytes();
  auto region = connection->open_region(descriptor, soon()).value();
  ASSERT_EQ(peer.ask("unmap"), "done") << "while it is open here";
  expect_pattern(*region, 1);
  const std::string asleep = peer.ask("refresh");
  EXPECT_NE(asleep.find("UNAVAILABLE"), std::string::npos) << asleep;
  EXPECT_FALSE(region->current());
  EXPECT_EQ(connection->open_region(descriptor, soon()).error().code, ErrorCode::kNotFound);
  region.reset();
  target_ = cuda::Memory();
  if (!pretends()) {  // tables of copies took a little meanwhile
    EXPECT_GE(free_bytes(), awake + 7 * 20 * kMiB) << "the last mapping held its pages";
  }
  ASSERT_EQ(peer.ask("remap 2"), "done");
  ASSERT_EQ(peer.ask("refresh"), "done");
  region = connection->open_region(descriptor, soon()).value();
  expect_pattern(*region, 2);
}

TEST_F(MappedMemoryTest, ASourceThatIsKilledLeavesWhatIsMappedAndEndsOpensWithAnError) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    SCOPED_TRACE(ordinal);
    GpuPeer peer(folder_, ordinal);
    const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
    const RegionDescriptor descriptor = peer.region_of(map(pretends() ? 5 : 50, 20 * kMiB, 1));
    const auto region = connection->open_region(descriptor, soon()).value();
    const auto copies = whole(region->size_bytes(), 8 * kMiB, false);
    std::vector<TicketId> tickets;
    for (int i = 0; i < 4; ++i) {
      tickets.push_back(transport_->submit({.region = region.get(), .copies = copies}).value());
    }
    peer.kill_it();
    for (const TicketId ticket : tickets) {
      ASSERT_TRUE(transport_->wait_any({&ticket, 1}, soon()));
      const auto outcome = transport_->finish(ticket);
      EXPECT_TRUE(outcome.has_value()) << outcome.error().to_string();
    }
    ASSERT_TRUE(held() == pattern(region->size_bytes(), 1));
    const auto again = connection->open_region(descriptor, soon());
    // What is open already needs nothing of its owner.
    if (!again) {
      EXPECT_EQ(again.error().code, ErrorCode::kUnavailable);
    }
  }
}

TEST_F(MappedMemoryTest, MemoryOfThisProcessIsReadToo) {
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    SCOPED_TRACE(ordinal);
    const auto driver = cuda::Driver::load().value();
    const auto device = cuda::Device::open(*driver, ordinal).value();
    const auto memory =
        MappedMemory::create(*device, {.count = 4, .range_bytes = 2 * kMiB}).value();
    const uint64_t size = memory->size_bytes();
    const auto bytes = pattern(size, 3);
    {
      const cuda::Stream stream = cuda::Stream::create(*device).value();
      const cuda::Current current = device->use();
      ASSERT_EQ(
          driver->cuMemcpyAsync(memory->address(), reinterpret_cast<CUdeviceptr>(bytes.data()),
                                size, stream.get()),
          CUDA_SUCCESS);
      ASSERT_EQ(driver->cuStreamSynchronize(stream.get()), CUDA_SUCCESS);
    }
    // A transport of the device that the memory lies on, in the same process.
    const std::string folder = fmt::format("{}/own{}", folder_, ordinal);
    ASSERT_TRUE(std::filesystem::create_directory(folder));
    std::filesystem::permissions(folder, std::filesystem::perms::owner_all);
    const auto own = open_cuda_transport(open_shm_transport(folder).value(), ordinal).value();
    const auto offered =
        own->register_memory({reinterpret_cast<std::byte*>(memory->address()), size});
    ASSERT_TRUE(offered.has_value()) << offered.error().to_string();
    const auto self = transport_->connect(own->endpoint().value(), "", soon()).value();
    const auto region = self->open_region((*offered)->descriptor(), soon());
    ASSERT_TRUE(region.has_value()) << region.error().to_string();
    expect_pattern(**region, 3);
  }
}

TEST_F(MappedMemoryTest, WhatCannotBeSharedIsRefusedWithTheReasonAndTheRemedy) {
  const auto refusal = [&](CUdeviceptr address) -> Error {
    const auto region = transport_->register_memory({reinterpret_cast<std::byte*>(address), kMiB});
    EXPECT_FALSE(region.has_value());
    return region ? Error{} : region.error();
  };
  const auto says = [](const Error& error, const char* words) {
    EXPECT_NE(error.message.find(words), std::string::npos) << error.message;
  };
  const auto unshared =
      MappedMemory::create(*device_, {.range_bytes = 2 * kMiB, .handles = CU_MEM_HANDLE_TYPE_NONE})
          .value();
  Error error = refusal(unshared->address());
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  says(error, "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC");
  // An engine may receive into it all the same, while it is awake.
  const auto target =
      transport_->register_target({reinterpret_cast<std::byte*>(unshared->address()), kMiB});
  ASSERT_TRUE(target.has_value()) << target.error().to_string();
  EXPECT_EQ((*target)->place(), MemoryPlace::kDevice);
  EXPECT_TRUE((*target)->refresh());
  unshared->unmap();
  EXPECT_EQ((*target)->refresh().error().code, ErrorCode::kUnavailable);
  error = refusal(unshared->address());
  EXPECT_EQ(error.code, ErrorCode::kUnavailable);
  says(error, "mapped");

  const cuda::Driver& driver = device_->driver();
  const cuda::Current current = device_->use();
  CUdeviceptr pooled = 0;
  ASSERT_EQ(driver.cuMemAllocAsync(&pooled, kMiB, stream_.get()), CUDA_SUCCESS);
  ASSERT_EQ(driver.cuStreamSynchronize(stream_.get()), CUDA_SUCCESS);
  error = refusal(pooled);
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  says(error, "cudaMallocAsync");
  EXPECT_EQ(driver.cuMemFree(pooled), CUDA_SUCCESS);

  CUdeviceptr managed = 0;
  ASSERT_EQ(driver.cuMemAllocManaged(&managed, kMiB, CU_MEM_ATTACH_GLOBAL), CUDA_SUCCESS);
  error = refusal(managed);
  EXPECT_EQ(error.code, ErrorCode::kUnsupported);
  says(error, "cudaMallocManaged");
  EXPECT_EQ(driver.cuMemFree(managed), CUDA_SUCCESS);
}

}  // namespace
}  // namespace transfuse

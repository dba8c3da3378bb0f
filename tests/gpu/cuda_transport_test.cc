// Memory of GPUs between real processes; skipped where there is no GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "copy/copy.h"
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
    const std::string_view route = (*region)->route();
    EXPECT_TRUE(ordinal == 0 ? route == "cuda_ipc, one GPU"
                             : route == "cuda_ipc, NVLink" || route == "cuda_ipc, PCIe")
        << route;
    auto copies = whole(20000001, 1 << 20, true);
    copies[0].fingerprint = false;  // from another GPU, a copy engine moves this one
    constexpr uint64_t kUntouched = 123;
    std::vector<uint64_t> sums(copies.size(), kUntouched);
    for (const uint64_t seed : {1U, 2U, 3U}) {  // through the same handle and the same table
      if (seed != 1) peer.ask(fmt::format("fill {}", seed));
      ASSERT_TRUE(read(**region, copies, sums).has_value());
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
  const RegionDescriptor descriptor = peer.allocate(256 << 10, 1);
  const auto copies = whole(256 << 10, 4 << 10, true);
  std::vector<uint64_t> sums(copies.size());
  const auto region = connection->open_region(descriptor, soon()).value();
  uint64_t free = 0;
  TransportStats stats;
  for (int cycle = 0; cycle < 1000; ++cycle) {
    ASSERT_TRUE(read(*region, copies, sums).has_value());
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
    const uint64_t size = std::min(uint64_t{1} << 30, free_bytes() / 64);
    GpuPeer peer(folder_, ordinal);
    const auto connection = transport_->connect(peer.endpoint(), "", soon()).value();
    const auto region = connection->open_region(peer.allocate(size, 1), soon()).value();
    const auto copies = whole(size, 8 << 20, true);
    std::vector<uint64_t> sums(copies.size());
    std::vector<TicketId> tickets;
    for (int i = 0; i < 8; ++i) {
      tickets.push_back(
          transport_->submit({.region = region.get(), .copies = copies, .fingerprints = sums})
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

// Strided, casting copies of `count` f32 at the source to bf16.
std::vector<StridedCopy> strided_casts(std::byte* target, uint32_t rows, uint32_t columns) {
  std::vector<StridedCopy> copies;
  for (uint32_t half = 0; half < 2; ++half) {
    copies.push_back({.source_offset_bytes = uint64_t{half} * (columns / 2) * 4,
                      .target = target + uint64_t{half} * rows * (columns / 2) * 2,
                      .linear_index = half * (columns / 2),
                      .fingerprint_key = 5,
                      .count = {1, rows, columns / 2},
                      .op = ElementOp::kF32ToBF16,
                      .fingerprint = true,
                      .source_stride = {0, columns, 1},
                      .target_stride = {0, columns / 2, 1},
                      .index_stride = {0, columns, 1}});
  }
  return copies;
}

TEST_F(CudaTransportTest, ReadsOfTheHostIntoTheDeviceAndBackAreStaged) {
  constexpr uint32_t kRows = 4099;
  constexpr uint32_t kColumns = 6004;  // 98 MB of f32: more than the buffers hold
  std::vector<std::byte> floats(uint64_t{kRows} * kColumns * 4);
  for (size_t i = 0; i < floats.size() / 4; ++i) {
    const float value = static_cast<float>(i % 100003) * 0.37F - 11111.0F;
    std::memcpy(floats.data() + i * 4, &value, 4);
  }
  std::vector<std::byte> expected(floats.size() / 2);
  std::vector<uint64_t> sums;
  for (const StridedCopy& copy : strided_casts(expected.data(), kRows, kColumns)) {
    sums.push_back(run_copy(copy, floats.data() + copy.source_offset_bytes));
  }
  copy_fence();
  // The source is memory of the host of this process, the target on the device.
  auto served = transport_->allocate(floats.size()).value();
  std::ranges::copy(floats, served->bytes().begin());
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const auto in_host = connection->open_region(served->descriptor(), soon()).value();
  target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, expected.size()).value();
  std::vector<uint64_t> found(2);
  auto up = read(*in_host, strided_casts(target_.as<std::byte>(), kRows, kColumns), found);
  ASSERT_TRUE(up) << up.error().to_string();
  EXPECT_EQ(found, sums);
  EXPECT_EQ(held(), expected);

  // And back: f32 on the device, bf16 in the host.
  const auto on_device = transport_->allocate_on_device(floats.size()).value();
  ASSERT_EQ(on_device->place(), MemoryPlace::kDevice);
  StridedCopy plain{.target = on_device->bytes().data(),
                    .count = {1, 1, static_cast<uint32_t>(floats.size())},
                    .source_stride = {0, 0, 1},
                    .target_stride = {0, 0, 1}};
  ASSERT_TRUE(read(*in_host, {&plain, 1}));
  const auto remote = connection->open_region(on_device->descriptor(), soon()).value();
  std::vector<std::byte> back(expected.size());
  std::ranges::fill(found, 0);
  auto down = read(*remote, strided_casts(back.data(), kRows, kColumns), found);
  ASSERT_TRUE(down) << down.error().to_string();
  EXPECT_EQ(found, sums);
  EXPECT_EQ(back, expected);
}

TEST_F(CudaTransportTest, MemoryOfTheHostThatIsMappedIsPinnedAndReadByTheDevice) {
  constexpr uint32_t kRows = 1031;
  constexpr uint32_t kColumns = 2004;
  const std::vector<std::byte> floats = pattern(uint64_t{kRows} * kColumns * 4, 8);
  auto served = transport_->allocate(floats.size()).value();
  std::ranges::copy(floats, served->bytes().begin());
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const auto region = connection->open_region(served->descriptor(), soon()).value();
  EXPECT_FALSE(region->joins_requests());
  region->expect_reads(MemoryPlace::kHost);
  EXPECT_FALSE(region->joins_requests());
  region->expect_reads(MemoryPlace::kDevice);
  ASSERT_TRUE(region->joins_requests());
  EXPECT_EQ(region->route(), "memfd, pinned");

  // A cast by the kernel; a whole piece by the copy engines, summed where it has landed.
  std::vector<std::byte> expected(floats.size() / 2);
  std::vector<uint64_t> sums;
  for (const StridedCopy& copy : strided_casts(expected.data(), kRows, kColumns)) {
    sums.push_back(run_copy(copy, floats.data() + copy.source_offset_bytes));
  }
  copy_fence();
  target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, expected.size()).value();
  std::vector<uint64_t> found(2);
  ASSERT_TRUE(read(*region, strided_casts(target_.as<std::byte>(), kRows, kColumns), found));
  EXPECT_EQ(found, sums);
  EXPECT_EQ(held(), expected);
  const auto copies = whole(floats.size(), uint32_t{3} << 20, true);
  found.assign(copies.size(), 0);
  ASSERT_TRUE(read(*region, copies, found));
  EXPECT_TRUE(held() == floats);
  for (size_t i = 0; i < copies.size(); ++i) {
    EXPECT_EQ(found[i], sum_copy(copies[i], floats.data() + copies[i].source_offset_bytes));
  }
  // Into the host it goes as before.
  std::vector<std::byte> back(floats.size());
  StridedCopy plain = copies[0];
  plain.target = back.data();
  ASSERT_TRUE(read(*region, {&plain, 1}));
  EXPECT_TRUE(std::equal(back.begin(), back.begin() + plain.count[2], floats.begin()));
}

// A matrix in blocks of 128x128 that share a scale, in a dtype on one side and fp8 on the other.
struct ScaledMatrix {
  static constexpr uint32_t kRows = 4100;
  static constexpr uint32_t kColumns = 6008;  // ragged at both ends
  static constexpr uint64_t kNumbers = uint64_t{kRows} * kColumns;
  static constexpr uint64_t kScaleBytes = uint64_t{33} * 47 * 4;

  ScaledMatrix(ElementOp op, std::byte* target, std::byte* scale_target) {
    scales.target = scale_target;
    scales.fingerprint_key = 6;
    scales.stride[0] = scales.index_stride[0] = 47;
    scales.stride[1] = scales.index_stride[1] = 1;
    copy = {.target = target,
            .fingerprint_key = 5,
            .count = {1, kRows, kColumns},
            .op = op,
            .fingerprint = true,
            .source_stride = {0, kColumns, 1},
            .target_stride = {0, kColumns, 1},
            .index_stride = {0, kColumns, 1},
            .scales = &scales};
  }
  BlockScales scales;
  StridedCopy copy;
};

// Every way between host and device, and within the device; scales in a region of their own.
TEST_F(CudaTransportTest, Fp8AndItsScalesGoBetweenHostAndDevice) {
  using Matrix = ScaledMatrix;
  const auto bytes_of = [](const auto& region) { return region->bytes(); };
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const auto open = [&](const auto& region) {
    return connection->open_region(region->descriptor(), soon()).value();
  };
  const auto run = [&](const RemoteRegion& region, const Matrix& matrix, uint64_t& sum,
                       const RemoteRegion* scales) -> Result<void> {
    const std::array regions = {&region};
    const std::array scale_regions = {scales};
    ReadRequest request{.region = &region, .copies = {&matrix.copy, 1}, .fingerprints = {&sum, 1}};
    request.scale_region = scales;
    if (region.joins_requests()) {
      request.regions = regions;
      request.scale_regions = scale_regions;
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket, transport_->submit(request));
    EXPECT_TRUE(transport_->wait_any({&ticket, 1}, soon()));
    return transport_->finish(ticket);
  };
  const auto to_device = [&](const RemoteRegion& from, const LocalRegion& to) {
    const StridedCopy plain{.target = to.bytes().data(),
                            .count = {1, 1, static_cast<uint32_t>(to.bytes().size())},
                            .source_stride = {0, 0, 1},
                            .target_stride = {0, 0, 1}};
    ASSERT_TRUE(read(from, {&plain, 1}));
  };
  const auto from_device = [&](const LocalRegion& from) {
    std::vector<std::byte> bytes(from.bytes().size());
    const StridedCopy plain{.target = bytes.data(),
                            .count = {1, 1, static_cast<uint32_t>(bytes.size())},
                            .source_stride = {0, 0, 1},
                            .target_stride = {0, 0, 1}};
    EXPECT_TRUE(read(*open(&from), {&plain, 1}));
    return bytes;
  };

  // What the CPU makes of it.
  const auto floats = transport_->allocate(Matrix::kNumbers * 4).value();
  for (uint64_t i = 0; i < Matrix::kNumbers; ++i) {
    const float value = (static_cast<float>(i % 100003) - 50000.5F) * 1e-6F;
    std::memcpy(bytes_of(floats).data() + i * 4, &value, 4);
  }
  const auto numbers = transport_->allocate(Matrix::kNumbers).value();
  const auto scales = transport_->allocate(Matrix::kScaleBytes).value();
  const Matrix quantising(ElementOp::kF32ToE4M3, bytes_of(numbers).data(), bytes_of(scales).data());
  const uint64_t sum = run_copy(quantising.copy, bytes_of(floats).data());
  std::vector<std::byte> wide(Matrix::kNumbers * 2);
  Matrix dequantising(ElementOp::kE4M3ToBF16, wide.data(), nullptr);
  dequantising.scales.fetched = bytes_of(scales).data();
  const uint64_t wide_sum = run_copy(dequantising.copy, bytes_of(numbers).data());
  copy_fence();

  const auto device_floats = transport_->allocate_on_device(Matrix::kNumbers * 4).value();
  const auto device_numbers = transport_->allocate_on_device(Matrix::kNumbers).value();
  const auto device_scales = transport_->allocate_on_device(Matrix::kScaleBytes).value();
  const auto device_wide = transport_->allocate_on_device(Matrix::kNumbers * 2).value();
  const auto host_floats = open(floats);
  to_device(*host_floats, *device_floats);
  std::vector<std::byte> back(Matrix::kNumbers);
  std::vector<std::byte> back_scales(Matrix::kScaleBytes);
  std::vector<std::byte> back_wide(Matrix::kNumbers * 2);
  const auto expect_fp8 = [&](std::span<const std::byte> found, std::span<const std::byte> of) {
    EXPECT_TRUE(std::ranges::equal(found, bytes_of(numbers)));
    EXPECT_TRUE(std::ranges::equal(of, bytes_of(scales)));
  };
  uint64_t found = 0;
  const Matrix into_device(ElementOp::kF32ToE4M3, device_numbers->bytes().data(),
                           device_scales->bytes().data());
  for (const auto* from : {&floats, &device_floats}) {
    auto done = run(*open(*from), into_device, found, nullptr);
    ASSERT_TRUE(done) << done.error().to_string();
    EXPECT_EQ(found, sum);
    expect_fp8(from_device(*device_numbers), from_device(*device_scales));
  }
  auto done = run(*open(device_floats),
                  Matrix(ElementOp::kF32ToE4M3, back.data(), back_scales.data()), found, nullptr);
  ASSERT_TRUE(done) << done.error().to_string();
  EXPECT_EQ(found, sum);
  expect_fp8(back, back_scales);

  const Matrix wide_on_device(ElementOp::kE4M3ToBF16, device_wide->bytes().data(), nullptr);
  for (const bool from_host : {true, false}) {
    done = run(*open(from_host ? numbers : device_numbers), wide_on_device, found,
               open(from_host ? scales : device_scales).get());
    ASSERT_TRUE(done) << done.error().to_string();
    EXPECT_EQ(found, wide_sum);
    EXPECT_TRUE(from_device(*device_wide) == wide);
  }
  const Matrix wide_in_host(ElementOp::kE4M3ToBF16, back_wide.data(), nullptr);
  done = run(*open(device_numbers), wide_in_host, found, open(device_scales).get());
  ASSERT_TRUE(done) << done.error().to_string();
  EXPECT_EQ(found, wide_sum);
  EXPECT_TRUE(back_wide == wide);
  // I13: too few scales, on a device and in the host.
  for (const auto* few : {&device_scales, &scales}) {
    Matrix beyond = wide_on_device;
    beyond.copy.scales = &beyond.scales;
    beyond.scales.source_offset_bytes = 4;
    const auto refused =
        run(*open(few == &scales ? numbers : device_numbers), beyond, found, open(*few).get());
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, ErrorCode::kCorrupt);
  }
}

TEST_F(CudaTransportTest, CopiesAndSumsWithinItsOwnMemory) {
  constexpr uint64_t kSize = 3 << 20;
  const auto a = transport_->allocate_on_device(kSize).value();
  const auto b = transport_->allocate_on_device(kSize).value();
  const std::vector<std::byte> bytes = pattern(kSize, 21);
  const RemoteRegion* own = transport_->own_memory().value();
  {
    const cuda::Current current = device_->use();
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync,
                               reinterpret_cast<CUdeviceptr>(a->bytes().data()),
                               reinterpret_cast<CUdeviceptr>(bytes.data()), kSize, stream_.get()));
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream_.get()));
  }
  StridedCopy copy{.source_offset_bytes = reinterpret_cast<uintptr_t>(a->bytes().data()),
                   .target = b->bytes().data(),
                   .fingerprint_key = 3,
                   .count = {1, 1, static_cast<uint32_t>(kSize)},
                   .fingerprint = true,
                   .source_stride = {0, 0, 1},
                   .target_stride = {0, 0, 1},
                   .index_stride = {0, 0, 1}};
  uint64_t copied = 0;
  ASSERT_TRUE(read(*own, {&copy, 1}, {&copied, 1}));
  StridedCopy sum = copy;
  sum.source_offset_bytes = reinterpret_cast<uintptr_t>(b->bytes().data());
  sum.target = nullptr;
  uint64_t summed = 0;
  ASSERT_TRUE(read(*own, {&sum, 1}, {&summed, 1}));
  EXPECT_EQ(copied, sum_copy(sum, bytes.data()));
  EXPECT_EQ(summed, copied);
}

TEST_F(CudaTransportTest, OneRequestJoinsRegions) {
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  std::vector<std::unique_ptr<LocalRegion>> regions;
  std::vector<std::unique_ptr<RemoteRegion>> opened;
  constexpr uint64_t kPart = 1 << 20;
  const RemoteRegion* own = transport_->own_memory().value();
  for (uint64_t i = 0; i < 40; ++i) {
    regions.push_back(transport_->allocate_on_device(kPart).value());
    const std::vector<std::byte> bytes = pattern(kPart, i);
    const cuda::Current current = device_->use();
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync,
                               reinterpret_cast<CUdeviceptr>(regions[i]->bytes().data()),
                               reinterpret_cast<CUdeviceptr>(bytes.data()), kPart, stream_.get()));
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream_.get()));
    opened.push_back(connection->open_region(regions[i]->descriptor(), soon()).value());
    ASSERT_TRUE(opened[i]->joins_requests());
  }
  ASSERT_TRUE(own->joins_requests());
  target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, 40 * kPart).value();
  std::vector<StridedCopy> copies;
  std::vector<const RemoteRegion*> of_copy;
  std::vector<std::byte> expected;
  for (uint64_t i = 0; i < 40; ++i) {
    copies.push_back({.target = target_.as<std::byte>() + i * kPart,
                      .count = {1, 1, static_cast<uint32_t>(kPart)},
                      .source_stride = {0, 0, 1},
                      .target_stride = {0, 0, 1}});
    of_copy.push_back(opened[39 - i].get());
    const std::vector<std::byte> bytes = pattern(kPart, 39 - i);
    expected.insert(expected.end(), bytes.begin(), bytes.end());
  }
  for (int cycle = 0; cycle < 3; ++cycle) {
    const auto ticket = transport_->submit(
        {.region = of_copy[0], .copies = copies, .fingerprints = {}, .regions = of_copy});
    ASSERT_TRUE(ticket) << ticket.error().to_string();
    ASSERT_TRUE(transport_->wait_any({&*ticket, 1}, soon()));
    ASSERT_TRUE(transport_->finish(*ticket));
    EXPECT_EQ(held(), expected);
  }
}

// Copies that are ready on the device were checked against the region that they read then.
TEST_F(CudaTransportTest, I13_TheSameCopiesOfASmallerRegionAreRefused) {
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  constexpr uint64_t kSize = 1 << 20;
  const auto large = transport_->allocate_on_device(kSize).value();
  const auto small = transport_->allocate_on_device(kSize / 2).value();
  const auto opened = connection->open_region(large->descriptor(), soon()).value();
  const auto smaller = connection->open_region(small->descriptor(), soon()).value();
  const auto copies = whole(kSize, kSize, false);
  ASSERT_TRUE(read(*opened, copies));
  const auto refused = read(*smaller, copies);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kCorrupt) << refused.error().to_string();
  ASSERT_TRUE(read(*opened, copies));
}

TEST_F(CudaTransportTest, ATicketThatHasLandedKnowsItsBytesWhenManyOthersHaveComeAndGone) {
  const auto own = transport_->own_memory().value();
  constexpr uint64_t kSize = 4096;
  const auto source = transport_->allocate_on_device(kSize).value();
  auto copies = whole(kSize, kSize, false);
  copies[0].source_offset_bytes = reinterpret_cast<uint64_t>(source->bytes().data());
  const TicketId landed = transport_->submit({.region = own, .copies = copies}).value();
  ASSERT_TRUE(transport_->wait_any({&landed, 1}, soon()));
  for (uint32_t size = 1; size <= 200; ++size) {
    StridedCopy other = copies[0];
    other.count[2] = size;
    ASSERT_TRUE(read(*own, {&other, 1}));
  }
  EXPECT_EQ(transport_->progress_bytes(landed), kSize);
  EXPECT_TRUE(transport_->finish(landed));
}

TEST_F(CudaTransportTest, TheSameCopiesWithARegionOfScalesThatNoneReadsAreAnotherRequest) {
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const auto numbers = transport_->allocate_on_device(1 << 20).value();
  const auto scales = transport_->allocate_on_device(4096).value();
  const auto opened = connection->open_region(numbers->descriptor(), soon()).value();
  const auto of_scales = connection->open_region(scales->descriptor(), soon()).value();
  const auto copies = whole(1 << 20, 1 << 20, false);
  for (const RemoteRegion* region : {of_scales.get(), static_cast<RemoteRegion*>(nullptr)}) {
    const auto ticket =
        transport_->submit({.region = opened.get(), .copies = copies, .scale_region = region});
    ASSERT_TRUE(ticket) << ticket.error().to_string();
    ASSERT_TRUE(transport_->wait_any({&*ticket, 1}, soon()));
    ASSERT_TRUE(transport_->finish(*ticket));
  }
}

TEST_F(CudaTransportTest, ATargetThatTheKernelCannotWriteIsRefused) {
  const auto region = transport_->allocate_on_device(4096).value();
  const auto connection = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  const auto opened = connection->open_region(region->descriptor(), soon()).value();
  target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, 4096).value();
  std::vector<std::byte> in_host(64);
  std::vector<StridedCopy> copies(2);
  for (StridedCopy& copy : copies) {
    copy.count[2] = 64;
    copy.source_stride[2] = copy.target_stride[2] = 1;
  }
  copies[0].target = target_.as<std::byte>();
  copies[1].target = in_host.data();
  const auto refused = transport_->submit({.region = opened.get(), .copies = copies});
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kUnsupported) << refused.error().to_string();
  // Nor where it cannot write the scales.
  const BlockScales scales{.target = in_host.data(), .stride = {1, 1}};
  StridedCopy fp8{.target = target_.as<std::byte>(),
                  .count = {1, 4, 16},
                  .op = ElementOp::kF32ToE4M3,
                  .source_stride = {0, 16, 1},
                  .target_stride = {0, 16, 1},
                  .scales = &scales};
  const auto unscaled = transport_->submit({.region = opened.get(), .copies = {&fp8, 1}});
  ASSERT_FALSE(unscaled);
  EXPECT_EQ(unscaled.error().code, ErrorCode::kUnsupported) << unscaled.error().to_string();
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
  const auto memory = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, 4 << 20).value();
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

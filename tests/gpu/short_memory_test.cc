// Memory that runs out: at every call of the driver that may say so, in everything the transport
// does. Each time the error says what it was, nothing is left behind, and the same is done again.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gpu/gpu_fixture.h"
#include "gpu/mapped_memory.h"
#include "gpu/pattern.h"
#include "gpu/short_driver.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/open_transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kSize = 3 * kMiB + 4096;

StridedCopy piece(uint64_t source_offset, std::byte* target, uint64_t size) {
  return {.source_offset_bytes = source_offset,
          .target = target,
          .linear_index = source_offset,
          .fingerprint_key = 7,
          .count = {1, 1, static_cast<uint32_t>(size)},
          .fingerprint = true,
          .source_stride = {0, 0, 1},
          .target_stride = {0, 0, 1},
          .index_stride = {0, 0, 1}};
}

// Everything that a transport does, a step at a time. Its driver is the short one; memory that the
// steps move between is not of it.
class Everything {
 public:
  struct World {
    Transport& peers_reader;                // reads what the transport offers, with memory enough
    std::string folder;                     // of the transport's host
    std::vector<std::string> endpoints;     // of peers
    std::vector<RegionDescriptor> sources;  // theirs
    std::byte* target = nullptr;            // kSize bytes of the device
    std::span<std::byte> mapped;            // memory of the device, by virtual memory mapping
    std::span<std::byte> floats;            // as source of what is quantised
    int device = 0;
  };
  Everything(const ShortDriver& driver, World& world) : driver_(driver), world_(world) {}

  using Step = std::pair<std::string, std::function<Result<void>()>>;
  std::vector<Step> steps() {
    std::vector<Step> all = {
        {"open", [&] { return open(); }},
        {"a snapshot's memory", [&] { return allocate(); }},
        {"registration of mapped memory", [&] { return register_mapped(); }},
        {"handles for a peer", [&] { return let_a_peer_open(); }},
    };
    for (size_t i = 0; i < world_.sources.size(); ++i) {
      const std::string name = fmt::format("source {}", i);
      all.push_back({name + ": connect and open", [this, i] { return open_source(i); }});
      all.push_back({name + ": read", [this, i] { return read_source(i, {}); }});
      all.push_back({name + ": read at a pace",
                     [this, i] { return read_source(i, {.gigabytes_per_second = 4}); }});
    }
    all.push_back({"host to device", [&] { return stage(true); }});
    all.push_back({"device to host", [&] { return stage(false); }});
    all.push_back({"pinned host to device", [&] { return read_pinned(); }});
    all.push_back({"fp8", [&] { return quantise(); }});
    return all;
  }

 private:
  Result<void> open() {
    TRANSFUSE_ASSIGN_OR_RETURN(std::shared_ptr<cuda::Devices> devices,
                               cuda::Devices::open(driver_.get()));
    TRANSFUSE_ASSIGN_OR_RETURN(auto host, open_shm_transport(world_.folder));
    TRANSFUSE_ASSIGN_OR_RETURN(
        transport_, cuda::open_transport(std::move(host), std::move(devices), world_.device));
    return {};
  }
  Result<void> allocate() {
    TRANSFUSE_ASSIGN_OR_RETURN(slot_, transport_->allocate_on_device(kSize));
    return {};
  }
  Result<void> register_mapped() {
    TRANSFUSE_ASSIGN_OR_RETURN(offered_, transport_->register_memory(world_.mapped));
    return {};
  }
  Result<void> let_a_peer_open() {
    TRANSFUSE_ASSIGN_OR_RETURN(const std::string endpoint, transport_->endpoint());
    TRANSFUSE_ASSIGN_OR_RETURN(const auto peer, world_.peers_reader.connect(endpoint, "", soon()));
    TRANSFUSE_ASSIGN_OR_RETURN(const auto region,
                               peer->open_region(offered_->descriptor(), soon()));
    return {};
  }
  Result<void> open_source(size_t i) {
    TRANSFUSE_ASSIGN_OR_RETURN(peers_[i], transport_->connect(world_.endpoints[i], "", soon()));
    TRANSFUSE_ASSIGN_OR_RETURN(regions_[i], peers_[i]->open_region(world_.sources[i], soon()));
    return {};
  }
  Result<void> read(const RemoteRegion& region, std::span<const StridedCopy> copies,
                    const CopyLimits& limits = {}) {
    std::vector<uint64_t> sums(copies.size());
    TRANSFUSE_ASSIGN_OR_RETURN(
        const TicketId ticket,
        transport_->submit(
            {.region = &region, .copies = copies, .fingerprints = sums, .limits = limits}));
    if (!transport_->wait_any({&ticket, 1}, soon())) {
      transport_->cancel(ticket);
      return Error{ErrorCode::kDeadlineExceeded, "the read did not end"};
    }
    return transport_->finish(ticket);
  }
  // Long pieces and short ones: both engines.
  Result<void> read_source(size_t i, const CopyLimits& limits) {
    std::vector<StridedCopy> copies = {piece(0, world_.target, 2 * kMiB),
                                       piece(2 * kMiB, world_.target + 2 * kMiB, kMiB),
                                       piece(3 * kMiB, world_.target + 3 * kMiB, 4096)};
    copies[1].fingerprint = false;
    return read(*regions_[i], copies, limits);
  }
  Result<void> stage(bool to_device) {
    if (own_peer_ == nullptr) {
      TRANSFUSE_ASSIGN_OR_RETURN(const std::string endpoint, transport_->endpoint());
      TRANSFUSE_ASSIGN_OR_RETURN(own_peer_, transport_->connect(endpoint, "", soon()));
      TRANSFUSE_ASSIGN_OR_RETURN(in_host_, transport_->allocate(kSize));
      const auto bytes = pattern(kSize, 5);
      std::ranges::copy(bytes, in_host_->bytes().begin());
    }
    // Every second byte: rectangles, which go row by row.
    const auto half = static_cast<uint32_t>(kSize / 4096);
    const StridedCopy copy{.target = to_device ? slot_->bytes().data() : in_host_->bytes().data(),
                           .fingerprint_key = 3,
                           .count = {1, half, 2048},
                           .fingerprint = true,
                           .source_stride = {0, 4096, 1},
                           .target_stride = {0, 4096, 1},
                           .index_stride = {0, 2048, 1}};
    TRANSFUSE_ASSIGN_OR_RETURN(
        const auto region,
        own_peer_->open_region((to_device ? in_host_ : slot_)->descriptor(), soon()));
    return read(*region, {&copy, 1});
  }
  // Where nothing can be pinned, or no longer, the read is staged.
  Result<void> read_pinned() {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto region,
                               own_peer_->open_region(in_host_->descriptor(), soon()));
    region->expect_reads(MemoryPlace::kDevice);
    const StridedCopy copy = piece(0, slot_->bytes().data(), 2 * kMiB);
    return read(*region, {&copy, 1});
  }
  Result<void> quantise() {
    std::byte* const target = world_.target;
    const BlockScales scales{.target = target + kMiB, .stride = {2, 1}};
    StridedCopy copy{.source_offset_bytes = reinterpret_cast<uint64_t>(world_.floats.data()),
                     .target = target,
                     .count = {1, 256, 256},
                     .op = ElementOp::kF32ToE4M3,
                     .fingerprint = true,
                     .source_stride = {0, 256, 1},
                     .target_stride = {0, 256, 1},
                     .index_stride = {0, 256, 1},
                     .scales = &scales};
    TRANSFUSE_ASSIGN_OR_RETURN(const RemoteRegion* own, transport_->own_memory());
    return read(*own, {&copy, 1});
  }

  const ShortDriver& driver_;
  World& world_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<LocalRegion> slot_;
  std::unique_ptr<LocalRegion> offered_;
  std::unique_ptr<LocalRegion> in_host_;
  std::map<size_t, std::unique_ptr<Peer>> peers_;
  std::unique_ptr<Peer> own_peer_;
  std::map<size_t, std::unique_ptr<RemoteRegion>> regions_;
};

class ShortMemoryTest : public CudaTransportTest {
 protected:
  void SetUp() override {
    CudaTransportTest::SetUp();
    if (IsSkipped()) return;
    target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, kSize).value();
    floats_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, kMiB).value();
    ASSERT_TRUE(floats_.clear());
    mapped_ = MappedMemory::create(*device_, {.count = 2, .range_bytes = 2 * kMiB}).value();
    mine_ = folder_ + "/mine";
    ASSERT_TRUE(std::filesystem::create_directory(mine_));
    std::filesystem::permissions(mine_, std::filesystem::perms::owner_all);
  }
  void TearDown() override {
    mapped_.reset();
    floats_ = cuda::Memory();
    CudaTransportTest::TearDown();
  }

  cuda::Memory floats_;
  std::unique_ptr<MappedMemory> mapped_;
  std::string mine_;
};

TEST_F(ShortMemoryTest, I3_MemoryThatRunsOutAtAnyCallIsAnErrorAndNothingIsLost) {
  std::vector<std::unique_ptr<GpuPeer>> peers;
  Everything::World world{.peers_reader = *transport_,
                          .folder = mine_,
                          .endpoints = {},
                          .sources = {},
                          .target = target_.as<std::byte>(),
                          .mapped = {reinterpret_cast<std::byte*>(mapped_->address()), 4 * kMiB},
                          .floats = {floats_.as<std::byte>(), kMiB}};
  for (int ordinal = 0; ordinal < std::min(device_count_, 2); ++ordinal) {
    for (const std::string& command :
         {fmt::format("allocate {} 5", kSize), fmt::format("map 2 {} 5", 2 * kMiB)}) {
      peers.push_back(std::make_unique<GpuPeer>(folder_, ordinal));
      world.endpoints.push_back(peers.back()->endpoint());
      world.sources.push_back(peers.back()->region_of(command));
    }
  }
  std::map<std::string, int> failures;
  uint64_t free = 0;
  // Call 0 of the transport fails, call 1, and so on; the first turn warms what the driver keeps.
  constexpr int64_t kWarm = -1;
  for (int64_t call = kWarm; !HasFailure(); ++call) {
    SCOPED_TRACE(fmt::format("call {}", call));
    ShortDriver driver(device_->driver());
    driver.fail_at(call);
    {
      Everything everything(driver, world);
      for (const auto& [name, step] : everything.steps()) {
        SCOPED_TRACE(name);
        const bool reads = name.find(": read") != std::string::npos;
        if (reads) {
          ASSERT_TRUE(target_.clear());
        }
        auto outcome = step();
        if (!outcome) {
          ASSERT_NE(driver.failed(), nullptr) << outcome.error().to_string();
          ++failures[fmt::format("{}: {}", driver.failed(), outcome.error().to_string())];
          EXPECT_EQ(outcome.error().code, ErrorCode::kResourceExhausted)
              << driver.failed() << ": " << outcome.error().to_string();
          outcome = step();
        }
        ASSERT_TRUE(outcome) << outcome.error().to_string();
        if (reads) {
          ASSERT_TRUE(held() == pattern(kSize, 5));
        }
      }
    }
    EXPECT_EQ(driver.alive(), decltype(driver.alive()){}) << "made and not taken back";
    if (call == kWarm) {
      free = free_bytes();
    } else if (driver.failed() == nullptr) {
      break;  // there is no such call any more
    }
  }
  // What the driver itself keeps of small allocations may differ; regions would be more.
  EXPECT_GE(free_bytes() + 2 * kMiB, free);
  EXPECT_GT(failures.size(), 20U);
  for (const auto& [what, times] : failures) fmt::print("{} times {}\n", times, what);
}

// Copies of both engines, any call of whose launch fails: what began before has ended.
TEST_F(ShortMemoryTest, I11_ALaunchThatFailedHalfwayWritesNothingAfterItsError) {
  constexpr uint64_t kBytes = 24 * kMiB;
  const cuda::Memory source =
      cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, kBytes).value();
  target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, kBytes).value();
  const std::vector<std::byte> bytes = pattern(kBytes, 6);
  {
    const cuda::Current current = device_->use();
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuMemcpyAsync, source.address(),
                               reinterpret_cast<CUdeviceptr>(bytes.data()), kBytes, stream_.get()));
    ASSERT_TRUE(TRANSFUSE_CUDA(device_->driver(), cuStreamSynchronize, stream_.get()));
  }
  // The shorter ones are the kernel's.
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < kBytes;) {
    const uint64_t size = at < 8 * kMiB ? 4 * kMiB : kMiB / 2;
    copies.push_back(piece(at, target_.as<std::byte>() + at, size));
    at += size;
  }
  const std::vector<uint32_t> sources(copies.size(), 0);
  const std::array<CUdeviceptr, 1> bases = {source.address()};
  for (const bool engines : {false, true}) {
    int failures = 0;
    for (int64_t call = 0;; ++call) {
      SCOPED_TRACE(fmt::format("call {}", call));
      ShortDriver driver(device_->driver());
      const auto device = cuda::Device::open(driver.get(), 0).value();
      auto prepared = cuda::PreparedCopies::make(*device, copies, sources, 1,
                                                 {.engines = {.copy_engines = engines}})
                          .value();
      const cuda::Stream stream = cuda::Stream::create(*device).value();
      ASSERT_TRUE(target_.clear());
      driver.fail_at(call);
      const auto launched = prepared.launch(bases, {.stream = stream.get()});
      const std::vector<std::byte> now = held();
      {
        const cuda::Current current = device->use();
        ASSERT_TRUE(TRANSFUSE_CUDA(device->driver(), cuStreamSynchronize, stream.get()));
      }
      if (launched) {
        EXPECT_TRUE(held() == bytes);
        break;
      }
      ++failures;
      EXPECT_EQ(launched.error().code, ErrorCode::kResourceExhausted);
      EXPECT_TRUE(held() == now) << driver.failed();
    }
    EXPECT_GE(failures, engines ? 5 : 4);  // bases, sums cleared, the launches, sums fetched
  }
}

}  // namespace
}  // namespace transfuse

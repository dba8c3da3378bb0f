// What a transport promises about single reads: the bytes, the bounds, the ends.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/random.h"
#include "conformance/conformance_fixture.h"
#include "conformance/peer_commands.h"
#include "conformance/peer_group.h"
#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {
namespace {

class TransportTest : public Conformance {};
INSTANTIATE_TEST_SUITE_P(Backends, TransportTest, testing::ValuesIn(all_backends()), backend_name);

TEST_P(TransportTest, ReadsWhatAPeerAllocatedAndWrote) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto descriptor = peer->allocate(3 << 20, 5);
  const auto region = connection->open_region(descriptor, soon()).value();
  EXPECT_EQ(region->size_bytes(), uint64_t{3} << 20);
  EXPECT_FALSE(region->route().empty());
  EXPECT_TRUE(connection->alive());
  const Target target = make_target(3 << 20);
  EXPECT_TRUE(read(*region, pieces(target, 1 << 20)));
  EXPECT_EQ(target.bytes(), pattern(3 << 20, 5));
  // What the peer writes later is seen by the next read, through the same handle.
  peer->fill(descriptor, 6);
  EXPECT_TRUE(read(*region, pieces(target, 1 << 20)));
  EXPECT_EQ(target.bytes(), pattern(3 << 20, 6));
  EXPECT_EQ(reader_->stats().read_bytes, uint64_t{6} << 20);
}

TEST_P(TransportTest, ReadsMemoryThatThePeersCallerOwns) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto descriptor = peer->register_memory(2500001, 7);
  const auto region = connection->open_region(descriptor, soon()).value();
  const Target target = make_target(2500001);
  EXPECT_TRUE(read(*region, pieces(target, 700)));
  EXPECT_EQ(target.bytes(), pattern(2500001, 7));
  peer->fill(descriptor, 8);
  EXPECT_TRUE(read(*region, pieces(target, 1 << 20)));
  EXPECT_EQ(target.bytes(), pattern(2500001, 8));
}

TEST_P(TransportTest, AllocatedMemoryIsZeroedPageAlignedAndWritable) {
  auto region = reader_->allocate(10000).value();
  EXPECT_EQ(region->bytes().size(), 10000u);
  EXPECT_EQ(region->descriptor().size_bytes, 10000u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(region->bytes().data()) % 4096, 0u);
  EXPECT_TRUE(std::all_of(region->bytes().begin(), region->bytes().end(),
                          [](std::byte b) { return b == std::byte{0}; }));
  std::fill(region->bytes().begin(), region->bytes().end(), std::byte{1});
  EXPECT_EQ(reader_->allocate(0).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(reader_->register_memory({}).error().code, ErrorCode::kInvalidArgument);
}

// Any shape inside [0, source_bytes), any op; targets of one request do not meet.
std::vector<StridedCopy> random_copies(Random& random, uint64_t source_bytes,
                                       std::vector<std::byte>& target) {
  constexpr std::array<ElementOp, kElementOpCount> kOps = {
      ElementOp::kCopy1,     ElementOp::kCopy2,    ElementOp::kCopy4,     ElementOp::kCopy8,
      ElementOp::kF32ToBF16, ElementOp::kF32ToF16, ElementOp::kBF16ToF32, ElementOp::kF16ToF32};
  std::vector<StridedCopy> copies;
  std::vector<uint64_t> starts;
  uint64_t end = 0;
  const uint64_t wanted = 1 + random.below(40);
  while (copies.size() < wanted) {
    StridedCopy copy;
    copy.op = kOps[random.below(kOps.size())];
    copy.fingerprint = random.chance(0.6);
    copy.fingerprint_key = random.next();
    copy.linear_index = random.below(1u << 20);
    int64_t span = 1;
    for (size_t level = 3; level-- > 0;) {
      copy.count[level] = 1 + static_cast<uint32_t>(random.below(level == 2 ? 300 : 6));
      copy.source_stride[level] = 1 + static_cast<int64_t>(random.below(level == 2 ? 3 : 900));
      copy.target_stride[level] = span + static_cast<int64_t>(random.below(3));
      copy.index_stride[level] = static_cast<int64_t>(random.below(1000));
      span = copy.target_stride[level] * copy.count[level];
    }
    copy.source_offset_bytes = random.below(source_bytes);
    if (copy.source_end_bytes() > source_bytes) continue;
    starts.push_back(end + random.below(9));
    end = starts.back() + static_cast<uint64_t>(span) * target_element_bytes(copy.op);
    copies.push_back(copy);
  }
  target.assign(end, std::byte{0x5A});
  for (size_t i = 0; i < copies.size(); ++i) copies[i].target = target.data() + starts[i];
  return copies;
}

TEST_P(TransportTest, StridesCastsAndFingerprintsAreThoseOfTheSlowModel) {
  constexpr uint64_t kSize = 200000;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto mapped = connection->open_region(peer->allocate(kSize, 21), soon()).value();
  const auto owned = connection->open_region(peer->register_memory(kSize, 22), soon()).value();
  const auto mapped_bytes = pattern(kSize, 21);
  const auto owned_bytes = pattern(kSize, 22);
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const bool use_mapped = seed % 2 == 0;
    std::vector<std::byte> expected;
    auto copies = random_copies(random, kSize, expected);
    const Target target = make_target(expected);
    std::vector<uint64_t> starts;
    for (StridedCopy& copy : copies) {
      starts.push_back(static_cast<uint64_t>(copy.target - expected.data()));
      copy.target = target.data() + starts.back();
    }
    std::vector<uint64_t> sums(copies.size(), 1);
    std::vector<uint64_t> expected_sums(copies.size(), 1);
    for (size_t i = 0; i < copies.size(); ++i) {
      const auto& bytes = use_mapped ? mapped_bytes : owned_bytes;
      const uint64_t sum = slow_copy(copies[i], bytes.data() + copies[i].source_offset_bytes,
                                     expected.data() + starts[i]);
      if (copies[i].fingerprint) expected_sums[i] = sum;
    }
    const auto outcome = read(use_mapped ? *mapped : *owned, copies, sums);
    ASSERT_TRUE(outcome) << outcome.error().to_string();
    ASSERT_TRUE(target.bytes() == expected);
    ASSERT_EQ(sums, expected_sums);
  }
}

// A copy to or from fp8 inside [0, source_bytes), its scales, and what it writes.
struct ScaledRead {
  StridedCopy copy;
  BlockScales scales;
  std::vector<std::byte> target;
  std::vector<std::byte> written_scales;
};

void random_scaled_read(Random& random, uint64_t source_bytes, ScaledRead& made) {
  StridedCopy& copy = made.copy;
  do {
    made.scales = {};
    copy = {};
    copy.op = static_cast<ElementOp>(kElementOpCount + static_cast<int>(random.below(6)));
    copy.fingerprint = random.chance(0.6);
    copy.fingerprint_key = random.next();
    for (int axis = 0; axis < 2; ++axis) {
      copy.count[axis + 1] = 1 + static_cast<uint32_t>(random.below(60));
      copy.source_stride[axis + 1] = 1 + static_cast<int64_t>(random.below(axis == 0 ? 900 : 3));
      copy.index_stride[axis + 1] = static_cast<int64_t>(random.below(1000));
      made.scales.block[axis] = 1 + static_cast<uint32_t>(random.below(9));
      made.scales.stride[axis] = 1 + static_cast<int64_t>(random.below(9));
      made.scales.index_stride[axis] = static_cast<int64_t>(random.below(9));
      if (!quantizes(copy.op)) {
        made.scales.phase[axis] = static_cast<uint32_t>(random.below(made.scales.block[axis]));
      }
    }
    copy.target_stride[1] = copy.count[2];
    copy.target_stride[2] = 1;
    copy.scales = &made.scales;
    if (quantizes(copy.op)) {
      made.scales.stride[0] = static_cast<int64_t>(copy.block_count(1));
      made.scales.stride[1] = 1;
    }
    copy.source_offset_bytes = random.below(source_bytes);
    made.scales.source_offset_bytes = random.below(source_bytes);
  } while (!check_copy(copy, source_bytes));
  made.target.assign(copy.element_count() * target_element_bytes(copy.op), std::byte{0x5A});
  made.written_scales.assign(copy.block_count(0) * copy.block_count(1) * sizeof(float),
                             std::byte{0});
}

TEST_P(TransportTest, Fp8BlocksAndTheirScalesAreThoseOfTheSlowModel) {
  constexpr uint64_t kSize = 200000;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto mapped = connection->open_region(peer->allocate(kSize, 21), soon()).value();
  const auto owned = connection->open_region(peer->register_memory(kSize, 22), soon()).value();
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const bool use_mapped = seed % 2 == 0;
    const bool scales_mapped = seed % 4 < 2;  // where they are read
    const auto bytes = pattern(kSize, use_mapped ? 21 : 22);
    const auto scale_bytes = pattern(kSize, scales_mapped ? 21 : 22);
    ScaledRead made;
    random_scaled_read(random, kSize, made);
    made.scales.fetched = scale_bytes.data() + made.scales.source_offset_bytes;
    std::vector<std::byte> expected = made.target;
    std::vector<std::byte> expected_scales = made.written_scales;
    const Target target = make_target(expected);
    const Target scales = make_target(expected_scales);
    made.copy.target = target.data();
    made.scales.target = scales.data();
    const uint64_t sum = slow_scaled_copy(made.copy, bytes.data() + made.copy.source_offset_bytes,
                                          expected.data(), expected_scales.data());
    made.scales.fetched = nullptr;
    uint64_t found = 1;
    const auto outcome = read(use_mapped ? *mapped : *owned, {&made.copy, 1}, {&found, 1},
                              scales_mapped ? mapped.get() : owned.get());
    ASSERT_TRUE(outcome) << outcome.error().to_string();
    ASSERT_TRUE(target.bytes() == expected);
    EXPECT_TRUE(scales.bytes() == expected_scales);
    ASSERT_EQ(found, made.copy.fingerprint ? sum : 1);
  }
}

TEST_P(TransportTest, I13_ScalesBeyondTheirOwnRegionAreRefused) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto numbers = connection->open_region(peer->allocate(4096, 1), soon()).value();
  const auto few = connection->open_region(peer->register_memory(8, 1), soon()).value();
  std::vector<uint16_t> target(4096);
  BlockScales scales{.block = {16, 32}, .stride = {2, 1}};
  StridedCopy copy;
  copy.op = ElementOp::kE4M3ToBF16;
  copy.target = reinterpret_cast<std::byte*>(target.data());
  copy.scales = &scales;
  copy.count[1] = copy.count[2] = 64;  // 4 by 2 blocks
  copy.source_stride[1] = copy.target_stride[1] = 64;
  copy.source_stride[2] = copy.target_stride[2] = 1;
  const auto outcome = read(*numbers, {&copy, 1}, {}, few.get());
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(target, std::vector<uint16_t>(4096));
  copy.count[1] = 16;  // one row of blocks
  EXPECT_TRUE(read(*numbers, {&copy, 1}, {}, few.get()));
  scales.source_offset_bytes = 1;
  EXPECT_FALSE(read(*numbers, {&copy, 1}, {}, few.get()));
}

TEST_P(TransportTest, WhereTheRegionOfTheScalesIsClosedNothingIsReadAnyMore) {
  constexpr uint32_t kSide = 2048;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto numbers =
      connection->open_region(peer->allocate(uint64_t{kSide} * kSide, 1), soon()).value();
  auto others = connection->open_region(peer->allocate(uint64_t{kSide} * kSide * 4, 2), soon());
  std::vector<uint16_t> target(uint64_t{kSide} * kSide);
  const BlockScales scales{.block = {1, 1}, .stride = {kSide, 1}};
  StridedCopy copy;
  copy.op = ElementOp::kE4M3ToBF16;
  copy.target = reinterpret_cast<std::byte*>(target.data());
  copy.scales = &scales;
  copy.count[1] = copy.count[2] = kSide;
  copy.source_stride[1] = copy.target_stride[1] = kSide;
  copy.source_stride[2] = copy.target_stride[2] = 1;
  const auto ticket = reader_->submit(
      {.region = numbers.get(), .copies = {&copy, 1}, .scale_region = others->get()});
  ASSERT_TRUE(ticket) << ticket.error().to_string();
  others->reset();  // ends the ticket before the scales go
  EXPECT_NE(reader_->poll(*ticket), TicketState::kPending);
  const auto before = target;
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_TRUE(target == before);
  static_cast<void>(reader_->finish(*ticket));
}

TEST_P(TransportTest, ProgressGrowsToTheTargetBytesOfTheRequest) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto region = connection->open_region(peer->allocate(16 << 20, 1), soon()).value();
  const Target target = make_target(16 << 20);
  const auto copies = pieces(target, 1 << 18);
  const TicketId ticket = reader_->submit({.region = region.get(), .copies = copies}).value();
  uint64_t last = 0;
  const Deadline deadline = soon();
  while (reader_->poll(ticket) == TicketState::kPending && !deadline.passed()) {
    const uint64_t now = reader_->progress_bytes(ticket);
    EXPECT_GE(now, last);
    last = now;
  }
  EXPECT_EQ(reader_->poll(ticket), TicketState::kLanded);
  EXPECT_EQ(reader_->progress_bytes(ticket), target.size());
  EXPECT_TRUE(reader_->finish(ticket));
  EXPECT_EQ(target.bytes(), pattern(16 << 20, 1));
}

TEST_P(TransportTest, AnEmptyRequestLands) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto region = connection->open_region(peer->allocate(64, 1), soon()).value();
  EXPECT_TRUE(read(*region, {}));
  StridedCopy nothing = bytes_copy(64, nullptr, 0);
  EXPECT_TRUE(read(*region, {&nothing, 1}));
}

TEST_P(TransportTest, I13_AReadBeyondTheRegionIsRefusedAndWritesNothing) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const std::array regions = {
      connection->open_region(peer->allocate(4096, 1), soon()).value(),
      connection->open_region(peer->register_memory(4096, 1), soon()).value()};
  const Target target = make_target(8192);
  const auto expect_refused = [&](const StridedCopy& bad) {
    for (const auto& region : regions) {
      const StridedCopy copies[] = {bytes_copy(0, target.data(), 4096), bad};
      EXPECT_EQ(reader_->submit({.region = region.get(), .copies = copies}).error().code,
                ErrorCode::kCorrupt);
    }
  };
  expect_refused(bytes_copy(1, target.data() + 4096, 4096));
  expect_refused(bytes_copy(4097, target.data() + 4096, 1));
  expect_refused(bytes_copy(std::numeric_limits<uint64_t>::max(), target.data() + 4096, 1));
  expect_refused(bytes_copy(std::numeric_limits<uint64_t>::max() - 100, target.data() + 4096, 200));
  StridedCopy strided = bytes_copy(0, target.data() + 4096, 2);
  strided.source_stride[2] = 4096;
  expect_refused(strided);
  strided.source_stride[2] = std::numeric_limits<int64_t>::max();
  expect_refused(strided);
  strided.source_stride[2] = -1;
  expect_refused(strided);
  strided = bytes_copy(0, target.data() + 4096, 1024);
  strided.op = ElementOp::kCopy8;
  expect_refused(strided);
  EXPECT_EQ(target.bytes(), std::vector<std::byte>(8192));
  EXPECT_EQ(reader_->stats().tickets, 0u);
}

TEST_P(TransportTest, I13_ARegionThatWasAnnouncedLargerOrSmallerThanItIsDoesNotOpen) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  for (const RegionDescriptor& real : {peer->allocate(8192, 1), peer->register_memory(8192, 1)}) {
    for (const uint64_t lie : {uint64_t{8193}, uint64_t{1} << 40, uint64_t{8191}, uint64_t{0},
                               std::numeric_limits<uint64_t>::max()}) {
      const auto opened = connection->open_region({real.id, lie}, soon());
      ASSERT_FALSE(opened) << lie;
      EXPECT_EQ(opened.error().code, ErrorCode::kCorrupt) << opened.error().to_string();
    }
    EXPECT_TRUE(connection->open_region(real, soon()));
  }
}

TEST_P(TransportTest, ARegionThatThePeerReleasedOrNeverHadIsNotFound) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto first = peer->allocate(4096, 1);
  const auto second = peer->register_memory(4096, 2);
  peer->drop(first);
  peer->drop(second);
  for (const RegionDescriptor& gone :
       {first, second, RegionDescriptor{RegionId{987654321}, 4096}}) {
    EXPECT_EQ(connection->open_region(gone, soon()).error().code, ErrorCode::kNotFound);
  }
  const auto third = peer->allocate(4096, 3);
  EXPECT_NE(third.id, first.id);
  EXPECT_NE(third.id, second.id);
  EXPECT_TRUE(connection->open_region(third, soon()));
}

TEST_P(TransportTest, MemoryThatWasOpenedBeforeItsReleaseStaysSafeToRead) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto descriptor = peer->allocate(1 << 20, 4);
  const auto region = connection->open_region(descriptor, soon()).value();
  peer->drop(descriptor);
  const Target target = make_target(1 << 20);
  const auto outcome = read(*region, pieces(target, 1 << 20));
  if (on_device(GetParam().of_peers())) {  // it is the allocator's again: nobody may read it
    ASSERT_FALSE(outcome);
    EXPECT_EQ(outcome.error().code, ErrorCode::kTornRead) << outcome.error().to_string();
    return;
  }
  EXPECT_TRUE(outcome);
  EXPECT_EQ(target.bytes(), pattern(1 << 20, 4));
}

TEST_P(TransportTest, AWrongTokenIsRefusedAndTheRightOneIsServed) {
  const auto peer = make_peer("open sesame");
  const std::string endpoint = peer->endpoint();
  for (const char* wrong : {"", "open", "open sesame ", "Open sesame"}) {
    EXPECT_EQ(reader_->connect(endpoint, wrong, soon()).error().code, ErrorCode::kPermissionDenied);
  }
  const auto connection = reader_->connect(endpoint, "open sesame", soon());
  ASSERT_TRUE(connection);
  EXPECT_TRUE((*connection)->open_region(peer->allocate(64, 1), soon()));
}

TEST_P(TransportTest, NonsenseInsteadOfAnEndpointIsATypedError) {
  for (const char* nonsense :
       {"", "nonsense", "shm:", "local:", "shm:/nowhere/at/all", "local:7"}) {
    const auto connected = reader_->connect(nonsense, "", Deadline::after_ms(2000));
    ASSERT_FALSE(connected);
    const ErrorCode code = connected.error().code;
    EXPECT_TRUE(code == ErrorCode::kInvalidArgument || code == ErrorCode::kUnavailable)
        << nonsense << ": " << connected.error().to_string();
  }
}

TEST_P(TransportTest, ARegionOfAnotherTransportIsRefused) {
  const auto peer = make_peer();
  const auto other = open_backend(options()).value();
  {
    const auto connection = other->connect(peer->endpoint(), "", soon()).value();
    const auto region = connection->open_region(peer->allocate(64, 1), soon()).value();
    EXPECT_EQ(reader_->submit({.region = region.get()}).error().code, ErrorCode::kInvalidArgument);
    EXPECT_EQ(reader_->submit({}).error().code, ErrorCode::kInvalidArgument);
  }
}

TEST_P(TransportTest, FingerprintsAreNoneOrOneEach) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto region = connection->open_region(peer->allocate(64, 1), soon()).value();
  const Target target = make_target(64);
  const auto copies = pieces(target, 16);
  std::vector<uint64_t> three(3);
  EXPECT_EQ(reader_->submit({.region = region.get(), .copies = copies, .fingerprints = three})
                .error()
                .code,
            ErrorCode::kInvalidArgument);
}

TEST_P(TransportTest, I4_RequestsOfManyThreadsEndExactlyOnceWithTheirOwnBytes) {
  constexpr size_t kThreads = 4;
  constexpr uint64_t kEach = 150;
  constexpr uint64_t kSize = 1 << 20;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto region = connection->open_region(peer->allocate(kSize, 9), soon()).value();
  const auto source = pattern(kSize, 9);
  std::array<std::vector<TicketId>, kThreads> ids;
  std::atomic<uint64_t> wrong{0};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Random random(t);
      const Target target = make_target(40000);
      for (uint64_t i = 0; i < kEach; ++i) {
        const uint64_t size = 1 + random.below(target.size());
        const uint64_t offset = random.below(kSize - size);
        const StridedCopy copy = bytes_copy(offset, target.data(), size);
        const auto ticket = reader_->submit({.region = region.get(), .copies = {&copy, 1}});
        if (!ticket) {
          ++wrong;
          continue;
        }
        ids[t].push_back(*ticket);
        const bool cancel = random.chance(0.3);
        if (cancel) reader_->cancel(*ticket);
        const TicketState state = settled(*ticket);
        const auto outcome = reader_->finish(*ticket);
        if (state == TicketState::kLanded) {
          const auto landed = target.bytes(0, size);
          wrong += !outcome || !std::equal(landed.begin(), landed.end(),
                                           source.begin() + static_cast<long>(offset));
        } else {
          wrong += !cancel || state != TicketState::kCancelled || outcome ||
                   outcome.error().code != ErrorCode::kCancelled;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0u);
  std::set<TicketId> all;
  for (const auto& list : ids) all.insert(list.begin(), list.end());
  EXPECT_EQ(all.size(), kThreads * kEach) << "a ticket id was given out twice";
  EXPECT_EQ(reader_->stats().tickets, 0u);
  EXPECT_EQ(reader_->stats().poisoned_bytes, 0u);
}

TEST_P(TransportTest, WaitAnyTellsAllTicketsApart) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const auto region = connection->open_region(peer->allocate(8 << 20, 2), soon()).value();
  const Target target = make_target(8 << 20);
  const auto copies = pieces(target, 1 << 18);
  std::vector<TicketId> live;
  for (const StridedCopy& copy : copies) {
    live.push_back(reader_->submit({.region = region.get(), .copies = {&copy, 1}}).value());
  }
  while (!live.empty()) {
    ASSERT_TRUE(reader_->wait_any(live, soon()));
    const size_t before = live.size();
    std::erase_if(live, [&](TicketId ticket) {
      if (reader_->poll(ticket) == TicketState::kPending) return false;
      EXPECT_TRUE(reader_->finish(ticket));
      return true;
    });
    EXPECT_LT(live.size(), before) << "wait_any returned and nothing had ended";
  }
  EXPECT_EQ(target.bytes(), pattern(8 << 20, 2));
}

TEST_P(TransportTest, I11_NothingIsWrittenOnceACancelledTicketHasEnded) {
  constexpr uint64_t kSize = 8 << 20;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const std::array regions = {
      connection->open_region(peer->allocate(kSize, 3), soon()).value(),
      connection->open_region(peer->register_memory(kSize, 3), soon()).value()};
  Target target = make_target(kSize);
  const auto copies = pieces(target, 1 << 16);
  for (int round = 0; round < 20; ++round) {
    const auto& region = regions[static_cast<size_t>(round % 2)];
    target.fill(std::byte{0});
    const TicketId ticket = reader_->submit({.region = region.get(), .copies = copies}).value();
    for (int i = 0; i < round * 10; ++i) std::this_thread::yield();
    reader_->cancel(ticket);
    const uint64_t poisoned_bytes = reader_->stats().poisoned_bytes;
    if (reader_->poll(ticket) == TicketState::kPoisoned) {  // so it was when they were counted
      EXPECT_GT(poisoned_bytes, 0u);
    }
    const TicketState state = settled(ticket);
    EXPECT_TRUE(state == TicketState::kCancelled || state == TicketState::kLanded);
    const auto outcome = reader_->finish(ticket);
    EXPECT_EQ(outcome.has_value(), state == TicketState::kLanded);
    // Ours again: whoever wrote now would be seen.
    target.fill(std::byte{0x77});
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    EXPECT_EQ(target.bytes(), std::vector<std::byte>(kSize, std::byte{0x77}));
    EXPECT_EQ(reader_->stats().poisoned_bytes, 0u);
  }
  EXPECT_TRUE(read(*regions[0], copies));
  EXPECT_EQ(target.bytes(), pattern(kSize, 3));
}

TEST_P(TransportTest, ClosingARegionEndsItsTickets) {
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  auto region = connection->open_region(peer->allocate(32 << 20, 3), soon()).value();
  const Target target = make_target(32 << 20);
  const auto copies = pieces(target, 1 << 16);
  const TicketId ticket = reader_->submit({.region = region.get(), .copies = copies}).value();
  region.reset();
  const TicketState state = reader_->poll(ticket);
  EXPECT_TRUE(state == TicketState::kFailed || state == TicketState::kLanded);
  EXPECT_EQ(reader_->finish(ticket).has_value(), state == TicketState::kLanded);
}

TEST_P(TransportTest, TwoPeersAndTwoReadersDoNotMixUpRegions) {
  const auto first = make_peer();
  const auto second = make_peer();
  const auto other = open_backend(options()).value();
  const auto a = first->allocate(4096, 31);
  const auto b = second->allocate(4096, 32);
  {
    const auto to_first = connect(*first);
    const auto to_second = connect(*second);
    const auto from_other = other->connect(second->endpoint(), "", soon()).value();
    const auto region_a = to_first->open_region(a, soon()).value();
    const auto region_b = to_second->open_region(b, soon()).value();
    const auto again_b = from_other->open_region(b, soon()).value();
    const Target target = make_target(8192);
    const StridedCopy copy_a = bytes_copy(0, target.data(), 4096);
    const StridedCopy copy_b = bytes_copy(0, target.data() + 4096, 4096);
    EXPECT_TRUE(read(*region_a, {&copy_a, 1}));
    EXPECT_TRUE(read(*region_b, {&copy_b, 1}));
    const auto expected_b = pattern(4096, 32);
    EXPECT_EQ(target.bytes(0, 4096), pattern(4096, 31));
    EXPECT_EQ(target.bytes(4096, 4096), expected_b);
    const Target third = make_target(4096);
    const StridedCopy copy = bytes_copy(0, third.data(), 4096);
    const TicketId ticket = other->submit({.region = again_b.get(), .copies = {&copy, 1}}).value();
    EXPECT_TRUE(other->wait_any({&ticket, 1}, soon()));
    EXPECT_TRUE(other->finish(ticket));
    EXPECT_EQ(third.bytes(), expected_b);
  }
}

}  // namespace
}  // namespace transfuse::conformance

// Every fault does what its name says, and nothing else.
#include "transport/local/faulty.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kSize = 64 * 1024;
constexpr size_t kPieces = 16;

// One source region read in sixteen pieces into one target.
class Faulty : public testing::Test {
 protected:
  void open(const FaultPlan& plan) {
    source_ = open_local_transport().value();
    region_ = source_->allocate(kSize).value();
    Random random(3);
    for (auto& b : region_->bytes()) b = static_cast<std::byte>(random.next() >> 56);
    transport_ = open_faulty_local_transport(plan, {.threads = 2}).value();
    peer_ = transport_->connect(source_->endpoint().value(), "", soon()).value();
    remote_ = peer_->open_region(region_->descriptor(), soon()).value();
    target_.assign(kSize, std::byte{0});
    for (size_t i = 0; i < kPieces; ++i) {
      StridedCopy copy;
      copy.op = ElementOp::kCopy2;
      copy.fingerprint = true;
      copy.fingerprint_key = 99;
      copy.source_offset_bytes = i * kSize / kPieces;
      copy.target = target_.data() + copy.source_offset_bytes;
      copy.linear_index = copy.source_offset_bytes / 2;
      copy.count[2] = kSize / kPieces / 2;
      copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
      copies_.push_back(copy);
    }
    fingerprints_.assign(kPieces, 0);
  }
  static FaultPlan always(Fault fault) {
    FaultPlan plan;
    plan.chance[static_cast<size_t>(fault)] = 1;
    return plan;
  }
  static Deadline soon() { return Deadline::after_ms(20000); }
  Result<TicketId> submit() {
    return transport_->submit(
        {.region = remote_.get(), .copies = copies_, .fingerprints = fingerprints_});
  }
  bool wait(TicketId ticket) { return transport_->wait_any({&ticket, 1}, soon()); }
  void wait_unpoisoned(TicketId ticket) {
    while (transport_->poll(ticket) == TicketState::kPoisoned) std::this_thread::yield();
  }
  bool target_untouched() const {
    return std::all_of(target_.begin(), target_.end(),
                       [](std::byte b) { return b == std::byte{0}; });
  }
  size_t wrong_bytes() const {
    size_t wrong = 0;
    for (size_t i = 0; i < kSize; ++i) wrong += target_[i] != region_->bytes()[i];
    return wrong;
  }
  size_t wrong_fingerprints() const {
    size_t wrong = 0;
    for (size_t i = 0; i < kPieces; ++i) {
      const std::byte* from = region_->bytes().data() + copies_[i].source_offset_bytes;
      wrong += fingerprints_[i] != sum_copy(copies_[i], from);
    }
    return wrong;
  }

  std::vector<std::byte> target_;
  std::vector<StridedCopy> copies_;
  std::vector<uint64_t> fingerprints_;
  std::unique_ptr<Transport> source_;
  std::unique_ptr<LocalRegion> region_;
  std::unique_ptr<FaultyTransport> transport_;
  std::unique_ptr<Peer> peer_;
  std::unique_ptr<RemoteRegion> remote_;
};

TEST_F(Faulty, WithoutAFaultEverythingLands) {
  open({});
  const auto ticket = submit().value();
  ASSERT_TRUE(wait(ticket));
  EXPECT_EQ(transport_->poll(ticket), TicketState::kLanded);
  EXPECT_EQ(transport_->progress_bytes(ticket), kSize);
  EXPECT_TRUE(transport_->finish(ticket));
  EXPECT_EQ(wrong_bytes(), 0u);
  EXPECT_EQ(wrong_fingerprints(), 0u);
  EXPECT_EQ(transport_->stats().tickets, 0u);
}

TEST_F(Faulty, ADelayedReadLandsLater) {
  FaultPlan plan = always(Fault::kDelay);
  plan.delay_ms = 30;
  open(plan);
  const auto begin = std::chrono::steady_clock::now();
  const auto ticket = submit().value();
  EXPECT_EQ(transport_->poll(ticket), TicketState::kPending);
  ASSERT_TRUE(wait(ticket));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(30));
  EXPECT_TRUE(transport_->finish(ticket));
  EXPECT_EQ(wrong_bytes(), 0u);
}

TEST_F(Faulty, ADroppedReadStaysPendingUntilItIsCancelled) {
  open(always(Fault::kDrop));
  const auto ticket = submit().value();
  EXPECT_FALSE(transport_->wait_any({&ticket, 1}, Deadline::after_ms(20)));
  transport_->cancel(ticket);
  EXPECT_EQ(transport_->poll(ticket), TicketState::kCancelled);
  EXPECT_EQ(transport_->finish(ticket).error().code, ErrorCode::kCancelled);
  EXPECT_TRUE(target_untouched());
}

TEST_F(Faulty, ACorruptedReadLandsWithOneBitFlippedAndItsFingerprintTells) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    FaultPlan plan = always(Fault::kCorrupt);
    plan.seed = seed;
    copies_.clear();
    remote_.reset();
    peer_.reset();
    region_.reset();
    open(plan);
    const auto ticket = submit().value();
    ASSERT_TRUE(wait(ticket));
    EXPECT_TRUE(transport_->finish(ticket));
    EXPECT_EQ(wrong_bytes(), 1u);
    EXPECT_EQ(wrong_fingerprints(), 1u);
  }
}

TEST_F(Faulty, ALyingReadLandsWithoutMovingAnythingAndItsFingerprintsTell) {
  open(always(Fault::kLie));
  const auto ticket = submit().value();
  EXPECT_EQ(transport_->poll(ticket), TicketState::kLanded);
  EXPECT_TRUE(transport_->finish(ticket));
  EXPECT_TRUE(target_untouched());
  EXPECT_EQ(wrong_fingerprints(), kPieces);
}

TEST_F(Faulty, I11_ALateWriteKeepsItsTargetPoisonedUntilItHasHappened) {
  open(always(Fault::kLateWrite));
  const auto ticket = submit().value();
  transport_->cancel(ticket);
  EXPECT_EQ(transport_->poll(ticket), TicketState::kPoisoned);
  EXPECT_EQ(transport_->stats().poisoned_bytes, kSize);
  transport_->set_plan({});
  EXPECT_EQ(submit().error().code, ErrorCode::kPoisoned);
  wait_unpoisoned(ticket);
  EXPECT_EQ(transport_->finish(ticket).error().code, ErrorCode::kCancelled);
  EXPECT_EQ(wrong_bytes(), 0u);  // the late write has happened
  EXPECT_EQ(transport_->stats().poisoned_bytes, 0u);
  const auto again = submit().value();
  EXPECT_TRUE(wait(again));
  EXPECT_TRUE(transport_->finish(again));
}

TEST_F(Faulty, I11_ClosingThePeerEndsALateWrite) {
  FaultPlan plan = always(Fault::kLateWrite);
  plan.late_write_ms = 1000000;
  open(plan);
  const auto ticket = submit().value();
  transport_->cancel(ticket);
  EXPECT_EQ(transport_->finish(ticket).error().code, ErrorCode::kPoisoned);
  EXPECT_EQ(transport_->stats().tickets, 0u);
  EXPECT_EQ(transport_->stats().poisoned_bytes, kSize);
  remote_.reset();
  peer_.reset();
  EXPECT_EQ(transport_->stats().poisoned_bytes, 0u);
  EXPECT_TRUE(target_untouched());
}

TEST_F(Faulty, APeerThatDiesFailsItsTicketsAndCannotBeReachedAgain) {
  FaultPlan plan;
  plan.script = {{.submit_index = 0, .fault = Fault::kDrop},
                 {.submit_index = 1, .fault = Fault::kDie}};
  open(plan);
  const auto before = submit().value();
  const auto deadly = submit().value();
  for (const TicketId ticket : {before, deadly}) {
    EXPECT_EQ(transport_->poll(ticket), TicketState::kFailed);
    EXPECT_EQ(transport_->finish(ticket).error().code, ErrorCode::kUnavailable);
  }
  EXPECT_FALSE(peer_->alive());
  EXPECT_EQ(submit().error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(peer_->open_region(region_->descriptor(), soon()).error().code,
            ErrorCode::kUnavailable);
  EXPECT_EQ(transport_->connect(source_->endpoint().value(), "", soon()).error().code,
            ErrorCode::kUnavailable);
  EXPECT_EQ(transport_->fault_count(Fault::kDie), 1u);
}

TEST_F(Faulty, APartialReadWritesHalfAndFails) {
  open(always(Fault::kPartial));
  const auto ticket = submit().value();
  ASSERT_TRUE(wait(ticket));
  EXPECT_EQ(transport_->finish(ticket).error().code, ErrorCode::kUnavailable);
  EXPECT_TRUE(std::equal(target_.begin(), target_.begin() + kSize / 2, region_->bytes().begin()));
  EXPECT_TRUE(std::all_of(target_.begin() + kSize / 2, target_.end(),
                          [](std::byte b) { return b == std::byte{0}; }));
}

TEST_F(Faulty, OneSeedGivesOneOrderOfFaults) {
  const auto faults_of = [&](uint64_t seed) {
    FaultPlan plan;
    plan.seed = seed;
    for (const Fault fault : {Fault::kDrop, Fault::kLie, Fault::kPartial}) {
      plan.chance[static_cast<size_t>(fault)] = 0.3;
    }
    copies_.clear();
    remote_.reset();
    peer_.reset();
    region_.reset();
    open(plan);
    std::vector<uint64_t> counts;
    for (int i = 0; i < 30; ++i) {
      const auto ticket = submit().value();
      transport_->cancel(ticket);
      wait_unpoisoned(ticket);
      EXPECT_TRUE(wait(ticket));
      (void)transport_->finish(ticket).has_value();
      counts.push_back(transport_->fault_count(Fault::kDrop));
      counts.push_back(transport_->fault_count(Fault::kLie));
    }
    return counts;
  };
  EXPECT_EQ(faults_of(5), faults_of(5));
  EXPECT_NE(faults_of(5), faults_of(6));
}

TEST(LocalTransport, MemoryOfTheCallerIsNotReadAfterItsRegistrationEnded) {
  auto source = open_local_transport().value();
  auto reader = open_local_transport({.threads = 1}).value();
  std::vector<std::byte> memory(4096, std::byte{7});
  auto region = source->register_memory(memory).value();
  auto peer = reader->connect(source->endpoint().value(), "", Deadline::after_ms(1000)).value();
  auto remote = peer->open_region(region->descriptor(), Deadline::after_ms(1000)).value();
  region.reset();
  memory = {};
  std::vector<std::byte> target(4096);
  StridedCopy copy;
  copy.target = target.data();
  copy.count[2] = 4096;
  copy.source_stride[2] = copy.target_stride[2] = 1;
  const auto ticket = reader->submit({.region = remote.get(), .copies = {&copy, 1}}).value();
  ASSERT_TRUE(reader->wait_any({&ticket, 1}, Deadline::after_ms(20000)));
  EXPECT_EQ(reader->finish(ticket).error().code, ErrorCode::kNotFound);
}

TEST(LocalTransport, AllocatedMemoryStaysReadableWhileAReaderHoldsIt) {
  auto source = open_local_transport().value();
  auto reader = open_local_transport({.threads = 1}).value();
  auto region = source->allocate(4096).value();
  region->bytes()[5] = std::byte{9};
  auto peer = reader->connect(source->endpoint().value(), "", Deadline::after_ms(1000)).value();
  auto remote = peer->open_region(region->descriptor(), Deadline::after_ms(1000)).value();
  region.reset();
  source.reset();
  EXPECT_FALSE(peer->alive());
  std::byte target{0};
  StridedCopy copy;
  copy.target = &target;
  copy.source_offset_bytes = 5;
  const auto ticket = reader->submit({.region = remote.get(), .copies = {&copy, 1}}).value();
  ASSERT_TRUE(reader->wait_any({&ticket, 1}, Deadline::after_ms(20000)));
  EXPECT_TRUE(reader->finish(ticket));
  EXPECT_EQ(target, std::byte{9});
}

}  // namespace
}  // namespace transfuse

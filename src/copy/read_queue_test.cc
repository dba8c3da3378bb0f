// Tickets: how they end, what cancelling poisons, and who waits for whom.
#include "copy/read_queue.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

Deadline soon() { return Deadline::after_ms(20000); }

StridedCopy bytes_copy(uint64_t offset, std::byte* target, uint32_t size) {
  StridedCopy copy;
  copy.source_offset_bytes = offset;
  copy.target = target;
  copy.count[2] = size;
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  return copy;
}

std::vector<std::byte> pattern(uint64_t size) {
  Random random(size);
  std::vector<std::byte> bytes(size);
  for (auto& b : bytes) b = static_cast<std::byte>(random.next() >> 56);
  return bytes;
}

// A source whose reads wait for a word from the test. Safe to call from any thread.
class GatedSource final : public ReadSource {
 public:
  explicit GatedSource(std::span<const std::byte> bytes) : mapped_(bytes.data(), bytes.size()) {}
  uint64_t size_bytes() const override { return mapped_.size_bytes(); }
  Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                    std::span<std::byte> scratch) const override {
    {
      MutexLock lock(mutex_);
      ++inside_;
      changed_.notify_all();
      while (!open_) changed_.wait(mutex_);
      --inside_;
    }
    return mapped_.read(copies, fingerprints, scratch);
  }
  void open() {
    MutexLock lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait_inside(int count) {
    MutexLock lock(mutex_);
    while (inside_ < count) changed_.wait(mutex_);
  }

 private:
  MappedSource mapped_;
  mutable Mutex mutex_;
  mutable CondVar changed_;
  mutable int inside_ GUARDED_BY(mutex_) = 0;
  bool open_ GUARDED_BY(mutex_) = false;
};

class FailingSource final : public ReadSource {
 public:
  uint64_t size_bytes() const override { return 1 << 20; }
  Result<void> read(std::span<const StridedCopy>, std::span<uint64_t>,
                    std::span<std::byte>) const override {
    return Error{ErrorCode::kUnavailable, "the peer is gone"};
  }
};

TransportStats stats_of(const ReadQueue& queue) {
  TransportStats stats;
  queue.add_stats(stats);
  return stats;
}

void wait_ended(ReadQueue& queue, TicketId ticket) {
  while (queue.poll(ticket) == TicketState::kPoisoned) std::this_thread::yield();
}

TEST(ReadQueue, LandsEveryByteAndEveryFingerprint) {
  const auto source_bytes = pattern(1 << 20);
  const MappedSource source(source_bytes.data(), source_bytes.size());
  std::vector<std::byte> target(source_bytes.size());
  ReadQueue queue({.threads = 3, .batch_bytes = 10000});
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < target.size(); at += 4096) {
    copies.push_back(bytes_copy(at, target.data() + at, 4096));
    copies.back().fingerprint = (at / 4096) % 2 == 0;
    copies.back().linear_index = at;
  }
  std::vector<uint64_t> fingerprints(copies.size(), 7);
  const auto ticket = queue.submit(source, copies, fingerprints);
  ASSERT_TRUE(ticket);
  ASSERT_TRUE(queue.wait_any({&*ticket, 1}, soon()));
  EXPECT_EQ(queue.poll(*ticket), TicketState::kLanded);
  EXPECT_EQ(queue.progress_bytes(*ticket), target.size());
  EXPECT_TRUE(queue.finish(*ticket));
  EXPECT_EQ(target, source_bytes);
  for (size_t i = 0; i < copies.size(); ++i) {
    const std::byte* from = source_bytes.data() + copies[i].source_offset_bytes;
    EXPECT_EQ(fingerprints[i], i % 2 == 0 ? sum_copy(copies[i], from) : 7);
  }
  EXPECT_EQ(stats_of(queue), (TransportStats{.read_bytes = target.size()}));
}

TEST(ReadQueue, I4_ManyThreadsSubmitAndEveryTicketEndsOnce) {
  const auto source_bytes = pattern(1 << 16);
  const MappedSource source(source_bytes.data(), source_bytes.size());
  ReadQueue queue({.threads = 4});
  constexpr int kThreads = 4;
  constexpr int kEach = 500;
  std::vector<std::vector<TicketId>> ids(kThreads);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<std::byte> target(source_bytes.size());
      for (uint32_t i = 0; i < kEach; ++i) {
        const auto copy = bytes_copy(i, target.data(), 1000 + i);
        const auto ticket = queue.submit(source, {&copy, 1}, {});
        if (!ticket || !queue.wait_any({&*ticket, 1}, soon()) || !queue.finish(*ticket)) ++wrong;
        for (uint32_t k = 0; k < 1000 + i; ++k) wrong += target[k] != source_bytes[i + k];
        ids[t].push_back(*ticket);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  std::set<TicketId> all;
  for (const auto& list : ids) {
    EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
    all.insert(list.begin(), list.end());
  }
  EXPECT_EQ(all.size(), size_t{kThreads} * kEach);
  EXPECT_EQ(stats_of(queue).tickets, 0u);
}

TEST(ReadQueue, WaitAnyReturnsWhenOneOfManyEndsAndAtTheDeadlineOtherwise) {
  const auto bytes = pattern(64);
  GatedSource gated(bytes);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(128);
  ReadQueue queue({.threads = 2});
  const auto slow_copy = bytes_copy(0, target.data(), 64);
  const auto fast_copy = bytes_copy(0, target.data() + 64, 64);
  const auto slow = queue.submit(gated, {&slow_copy, 1}, {});
  EXPECT_FALSE(queue.wait_any({&*slow, 1}, Deadline::after_ms(10)));
  const auto fast = queue.submit(mapped, {&fast_copy, 1}, {});
  const TicketId both[] = {*slow, *fast};
  EXPECT_TRUE(queue.wait_any(both, soon()));
  EXPECT_EQ(queue.poll(*slow), TicketState::kPending);
  EXPECT_EQ(queue.poll(*fast), TicketState::kLanded);
  EXPECT_TRUE(queue.finish(*fast));
  gated.open();
  EXPECT_TRUE(queue.wait_any({&*slow, 1}, soon()));
  EXPECT_TRUE(queue.finish(*slow));
}

TEST(ReadQueue, I11_ACancelledReadPoisonsItsTargetUntilNoWorkerCanWriteIt) {
  const auto bytes = pattern(4096);
  GatedSource gated(bytes);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(8192);
  ReadQueue queue({.threads = 2});
  const auto copy = bytes_copy(0, target.data(), 4096);
  const auto ticket = queue.submit(gated, {&copy, 1}, {});
  gated.wait_inside(1);
  queue.cancel(*ticket);
  EXPECT_EQ(queue.poll(*ticket), TicketState::kPoisoned);
  EXPECT_TRUE(queue.wait_any({&*ticket, 1}, soon()));
  EXPECT_EQ(stats_of(queue).poisoned_bytes, 4096u);

  const auto overlapping = bytes_copy(0, target.data() + 4095, 10);
  EXPECT_EQ(queue.submit(mapped, {&overlapping, 1}, {}).error().code, ErrorCode::kPoisoned);
  const auto beside = bytes_copy(0, target.data() + 4096, 4096);
  const auto other = queue.submit(mapped, {&beside, 1}, {});
  ASSERT_TRUE(other);
  EXPECT_TRUE(queue.wait_any({&*other, 1}, soon()));
  EXPECT_TRUE(queue.finish(*other));

  gated.open();
  wait_ended(queue, *ticket);
  EXPECT_EQ(queue.poll(*ticket), TicketState::kCancelled);
  EXPECT_EQ(queue.finish(*ticket).error().code, ErrorCode::kCancelled);
  EXPECT_EQ(stats_of(queue).poisoned_bytes, 0u);
  const auto again = queue.submit(mapped, {&overlapping, 1}, {});
  ASSERT_TRUE(again);
  EXPECT_TRUE(queue.wait_any({&*again, 1}, soon()));
  EXPECT_TRUE(queue.finish(*again));
}

TEST(ReadQueue, I11_FinishingAPoisonedTicketKeepsItsMemoryPoisoned) {
  const auto bytes = pattern(4096);
  GatedSource gated(bytes);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(4096);
  ReadQueue queue({.threads = 2});
  const auto copy = bytes_copy(0, target.data(), 4096);
  const auto ticket = queue.submit(gated, {&copy, 1}, {});
  gated.wait_inside(1);
  queue.cancel(*ticket);
  EXPECT_EQ(queue.finish(*ticket).error().code, ErrorCode::kPoisoned);
  EXPECT_EQ(stats_of(queue), (TransportStats{.poisoned_bytes = 4096}));
  EXPECT_EQ(queue.submit(mapped, {&copy, 1}, {}).error().code, ErrorCode::kPoisoned);
  gated.open();
  while (stats_of(queue).poisoned_bytes != 0) std::this_thread::yield();
  const auto again = queue.submit(mapped, {&copy, 1}, {});
  ASSERT_TRUE(again);
  EXPECT_TRUE(queue.wait_any({&*again, 1}, soon()));
  EXPECT_TRUE(queue.finish(*again));
}

TEST(ReadQueue, ATicketCancelledBeforeAnyWorkerTookItEndsAtOnce) {
  const auto bytes = pattern(64);
  GatedSource gated(bytes);
  std::vector<std::byte> target(128);
  ReadQueue queue({.threads = 1});
  const auto first_copy = bytes_copy(0, target.data(), 64);
  const auto second_copy = bytes_copy(0, target.data() + 64, 64);
  const auto first = queue.submit(gated, {&first_copy, 1}, {});
  gated.wait_inside(1);
  const auto second = queue.submit(gated, {&second_copy, 1}, {});
  queue.cancel(*second);
  EXPECT_EQ(queue.poll(*second), TicketState::kCancelled);
  EXPECT_EQ(queue.finish(*second).error().code, ErrorCode::kCancelled);
  gated.open();
  EXPECT_TRUE(queue.wait_any({&*first, 1}, soon()));
  EXPECT_TRUE(queue.finish(*first));
  EXPECT_TRUE(std::all_of(target.begin() + 64, target.end(),
                          [](std::byte b) { return b == std::byte{0}; }));
}

TEST(ReadQueue, CancelAfterLandingChangesNothing) {
  const auto bytes = pattern(64);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(64);
  ReadQueue queue({.threads = 1});
  const auto copy = bytes_copy(0, target.data(), 64);
  const auto ticket = queue.submit(mapped, {&copy, 1}, {});
  EXPECT_TRUE(queue.wait_any({&*ticket, 1}, soon()));
  queue.cancel(*ticket);
  EXPECT_EQ(queue.poll(*ticket), TicketState::kLanded);
  EXPECT_TRUE(queue.finish(*ticket));
}

TEST(ReadQueue, ASourceThatFailsFailsItsTicketWithItsError) {
  const FailingSource failing;
  std::vector<std::byte> target(64);
  ReadQueue queue({.threads = 2, .batch_bytes = 8});
  std::vector<StridedCopy> copies;
  for (uint32_t i = 0; i < 8; ++i) copies.push_back(bytes_copy(0, target.data() + i * 8, 8));
  const auto ticket = queue.submit(failing, copies, {});
  EXPECT_TRUE(queue.wait_any({&*ticket, 1}, soon()));
  EXPECT_EQ(queue.poll(*ticket), TicketState::kFailed);
  EXPECT_EQ(queue.finish(*ticket).error().message, "the peer is gone");
}

TEST(ReadQueue, RetireEndsAllTicketsOfASourceAndNobodyUsesItAfterwards) {
  const auto bytes = pattern(64);
  auto gated = std::make_unique<GatedSource>(bytes);
  std::vector<std::byte> target(64 * 8);
  ReadQueue queue({.threads = 2});
  std::vector<StridedCopy> copies;
  for (uint32_t i = 0; i < 8; ++i) copies.push_back(bytes_copy(0, target.data() + i * 64, 64));
  std::vector<TicketId> tickets;
  for (const auto& copy : copies) tickets.push_back(*queue.submit(*gated, {&copy, 1}, {}));
  gated->wait_inside(2);
  std::thread opener([&] {  // when retire() has begun: it ends the tickets that nobody works at
    while (queue.poll(tickets.back()) == TicketState::kPending) std::this_thread::yield();
    gated->open();
  });
  queue.retire(*gated, {ErrorCode::kUnavailable, "closed"});
  opener.join();
  gated.reset();
  for (const TicketId ticket : tickets) {
    EXPECT_EQ(queue.poll(ticket), TicketState::kFailed);
    EXPECT_EQ(queue.finish(ticket).error().code, ErrorCode::kUnavailable);
  }
  EXPECT_EQ(stats_of(queue).tickets, 0u);
}

TEST(ReadQueue, I13_AReadBeyondTheSourceIsRefusedAndNothingStarts) {
  const auto bytes = pattern(64);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(128);
  ReadQueue queue({.threads = 1});
  const StridedCopy copies[] = {bytes_copy(0, target.data(), 64),
                                bytes_copy(1, target.data() + 64, 64)};
  EXPECT_EQ(queue.submit(mapped, copies, {}).error().code, ErrorCode::kCorrupt);
  std::vector<uint64_t> one(1);
  EXPECT_EQ(queue.submit(mapped, {copies, 0}, one).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(stats_of(queue), TransportStats{});
  EXPECT_EQ(target, std::vector<std::byte>(128));
}

TEST(ReadQueue, AnEmptyRequestLandsAtOnce) {
  const MappedSource mapped(nullptr, 0);
  ReadQueue queue({.threads = 1});
  const auto ticket = queue.submit(mapped, {}, {});
  ASSERT_TRUE(ticket);
  EXPECT_EQ(queue.poll(*ticket), TicketState::kLanded);
  EXPECT_TRUE(queue.finish(*ticket));
}

TEST(ReadQueue, DestructionEndsWhatIsLeft) {
  const auto bytes = pattern(1 << 20);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(4 << 20);
  std::vector<StridedCopy> copies;
  for (uint32_t i = 0; i < 4; ++i) {
    copies.push_back(bytes_copy(0, target.data() + (uint64_t{i} << 20), 1 << 20));
  }
  for (int round = 0; round < 20; ++round) {
    ReadQueue queue({.threads = 2});
    for (const auto& copy : copies) ASSERT_TRUE(queue.submit(mapped, {&copy, 1}, {}));
  }
}

TEST(ReadQueue, AForkedChildIsRefusedAndEndsWithoutHanging) {
  const auto bytes = pattern(64);
  const MappedSource mapped(bytes.data(), bytes.size());
  std::vector<std::byte> target(64);
  auto queue = std::make_unique<ReadQueue>(ReadQueueOptions{.threads = 2});
  const auto copy = bytes_copy(0, target.data(), 64);
  const auto ticket = queue->submit(mapped, {&copy, 1}, {});
  ASSERT_TRUE(queue->wait_any({&*ticket, 1}, soon()));
  ASSERT_TRUE(queue->finish(*ticket));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const bool refused =
        queue->submit(mapped, {&copy, 1}, {}).error().code == ErrorCode::kUnavailable;
    queue.reset();
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace transfuse

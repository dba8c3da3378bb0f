// Tickets, and the threads that work them off.
#include "copy/read_queue.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "base/mutex.h"
#include "copy/copy.h"
#include "copy/scaled_copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

// A ticket id is a sequence number and the number of its slot: it rises, names its slot without a
// search, and 2^48 tickets are nine years of a million a second.
constexpr uint32_t kSlotBits = 16;
constexpr uint64_t kMaxSlots = uint64_t{1} << kSlotBits;
// With plenty of queued work a waiter only has to come back before the queue runs dry; waking it
// for every ticket would cost a context switch per MiB.
constexpr auto kWakeDelay = std::chrono::microseconds(500);

struct AddressRange {
  const std::byte* begin = nullptr;
  const std::byte* end = nullptr;
};

bool overlap(const AddressRange& a, const AddressRange& b) {
  return a.begin < b.end && b.begin < a.end;
}

// Of the elements, and of the scales that a quantising copy writes.
std::array<AddressRange, 2> target_ranges(const StridedCopy& copy) {
  if (copy.element_count() == 0) return {};
  uint64_t last = 0;
  for (int i = 0; i < 3; ++i) {
    last += static_cast<uint64_t>(copy.target_stride[i]) * (copy.count[i] - 1u);
  }
  std::array<AddressRange, 2> ranges{};
  ranges[0] = {copy.target, copy.target + (last + 1) * target_element_bytes(copy.op)};
  if (!quantizes(copy.op)) return ranges;
  last = 0;
  for (int axis = 0; axis < 2; ++axis) {
    last += static_cast<uint64_t>(copy.scales->stride[axis]) * (copy.block_count(axis) - 1);
  }
  ranges[1] = {copy.scales->target, copy.scales->target + (last + 1) * sizeof(float)};
  return ranges;
}

bool overlap(const std::array<AddressRange, 2>& a, const std::array<AddressRange, 2>& b) {
  return overlap(a[0], b[0]) || overlap(a[0], b[1]) || overlap(a[1], b[0]) || overlap(a[1], b[1]);
}

uint64_t target_bytes(std::span<const StridedCopy> copies) {
  uint64_t sum = 0;
  for (const StridedCopy& copy : copies) sum += copy.target_bytes();
  return sum;
}

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

struct ReadQueue::Ticket {
  TicketId id{};  // 0: free
  const ReadSource* source = nullptr;
  const ReadSource* scales = nullptr;  // null: in `source`
  std::span<const StridedCopy> copies;
  std::span<uint64_t> fingerprints;
  size_t next_copy = 0;
  size_t batch_copies = 0;
  uint64_t total_bytes = 0;
  uint64_t done_bytes = 0;
  uint32_t active = 0;     // workers inside source->read()
  bool queued = false;     // in the list of runnable tickets
  bool stopped = false;    // no batch is taken any more; `error` says why
  bool cancelled = false;  // by the caller
  bool ended = false;
  bool abandoned = false;  // finished by the caller before it ended
  uint32_t slot = 0;
  Error error;
  Ticket* next = nullptr;
  Ticket* previous = nullptr;

  bool poisoned() const { return cancelled && !ended; }
  bool reads(const ReadSource& one) const { return source == &one || scales == &one; }
};

struct ReadQueue::Batch {
  Ticket* ticket = nullptr;  // nullptr: nothing to do
  const ReadSource* source = nullptr;
  const ReadSource* scales = nullptr;
  std::span<const StridedCopy> copies;
  std::span<uint64_t> fingerprints;

  Result<void> read(std::span<std::byte> scratch) const {
    return scales == nullptr ? source->read(copies, fingerprints, scratch)
                             : read_apart(*source, *scales, copies, fingerprints, scratch);
  }
};

namespace {

// Control words (generations, headers) that their owner stores atomically while peers read them.
constexpr uint64_t kMaxControlWords = 8;

bool is_control_words(const StridedCopy& copy, const std::byte* source) {
  return copy.op == ElementOp::kCopy8 && copy.count[0] == 1 && copy.count[1] == 1 &&
         copy.count[2] <= kMaxControlWords && copy.source_stride[2] == 1 && !copy.fingerprint &&
         reinterpret_cast<uintptr_t>(source) % alignof(uint64_t) == 0;
}

// Each word whole, and in order: what the owner wrote before a word is seen by who reads it.
void read_control_words(const StridedCopy& copy, const std::byte* source) {
  auto* const words = reinterpret_cast<uint64_t*>(const_cast<std::byte*>(source));
  for (uint32_t i = 0; i < copy.count[2]; ++i) {
    const uint64_t word = std::atomic_ref<uint64_t>(words[i]).load(std::memory_order_acquire);
    std::memcpy(copy.target + static_cast<int64_t>(i) * copy.target_stride[2] * 8, &word, 8);
  }
}

}  // namespace

Result<void> MappedSource::read(std::span<const StridedCopy> copies,
                                std::span<uint64_t> fingerprints,
                                std::span<std::byte> /*scratch*/) const {
  for (size_t i = 0; i < copies.size(); ++i) {
    const std::byte* const source = base_ + copies[i].source_offset_bytes;
    if (is_control_words(copies[i], source)) {
      read_control_words(copies[i], source);
      continue;
    }
    const uint64_t sum = run_copy(copies[i], source);
    if (copies[i].fingerprint && !fingerprints.empty()) fingerprints[i] = sum;
  }
  return {};
}

Result<void> read_apart(const ReadSource& source, const ReadSource& scales,
                        std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                        std::span<std::byte> scratch) {
  for (size_t i = 0; i < copies.size(); ++i) {
    const StridedCopy& copy = copies[i];
    const std::span<uint64_t> sum =
        fingerprints.empty() ? fingerprints : fingerprints.subspan(i, 1);
    if (copy.scales_end_bytes() == 0) {
      TRANSFUSE_RETURN_IF_ERROR(source.read({&copy, 1}, sum, scratch));
      continue;
    }
    uint64_t all = 0;
    const auto read_scales = [&](const StridedCopy& plain) {
      return scales.read({&plain, 1}, {}, scratch);
    };
    const auto read_numbers = [&](const StridedCopy& run) -> Result<void> {
      TRANSFUSE_RETURN_IF_ERROR(source.read({&run, 1}, sum, scratch));
      if (run.fingerprint && !sum.empty()) all += sum[0];
      return {};
    };
    TRANSFUSE_RETURN_IF_ERROR(for_each_band(copy, read_scales, read_numbers));
    if (copy.fingerprint && !sum.empty()) sum[0] = all;
  }
  return {};
}

ReadQueue::ReadQueue(const ReadQueueOptions& options)
    : thread_count_(options.threads > 0 ? options.threads : usable_core_count()),
      scratch_bytes_(options.scratch_bytes),
      batch_bytes_(std::max<uint64_t>(options.batch_bytes, 1)),
      pid_(getpid()),
      work_(std::make_unique<CondVar>()),
      ended_(std::make_unique<CondVar>()) {}

ReadQueue::~ReadQueue() {
  if (getpid() != pid_) {  // the threads are the parent's
    for (std::thread& thread : threads_) thread.detach();
    static_cast<void>(work_.release());
    static_cast<void>(ended_.release());
    return;
  }
  std::vector<std::thread> threads;
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    for (const auto& ticket : tickets_) {
      if (ticket->id != TicketId{} && !ticket->ended) {
        stop(*ticket, {ErrorCode::kCancelled, "read: the transport was closed"});
      }
    }
    threads.swap(threads_);
    work_->notify_all();
  }
  for (std::thread& thread : threads) thread.join();
}

void ReadQueue::start_threads() {
  // Signals belong to the program's own threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  threads_.reserve(thread_count_);
  for (uint32_t i = 0; i < thread_count_; ++i) {
    threads_.emplace_back([this] { work(); });
    pthread_setname_np(threads_.back().native_handle(), "transfuse-read");
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ReadQueue::work() {
  constexpr size_t kPage = 4096;
  const size_t scratch_bytes = (scratch_bytes_ + kPage - 1) / kPage * kPage;
  const std::unique_ptr<std::byte, FreeMemory> scratch(
      scratch_bytes == 0 ? nullptr
                         : static_cast<std::byte*>(std::aligned_alloc(kPage, scratch_bytes)));
  TRANSFUSE_CHECK(scratch_bytes == 0 || scratch != nullptr);
  MutexLock lock(mutex_);
  while (true) {
    const Batch batch = take_batch();
    if (batch.ticket != nullptr) {
      mutex_.unlock();
      const Result<void> outcome = batch.read({scratch.get(), scratch_bytes});
      copy_fence();
      const uint64_t bytes = target_bytes(batch.copies);
      mutex_.lock();
      end_batch(batch, bytes, outcome);
    } else if (stopping_) {
      return;
    } else {
      ++idle_workers_;
      work_->wait(mutex_);
      --idle_workers_;
    }
  }
}

ReadQueue::Batch ReadQueue::take_batch() {
  Ticket* ticket = first_runnable_;
  if (ticket == nullptr) return {};
  const size_t first = ticket->next_copy;
  const size_t count = std::min(ticket->batch_copies, ticket->copies.size() - first);
  ticket->next_copy += count;
  if (ticket->next_copy == ticket->copies.size()) unlink(*ticket);
  ++ticket->active;
  return {.ticket = ticket,
          .source = ticket->source,
          .scales = ticket->scales,
          .copies = ticket->copies.subspan(first, count),
          .fingerprints = ticket->fingerprints.empty()
                              ? ticket->fingerprints
                              : ticket->fingerprints.subspan(first, count)};
}

void ReadQueue::end_batch(const Batch& batch, uint64_t done_bytes, const Result<void>& outcome) {
  Ticket& ticket = *batch.ticket;
  --ticket.active;
  if (outcome) {
    ticket.done_bytes += done_bytes;
    read_bytes_ += done_bytes;
  } else if (!ticket.stopped) {
    stop(ticket, outcome.error());
    return;
  }
  settle(ticket);
}

void ReadQueue::stop(Ticket& ticket, const Error& error) {
  if (!ticket.stopped) {
    ticket.stopped = true;
    ticket.error = error;
    if (ticket.queued) unlink(ticket);
  }
  settle(ticket);
}

void ReadQueue::settle(Ticket& ticket) {
  const bool done = ticket.stopped || ticket.next_copy == ticket.copies.size();
  if (ticket.active > 0 || !done) {
    if (wake_due_) wake_waiters();
    return;
  }
  if (ticket.poisoned()) {
    --poisoned_;
    poisoned_bytes_ -= ticket.total_bytes;
  }
  ticket.ended = true;
  ticket.source = ticket.scales = nullptr;
  if (ticket.abandoned) release(ticket);
  wake_waiters();
}

void ReadQueue::wake_waiters() {
  if (waiters_ == 0) {
    wake_due_ = false;
    return;
  }
  if (runnable_ > thread_count_ && retiring_ == 0) {
    const TimePoint now = std::chrono::steady_clock::now();
    if (!wake_due_) {
      wake_due_ = true;
      wake_since_ = now;
    }
    if (now - wake_since_ < kWakeDelay) return;
  }
  wake_due_ = false;
  ended_->notify_all();
}

Result<TicketId> ReadQueue::submit(const ReadSource& source, std::span<const StridedCopy> copies,
                                   std::span<uint64_t> fingerprints, const ReadSource* scales) {
  if (getpid() != pid_) {
    return Error{ErrorCode::kUnavailable,
                 "submit: this process is a fork of the one that opened the transport; open one "
                 "of its own"};
  }
  if (!fingerprints.empty() && fingerprints.size() != copies.size()) {
    return Error{ErrorCode::kInvalidArgument,
                 "submit: " + std::to_string(fingerprints.size()) + " places for fingerprints of " +
                     std::to_string(copies.size()) + " copies, expected none or one each"};
  }
  const uint64_t source_size = source.size_bytes();
  const uint64_t scales_size = scales == nullptr ? source_size : scales->size_bytes();
  uint64_t total = 0;
  for (const StridedCopy& copy : copies) {
    TRANSFUSE_RETURN_IF_ERROR(check_copy(copy, source_size, scales_size));
    total += copy.target_bytes();
  }

  MutexLock lock(mutex_);
  if (poisoned_ > 0) TRANSFUSE_RETURN_IF_ERROR(check_poison(copies));
  Ticket* ticket = free_ticket();
  if (ticket == nullptr) {
    return Error{ErrorCode::kResourceExhausted,
                 "submit: " + std::to_string(kMaxSlots) + " tickets are live, finish() some"};
  }
  ++sequence_;
  TRANSFUSE_CHECK(sequence_ < uint64_t{1} << (64 - kSlotBits));
  ticket->id = TicketId{(sequence_ << kSlotBits) | ticket->slot};
  ticket->source = &source;
  ticket->scales = scales == &source ? nullptr : scales;
  ticket->copies = copies;
  ticket->fingerprints = fingerprints;
  ticket->total_bytes = total;
  ++live_;
  if (copies.empty()) {
    settle(*ticket);
    return ticket->id;
  }
  const size_t batches =
      static_cast<size_t>(std::clamp<uint64_t>(total / batch_bytes_, 1, copies.size()));
  ticket->batch_copies = (copies.size() + batches - 1) / batches;
  if (threads_.empty()) start_threads();
  append(*ticket);
  const size_t wanted = std::min<size_t>(idle_workers_, batches);
  for (size_t i = 0; i < wanted; ++i) work_->notify_one();
  return ticket->id;
}

TicketState ReadQueue::poll(TicketId id) {
  MutexLock lock(mutex_);
  const Ticket& ticket = at(id);
  if (!ticket.ended) return ticket.cancelled ? TicketState::kPoisoned : TicketState::kPending;
  if (ticket.cancelled) return TicketState::kCancelled;
  return ticket.stopped ? TicketState::kFailed : TicketState::kLanded;
}

bool ReadQueue::wait_any(std::span<const TicketId> tickets, Deadline deadline) {
  if (tickets.empty()) return false;
  MutexLock lock(mutex_);
  bool in_time = true;
  while (true) {
    for (const TicketId id : tickets) {
      const Ticket& ticket = at(id);
      if (ticket.ended || ticket.cancelled) return true;
    }
    if (!in_time) return false;
    ++waiters_;
    in_time = ended_->wait_until(mutex_, deadline);
    --waiters_;
  }
}

uint64_t ReadQueue::progress_bytes(TicketId id) {
  MutexLock lock(mutex_);
  return at(id).done_bytes;
}

void ReadQueue::cancel(TicketId id) {
  MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  if (ticket.ended || ticket.cancelled) return;
  ticket.cancelled = true;
  ++poisoned_;
  poisoned_bytes_ += ticket.total_bytes;
  stop(ticket, {ErrorCode::kCancelled, "read: cancelled by the caller"});
  if (!ticket.ended) wake_waiters();  // who waits for this ticket must see that it is poisoned
}

Result<void> ReadQueue::finish(TicketId id) {
  MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  TRANSFUSE_CHECK(ticket.ended || ticket.cancelled);
  --live_;
  if (!ticket.ended) {
    ticket.abandoned = true;
    return Error{ErrorCode::kPoisoned, "read: cancelled, but a worker may still write its target"};
  }
  Result<void> outcome;
  if (ticket.stopped) outcome = std::move(ticket.error);
  release(ticket);
  return outcome;
}

void ReadQueue::stop_all(const ReadSource& source, const Error& error) {
  for (const auto& ticket : tickets_) {
    if (ticket->reads(source) && !ticket->ended) stop(*ticket, error);
  }
}

bool ReadQueue::in_use(const ReadSource& source) const {
  return std::any_of(tickets_.begin(), tickets_.end(),
                     [&](const auto& ticket) { return ticket->reads(source); });
}

void ReadQueue::fail(const ReadSource& source, const Error& error) {
  MutexLock lock(mutex_);
  stop_all(source, error);
}

void ReadQueue::retire(const ReadSource& source, const Error& error) {
  if (getpid() != pid_) return;
  MutexLock lock(mutex_);
  stop_all(source, error);
  ++retiring_;
  ++waiters_;
  while (in_use(source)) ended_->wait(mutex_);
  --waiters_;
  --retiring_;
}

void ReadQueue::add_stats(TransportStats& stats) const {
  MutexLock lock(mutex_);
  stats.tickets += live_;
  stats.poisoned_bytes += poisoned_bytes_;
  stats.read_bytes += read_bytes_;
}

Result<void> ReadQueue::check_poison(std::span<const StridedCopy> copies) const {
  for (const auto& ticket : tickets_) {
    if (ticket->id == TicketId{} || !ticket->poisoned()) continue;
    for (const StridedCopy& old : ticket->copies) {
      const auto poisoned = target_ranges(old);
      for (const StridedCopy& copy : copies) {
        if (overlap(target_ranges(copy), poisoned)) {
          return Error{ErrorCode::kPoisoned,
                       "submit: a cancelled read may still write the target memory"};
        }
      }
    }
  }
  return {};
}

void ReadQueue::append(Ticket& ticket) {
  ticket.queued = true;
  ticket.next = nullptr;
  ticket.previous = last_runnable_;
  (last_runnable_ != nullptr ? last_runnable_->next : first_runnable_) = &ticket;
  last_runnable_ = &ticket;
  ++runnable_;
}

void ReadQueue::unlink(Ticket& ticket) {
  (ticket.previous != nullptr ? ticket.previous->next : first_runnable_) = ticket.next;
  (ticket.next != nullptr ? ticket.next->previous : last_runnable_) = ticket.previous;
  ticket.next = ticket.previous = nullptr;
  ticket.queued = false;
  --runnable_;
}

ReadQueue::Ticket* ReadQueue::free_ticket() {
  if (free_ == nullptr) {
    if (tickets_.size() == kMaxSlots) return nullptr;
    tickets_.push_back(std::make_unique<Ticket>());
    tickets_.back()->slot = static_cast<uint32_t>(tickets_.size() - 1);
    return tickets_.back().get();
  }
  return std::exchange(free_, free_->next);
}

void ReadQueue::release(Ticket& ticket) {
  const uint32_t slot = ticket.slot;
  ticket = Ticket{};
  ticket.slot = slot;
  ticket.next = free_;
  free_ = &ticket;
}

ReadQueue::Ticket& ReadQueue::at(TicketId id) {
  const uint64_t slot = static_cast<uint64_t>(id) & (kMaxSlots - 1);
  TRANSFUSE_CHECK(slot < tickets_.size());
  Ticket& ticket = *tickets_[slot];
  TRANSFUSE_CHECK(ticket.id == id && id != TicketId{} && !ticket.abandoned);
  return ticket;
}

}  // namespace transfuse

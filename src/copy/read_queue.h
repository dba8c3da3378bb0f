// Tickets and worker threads for transports whose reads are done by this process' own CPUs.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// What a backend's remote region is to the queue: something that worker threads can read from.
// Outlives its tickets; its owner calls ReadQueue::retire() before it ends.
class ReadSource {
 public:
  virtual ~ReadSource() = default;
  ReadSource(const ReadSource&) = delete;
  ReadSource& operator=(const ReadSource&) = delete;

  virtual uint64_t size_bytes() const = 0;
  // Executes `copies` (bounds are checked) and sets fingerprints[i] where copies[i].fingerprint is
  // set and `fingerprints` is not empty. Called from several worker threads at once. `scratch` is
  // the thread's own, of ReadQueueOptions::scratch_bytes. An error fails the ticket. No allocation
  // on success.
  virtual Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                            std::span<std::byte> scratch) const = 0;

 protected:
  ReadSource() = default;
};

// A source that is mapped in this process: run_copy() from `base`. Up to eight aligned 8-byte
// elements without a fingerprint are control words: each is read whole, in order, with acquire.
class MappedSource final : public ReadSource {
 public:
  MappedSource(const std::byte* base, uint64_t size_bytes) : base_(base), size_bytes_(size_bytes) {}
  uint64_t size_bytes() const override { return size_bytes_; }
  Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                    std::span<std::byte> scratch) const override;

 private:
  const std::byte* base_;
  uint64_t size_bytes_;
};

struct ReadQueueOptions {
  uint32_t threads = 0;        // 0: one per core that this process may use
  uint64_t scratch_bytes = 0;  // per worker thread, page aligned
  // A worker takes whole copies until they make so many target bytes, so that several threads share
  // one large request.
  uint64_t batch_bytes = uint64_t{1} << 20;
};

// Executes `copies` of `source` as its read() does; dequantising ones find their scales in
// `scales`.
Result<void> read_apart(const ReadSource& source, const ReadSource& scales,
                        std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                        std::span<std::byte> scratch);

// Executes ReadRequests copy by copy on its own threads, with the meaning that transport.h gives to
// submit, poll, wait_any, progress_bytes, cancel and finish. Threads start with the first submit;
// submit allocates nothing once as many tickets were live before. A worker passes copy_fence() and
// the queue's mutex before a ticket lands, so who polls sees the bytes. In a forked child submit
// fails and the destructor does nothing.
//
// Safe to call from any thread. The destructor cancels what is left and waits for its own threads.
class ReadQueue {
 public:
  explicit ReadQueue(const ReadQueueOptions& options);
  ~ReadQueue();
  ReadQueue(const ReadQueue&) = delete;
  ReadQueue& operator=(const ReadQueue&) = delete;

  // kCorrupt: a copy reads beyond `source`. kPoisoned: a target may still be written by a cancelled
  // ticket (judged by the address range that a copy spans). kInvalidArgument: fingerprints neither
  // empty nor one per copy. An empty request lands at once. `scales`: where dequantising copies
  // find theirs, if not in `source`; the same that `source` is to the queue.
  Result<TicketId> submit(const ReadSource& source, std::span<const StridedCopy> copies,
                          std::span<uint64_t> fingerprints, const ReadSource* scales = nullptr)
      EXCLUDES(mutex_);
  // A ticket that was finished, or never given out, aborts: ids are the caller's to keep.
  TicketState poll(TicketId ticket) EXCLUDES(mutex_);
  // While workers have plenty to do, waiters are woken in groups, at most about 0.5 ms late.
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) EXCLUDES(mutex_);
  uint64_t progress_bytes(TicketId ticket) EXCLUDES(mutex_);
  void cancel(TicketId ticket) EXCLUDES(mutex_);
  Result<void> finish(TicketId ticket) EXCLUDES(mutex_);

  // Ends every live ticket of `source` with `error`; one that a worker is busy with ends when that
  // worker is done with its batch. fail() returns at once; retire() returns when no worker uses
  // `source` any more: call it before `source` goes.
  void fail(const ReadSource& source, const Error& error) EXCLUDES(mutex_);
  void retire(const ReadSource& source, const Error& error) EXCLUDES(mutex_);

  // Adds tickets, poisoned_bytes and read_bytes; leaves the rest of `stats` alone.
  void add_stats(TransportStats& stats) const EXCLUDES(mutex_);
  uint32_t thread_count() const { return thread_count_; }

 private:
  struct Ticket;
  struct Batch;

  void work();
  void start_threads() REQUIRES(mutex_);
  Batch take_batch() REQUIRES(mutex_);
  void end_batch(const Batch& batch, uint64_t done_bytes, const Result<void>& outcome)
      REQUIRES(mutex_);
  // Ends the ticket if all its work is done or given up.
  void settle(Ticket& ticket) REQUIRES(mutex_);
  void stop(Ticket& ticket, const Error& error) REQUIRES(mutex_);
  void stop_all(const ReadSource& source, const Error& error) REQUIRES(mutex_);
  bool in_use(const ReadSource& source) const REQUIRES(mutex_);
  void wake_waiters() REQUIRES(mutex_);
  void append(Ticket& ticket) REQUIRES(mutex_);
  void unlink(Ticket& ticket) REQUIRES(mutex_);
  void release(Ticket& ticket) REQUIRES(mutex_);
  Ticket* free_ticket() REQUIRES(mutex_);  // nullptr: all are taken
  Ticket& at(TicketId id) REQUIRES(mutex_);
  Result<void> check_poison(std::span<const StridedCopy> copies) const REQUIRES(mutex_);

  const uint32_t thread_count_;
  const uint64_t scratch_bytes_;
  const uint64_t batch_bytes_;
  const pid_t pid_;

  mutable Mutex mutex_;
  // On the heap: destroying one that had waiters at a fork would hang the child.
  std::unique_ptr<CondVar> work_;   // for workers: a ticket is runnable
  std::unique_ptr<CondVar> ended_;  // for wait_any() and retire()
  bool stopping_ GUARDED_BY(mutex_) = false;
  uint32_t idle_workers_ GUARDED_BY(mutex_) = 0;
  uint32_t waiters_ GUARDED_BY(mutex_) = 0;
  uint32_t retiring_ GUARDED_BY(mutex_) = 0;
  bool wake_due_ GUARDED_BY(mutex_) = false;  // a ticket ended and the waiters were not told yet
  TimePoint wake_since_ GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Ticket>> tickets_ GUARDED_BY(mutex_);
  Ticket* free_ GUARDED_BY(mutex_) = nullptr;  // linked through Ticket::next
  Ticket* first_runnable_ GUARDED_BY(mutex_) = nullptr;
  Ticket* last_runnable_ GUARDED_BY(mutex_) = nullptr;
  uint32_t runnable_ GUARDED_BY(mutex_) = 0;
  uint64_t sequence_ GUARDED_BY(mutex_) = 0;
  uint64_t live_ GUARDED_BY(mutex_) = 0;
  uint32_t poisoned_ GUARDED_BY(mutex_) = 0;
  uint64_t poisoned_bytes_ GUARDED_BY(mutex_) = 0;
  uint64_t read_bytes_ GUARDED_BY(mutex_) = 0;
  std::vector<std::thread> threads_ GUARDED_BY(mutex_);
};

}  // namespace transfuse

// Brings one version into target memory: leases, attempts under them, and what becomes of both.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "session/checkpoint_fallback.h"
#include "session/refit_attempt.h"
#include "session/source_link.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

namespace transfuse {

// The memory that a fetch writes, as its owner sees it. Called from the thread that fetches.
class FetchMemory {
 public:
  virtual ~FetchMemory() = default;
  virtual void begin_write() = 0;  // before the first byte of an attempt
  // After its last: it holds `version`, proved (0: no version). What the lease ends with.
  virtual LeaseEnd end_write(uint64_t version) = 0;
  virtual uint64_t held() const = 0;  // the version that the parameters hold; 0: none
};

struct FetchOrder {
  VersionRequest request;
  Deadline deadline;
  CopyLimits limits{};
};

struct Fetched {
  uint64_t version = 0;
  uint64_t round = 0;  // of the group; 0: the target is alone
  bool voted = false;  // the coordinator has this rank's vote
  bool from_checkpoint = false;
};

// Used from one thread, but cancelled() and progress(), which are for any. Outlived by everything
// that it is given.
class Fetch {
 public:
  Fetch(Transport& transport, Control& control, const Layout& target,
        const TargetMemory& target_memory, FetchMemory& memory, const ReceiverOptions& options,
        MemberId member);

  // On success the memory holds the version, proved, and the rank of a group has voted for it. On
  // failure the group's round is given up. `cancelled` ends it soon with kCancelled.
  Result<Fetched> run(const FetchOrder& order, const std::atomic<bool>& cancelled,
                      RefitReport& report);

  const AttemptProgress& progress() const { return progress_; }
  void clear_progress();
  void forget_padding();
  void close();
  void abandon_in_forked_child();

 private:
  Result<Lease> acquire(const FetchOrder& order, const std::atomic<bool>& cancelled);
  Result<void> attempt_once(const FetchOrder& order, const std::atomic<bool>& cancelled,
                            RefitReport& report, Fetched& fetched);
  Result<void> attempt_peers(const FetchOrder& order, const std::atomic<bool>& cancelled,
                             RefitReport& report, Fetched& fetched);
  Result<void> attempt_all(const FetchOrder& order, const std::atomic<bool>& cancelled,
                           RefitReport& report, Fetched& fetched);
  Result<void> attempt_checkpoint(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                  RefitReport& report, Fetched& fetched);
  void give_up_round(Fetched& fetched, const Error& error, Deadline deadline, RefitReport& report);
  void tell(LeaseEnd end, uint64_t version, Deadline deadline, RefitReport& report);

  Control& control_;
  FetchMemory& memory_;
  const ReceiverOptions options_;
  const MemberId member_;
  TimePoint started_at_{};
  int64_t version_wait_ms_ = 0;   // the longest wait for a version of peers; 0: the order's
  bool version_awaited_ = false;  // in vain, in the last attempt
  AttemptProgress progress_;
  MemberDirectory members_;
  RefitAttempt attempt_;
  std::unique_ptr<CheckpointFallback> fallback_;  // null: there is no checkpoint
};

}  // namespace transfuse

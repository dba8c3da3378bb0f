// Brings one version into target memory: leases, attempts under them, and what becomes of both.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "session/refit_attempt.h"
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
};

struct FetchOrder {
  VersionRequest request;
  Deadline deadline;
  double gigabytes_per_second = 0;  // of bytes written; 0: as fast as possible
};

struct Fetched {
  uint64_t version = 0;
  uint64_t round = 0;  // of the group; 0: the target is alone
  bool voted = false;  // the coordinator has this rank's vote
};

// Used from one thread, but cancelled() and progress(), which are for any. Outlived by everything
// that it is given.
class Fetch {
 public:
  Fetch(Transport& transport, Control& control, const Layout& target,
        std::span<std::byte* const> target_data, FetchMemory& memory,
        const ReceiverOptions& options, MemberId member);

  // On success the memory holds the version, proved, and the rank of a group has voted for it. On
  // failure the group's round is given up. `cancelled` ends it soon with kCancelled.
  Result<Fetched> run(const FetchOrder& order, const std::atomic<bool>& cancelled,
                      RefitReport& report);

  const AttemptProgress& progress() const { return attempt_.progress(); }
  void clear_progress();
  void forget_padding() { attempt_.forget_padding(); }
  void close() { attempt_.close(); }
  void abandon_in_forked_child() { attempt_.abandon_in_forked_child(); }

 private:
  Result<Lease> acquire(const FetchOrder& order, const std::atomic<bool>& cancelled);
  Result<void> attempt_once(const FetchOrder& order, const std::atomic<bool>& cancelled,
                            RefitReport& report, Fetched& fetched);
  Result<void> attempt_until(const FetchOrder& order, const std::atomic<bool>& cancelled,
                             RefitReport& report, Fetched& fetched);

  Control& control_;
  FetchMemory& memory_;
  const ReceiverOptions options_;
  const MemberId member_;
  TimePoint started_at_{};
  RefitAttempt attempt_;
};

}  // namespace transfuse

// Moves a set of runs: keeps a window of tickets busy, sees stalls, and says of every run whether
// it landed.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "plan/copies.h"
#include "session/source_link.h"
#include "transfuse/transport.h"

namespace transfuse {

// What one round of a refit wants moved. Per-run arrays have one entry per run of the plan.
struct TransferOrder {
  const CopyTable* copies = nullptr;
  std::span<const uint32_t> runs;     // to be moved, in plan order
  std::span<const uint32_t> holder;   // per run: index into Plan::holders()
  std::span<const uint32_t> link_of;  // per run: index into links
  std::span<SourceLink* const> links;
  std::span<const uint32_t> slots;     // per link: where its leased version lies
  std::span<std::byte* const> target;  // per target parameter
  bool fingerprint = false;
  int64_t no_progress_ms = 2000;
  CopyLimits limits{};
  uint64_t landed_before = 0;                     // bytes of the plan that need not be moved
  std::atomic<uint64_t>* landed_bytes = nullptr;  // of the plan; never falls
  Deadline deadline;
  const std::atomic<bool>* cancelled = nullptr;
};

struct LinkFailure {
  uint32_t link = 0;
  Error error;
};

// Reused from refit to refit: after the first one of a size nothing is allocated. Used from one
// thread.
class Transfer {
 public:
  explicit Transfer(Transport& transport);

  // On return nothing writes the target any more. landed[run] is set to 1 for every run that
  // arrived, sums[run] to its fingerprint if wanted. Links that failed are listed in failures();
  // their connections are closed where a read had to be abandoned. Fails as a whole only with
  // kCancelled, or kDeadlineExceeded at order.deadline.
  Result<void> run(const TransferOrder& order, std::span<uint8_t> landed, std::span<uint64_t> sums);
  std::span<const LinkFailure> failures() const { return failures_; }

 private:
  struct Slot {
    TicketId ticket{};
    bool busy = false;
    uint32_t link = 0;
    uint64_t bytes = 0;
    uint64_t progress = 0;
    TimePoint submitted_at{};
    TimePoint cancelled_at{};  // epoch: not cancelled
    std::vector<StridedCopy> copies;
    std::vector<BlockScales> scales;  // of those copies that have some, in their order
    std::vector<uint64_t> sums;
    std::vector<uint32_t> runs;
    std::vector<const RemoteRegion*> regions;  // per copy; empty: all read one
    // Where scales are read: per copy, null for those that read none; or of all copies.
    std::vector<const RemoteRegion*> scale_regions;
    const RemoteRegion* scale_region = nullptr;
  };

  bool held_back(const TransferOrder& order) const;
  bool fill(const TransferOrder& order, Slot& slot);
  void gather(const TransferOrder& order, Slot& slot, Deadline limit);
  // Where a run's numbers lie in its source, and the scales that it reads.
  struct Place {
    SourceLink::Where numbers;
    SourceLink::Where scales{};  // of no region: it reads none

    // Whether it goes into a request that joins regions: all that it reads does.
    bool joins() const {
      return numbers.region->joins_requests() &&
             (scales.region == nullptr || scales.region->joins_requests());
    }
  };
  Result<Place> place_of(const TransferOrder& order, uint32_t number, Deadline limit) const;
  // Appends the copy of a run.
  void add(const TransferOrder& order, Slot& slot, uint32_t number, const Place& place) const;
  void submit(const TransferOrder& order, Slot& slot, const RemoteRegion& region);
  bool reap(const TransferOrder& order, Slot& slot, std::span<uint8_t> landed,
            std::span<uint64_t> sums);
  void watch_progress(const TransferOrder& order);
  void abandon(const TransferOrder& order);
  void fail_link(uint32_t link, Error error);
  bool failed(uint32_t link) const;

  Transport& transport_;
  std::vector<Slot> slots_;
  std::vector<TicketId> waiting_;
  std::vector<LinkFailure> failures_;
  size_t next_ = 0;                     // position in order.runs
  std::vector<size_t> gathered_to_;     // per link: joining runs before this place were asked for
  std::vector<TimePoint> progress_at_;  // per link: when a read of it last moved or ended
  uint64_t landed_bytes_ = 0;
  TimePoint next_submit_at_{};  // under a bandwidth cap
};

}  // namespace transfuse

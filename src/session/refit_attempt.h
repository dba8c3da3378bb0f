// One attempt of a refit under one lease: plan, choose sources, move, prove.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "plan/copies.h"
#include "session/admission.h"
#include "session/memory.h"
#include "session/source_link.h"
#include "session/transfer.h"
#include "transfuse/receiver.h"

namespace transfuse {

// What other threads may see of an attempt while it runs.
struct AttemptProgress {
  std::atomic<uint64_t> version{0};  // 0: no lease yet
  std::atomic<uint64_t> landed_bytes{0};
};

// Keeps connections, layouts, the plan and all buffers from cycle to cycle: a warm attempt neither
// connects, plans nor grows anything. Used from one thread; outlived by everything that it is
// given.
class RefitAttempt {
 public:
  RefitAttempt(Transport& transport, SourceDirectory& sources, const Layout& target,
               const TargetMemory& memory, const ReceiverOptions& options, MemberId member,
               AttemptProgress& progress);

  // Everything before the first byte: layouts, plan, sources, connections, first generation reads.
  // Writes no parameter.
  Result<void> prepare(const Lease& lease, Deadline deadline, RefitReport& report);
  // Moves and proves. On success every byte is that of the lease's version (I8). On failure the
  // parameters hold no version.
  Result<void> transfer(Deadline deadline, const std::atomic<bool>& cancelled, RefitReport& report);

  // Of later attempts. kInvalidArgument: see check_demand().
  Result<void> set_demand(const Demand& demand) {
    return admission_.set_demand("receiver '" + options_.name + "'", demand);
  }
  // Of later transfers.
  void set_limits(const CopyLimits& limits) { limits_ = limits; }
  // Something else wrote the target memory: its padding is filled again.
  void forget_padding() { padding_filled_ = false; }

  void close();
  // Leaks what must not be touched in a forked child.
  void abandon_in_forked_child();

 private:
  // One source of the lease during this attempt.
  struct Candidate {
    MemberInfo info;
    SourceLink* link = nullptr;       // null until it is first needed
    bool generation_checked = false;  // the first read gave the lease's generation
    bool proof_due = false;           // runs landed from it since the last good generation read
    uint32_t stalls = 0;
    uint32_t mismatches = 0;
    std::optional<Error> excluded;  // not asked again in this attempt
  };

  Result<void> admit(const Lease& lease, Deadline deadline, RefitReport& report);
  Result<void> plan_for(const Lease& lease, Deadline deadline, RefitReport& report);
  Result<Layout> layout_of(const Digest& digest, Deadline deadline);
  Result<void> choose_sources();
  Result<void> ready_sources(Deadline deadline, RefitReport& report);
  Result<void> ready_source(Candidate& candidate, Deadline deadline);
  void exclude(uint32_t candidate, Error error, RefitReport& report);
  void retry_or_exclude(uint32_t candidate, Error error, uint32_t& count, RefitReport& report);
  Error no_source_left(const Error& assign_error) const;
  Result<void> move(Deadline deadline, const std::atomic<bool>& cancelled, RefitReport& report);
  void prove_landed(Deadline deadline, RefitReport& report);
  Result<void> verify(Deadline deadline, const std::atomic<bool>& cancelled, RefitReport& report);
  Result<void> expect_sums(Candidate& candidate, Deadline deadline,
                           const std::atomic<bool>& cancelled);
  void compare_sums(uint32_t candidate, std::span<const uint64_t> expected, RefitReport& report);
  void report_routes(RefitReport& report) const;
  void count_missing();
  void forget_unproved(uint32_t candidate);
  void index_runs(std::span<const uint32_t> candidate_of);
  Result<void> choose_vouchers();
  std::span<const uint32_t> runs_of(uint32_t candidate) const;
  TableRequest table_request() const;

  Transport& transport_;
  SourceDirectory& sources_;
  const Layout target_;
  const ReceiverOptions options_;
  const MemberId member_;
  const std::vector<std::byte*> target_data_;  // per target parameter
  const MemoryPlace place_;
  Transfer transfer_;
  bool padding_filled_ = false;
  CopyLimits limits_;
  AttemptProgress& progress_;

  // From cycle to cycle.
  Admission admission_;
  std::vector<Layout> layouts_;                     // of sources, by digest
  std::vector<std::unique_ptr<SourceLink>> links_;  // to live incarnations
  std::optional<CopyTable> copies_;
  std::vector<Digest> source_digests_;  // of the plan

  // Of this attempt; per-run arrays follow the plan.
  uint64_t version_ = 0;
  std::vector<Candidate> candidates_;
  std::vector<SourceLink*> candidate_links_;
  std::vector<uint32_t> candidate_slots_;
  std::vector<uint32_t> member_counts_;  // per source layout of the plan
  std::vector<uint32_t> members_;        // flattened: index into candidates_
  Assignment assignment_;
  std::vector<uint32_t>
      missing_;  // runs that did not land, or landed unproved and lost their source
  std::vector<uint32_t> holder_of_;
  std::vector<uint32_t> candidate_of_;
  std::vector<uint32_t> voucher_of_;         // whose table each run is compared with
  std::vector<uint32_t> runs_by_candidate_;  // grouped by source, while verifying by voucher
  std::vector<uint32_t> first_run_of_;       // per candidate, and one past the last
  std::vector<uint32_t> next_place_;
  std::vector<uint8_t> landed_;  // bytes arrived
  std::vector<uint8_t> proved_;  // and a later good generation read of the source was made
  std::vector<uint64_t> sums_;
  std::vector<uint64_t> expected_;
  std::vector<uint64_t> table_;  // of one source: its runs only
};

}  // namespace transfuse

// Versions, leases and membership as a session sees them. Implemented in one process (local) and
// over gRPC (rpc).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"  // IWYU pragma: export

namespace transfuse {

// A stream of version changes of one model; notifies, never writes (I9). Used from one thread.
class Watch {
 public:
  virtual ~Watch() = default;
  // The next change, or nullopt at the deadline. Slow readers lose intermediate states of one
  // version, never the last.
  virtual Result<std::optional<VersionInfo>> next(Deadline deadline) = 0;
};

// Safe to call from any thread. Every call ends by its deadline (or the instance's default) with
// kDeadlineExceeded or kUnavailable. Heartbeats, re-registration after a coordinator restart and
// renewal of leases run inside. In a forked child every call fails with kUnavailable and the
// destructor does nothing.
class Control {
 public:
  virtual ~Control() = default;

  virtual Result<void> put_layout(const Layout& layout) = 0;  // a layout travels once per digest
  virtual Result<Layout> get_layout(const Digest& digest, Deadline deadline) = 0;

  // kAlreadyExists: a live member has the name. A dead one (or an older incarnation whose time ran
  // out) is replaced.
  virtual Result<MemberId> join(const Registration& registration) = 0;
  virtual Result<void> leave(MemberId member) = 0;
  // The descriptor of a MemberInfo.
  virtual Result<std::string> describe(uint64_t member, uint64_t incarnation,
                                       Deadline deadline) = 0;
  virtual Result<std::vector<MemberInfo>> members(std::string_view model) = 0;  // "" for all models
  virtual Result<std::vector<VersionInfo>> versions(std::string_view model) = 0;

  // What happened to a version, oldest first; at most 256 entries are kept. kNotFound: unknown, or
  // ended too long ago.
  virtual Result<std::vector<VersionEvent>> history(std::string_view model, uint64_t version) = 0;
  virtual Result<std::vector<GroupInfo>> groups(std::string_view model) = 0;  // "" for all models

  // -- source --
  // Makes room for a version: no new lease on what it replaces, whose readers are waited for as
  // request.when_leased says; then that is RETIRED and request.version is OPEN. kAlreadyExists if
  // the version is not above the last one published. The deadline is the readers': the
  // coordinator's answer may take the instance's default longer.
  virtual Result<DrainOutcome> begin_write(MemberId source, const WriteRequest& request,
                                           Deadline deadline) = 0;
  virtual Result<void> publish(MemberId source, const Offer& offer) = 0;
  virtual Result<void> abort_version(MemberId source, uint64_t version,
                                     std::string_view reason) = 0;

  // -- target --
  // Waits for a READY version that fits. kVersionGone: exactly N can never come. kDeadlineExceeded
  // says who has not published. In a group every rank of a round gets the same version.
  virtual Result<Lease> acquire(MemberId target, const VersionRequest& request,
                                Deadline deadline) = 0;
  virtual Result<void> release(LeaseId lease, const LeaseOutcome& outcome, Deadline deadline) = 0;
  // The target holds `version` from now on (0: none): after a commit without a group, a rollback,
  // or the loss of what it held.
  virtual Result<void> hold(MemberId target, uint64_t version, Deadline deadline) = 0;

  // -- groups -- (see docs/control.md for the protocol)
  // This rank has the round's version staged and verified, or (not ready) gives the round up.
  virtual Result<void> vote(MemberId target, uint64_t round, bool ready, std::string_view reason,
                            Deadline deadline) = 0;
  // Waits for the one recorded decision. kDeadlineExceeded: there is none yet. kGroupBroken: the
  // coordinator that recorded it is gone and no rank knows it.
  virtual Result<Decision> decision(MemberId target, uint64_t round, Deadline deadline) = 0;
  // This rank holds `version`, the round's; waits until every rank does. kDeadlineExceeded names
  // those that do not yet, kGroupBroken a rank that is lost.
  virtual Result<void> applied(MemberId target, uint64_t round, uint64_t version,
                               Deadline deadline) = 0;

  virtual Result<std::unique_ptr<Watch>> watch(std::string_view model) = 0;

  // -- fingerprint tables (between members, through the coordinator once per plan) --
  // A coordinator that restarted knows none: holders announce theirs again after kEpoch, and
  // get_table() of one that nobody asked for is kNotFound.
  virtual Result<void> request_table(MemberId from, uint64_t holder, const TableRequest& request,
                                     Deadline deadline) = 0;
  virtual Result<void> put_table(MemberId holder, const Digest& plan_key,
                                 std::string_view descriptor) = 0;
  virtual Result<std::string> get_table(uint64_t holder, const Digest& plan_key,
                                        Deadline deadline) = 0;
  // The next event for this member, or nullopt at the deadline.
  virtual Result<std::optional<MemberEvent>> next_event(MemberId member, Deadline deadline) = 0;
};

// All members in this process (tests, one-process use): several handles onto one coordinator may be
// opened with share().
struct ControlOptions {
  int64_t heartbeat_ms = 500;
  int64_t member_ttl_ms = 5000;  // a member that was silent for so long is dead
  int64_t lease_ttl_ms =
      60000;  // the longest a lease lives without being renewed by its holder's heartbeat
  int64_t call_deadline_ms = 5000;
};
std::unique_ptr<Control> open_local_control(const ControlOptions& options = {});

}  // namespace transfuse

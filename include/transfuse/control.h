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

namespace transfuse {

enum class MemberId : uint64_t {
};  // of this Control instance; stays valid when the coordinator restarts
enum class LeaseId : uint64_t {};

// Lies in registered memory beside the weights; the counter is odd while the source is being
// written.
struct Generation {
  uint64_t incarnation = 0;  // random, never 0: a restarted process has another
  uint64_t counter = 0;
  bool operator==(const Generation&) const = default;
};

enum class MemberRole : uint8_t { kSource, kTarget };

struct Registration {
  MemberRole role = MemberRole::kSource;
  std::string model;  // the stream of versions: "policy"
  std::string name;   // unique among live members of one model and role: "trainer0"
  uint32_t source_count =
      1;                     // kSource: a version is READY when this many sources have published it
  uint64_t incarnation = 0;  // random, never 0
  Digest layout;             // put_layout() first
  std::string descriptor;  // opaque to the coordinator: endpoint, token, regions, binding. At most
                           // 16 MiB, sent once
};

struct MemberInfo {
  uint64_t id = 0;  // the coordinator's number, for describe() and tables
  MemberRole role = MemberRole::kSource;
  std::string model;
  std::string name;
  uint64_t incarnation = 0;
  Digest layout;
  uint64_t version = 0;  // published (source) or landed (target); 0: none
  Generation generation;
};

enum class VersionState : uint8_t { kOpen, kReady, kRetired, kAborted };
std::string_view version_state_name(VersionState state);

struct VersionInfo {
  std::string model;
  uint64_t version = 0;  // from 1
  VersionState state = VersionState::kOpen;
  uint32_t published = 0;  // sources that have published it
  uint32_t source_count = 0;
  uint32_t leases = 0;
  std::string reason;  // why aborted or retired
};

// What a receiver asks for.
struct VersionRequest {
  enum class Kind : uint8_t { kNewest, kExactly, kAtLeast } kind = Kind::kNewest;
  uint64_t version = 0;
};

// What became of the target's parameters under a lease that is given back.
enum class LeaseEnd : uint8_t {
  kUnchanged,  // they hold what they held
  kLanded,     // they hold the lease's version
  kLost,       // writing began and did not succeed: they hold no version
};

struct Lease {
  LeaseId id{};
  uint64_t version = 0;
  int64_t ttl_ms = 0;  // renewed by the heartbeat of the member; a dead member's leases end with it
  std::vector<MemberInfo>
      sources;  // everyone who published the version, with the generation of that moment
};

struct DrainOutcome {
  uint32_t revoked = 0;  // readers that had not finished at the deadline; they will see a torn read
  int64_t waited_us = 0;
};

// A request to a member to keep fingerprints of a plan ready: source digests and target digest name
// the plan. The member sums its share of every run, per version, into a table in registered memory
// and says where with put_table().
struct TableRequest {
  Digest plan_key;
  Digest target;
  std::vector<Digest> sources;
  uint64_t chunk_bytes = 0;
};
struct MemberEvent {
  enum class Kind : uint8_t { kTableRequest, kRevoked, kEpoch } kind = Kind::kTableRequest;
  TableRequest table;
  uint64_t epoch = 0;  // kEpoch: the coordinator restarted; registrations were repeated already
};

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

  // -- source --
  // No new lease on what this source published; waits until its readers are gone, at the deadline
  // revokes them. Then the version it had published is RETIRED and `version` is OPEN.
  // kAlreadyExists if `version` is not above the last one published. The deadline is the readers':
  // the coordinator's answer may take the instance's default longer.
  virtual Result<DrainOutcome> begin_write(MemberId source, uint64_t version,
                                           Deadline deadline) = 0;
  virtual Result<void> publish(MemberId source, uint64_t version, const Generation& generation) = 0;
  virtual Result<void> abort_version(MemberId source, uint64_t version,
                                     std::string_view reason) = 0;

  // -- target --
  // Waits for a READY version that fits. kVersionGone: exactly N can never come. kDeadlineExceeded
  // says who has not published.
  virtual Result<Lease> acquire(MemberId target, const VersionRequest& request,
                                Deadline deadline) = 0;
  virtual Result<void> release(LeaseId lease, LeaseEnd end, Deadline deadline) = 0;
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

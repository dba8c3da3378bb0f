// What the control plane keeps and tells: members, versions, leases, groups. Plain data.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/digest.h"
#include "transfuse/groups.h"    // IWYU pragma: export
#include "transfuse/metadata.h"  // IWYU pragma: export

namespace transfuse {

enum class MemberId : uint64_t {
};  // of one Control instance; stays valid when the coordinator restarts
enum class LeaseId : uint64_t {};

// Lies in registered memory beside the weights; the counter is odd while they are being written.
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
  // kTarget: the ranks of one engine, which commit together; "" and 0 for one that is alone.
  std::string group{};
  uint32_t group_size = 0;
  // kSource: what it says of itself for as long as it lives; the kind is that of its layout.
  std::string kind{};
  Metadata metadata{};
};

// How the last refit of a target went.
struct RefitSummary {
  uint64_t version = 0;  // 0: none so far
  int64_t total_us = 0;
  int64_t transfer_us = 0;
  uint64_t size_bytes = 0;
  uint32_t attempts = 0;
  bool operator==(const RefitSummary&) const = default;
};

struct MemberInfo {
  uint64_t id = 0;  // the coordinator's number, for describe() and tables
  MemberRole role = MemberRole::kSource;
  std::string model;
  std::string name;
  uint64_t incarnation = 0;
  Digest layout;
  uint64_t version = 0;  // newest published (source) or held (target); 0: none
  Generation generation;
  uint32_t slot = 0;     // source: where `version` lies, see Offer
  uint64_t writing = 0;  // source: between begin_write() and publish()
  uint32_t leases = 0;   // target
  std::string group{};   // target
  RefitSummary last_refit{};
  std::string kind{};           // source
  Metadata metadata{};          // source
  Metadata version_metadata{};  // source: of `version`, as its offer says
  Digest revision{};            // likewise
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
  // What all sources that have published it say alike; zero and empty where they do not.
  Digest revision{};
  Metadata metadata{};
};

// One entry in the story of a version.
struct VersionEvent {
  int64_t at_us = 0;  // since the version was opened
  std::string who;    // member name
  std::string what;   // "began to write", "published", "READY", "leased", "landed", ...
};

// -- sources --

// One version as a source offers it.
struct Offer {
  uint64_t version = 0;
  Generation generation;
  uint32_t slot = 0;  // 0: the weights themselves (in place); 1 to k: a snapshot
  // What the source says of this version alone; layouts, plans and registrations do not change.
  Metadata metadata{};
  Digest revision{};  // see content_revision(); zero: not stated
};

// What happens if readers hold a lease on every version that could make room.
enum class WhenLeased : uint8_t {
  kRevokeAtDeadline,  // wait for the readers of the oldest, revoke them at the deadline
  kWait,              // wait for the readers of the oldest; kDeadlineExceeded leaves all as it was
  kRevoke,            // revoke the readers of the oldest at once
  kSkip,              // this version is not published: it is ABORTED for every source, kVersionGone
};

struct WriteRequest {
  uint64_t version = 0;  // above the last one published
  std::vector<uint64_t>
      replaces;  // offers of this source, one of which is overwritten; empty: none
  WhenLeased when_leased = WhenLeased::kRevokeAtDeadline;
};

struct DrainOutcome {
  uint32_t revoked = 0;  // readers that had not finished at the deadline; they will see a torn read
  int64_t waited_us = 0;
  uint64_t replaced = 0;  // one of WriteRequest::replaces: nobody may read it any more
};

// -- targets --

// What a receiver asks for.
struct VersionRequest {
  enum class Kind : uint8_t { kNewest, kExactly, kAtLeast } kind = Kind::kNewest;
  uint64_t version = 0;
  // In a group: the first rank that asks opens a round, which all ranks enter and which chooses the
  // version for all. Without a decision after so long the round is aborted.
  int64_t round_ms = 60000;
  Demand demand{};  // some source of the version fits it (requirements of tensors aside)
};

// A source that has published the version and is not listed, since it does not fit the demand.
struct Refusal {
  uint64_t member = 0;
  std::string source;  // its name
  Digest layout;
  std::string reason;
};

struct Lease {
  LeaseId id{};
  uint64_t version = 0;
  uint64_t round = 0;  // of the group; 0: the target is alone
  int64_t ttl_ms = 0;  // renewed by the heartbeat of the member; a dead member's leases end with it
  std::vector<MemberInfo>
      sources;  // everyone who published the version and fits, with the generation and slot of it
  std::vector<Refusal> refused{};
};

// What became of the target's parameters under a lease that is given back.
enum class LeaseEnd : uint8_t {
  kUnchanged,  // they hold what they held
  kLanded,     // they hold the lease's version
  kLost,       // writing began and did not succeed: they hold no version
};
struct LeaseOutcome {
  LeaseEnd end = LeaseEnd::kUnchanged;
  RefitSummary summary{};  // kept and shown if its version is not 0
};

// -- fingerprint tables --

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

}  // namespace transfuse

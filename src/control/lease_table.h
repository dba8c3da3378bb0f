// Versions, leases and membership as a pure state machine: calls and times in, replies and notices
// out.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "control/layout_store.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Chosen by the front end for each waiting call, never used twice.
enum class WaiterId : uint64_t {};

struct TableLimits {
  uint64_t first_id = 1;  // of members and leases: another range after every restart, so that an id
                          // of a dead coordinator is never taken for one of this
  size_t members = 65536;
  size_t waiters = 65536;
  size_t leases_per_member = 16;
  size_t waiters_per_member = 16;
  size_t tables_per_member = 64;
  size_t finished_versions = 64;  // remembered per model
  size_t version_events = 256;    // kept per version
  size_t finished_rounds = 4;     // remembered per group
  uint64_t descriptor_bytes = uint64_t{16} << 20;
  uint64_t all_descriptor_bytes = uint64_t{1} << 30;
  uint64_t table_descriptor_bytes = uint64_t{1} << 20;
  Duration suspect_grace = std::chrono::milliseconds(500);
  LayoutLimits layouts;
};

// What a member knew when its coordinator died, told to the next one.
struct Resume {
  uint64_t id = 0;              // its number before
  uint64_t last_published = 0;  // the highest number it has published
  std::vector<Offer> offers{};  // what it offers now, rising
  uint64_t writing = 0;         // between begin_write() and publish()
  uint64_t landed = 0;          // target: what it holds
  // Target in a group: the round that it has sent a vote ready for, answered or not, until it is
  // told ABORT or applied() has said that every rank holds the version.
  uint64_t voted_round = 0;
  uint64_t voted_version = 0;
  bool told_commit = false;  // it has learned that the round was committed
  bool applied = false;      // and holds what it voted for
  uint64_t last_round = 0;   // of the last lease that it was granted
};

struct JoinRequest {
  Registration registration;
  uint64_t owner = 0;  // the connection that answers for it, see suspect()
  Duration ttl = std::chrono::seconds(5);
  Duration lease_ttl = std::chrono::seconds(60);
  std::optional<Resume> resume{};  // set: a live member of the same incarnation is taken over
};

// -- effects: what the front end has to tell whom --
struct LeaseReply {
  WaiterId waiter{};
  Result<Lease> result;
  uint64_t target = 0;  // whose lease it is
  uint64_t roster = 0;  // see LeaseTable::roster()
};
struct DrainReply {
  WaiterId waiter{};
  Result<DrainOutcome> result;
};
struct TableReply {
  WaiterId waiter{};
  Result<std::string> result;
};
struct DecisionReply {
  WaiterId waiter{};
  Result<Decision> result;
};
struct AppliedReply {
  WaiterId waiter{};
  Result<void> result;
};
struct VersionChanged {
  VersionInfo version;
};
struct MemberNotice {
  uint64_t member = 0;
  uint64_t owner = 0;
  MemberEvent event;
};
inline constexpr std::string_view kLeftWord = "it left";  // MemberChanged::why of a leave()

// For the log: who came or went, and engines that may serve or not.
struct MemberChanged {
  uint64_t member = 0;
  MemberRole role = MemberRole::kSource;
  std::string model;
  std::string name;
  bool joined = false;
  std::string why{};  // it went
};
struct GroupChanged {
  GroupInfo group;
};
using Effect = std::variant<LeaseReply, DrainReply, TableReply, DecisionReply, AppliedReply,
                            VersionChanged, MemberNotice, MemberChanged, GroupChanged>;

struct TableStats {
  size_t members = 0;
  size_t models = 0;
  size_t versions = 0;
  size_t leases = 0;
  size_t waiters = 0;
  size_t rounds = 0;
  size_t tables = 0;
  size_t timers = 0;
  size_t layouts = 0;
  uint64_t layout_bytes = 0;
  uint64_t descriptor_bytes = 0;
  bool operator==(const TableStats&) const = default;
};

// A version is OPEN from the first begin_write(), READY when all expected sources have published
// it, and ends RETIRED or ABORTED. Only a READY version has leases. Nothing here blocks, reads a
// clock or does I/O; a waiting call is answered by exactly one effect, at its deadline at the
// latest (tick). Memory is bounded by TableLimits. Used from one thread at a time.
//
// A group of targets changes versions in rounds: opened by the first rank that asks for a lease,
// STAGING until every rank has voted ready (then COMMIT is recorded) or one gives up, is lost, or
// the round's time runs out (ABORT); after COMMIT open until every rank has applied it.
class LeaseTable {
 public:
  explicit LeaseTable(const TableLimits& limits = {});
  LeaseTable(const LeaseTable&) = delete;
  LeaseTable& operator=(const LeaseTable&) = delete;

  LayoutStore& layouts() { return layouts_; }
  const LayoutStore& layouts() const { return layouts_; }

  // -- members --
  // kNotFound: the layout was not put. kAlreadyExists: a live member has the name, or the model has
  // all its sources. kInvalidArgument: names, counts, or source_count differs from that of the live
  // sources.
  Result<uint64_t> join(const JoinRequest& request, TimePoint now);
  Result<void> leave(uint64_t member, TimePoint now);
  // Keeps members and leases alive. Returns those that are not members (any more). A lease that its
  // holder does not name in several beats running is one whose grant never reached it: it ends.
  std::vector<uint64_t> beat(std::span<const uint64_t> members, std::span<const LeaseId> leases,
                             TimePoint now);
  // The connection `owner` broke: its members die after a short grace unless they beat again.
  void suspect(uint64_t owner, TimePoint now);
  // As if the time to live of a member had run out.
  void lose(uint64_t member, std::string_view why, TimePoint now);
  // The coordinator itself stood still: silence until now is held against nobody.
  void forgive(TimePoint now);

  Result<std::shared_ptr<const std::string>> describe(uint64_t member, uint64_t incarnation) const;
  std::vector<MemberInfo> members(std::string_view model) const;    // "": of all models
  std::vector<VersionInfo> versions(std::string_view model) const;  // "": of all models
  // Changes with every source that joins or goes: who knows it knows the sources.
  uint64_t roster(std::string_view model) const;

  Result<std::vector<VersionEvent>> history(std::string_view model, uint64_t version) const;
  std::vector<GroupInfo> groups(std::string_view model) const;  // "": of all models

  // -- sources -- answered by a DrainReply
  void begin_write(WaiterId waiter, uint64_t source, const WriteRequest& request,
                   TimePoint deadline, TimePoint now);
  Result<void> publish(uint64_t source, const Offer& offer, TimePoint now);
  Result<void> abort_version(uint64_t source, uint64_t version, std::string_view reason,
                             TimePoint now);

  // -- targets -- answered by a LeaseReply
  void acquire(WaiterId waiter, uint64_t target, const VersionRequest& request, TimePoint deadline,
               TimePoint now);
  // kNotFound: `target` holds no such lease (any more). `outcome` is noted all the same.
  Result<void> release(uint64_t target, LeaseId lease, uint64_t version,
                       const LeaseOutcome& outcome, TimePoint now);
  Result<void> hold(uint64_t target, uint64_t version, TimePoint now);

  // -- groups -- answered by a DecisionReply, an AppliedReply
  Result<void> vote(uint64_t target, uint64_t round, bool ready, std::string_view reason,
                    TimePoint now);
  void decision(WaiterId waiter, uint64_t target, uint64_t round, TimePoint deadline,
                TimePoint now);
  void applied(WaiterId waiter, uint64_t target, uint64_t round, uint64_t version,
               TimePoint deadline, TimePoint now);

  // -- fingerprint tables -- get_table() is answered by a TableReply
  Result<void> request_table(uint64_t from, uint64_t holder, const TableRequest& request);
  Result<void> put_table(uint64_t holder, const Digest& plan_key, std::string_view descriptor);
  void get_table(WaiterId waiter, uint64_t holder, const Digest& plan_key, TimePoint deadline,
                 TimePoint now);
  // Requests that the members of `owner` have not answered: told again after a broken connection.
  void repeat_requests(uint64_t owner);

  // The caller of a waiting call is gone; no reply follows.
  void cancel(WaiterId waiter, TimePoint now);

  // Ends what is due. To be called no later than next_deadline().
  void tick(TimePoint now);
  std::optional<TimePoint> next_deadline() const;
  std::vector<Effect> take_effects();
  TableStats stats() const;
  size_t member_count() const { return members_.size(); }
  bool is_member(uint64_t id) const { return members_.contains(id); }

 private:
  enum class TimerKind : uint8_t { kMember, kLease, kWaiter, kRound };
  using Timer = std::tuple<TimePoint, TimerKind, uint64_t>;

  struct FingerprintTable {
    TableRequest request;
    std::set<uint64_t> requesters;
    std::optional<std::string> descriptor;
    std::set<uint64_t> waiters;
    uint64_t last_used = 0;  // count of uses, for eviction
  };
  struct Member {
    uint64_t id = 0;
    Registration registration;  // without its descriptor
    std::shared_ptr<const std::string> descriptor;
    uint64_t owner = 0;
    Duration ttl{};
    Duration lease_ttl{};
    TimePoint last_beat;
    TimePoint expires;
    TimePoint timer;  // when it is looked at next, at most `expires`
    bool suspect = false;
    uint64_t last_published = 0;
    std::map<uint64_t, Offer> offers;  // by version: OPEN or READY
    uint64_t writing = 0;
    uint64_t landed = 0;
    uint64_t landed_run = 0;  // see Model::run
    uint64_t last_round = 0;  // of its leases
    RefitSummary last_refit;
    std::optional<uint64_t> drain;  // waiter of begin_write()
    std::set<uint64_t> leases;
    std::set<uint64_t> waiters;
    std::map<Digest, FingerprintTable> tables;
    std::set<std::pair<uint64_t, Digest>> requested;  // tables of others: (holder, plan)
  };
  struct Participant {    // of a version, by name
    uint64_t member = 0;  // 0: gone
    uint64_t incarnation = 0;
    bool published = false;
    bool withdrawn = false;  // the source was told that it may write over it
    Offer offer{};
  };
  struct Version {
    VersionState state = VersionState::kOpen;
    uint32_t source_count = 0;
    bool closing = false;  // READY, but a source waits to write
    bool lost = false;     // finished because a source was lost: may come back with it
    bool skipped = false;  // ABORTED for all, since a source had no slot for it
    TimePoint opened;
    std::vector<VersionEvent> events;
    std::string reason;
    std::map<std::string, Participant> participants;
    // What all have said alike, once it has ended; see VersionInfo.
    std::optional<std::pair<Digest, Metadata>> said{};
    std::set<uint64_t> leases;
    std::set<uint64_t> drains;
  };
  struct Round {
    uint64_t id = 0;
    uint64_t version = 0;
    uint64_t run = 0;  // see Model::run
    TimePoint deadline;
    bool recovered = false;  // told by its ranks: the coordinator that opened it is gone
    bool committed = false;
    std::set<uint64_t> ready{};    // members that voted so
    std::set<uint64_t> applied{};  // members that said so
  };
  struct FinishedRound {
    Decision decision;
    uint64_t run = 0;
  };
  struct Group {
    uint32_t size = 0;
    std::map<std::string, uint64_t, std::less<>> ranks;  // alive
    bool was_whole = false;
    std::string trouble;         // why it is not whole any more
    std::optional<Round> round;  // STAGING, or committed and not applied by all
    std::map<uint64_t, FinishedRound> finished;
    std::set<uint64_t> waiters;              // decision() and applied()
    std::pair<GroupState, uint64_t> told{};  // state and version of the last GroupChanged
  };
  struct Model {
    std::map<uint64_t, Version> versions;
    std::map<std::string, Group, std::less<>> groups;
    std::map<std::string, uint64_t, std::less<>> sources;
    std::map<std::string, uint64_t, std::less<>> targets;
    std::set<uint64_t> waiters;  // acquire()
    uint64_t floor = 0;          // highest finished version that was forgotten
    uint64_t roster = 0;
    uint64_t run = 0;  // rises when numbers may come again: then they stand for other weights
  };
  struct HeldLease {
    uint64_t holder = 0;
    std::string model;
    uint64_t version = 0;
    TimePoint renewed;
    TimePoint timer;
    uint32_t beats_without = 0;
  };
  enum class WaiterKind : uint8_t { kDrain, kLease, kTable, kDecision, kApplied };
  struct Waiter {
    WaiterKind kind = WaiterKind::kLease;
    uint64_t member = 0;  // who waits; kTable: the holder
    TimePoint started;
    TimePoint deadline;
    VersionRequest request{};  // kLease; kDrain, kApplied: the version
    uint64_t drained = 0;      // kDrain: the version that is drained
    WhenLeased when_leased{};  // kDrain
    uint64_t round = 0;        // kDecision, kApplied
    uint32_t revoked = 0;
    Digest plan_key{};
  };

  // lease_table.cc
  Result<void> check_join(const JoinRequest& request) const;
  Result<void> check_source_join(const Registration& wanted, uint64_t replaced) const;
  std::optional<uint64_t> find_named(const Registration& wanted) const;
  void take_over(Member& member, const JoinRequest& request, TimePoint now);
  uint64_t admit(const JoinRequest& request, TimePoint now);
  void renew(Member& member, TimePoint now);
  void end_orphaned_leases(std::span<const uint64_t> members, std::span<const LeaseId> named,
                           TimePoint now);
  void set_member_timer(Member& member, TimePoint at);
  void remove_member(uint64_t id, std::string_view why, TimePoint now);
  void erase_model_if_empty(std::string_view name);
  MemberInfo info(const Member& member) const;
  Member* find_member(uint64_t id, MemberRole role);
  Error no_member(uint64_t id) const;
  uint64_t new_id() { return next_id_++; }
  bool from_this_life(uint64_t id) const;  // may have been, or may yet be, given out by new_id()
  static bool finished(VersionState state) {
    return state == VersionState::kRetired || state == VersionState::kAborted;
  }

  // lease_table_versions.cc
  Result<void> check_begin(const Member& source, uint64_t version) const;
  uint64_t choose_replaced(const Member& source, const WriteRequest& request) const;
  void skip_version(const Member& source, uint64_t version, TimePoint now);
  void open_version(Member& source, uint64_t version, TimePoint now);
  void finish_begin(uint64_t waiter_id, TimePoint now);
  void maybe_ready(const std::string& model, uint64_t version, TimePoint now);
  void finish_version(const std::string& model, uint64_t version, VersionState state,
                      std::string_view reason, TimePoint now);
  void resume_source(Member& source, const Resume& resume, TimePoint now);
  void withdraw(Member& source, uint64_t version);
  bool revive(const Member& source, uint64_t version);
  void drop_versions_of(const Registration& restarted, TimePoint now);
  void source_gone(const Member& source, std::string_view why, TimePoint now);
  bool passed_by_live_source(const Model& model, uint64_t version, uint64_t except) const;
  uint32_t revoke_leases(Version& version);
  void end_lease(uint64_t lease, TimePoint now);
  void drained_if_empty(const std::string& model, uint64_t version, TimePoint now);
  VersionInfo info(const std::string& model, uint64_t number, const Version& version) const;
  static std::pair<Digest, Metadata> said_alike(const Version& version);
  static void forget_words(Version& version);
  void changed(const std::string& model, uint64_t number, const Version& version);
  void note(const std::string& model, uint64_t number, std::string_view who, std::string what,
            TimePoint now);
  // lease_table_leases.cc
  std::optional<uint64_t> choose(const Model& model, const VersionRequest& request) const;
  std::optional<Error> never(const std::string& name, const Model& model,
                             const VersionRequest& request) const;
  std::optional<std::string> misfit_of(const Participant& part, const Demand& demand) const;
  bool any_fits(const Version& version, const Demand& demand) const;
  std::optional<Error> none_fits(const std::string& name, const Model& model,
                                 const VersionRequest& request) const;
  Error no_fitting_source(const std::string& name, uint64_t number, const Version& version,
                          const Demand& demand) const;
  bool try_grant(uint64_t waiter_id, TimePoint now);
  void grant(uint64_t waiter_id, uint64_t number, uint64_t round, TimePoint now);
  void serve_waiters(const std::string& model, TimePoint now);
  std::string who_is_missing(const std::string& name, const Model& model, const Member& target,
                             const VersionRequest& request) const;

  // lease_table_groups.cc
  Result<void> check_group_join(const Registration& wanted, uint64_t replaced) const;
  Group* group_of(const Member& member);
  void join_group(Member& member, const std::optional<Resume>& resume, TimePoint now);
  void leave_group(const Member& member, std::string_view why, TimePoint now);
  bool try_grant_in_group(uint64_t waiter_id, Group& group, TimePoint now);
  void open_round(Group& group, const Waiter& waiter, uint64_t version, TimePoint now);
  void recover_round(Member& member, Group& group, const Resume& resume, TimePoint now);
  void settle_recovered(const std::string& model, Group& group, TimePoint now);
  void record(Group& group, uint64_t round, Decision decision, uint64_t run);
  void end_round(const std::string& model, Group& group, Decision decision, TimePoint now);
  void lose_round(const std::string& model, Group& group, const std::string& why, TimePoint now);
  void commit_if_all_ready(const std::string& model, Group& group, TimePoint now);
  void settle_group(const std::string& model, Group& group, TimePoint now);
  void expire_round(uint64_t round, TimePoint now);
  void tell_change(const std::string& model, const std::string& name, Group& group);
  bool holds(const Group& group, uint64_t version) const;
  void land(Member& target, uint64_t version, uint64_t run);
  uint64_t run_of(const Member& member) const;
  std::string who_holds_not(const Group& group, uint64_t version) const;
  GroupInfo info(const std::string& model, const std::string& name, const Group& group) const;

  // lease_table_waiters.cc
  void add_waiter(uint64_t id, Waiter waiter);
  void remove_waiter(uint64_t id);
  void expire_waiter(uint64_t id, TimePoint now);
  void fail_waiter(uint64_t id, const Error& error);
  void forget_requests(Member& requester);
  void evict_table(Member& holder);

  TableLimits limits_;
  LayoutStore layouts_;
  std::map<uint64_t, Member> members_;
  std::map<uint64_t, std::set<uint64_t>> owners_;  // owner -> members
  std::map<std::string, Model, std::less<>> models_;
  std::map<uint64_t, HeldLease> leases_;
  std::map<uint64_t, Waiter> waiters_;
  std::map<uint64_t, std::pair<std::string, std::string>> rounds_;  // -> model, group
  std::set<Timer> timers_;
  std::vector<Effect> effects_;
  uint64_t next_id_ = 1;
  uint64_t rosters_ = 0;
  uint64_t table_uses_ = 0;
  uint64_t descriptor_bytes_ = 0;
};

}  // namespace transfuse

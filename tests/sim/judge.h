// What must be true of versions, leases and groups, kept beside the implementation from the calls
// that it gets and the answers that it gives.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "control/lease_table.h"
#include "sim/facts.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse::sim {

// Shares no code with the lease table. Calls are told before their effects. Used from one thread.
class Judge {
 public:
  Judge(TableLimits limits, Counts& counts) : limits_(std::move(limits)), counts_(counts) {}

  const std::vector<std::string>& faults() const { return faults_; }
  void expect(bool condition, const char* what) {
    if (!condition) faults_.emplace_back(what);
  }

  // -- calls at the coordinator --
  void coordinator_died(TimePoint now);
  void joined(uint64_t id, const JoinRequest& request, TimePoint now);
  void left(uint64_t id);
  void beat(std::span<const uint64_t> members, std::span<const LeaseId> leases, TimePoint now);
  void suspected(uint64_t owner, TimePoint now);
  void before_tick(TimePoint now);
  void after_tick(TimePoint now);
  void begin_write(WaiterId waiter, uint64_t source, const WriteRequest& request,
                   TimePoint deadline, TimePoint now);
  void published(uint64_t source, const Offer& offer);
  void acquire(WaiterId waiter, uint64_t target, const VersionRequest& request, TimePoint deadline);
  void released(uint64_t target, LeaseId lease, uint64_t version, const LeaseOutcome& outcome,
                bool accepted);
  void held(uint64_t target, uint64_t version);
  void voted(uint64_t target, uint64_t round, bool ready);
  void decision(WaiterId waiter, uint64_t target, uint64_t round, TimePoint deadline);
  void applied(WaiterId waiter, uint64_t target, uint64_t round, uint64_t version,
               TimePoint deadline);
  void cancelled(WaiterId waiter);
  void effect(const Effect& effect, TimePoint now);
  // After every event.
  void check(const LeaseTable& table, TimePoint now);

  // -- facts of the processes --
  void wrote(uint64_t incarnation, uint64_t version, const Stamp& stamp);
  void refit_succeeded(const Lease& lease, const std::map<uint64_t, Chunks>& read);
  void told(uint64_t round, uint64_t incarnation, bool commit);
  void process_died(uint64_t incarnation);
  uint64_t landed(uint64_t member) const;

 private:
  struct Member {
    Registration registration;
    uint64_t owner = 0;
    TimePoint expires;
    bool suspect = false;
    std::map<uint64_t, Offer> offers;  // published and not replaced
    bool resumed = false;
    uint64_t landed = 0;
  };
  struct Held {
    uint64_t holder = 0;
    uint64_t version = 0;
    TimePoint renewed;
    int beats_without = 0;
  };
  enum class Kind : uint8_t { kDrain, kLease, kDecision, kApplied };
  struct Waiter {
    Kind kind{};
    uint64_t member = 0;
    TimePoint deadline;
    VersionRequest wanted{};
    WriteRequest write{};
    std::set<uint64_t> may_replace{};  // what the rules leave to choose from
    uint64_t drains = 0;               // READY and read when the call came
    uint64_t round = 0;
    uint64_t version = 0;
  };
  struct Round {
    uint64_t version = 0;
    std::string group;
    uint32_t size = 0;
    TimePoint deadline;
    std::set<std::string> ready;
    std::optional<bool> recorded;   // by the coordinator that lives
    std::map<uint64_t, bool> told;  // to processes that live, by incarnation
  };

  std::optional<Waiter> answered(WaiterId id);
  void see_lease(const LeaseReply& reply, TimePoint now);
  void see_round(const Waiter& waiter, const Member& target, const Lease& lease, TimePoint now);
  void see_drain(const DrainReply& reply, TimePoint now);
  void see_decision(const DecisionReply& reply);
  void see_applied(const AppliedReply& reply);
  void see_change(const VersionInfo& version);
  void remove(uint64_t member);
  std::set<uint64_t> choose_replaced(const Member& source, const WriteRequest& request) const;
  bool read(uint64_t version) const;
  bool ready(uint64_t version) const;
  std::vector<const Member*> ranks(const std::string& group) const;
  void check_versions(const LeaseTable& table);
  void check_groups(const LeaseTable& table, TimePoint now);

  TableLimits limits_;
  Counts& counts_;
  std::vector<std::string> faults_;

  // -- of the coordinator that lives --
  std::map<uint64_t, Member> members_;
  std::map<uint64_t, Held> leases_;
  std::map<uint64_t, Waiter> waiters_;
  std::map<uint64_t, VersionState> versions_;
  std::set<uint64_t> skipped_;
  std::map<std::string, GroupState> states_;
  bool recounted_ = false;     // a trainer has started again and may count from below
  std::set<uint64_t> dying_;   // members whose time ends in this tick
  std::set<uint64_t> ending_;  // leases that may have ended before they were revoked
  bool upheaval_ = false;      // in this event somebody came or went
  uint64_t notices_ = 0;       // of revocations, in this event
  uint64_t owed_ = 0;          // at least
  uint64_t tolerated_ = 0;     // more of them
  TimePoint due_at_;           // when readers were last revoked at a deadline

  // -- that outlive it --
  std::map<uint64_t, Round> rounds_;
  std::map<std::pair<uint64_t, uint64_t>, Stamp> truth_;  // (incarnation, version)
};

}  // namespace transfuse::sim

// A coordinator that crashes, comes back with a higher epoch, and looks at its timers late.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "sim/facts.h"
#include "sim/judge.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse::sim {

class Process;
class World;

// To a call; nothing if the call failed on its way, or was not answered in time.
using Answer = std::variant<std::monostate, Result<void>, Result<uint64_t>, Result<Lease>,
                            Result<DrainOutcome>, Result<Decision>>;

// The lease table with the judge beside it: each call is told to both. What a canary breaks lies
// between the two. Used from one thread.
class Coordinator {
 public:
  Coordinator(World& world, Canary canary);

  bool up() const { return table_.has_value(); }
  uint64_t epoch() const { return epoch_; }
  const LeaseTable& table() const { return *table_; }
  void start();
  void crash();

  // -- calls that have arrived -- answered by an effect where they return nothing
  Result<uint64_t> join(const JoinRequest& request);
  Result<void> leave(uint64_t member);
  // False: the coordinator does not know the member.
  bool beat(uint64_t member, const std::vector<LeaseId>& leases);
  void suspect(uint64_t owner);
  void begin_write(Process& process, WaiterId waiter, uint64_t source, const WriteRequest& request,
                   Duration deadline);
  Result<void> publish(uint64_t source, const Offer& offer);
  Result<void> abort_version(uint64_t source, uint64_t version);
  void acquire(Process& process, WaiterId waiter, uint64_t target, const VersionRequest& request,
               Duration deadline);
  Result<void> release(uint64_t target, const Lease& lease, const LeaseOutcome& outcome);
  Result<void> hold(uint64_t target, uint64_t version);
  Result<void> vote(uint64_t target, uint64_t round, bool ready);
  void decision(Process& process, WaiterId waiter, uint64_t target, uint64_t round,
                Duration deadline);
  void applied(Process& process, WaiterId waiter, uint64_t target, uint64_t round, uint64_t version,
               Duration deadline);
  void cancel(WaiterId waiter);

  // Passes on what the last call caused, and sees to it that the next timer is looked at.
  void settle();
  void tick();

 private:
  void pass_on(Effect effect);
  void break_something(Effect& effect);
  void forget_a_lease(uint64_t version);

  World& world_;
  const Canary canary_;
  uint64_t epoch_ = 0;
  std::optional<LeaseTable> table_;
  std::map<WaiterId, Process*> callers_;
  std::optional<TimePoint> wakes_;
  std::optional<Lease> replaced_;  // canary: what a lease of a replaced version looked like
  std::map<LeaseId, std::pair<uint64_t, Lease>> granted_;  // canary
  std::map<WaiterId, uint64_t> asked_;  // canary: who waits for the decision of which round
  uint64_t split_ = 0;                  // canary: the round whose decision was split
};

}  // namespace transfuse::sim

// One life of a job: trainers, engines, a coordinator, a network, and what goes wrong, all by one
// seed.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/random.h"
#include "control/lease_table.h"
#include "sim/coordinator.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/judge.h"
#include "sim/process.h"
#include "sim/source.h"
#include "sim/target.h"
#include "transfuse/deadline.h"

namespace transfuse::sim {

// Used from one thread.
class World {
 public:
  struct Options {
    Canary canary = Canary::kNone;
    bool trace = false;  // keeps the last events for print
  };
  World(uint64_t seed, const Options& options);

  // Trouble, then peace in which everything has to recover, then everybody leaves. Ends at the
  // first violation; what the judge says then.
  std::vector<std::string> live();
  const std::deque<std::string>& last_events() const { return trace_; }

  // -- for its inhabitants --
  Events& events() { return events_; }
  TimePoint now() const { return events_.now(); }
  Random& random() { return random_; }
  Judge& judge() { return judge_; }
  Counts& counts() { return counts_; }
  const Counts& counts() const { return counts_; }
  Coordinator& coordinator() { return coordinator_; }
  Canary canary() const { return options_.canary; }
  const TableLimits& limits() const { return limits_; }
  bool peace() const { return peace_; }
  uint64_t new_id() { return ++last_id_; }
  uint64_t new_incarnation() { return ++last_incarnation_; }
  const Source* source(uint64_t incarnation) const;  // nullptr: dead
  bool all_finished(uint64_t version) const;
  bool someone_has_published(uint64_t version) const;
  void seen_change(const Target& target);

  // -- the network --
  void send(uint64_t epoch, std::function<void(Coordinator&)> message);
  void reply(Process& to, uint64_t call, Answer answer);
  void connection_broke(uint64_t owner);

  template <typename What>
  void say(What what) {
    if (options_.trace) note(what());
  }

 private:
  void populate();
  void trouble();
  void trouble_coordinator();
  void run_until(TimePoint end);
  void after_event();
  void check_engines();
  void check_weights();
  // Everybody has gone on since.
  bool recovered(const std::map<std::string, uint64_t>& before) const;
  std::map<std::string, uint64_t> progress() const;
  void leave_all();
  void note(const std::string& what);
  Duration delay();
  Process& any_process();
  std::vector<Process*> processes() const;

  const Options options_;
  Random random_;
  TableLimits limits_;
  Counts counts_;
  Judge judge_;
  Events events_;
  Coordinator coordinator_;
  Job job_;
  std::vector<std::unique_ptr<Source>> sources_;
  std::vector<std::unique_ptr<Target>> targets_;
  std::map<const Target*, std::map<uint64_t, Chunks>> seen_;  // weights, after the last event
  std::map<std::string, uint64_t> commits_;
  std::deque<std::string> trace_;
  bool peace_ = false;
  uint64_t last_id_ = 0;
  uint64_t last_incarnation_ = 0;
};

}  // namespace transfuse::sim

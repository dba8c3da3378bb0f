// The network, the trouble, and what is checked after every event.
#include "sim/world.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "control/lease_table.h"
#include "sim/coordinator.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/process.h"
#include "sim/source.h"
#include "sim/target.h"
#include "transfuse/deadline.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

constexpr size_t kTraced = 80;
constexpr auto kTrouble = std::chrono::milliseconds(2500);
constexpr auto kCalm = std::chrono::milliseconds(2000);   // what was slow or silent comes back
constexpr auto kPeace = std::chrono::milliseconds(6000);  // at most, until all have gone on
constexpr auto kLook = std::chrono::milliseconds(300);

TableLimits small_limits() {
  TableLimits limits;
  limits.finished_versions = 6;
  limits.version_events = 16;
  limits.leases_per_member = 4;
  limits.suspect_grace = kGrace;
  return limits;
}

}  // namespace

void Counts::add(const Counts& other) {
  events += other.events;
  refits += other.refits;
  commits += other.commits;
  aborts += other.aborts;
  unknown += other.unknown;
  whole += other.whole;
  broken += other.broken;
  revoked += other.revoked;
  skipped += other.skipped;
  waited_in_vain += other.waited_in_vain;
  restarts += other.restarts;
  resumed += other.resumed;
  recovered += other.recovered;
  torn += other.torn;
  torn_in_fact += other.torn_in_fact;
  lost += other.lost;
  kills += other.kills;
  pauses += other.pauses;
  jumps += other.jumps;
}

World::World(uint64_t seed, const Options& options)
    : options_(options),
      random_(seed),
      limits_(small_limits()),
      judge_(limits_, counts_),
      coordinator_(*this, options.canary) {
  populate();
}

void World::populate() {
  job_.source_count = 1 + static_cast<uint32_t>(random_.below(3));
  const auto snapshots = static_cast<uint32_t>(random_.below(4));
  for (uint32_t i = 0; i < job_.source_count; ++i) {
    sources_.push_back(
        std::make_unique<Source>(*this, fmt::format("trainer{}", i), job_, snapshots));
  }
  const uint64_t alone = random_.below(3);
  for (uint64_t i = 0; i < alone; ++i) {
    targets_.push_back(std::make_unique<Target>(
        *this, fmt::format("engine{}", i),
        TargetPlan{.group = "", .group_size = 0, .shadow = random_.chance(0.5)}));
  }
  const uint64_t groups = alone == 0 ? 1 : random_.below(2);
  for (uint64_t g = 0; g < groups; ++g) {
    const TargetPlan plan{.group = fmt::format("group{}", g),
                          .group_size = 2 + static_cast<uint32_t>(random_.below(3)),
                          .shadow = random_.chance(0.6)};
    for (uint32_t i = 0; i < plan.group_size; ++i) {
      targets_.push_back(std::make_unique<Target>(*this, fmt::format("g{}rank{}", g, i), plan));
    }
  }
}

// -- the network --

Duration World::delay() {
  const bool slow = !peace_ && random_.chance(0.03);
  return std::chrono::microseconds(200 + random_.below(slow ? 200000 : 8000));
}

void World::send(uint64_t epoch, std::function<void(Coordinator&)> message) {
  if (!peace_ && random_.chance(0.02)) {
    ++counts_.lost;
    return;
  }
  events_.after(delay(), [this, epoch, message = std::move(message)] {
    if (coordinator_.up() && coordinator_.epoch() == epoch) message(coordinator_);
  });
}

void World::reply(Process& to, uint64_t call, Answer answer) {
  if (!peace_ && random_.chance(0.02)) {
    ++counts_.lost;
    return;
  }
  events_.after(delay(), [this, &to, call, answer = std::move(answer),
                          epoch = coordinator_.epoch()] { to.deliver(call, answer, epoch); });
}

// The coordinator notices most broken connections, and not those of a host that is gone.
void World::connection_broke(uint64_t owner) {
  if (random_.chance(0.2)) return;
  events_.after(delay() + ms(5), [this, owner] {
    if (coordinator_.up()) coordinator_.suspect(owner);
  });
}

// -- trouble --

std::vector<Process*> World::processes() const {
  std::vector<Process*> out;
  for (const auto& source : sources_) out.push_back(source.get());
  for (const auto& target : targets_) out.push_back(target.get());
  return out;
}

Process& World::any_process() {
  const auto all = processes();
  return *all[random_.below(all.size())];
}

void World::trouble() {
  if (peace_) return;
  const auto again = ms(40 + static_cast<int64_t>(random_.below(500)));
  events_.after(again, [this] { trouble(); });
  const auto start_later = [this](Process& process) {
    events_.after(ms(20 + static_cast<int64_t>(random_.below(700))), [&process] {
      if (!process.alive()) process.start();
    });
  };
  switch (random_.below(10)) {
    case 0:
    case 1: {
      Process& victim = any_process();
      ++counts_.kills;
      victim.kill();
      return start_later(victim);
    }
    case 2:  // the job dies and goes on from a checkpoint: it may count from below
      ++counts_.kills;
      for (const auto& source : sources_) source->kill();
      ++job_.run;
      job_.top -= std::min<uint64_t>(job_.top, random_.below(4));
      for (const auto& source : sources_) start_later(*source);
      return;
    case 3:
    case 4:
      ++counts_.pauses;
      return any_process().pause(ms(100 + static_cast<int64_t>(random_.below(1500))));
    case 5:
      return any_process().lose_connection();
    case 6:
    case 7:
      ++counts_.jumps;
      return any_process().jump(ms(static_cast<int64_t>(random_.below(3000)) - 800));
    default:
      return trouble_coordinator();
  }
}

void World::trouble_coordinator() {
  if (!coordinator_.up()) return;
  ++counts_.restarts;
  say([] { return std::string("the coordinator dies"); });
  coordinator_.crash();
  events_.after(ms(20 + static_cast<int64_t>(random_.below(300))), [this] {
    coordinator_.start();
    say([&] { return fmt::format("a coordinator of epoch {} starts", coordinator_.epoch()); });
  });
  for (Process* process : processes()) {
    events_.after(ms(1 + static_cast<int64_t>(random_.below(250))),
                  [process, was = process->incarnation()] {
                    if (process->incarnation() == was) process->lose_connection();
                  });
  }
}

// -- life --

std::vector<std::string> World::live() {
  coordinator_.start();
  for (Process* process : processes()) {
    events_.after(ms(static_cast<int64_t>(random_.below(100))), [process] { process->start(); });
  }
  events_.after(ms(300), [this] { trouble(); });
  run_until(now() + kTrouble);
  peace_ = true;
  run_until(now() + kCalm);
  const auto before = progress();
  const TimePoint limit = now() + kPeace;
  while (judge_.faults().empty() && !recovered(before) && now() < limit) run_until(now() + kLook);
  const bool violated = !judge_.faults().empty();
  judge_.expect(violated || recovered(before), "I11: somebody does not go on after the trouble");
  if (judge_.faults().empty()) leave_all();
  return judge_.faults();
}

void World::run_until(TimePoint end) {
  while (judge_.faults().empty() && events_.run_next(end)) {
    ++counts_.events;
    after_event();
  }
  if (!judge_.faults().empty()) note("VIOLATED: " + judge_.faults().front());
}

void World::after_event() {
  coordinator_.settle();
  if (coordinator_.up()) judge_.check(coordinator_.table(), now());
  check_weights();
  check_engines();
}

// I9
void World::check_weights() {
  for (const auto& target : targets_) seen_change(*target);
}

void World::seen_change(const Target& target) {
  auto& seen = seen_[&target];
  if (seen == target.weights()) return;
  judge_.expect(target.in_commit() || !target.alive(), "I9: weights changed outside of a commit");
  seen = target.weights();
}

// An engine makes a step when every rank of it may serve: then all hold one version, and whole.
void World::check_engines() {
  std::map<std::string, std::vector<const Target*>> engines;
  for (const auto& target : targets_) {
    if (!target->plan().group.empty()) engines[target->plan().group].push_back(target.get());
  }
  for (const auto& [name, ranks] : engines) {
    const bool steps = std::all_of(ranks.begin(), ranks.end(), [](const Target* rank) {
      return rank->alive() && rank->serves() && !rank->in_commit();
    });
    if (!steps) continue;
    const Stamp& first = ranks.front()->weights().begin()->second.front();
    for (const Target* rank : ranks) {
      judge_.expect(rank->claims() == ranks.front()->claims(),
                    "I8: an engine serves with ranks of different versions");
      for (const auto& [incarnation, chunks] : rank->weights()) {
        for (const Stamp& chunk : chunks) {
          judge_.expect(chunk.version == rank->claims() && chunk.run == first.run,
                        "I8: an engine serves with weights of another version");
        }
      }
    }
  }
  if (!coordinator_.up()) return;
  for (const GroupInfo& group : coordinator_.table().groups("")) {
    if (group.state != GroupState::kWhole) continue;
    for (const Target* rank : engines[group.name]) {
      if (!rank->alive() || rank->claims() == 0) continue;  // not noticed yet; being written
      judge_.expect(rank->claims() == group.version,
                    "I8: a group is WHOLE though a rank holds another version");
    }
  }
}

std::map<std::string, uint64_t> World::progress() const {
  std::map<std::string, uint64_t> out;
  for (const auto& target : targets_) out[target->name()] = target->last_claim();
  return out;
}

bool World::recovered(const std::map<std::string, uint64_t>& before) const {
  const bool targets = std::all_of(targets_.begin(), targets_.end(), [&](const auto& target) {
    return target->alive() && target->last_claim() > before.at(target->name());
  });
  return targets && std::all_of(sources_.begin(), sources_.end(),
                                [&](const auto& source) { return source->done() + 3 >= job_.top; });
}

void World::leave_all() {
  for (Process* process : processes()) process->leave();
  run_until(now() + std::chrono::minutes(2));
  coordinator_.tick();  // layouts are forgotten when somebody looks at the clock
  judge_.expect(coordinator_.table().stats() == TableStats{}, "I3: something is left of members");
}

const Source* World::source(uint64_t incarnation) const {
  for (const auto& source : sources_) {
    if (source->incarnation() == incarnation && incarnation != 0) return source.get();
  }
  return nullptr;
}

bool World::all_finished(uint64_t version) const {
  return std::all_of(sources_.begin(), sources_.end(),
                     [&](const auto& source) { return source->done() >= version; });
}

bool World::someone_has_published(uint64_t version) const {
  return std::any_of(sources_.begin(), sources_.end(),
                     [&](const auto& source) { return source->done() >= version; });
}

void World::note(const std::string& what) {
  if (!options_.trace) return;
  trace_.push_back(fmt::format(
      "{:9.3f} ms  {}",
      static_cast<double>((now() - TimePoint(std::chrono::hours(1))).count()) / 1e6, what));
  if (trace_.size() > kTraced) trace_.pop_front();
}

}  // namespace transfuse::sim

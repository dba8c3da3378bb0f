// Random lives of a lease table, from a printed seed, against a judge that shares no code with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/random.h"
#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

constexpr Digest kLayout{1, 2};
constexpr Duration kTtl = std::chrono::seconds(5);
constexpr Duration kLeaseTtl = std::chrono::seconds(12);
constexpr Duration kGrace = std::chrono::milliseconds(500);

Duration ms(uint64_t count) { return std::chrono::milliseconds(count); }

// What must be true, kept from the calls made and the effects seen, element by element.
class Judge {
 public:
  struct Member {
    MemberRole role{};
    std::string name;
    uint32_t source_count = 0;
    TimePoint dead_at;
    uint64_t offers = 0;   // published, and not writing since
    uint64_t closing = 0;  // its begin_write() waits for the readers of this one
    Generation generation;
    std::string kind{};
    uint64_t step = 0;  // that it says of what it offers
  };
  struct Lease {
    uint64_t holder = 0;
    uint64_t version = 0;
    TimePoint ends;
    int beats_without = 0;  // of its holder, running, that did not name it
  };
  struct Waiter {
    uint64_t member = 0;
    TimePoint deadline;
    uint64_t writes = 0;  // begin_write() of this version
    VersionRequest wanted;
    std::string kind{};  // demanded; empty: any
    uint64_t step = 0;   // at least this one; 0: any
  };

  std::map<uint64_t, Member> members;
  std::map<uint64_t, Lease> leases;
  std::map<uint64_t, Waiter> waiters;
  std::map<uint64_t, VersionState> versions;
  std::set<std::pair<uint64_t, uint64_t>> published;  // (member, version), ever
  std::set<uint64_t> dying;  // members whose time ends now: before or after anything else of now
  bool upheaval = false;     // in this step somebody came or went
  std::vector<std::string> faults;

  void expect(bool condition, const std::string& what) {
    if (!condition) faults.push_back(what);
  }

  void gone(uint64_t member) {
    upheaval = true;
    members.erase(member);
    std::erase_if(leases, [&](const auto& lease) { return lease.second.holder == member; });
  }

  void see(const Effect& effect, TimePoint now) {
    if (const auto* changed = std::get_if<VersionChanged>(&effect)) {
      see_change(changed->version);
    } else if (const auto* lease = std::get_if<LeaseReply>(&effect)) {
      const auto waiter = answered(lease->waiter);
      if (waiter && lease->result) see_lease(*waiter, *lease->result, now);
      if (waiter && !lease->result && lease->result.error().code == ErrorCode::kNoFittingSource) {
        see_no_fit(*waiter);
      }
    } else if (const auto* drain = std::get_if<DrainReply>(&effect)) {
      const auto waiter = answered(drain->waiter);
      if (waiter) see_drain(*waiter, *drain, now);
    } else if (const auto* notice = std::get_if<MemberNotice>(&effect)) {
      expect(members.contains(notice->member), "a notice for nobody");
      const bool revoked = notice->event.kind == MemberEvent::Kind::kRevoked;
      if (revoked && !dying.contains(notice->member)) ++revoked_notices;
    }
  }

  void see_change(const VersionInfo& version) {
    const uint64_t number = version.version;
    const auto before = versions.find(number);
    switch (version.state) {
      case VersionState::kOpen:
        expect(before == versions.end() || before->second != VersionState::kReady,
               "READY became OPEN");
        break;
      case VersionState::kReady: {
        expect(before != versions.end() && before->second == VersionState::kOpen,
               "READY without OPEN");
        uint32_t count = 0;
        for (const auto& [id, member] : members) {
          if (member.offers == number && member.role == MemberRole::kSource) ++count;
        }
        expect(count >= version.source_count, "READY before all sources had published");
        break;
      }
      case VersionState::kRetired:
      case VersionState::kAborted: {
        expect(!version.reason.empty(), "ended without a reason");
        std::erase_if(leases, [&](const auto& lease) {
          if (lease.second.version != number) return false;
          if (!dying.contains(lease.second.holder)) ++owed_notices;
          return true;
        });
        break;
      }
    }
    versions[number] = version.state;
  }

  void see_lease(const Waiter& waiter, const transfuse::Lease& lease, TimePoint now) {
    expect(versions[lease.version] == VersionState::kReady, "a lease on a version not READY");
    expect(waiter.wanted.kind != VersionRequest::Kind::kExactly ||
               lease.version == waiter.wanted.version,
           "another version than exactly the one");
    expect(waiter.wanted.kind != VersionRequest::Kind::kAtLeast ||
               lease.version >= waiter.wanted.version,
           "a version below the least");
    expect(!lease.sources.empty(), "a lease without a source");
    for (const MemberInfo& source : lease.sources) {
      const auto found = members.find(source.id);
      expect(found != members.end(), "a lease names a dead source");
      if (found == members.end()) continue;
      expect(found->second.generation == source.generation || found->second.offers == 0,
             "a lease with another generation than was published");
      expect(found->second.offers != lease.version || fits(waiter, found->second),
             "a lease names a source that does not fit the demand");
    }
    for (const Refusal& refusal : lease.refused) {
      expect(!refusal.reason.empty(), "a source was refused without a reason");
      for (const auto& [id, member] : members) {
        if (member.role != MemberRole::kSource || member.name != refusal.source) continue;
        expect(member.offers != lease.version || !fits(waiter, member),
               "a source that fits was refused");
      }
    }
    for (const auto& [id, member] : members) {
      if (member.role != MemberRole::kSource || member.offers != lease.version) continue;
      const auto named = [&](const MemberInfo& source) { return source.id == id; };
      expect(!fits(waiter, member) || std::ranges::any_of(lease.sources, named),
             "a source that fits is not named");
    }
    for (const auto& [id, member] : members) {
      expect(member.closing != lease.version, "a lease on a version that a source waits to end");
    }
    leases[static_cast<uint64_t>(lease.id)] = {
        .holder = waiter.member, .version = lease.version, .ends = now + kLeaseTtl};
  }

  static bool fits(const Waiter& waiter, const Member& source) {
    return (waiter.kind.empty() || waiter.kind == source.kind) && source.step >= waiter.step;
  }

  // Some version that could have been leased has no source that fits.
  void see_no_fit(const Waiter& waiter) {
    bool one = false;
    for (const auto& [number, state] : versions) {
      bool unfit = state == VersionState::kReady;
      for (const auto& [id, member] : members) {
        unfit = unfit && (member.offers != number || !fits(waiter, member));
      }
      one = one || unfit;
    }
    expect(one || !dying.empty(), "told that nothing fits, though every version has what fits");
  }

  void see_drain(const Waiter& waiter, const DrainReply& drain, TimePoint now) {
    if (drain.result && drain.result->revoked > 0) {
      bool due = upheaval || !dying.empty() || waiter.deadline <= now || last_due == now;
      for (const auto& [id, other] : waiters) {
        due = due || (other.writes != 0 && other.deadline <= now);
      }
      expect(due, "readers were revoked before any deadline");
    }
    if (waiter.deadline <= now) last_due = now;
    const auto found = members.find(waiter.member);
    if (found == members.end()) return;
    Member& member = found->second;
    if (drain.result) {
      for (const auto& [id, lease] : leases) {
        const bool read = member.closing != 0 && lease.version == member.closing;
        expect(!read || dying.contains(lease.holder), "begin_write() returned with readers");
      }
      member.offers = 0;
    }
    bool waits = false;  // another begin_write() of the same source, which this one did not end
    for (const auto& [id, other] : waiters) {
      waits = waits || (other.member == waiter.member && other.writes != 0);
    }
    if (!waits) member.closing = 0;
  }

  // After tick(now) and all effects.
  void check(const LeaseTable& table, const TableLimits& limits, TimePoint now) {
    for (const auto& [id, waiter] : waiters) {
      expect(waiter.deadline > now, "a waiter outlived its deadline");
      expect(members.contains(waiter.member), "a waiter outlived its member");
      if (waiter.writes == 0 || !members.contains(waiter.member)) continue;
      const uint64_t closing = members.at(waiter.member).closing;
      bool read = false;
      for (const auto& [number, lease] : leases) read = read || lease.version == closing;
      expect(read, "begin_write() waits for nobody");
    }
    std::set<uint64_t> named;
    for (const MemberInfo& member : table.members("")) {
      named.insert(member.id);
      expect(members.contains(member.id), "a member that should be dead");
    }
    for (const auto& [id, member] : members) expect(named.contains(id), "a live member is missing");
    uint64_t counted = 0;
    size_t finished = 0;
    for (const VersionInfo& version : table.versions("")) {
      counted += version.leases;
      const bool ready = version.state == VersionState::kReady;
      expect(ready || version.leases == 0, "a version not READY has leases");
      if (!ready && version.state != VersionState::kOpen) ++finished;
      expect(versions[version.version] == version.state, "a change of state was not told");
    }
    const TableStats stats = table.stats();
    expect(stats.leases == leases.size() && counted == leases.size(), "leases are miscounted");
    expect(stats.waiters == waiters.size(), "waiters are miscounted");
    expect(finished <= limits.finished_versions, "too many finished versions are remembered");
    expect(revoked_notices == owed_notices, "a revoked reader was not told");
  }

  TimePoint last_due;  // when a begin_write() was last answered at its deadline
  size_t revoked_notices = 0;
  size_t owed_notices = 0;

 private:
  std::optional<Waiter> answered(WaiterId id) {
    const auto found = waiters.find(static_cast<uint64_t>(id));
    expect(found != waiters.end(), "a second reply, or one to nobody");
    if (found == waiters.end()) return std::nullopt;
    const Waiter waiter = found->second;
    waiters.erase(found);
    return waiter;
  }
};

// One random life. Used from one thread.
class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed), limits_(small_limits()), table_(limits_), sources_(1 + random_.below(3)) {}

  std::vector<std::string> live(int steps) {
    for (int i = 0; i < steps && judge_.faults.empty(); ++i) {
      judge_.upheaval = false;
      step();
      settle();
    }
    leave_all();
    return judge_.faults;
  }

 private:
  static TableLimits small_limits() {
    TableLimits limits;
    limits.finished_versions = 4;
    limits.leases_per_member = 2;
    limits.waiters_per_member = 3;
    limits.suspect_grace = kGrace;
    return limits;
  }

  // Timer by timer, so that the judge knows what came first.
  void settle() {
    while (const auto next = table_.next_deadline()) {
      if (*next > now_) break;
      settle_at(*next);
    }
    settle_at(now_);
    judge_.check(table_, limits_, now_);
  }

  void settle_at(TimePoint now) {
    for (const auto& [id, member] : judge_.members) {
      if (member.dead_at <= now) judge_.dying.insert(id);
    }
    std::erase_if(judge_.leases, [&](const auto& lease) { return lease.second.ends <= now; });
    table_.tick(now);
    for (const Effect& effect : table_.take_effects()) judge_.see(effect, now);
    for (const uint64_t id : std::exchange(judge_.dying, {})) judge_.gone(id);
  }

  uint64_t any_member(MemberRole role) {
    std::vector<uint64_t> fitting;
    for (const auto& [id, member] : judge_.members) {
      if (member.role == role) fitting.push_back(id);
    }
    return fitting.empty() ? 0 : fitting[random_.below(fitting.size())];
  }

  void step() {
    switch (random_.below(12)) {
      case 0:
      case 1:
        return join();
      case 2:
        now_ += ms(random_.below(random_.chance(0.1) ? 6000 : 400));
        return;
      case 3:
      case 4:
        return beat();
      case 5:
        return random_.chance(0.3) ? end_member() : beat();
      case 6:
        return begin_write();
      case 7:
      case 8:
        return publish();
      case 9:
      case 10:
        return acquire();
      default:
        return random_.chance(0.8) ? release() : cancel();
    }
  }

  void join() {
    const bool source = random_.chance(0.6);
    const std::string name = std::string(source ? "s" : "t") +
                             std::to_string(random_.below(source ? sources_ : uint64_t{3}));
    (void)table_.layouts().put(kLayout, "layout", now_).has_value();
    JoinRequest request;
    request.registration.role = source ? MemberRole::kSource : MemberRole::kTarget;
    request.registration.model = "m";
    request.registration.name = name;
    request.registration.source_count = static_cast<uint32_t>(sources_);
    request.registration.incarnation = 1 + random_.below(2);
    request.registration.layout = kLayout;
    if (source) request.registration.kind = random_.chance(0.7) ? "raw" : "packed";
    request.owner = ++last_owner_;
    request.ttl = kTtl;
    request.lease_ttl = kLeaseTtl;
    std::optional<uint64_t> suspect;
    bool alive = false;
    for (const auto& [id, member] : judge_.members) {
      if (member.role != request.registration.role || member.name != name) continue;
      alive = true;
      if (suspects_.contains(id)) suspect = id;
    }
    const auto joined = table_.join(request, now_);
    const bool possible = !alive || suspect;
    judge_.expect(joined.has_value() == possible, "join() did not go by who is alive");
    if (!joined) return;
    if (suspect) judge_.gone(*suspect);
    judge_.upheaval = true;
    owners_[*joined] = request.owner;
    judge_.members[*joined] = {.role = request.registration.role,
                               .name = name,
                               .source_count = request.registration.source_count,
                               .dead_at = now_ + kTtl,
                               .offers = 0,
                               .closing = 0,
                               .generation = {},
                               .kind = request.registration.kind};
  }

  void beat() {
    std::vector<uint64_t> members;
    for (auto& [id, member] : judge_.members) {
      if (random_.chance(0.1)) continue;
      members.push_back(id);
      member.dead_at = now_ + kTtl;
      suspects_.erase(id);
    }
    std::vector<LeaseId> leases;
    for (auto& [id, lease] : judge_.leases) {
      const bool told = std::find(members.begin(), members.end(), lease.holder) != members.end();
      if (random_.chance(0.2)) {
        if (told && ++lease.beats_without > 3) lease.ends = now_;
        continue;
      }
      leases.push_back(LeaseId{id});
      if (!told) continue;
      lease.ends = now_ + kLeaseTtl;
      lease.beats_without = 0;
    }
    std::erase_if(judge_.leases, [&](const auto& lease) { return lease.second.ends <= now_; });
    judge_.expect(table_.beat(members, leases, now_).empty(), "a live member is unknown");
  }

  void end_member() {
    const uint64_t id = any_member(random_.chance(0.5) ? MemberRole::kSource : MemberRole::kTarget);
    if (id == 0) return;
    switch (random_.below(3)) {
      case 0:
        judge_.expect(table_.leave(id, now_).has_value(), "a live member cannot leave");
        return judge_.gone(id);
      case 1:
        table_.lose(id, "the test says so", now_);
        return judge_.gone(id);
      default:
        table_.suspect(owners_[id], now_);
        suspects_.insert(id);
        judge_.members[id].dead_at = std::min(judge_.members[id].dead_at, now_ + kGrace);
    }
  }

  uint64_t add_waiter(uint64_t member, uint64_t writes, const VersionRequest& wanted) {
    const uint64_t waiter = ++last_waiter_;
    judge_.waiters[waiter] = {.member = member,
                              .deadline = now_ + ms(1 + random_.below(1500)),
                              .writes = writes,
                              .wanted = wanted};
    return waiter;
  }

  void begin_write() {
    const uint64_t id = any_member(MemberRole::kSource);
    if (id == 0) return;
    if (random_.chance(0.1)) top_ += random_.below(3);
    const uint64_t version = top_ + 1 - random_.below(2);
    const uint64_t waiter = add_waiter(id, version, {});
    // From here on nobody may be given what it offers, unless the table refuses.
    const uint64_t offers = judge_.members[id].offers;
    WriteRequest request{.version = version, .replaces = {}, .when_leased = {}};
    if (offers != 0) request.replaces.push_back(offers);
    table_.begin_write(WaiterId{waiter}, id, request, judge_.waiters[waiter].deadline, now_);
    bool refused = false;
    std::vector<Effect> effects = table_.take_effects();
    for (const Effect& effect : effects) {
      const auto* drain = std::get_if<DrainReply>(&effect);
      if (drain != nullptr && drain->waiter == WaiterId{waiter}) refused = !drain->result;
    }
    if (!refused) judge_.members[id].closing = offers;
    for (const Effect& effect : effects) judge_.see(effect, now_);
  }

  void publish() {
    const uint64_t id = any_member(MemberRole::kSource);
    if (id == 0) return;
    const uint64_t version = top_ + 1 - random_.below(2);
    const Generation generation{.incarnation = id, .counter = 2 * (version + random_.below(2))};
    const uint64_t step = random_.below(4) + version;
    const auto done = table_.publish(id,
                                     {.version = version,
                                      .generation = generation,
                                      .metadata = {{"step", std::to_string(step)}}},
                                     now_);
    if (!done) {
      if (random_.chance(0.3)) (void)table_.abort_version(id, version, "no", now_).has_value();
      return;
    }
    judge_.expect(judge_.published.emplace(id, version).second, "a version was published twice");
    // Noted before the effects are judged: they follow from it.
    judge_.members[id].offers = version;
    judge_.members[id].generation = generation;
    judge_.members[id].step = step;
    top_ = std::max(top_, version);
  }

  void acquire() {
    const uint64_t id = any_member(MemberRole::kTarget);
    if (id == 0) return;
    VersionRequest wanted;
    wanted.kind = static_cast<VersionRequest::Kind>(random_.below(3));
    wanted.version = top_ + 1 - std::min<uint64_t>(random_.below(4), top_);
    const uint64_t waiter = add_waiter(id, 0, wanted);
    if (random_.chance(0.3)) {
      judge_.waiters[waiter].kind = random_.chance(0.5) ? "raw" : "packed";
      wanted.demand.kinds = {judge_.waiters[waiter].kind};
    }
    if (random_.chance(0.3)) {
      judge_.waiters[waiter].step = top_ + random_.below(4);
      wanted.demand.require.push_back({.key = "step",
                                       .kind = Requirement::Kind::kAtLeast,
                                       .value = std::to_string(judge_.waiters[waiter].step)});
    }
    table_.acquire(WaiterId{waiter}, id, wanted, judge_.waiters[waiter].deadline, now_);
  }

  void release() {
    if (judge_.leases.empty()) return;
    auto at = judge_.leases.begin();
    std::advance(at, static_cast<int64_t>(random_.below(judge_.leases.size())));
    const auto [id, lease] = *at;
    judge_.leases.erase(at);
    judge_.expect(
        table_.release(lease.holder, LeaseId{id}, lease.version, {.end = LeaseEnd::kLanded}, now_)
            .has_value(),
        "a held lease cannot be released");
    judge_.expect(
        !table_.release(lease.holder, LeaseId{id}, lease.version, {.end = LeaseEnd::kLanded}, now_),
        "a lease was released twice");
  }

  void cancel() {
    if (judge_.waiters.empty()) return;
    const auto [id, waiter] = *judge_.waiters.begin();
    judge_.waiters.erase(id);
    if (judge_.members.contains(waiter.member)) judge_.members[waiter.member].closing = 0;
    table_.cancel(WaiterId{id}, now_);
  }

  void leave_all() {
    if (!judge_.faults.empty()) return;
    while (!judge_.members.empty()) {
      const uint64_t id = judge_.members.begin()->first;
      judge_.expect(table_.leave(id, now_).has_value(), "a live member cannot leave");
      judge_.gone(id);
      for (const Effect& effect : table_.take_effects()) judge_.see(effect, now_);
    }
    now_ += std::chrono::minutes(2);
    table_.tick(now_);
    judge_.expect(table_.stats() == TableStats{}, "something is left when all have gone");
    judge_.expect(judge_.waiters.empty(), "a waiter was never answered");
  }

  Random random_;
  TableLimits limits_;
  LeaseTable table_;
  Judge judge_;
  const uint64_t sources_;
  TimePoint now_{std::chrono::hours(1)};
  uint64_t top_ = 0;  // the highest number published
  uint64_t last_waiter_ = 0;
  uint64_t last_owner_ = 0;
  std::map<uint64_t, uint64_t> owners_;
  std::set<uint64_t> suspects_;
};

TEST(LeaseTableProperty, EveryRandomLifeKeepsTheRulesAndLeavesNothing) {
  const char* given = std::getenv("TRANSFUSE_TEST_SEED");
  const uint64_t first = given != nullptr ? std::stoull(given) : random_identity() >> 16;
  for (uint64_t seed = first; seed < first + 300; ++seed) {
    const auto faults = World(seed).live(400);
    ASSERT_TRUE(faults.empty()) << faults.front() << " (TRANSFUSE_TEST_SEED=" << seed << ")";
  }
}

// The canary: a judge that accepts a broken table would prove nothing.
TEST(LeaseTableProperty, TheJudgeCatchesALeaseOnAVersionThatIsNotReady) {
  Judge judge;
  judge.members[1] = {};
  judge.waiters[7] = {.member = 1, .deadline = {}, .writes = 0, .wanted = {}};
  judge.versions[3] = VersionState::kRetired;
  Lease lease;
  lease.version = 3;
  lease.sources.emplace_back().id = 1;
  judge.see(LeaseReply{.waiter = WaiterId{7}, .result = lease}, TimePoint{});
  ASSERT_EQ(judge.faults.size(), 1u);
  EXPECT_EQ(judge.faults[0], "a lease on a version not READY");
}

}  // namespace
}  // namespace transfuse

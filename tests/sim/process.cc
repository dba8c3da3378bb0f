// Connections, calls, heartbeats and clocks of a process.
#include "sim/process.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "sim/coordinator.h"
#include "sim/events.h"
#include "sim/facts.h"
#include "sim/world.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse::sim {

namespace {

constexpr int64_t kBeatMs = 150;
constexpr int64_t kJoinMs = 200;
constexpr int64_t kAgainMs = 50;

}  // namespace

Process::Process(World& world, std::string name) : world_(world), name_(std::move(name)) {}

// -- life and clock --

void Process::start() {
  TRANSFUSE_CHECK(!alive());
  ++life_;
  incarnation_ = world_.new_incarnation();
  rate_ = 0.5 + 1.5 * static_cast<double>(world_.random().below(1000)) / 1000.0;
  started_ = world_.now();
  offset_ = {};
  paused_until_ = {};
  member_ = 0;
  asked_to_join_ = running_ = false;
  world_.say([&] { return name_ + " starts"; });
  connect();
  beat();
}

void Process::kill() {
  if (!alive()) return;
  world_.say([&] { return name_ + " is killed"; });
  world_.judge().process_died(incarnation_);
  incarnation_ = 0;
  connected_ = false;
  timers_.clear();
  pending_.clear();
  leases_.clear();
  forget();
  world_.connection_broke(owner_);
}

void Process::leave() {
  if (!alive()) return;
  const uint64_t member = member_;
  kill();
  if (!world_.coordinator().up()) return;
  (void)world_.coordinator().leave(member);
  world_.coordinator().settle();
}

void Process::pause(Duration duration) {
  world_.say([&] { return name_ + " stands still"; });
  paused_until_ = std::max(paused_until_, world_.now() + duration);
}

void Process::jump(Duration by) {
  world_.say([&] { return "the clock of " + name_ + " jumps"; });
  offset_ += by;
  std::vector<uint64_t> timers;
  for (const auto& [id, timer] : timers_) timers.push_back(id);
  for (const uint64_t id : timers) wake_for(id);
}

TimePoint Process::own_now() const {
  const auto passed = static_cast<double>((world_.now() - started_).count()) * rate_;
  return started_ + Duration(static_cast<int64_t>(passed)) + offset_;
}

void Process::after(Duration delay, std::function<void()> what) {
  world_.events().after(delay, [this, life = life_, what = std::move(what)]() mutable {
    if (life != life_ || !alive()) return;
    if (world_.now() < paused_until_) return after(paused_until_ - world_.now(), std::move(what));
    what();
  });
}

void Process::after_ms(int64_t own_ms, std::function<void()> what) {
  const uint64_t id = world_.new_id();
  timers_[id] = {.due = own_now() + ms(own_ms), .what = std::move(what)};
  wake_for(id);
}

void Process::wake_for(uint64_t id) {
  const Duration left = std::max(Duration::zero(), timers_.at(id).due - own_now());
  const Duration delay(static_cast<int64_t>(static_cast<double>(left.count()) / rate_) + 1);
  after(delay, [this, id] {
    const auto found = timers_.find(id);
    if (found == timers_.end()) return;  // its clock had jumped
    if (found->second.due > own_now()) return wake_for(id);
    const auto what = std::move(found->second.what);
    timers_.erase(found);
    what();
  });
}

// -- connection --

void Process::connect() {
  if (connected_) return;
  if (!world_.coordinator().up()) return after_ms(kAgainMs, [this] { connect(); });
  connected_ = true;
  epoch_ = world_.coordinator().epoch();
  owner_ = world_.new_id();
  JoinRequest request{.registration = registration(),
                      .owner = owner_,
                      .ttl = kTtl,
                      .lease_ttl = kLeaseTtl,
                      .resume = {}};
  if (asked_to_join_) {
    request.resume = resume();
    request.resume->id = member_;
  }
  asked_to_join_ = true;
  call(
      kJoinMs, [request](Coordinator& at, WaiterId) { return at.join(request); },
      [this](const Answer& answer) {
        const auto* joined = std::get_if<Result<uint64_t>>(&answer);
        if (joined == nullptr || !*joined) {
          disconnect();
          return after_ms(kAgainMs, [this] { connect(); });
        }
        member_ = **joined;
        if (!std::exchange(running_, true)) run();
      });
}

// What is under way is not answered any more.
void Process::disconnect() {
  if (!connected_) return;
  connected_ = false;
  world_.connection_broke(owner_);
  for (const auto& [id, then] : std::exchange(pending_, {})) {
    after(ms(1), [then = then] { then({}); });
  }
}

void Process::lose_connection() {
  if (!alive() || !connected_) return;
  world_.say([&] { return name_ + " loses its connection"; });
  disconnect();
  after_ms(10, [this] { connect(); });
}

void Process::beat() {
  after_ms(kBeatMs, [this] { beat(); });
  if (!connected_ || !running_) return;
  if (world_.coordinator().epoch() != epoch_ || !world_.coordinator().up()) return;
  const std::vector<LeaseId> leases(leases_.begin(), leases_.end());
  call(
      kJoinMs,
      [member = member_, leases](Coordinator& at, WaiterId) {
        return Answer(Result<uint64_t>(at.beat(member, leases) ? 1u : 0u));
      },
      [this](const Answer& answer) {
        const auto* known = std::get_if<Result<uint64_t>>(&answer);
        if (known != nullptr && **known == 0) lose_connection();  // its time had run out
      });
}

// -- calls --

void Process::call(int64_t timeout_ms, Call what, Then then) {
  const uint64_t id = world_.new_id();
  if (!connected_) {
    return after(ms(5), [then = std::move(then)] { then({}); });
  }
  pending_[id] = std::move(then);
  after_ms(timeout_ms, [this, id, epoch = epoch_] {
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    const Then unanswered = std::move(found->second);
    pending_.erase(found);
    if (world_.random().chance(0.5))
      world_.send(epoch, [id](Coordinator& at) { at.cancel(WaiterId{id}); });
    unanswered({});
  });
  world_.send(epoch_, [this, id, what = std::move(what)](Coordinator& at) {
    if (auto answer = what(at, WaiterId{id})) world_.reply(*this, id, std::move(*answer));
  });
}

void Process::deliver(uint64_t call, const Answer& answer, uint64_t epoch) {
  after({}, [this, call, answer, epoch] {
    const auto found = pending_.find(call);
    // Of a coordinator that it has turned away from, nothing counts any more.
    if (found == pending_.end() || !connected_ || epoch != epoch_) return;
    const Then then = std::move(found->second);
    pending_.erase(found);
    then(answer);
  });
}

}  // namespace transfuse::sim

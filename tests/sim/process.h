// A process that dies, stands still, loses messages, and has a clock of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "control/lease_table.h"
#include "sim/coordinator.h"
#include "sim/facts.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse::sim {

// One member of the control plane: registers, beats, registers again, and calls. The world keeps it
// for all lives of the process that it stands for. Used from one thread.
class Process {
 public:
  Process(World& world, std::string name);
  virtual ~Process() = default;
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  const std::string& name() const { return name_; }
  bool alive() const { return incarnation_ != 0; }
  uint64_t incarnation() const { return incarnation_; }
  uint64_t member() const { return member_; }

  void start();  // a new process
  void kill();
  void pause(Duration duration);
  void jump(Duration by);  // its clock, there and not back
  void lose_connection();  // notices at once and connects again
  void leave();            // for good
  void deliver(uint64_t call, const Answer& answer, uint64_t epoch);

 protected:
  using Then = std::function<void(const Answer&)>;
  // At the coordinator. Nothing: an effect answers.
  using Call = std::function<std::optional<Answer>(Coordinator&, WaiterId)>;

  World& world() { return world_; }
  // `then` gets nothing if there is no answer within so long of its own clock.
  void call(int64_t timeout_ms, Call call, Then then);
  // By its own clock, unless it has died by then.
  void after_ms(int64_t own_ms, std::function<void()> what);
  // In the world's time, unless it has died by then; later if it stands still.
  void after(Duration delay, std::function<void()> what);
  bool connected() const { return connected_; }

  virtual Registration registration() const = 0;
  virtual Resume resume() const = 0;
  virtual void forget() = 0;  // its memory is gone
  virtual void run() = 0;     // it has joined for the first time

  std::set<LeaseId> leases_;  // named in its beats

 private:
  void connect();
  void disconnect();
  void beat();
  TimePoint own_now() const;
  void wake_for(uint64_t timer);

  World& world_;
  const std::string name_;
  uint64_t incarnation_ = 0;  // 0: dead
  uint64_t life_ = 0;
  uint64_t member_ = 0;  // at the coordinator, the last known
  uint64_t owner_ = 0;   // its connection
  uint64_t epoch_ = 0;   // of the coordinator that it is connected to
  bool connected_ = false;
  bool asked_to_join_ = false;
  bool running_ = false;
  TimePoint paused_until_;
  double rate_ = 1.0;  // of its clock
  TimePoint started_;
  Duration offset_{};
  struct Timer {
    TimePoint due;
    std::function<void()> what;
  };
  std::map<uint64_t, Timer> timers_;
  std::map<uint64_t, Then> pending_;
};

}  // namespace transfuse::sim

// A trainer rank that publishes version after version, in place or into snapshots.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim/facts.h"
#include "sim/process.h"
#include "transfuse/control.h"

namespace transfuse::sim {

// The ranks of one job agree on the numbers of versions; each step takes the next one.
struct Job {
  uint32_t source_count = 1;
  uint64_t run = 0;  // starts of all ranks together
  uint64_t top = 0;  // the highest number that a rank has taken
};

// Used from one thread.
class Source final : public Process {
 public:
  // No snapshots: in place.
  Source(World& world, std::string name, Job& job, uint32_t snapshots);

  const std::vector<Slot>& slots() const { return slots_; }
  bool busy() const { return version_ != 0; }
  uint64_t done() const { return done_; }

 private:
  Registration registration() const override;
  Resume resume() const override;
  void forget() override;
  void run() override;

  void step();
  void begin();
  void begun(const Answer& answer);
  void write(uint32_t slot);
  void publish();
  void finish();
  std::optional<uint32_t> free_slot() const;

  Job& job_;
  const uint32_t snapshots_;
  std::vector<Slot> slots_;
  uint64_t version_ = 0;  // this step's; 0: between steps
  uint64_t done_ = 0;     // the last step's
  bool open_ = false;     // version_, at the coordinator
  uint32_t slot_ = 0;     // where it goes
  WhenLeased when_leased_{};
  Generation written_;  // of slot_
  uint64_t last_published_ = 0;
  int patience_ = 0;
};

}  // namespace transfuse::sim

// An engine rank: reads versions in place or into a shadow, alone or in a group.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "sim/facts.h"
#include "sim/process.h"
#include "transfuse/control.h"

namespace transfuse::sim {

struct TargetPlan {
  std::string group;  // "": alone
  uint32_t group_size = 0;
  bool shadow = false;
};

// Used from one thread.
class Target final : public Process {
 public:
  Target(World& world, std::string name, TargetPlan plan);

  const TargetPlan& plan() const { return plan_; }
  // What it claims to hold, and what is in its parameters, by the incarnation of the source.
  uint64_t claims() const { return claims_; }
  uint64_t last_claim() const { return last_claim_; }  // that was not 0
  const std::map<uint64_t, Chunks>& weights() const { return weights_; }
  // Its parameters may change only then (I9).
  bool in_commit() const { return in_commit_; }
  // It has seen that its group is whole at claims(), and nothing has changed since.
  bool serves() const { return serves_; }

 private:
  Registration registration() const override;
  Resume resume() const override;
  void forget() override;
  void run() override;

  // -- one refit --
  void step();
  void leased(const Lease& lease);
  void read_generations(bool again);
  void read_chunk(size_t index);
  void staged(bool good);
  void released();
  void put_in_place(uint64_t version);

  // -- a group --
  void vote(bool ready, int tries);
  void decide(int tries);
  void decided(bool commit);
  void say_applied(int tries);
  void say_held(int tries);
  void look_at_group();
  void pause_and_step();

  const TargetPlan plan_;
  uint64_t claims_ = 0;
  uint64_t last_claim_ = 0;
  std::map<uint64_t, Chunks> weights_;
  uint64_t changes_ = 0;  // of claims_, also to the same number
  bool in_commit_ = false;
  bool serves_ = false;

  std::optional<Lease> lease_;
  std::map<uint64_t, Chunks> read_;
  bool torn_ = false;

  uint64_t voted_round_ = 0;
  uint64_t voted_version_ = 0;
  uint64_t voted_epoch_ = 0;
  bool told_commit_ = false;
  bool applied_ = false;
  uint64_t last_round_ = 0;
  bool gave_up_ = false;
};

}  // namespace transfuse::sim

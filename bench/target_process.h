// An engine rank in a process of its own: `transfuse bench-target`.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "child_process.h"
#include "member_spec.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse::bench {

struct TargetSpec {
  MemberSpec member;
  std::string name;
  ReceiveInto into = ReceiveInto::kInPlace;
  std::string group{};  // its size is the number of ranks of the layout
};
std::string encode(const TargetSpec& spec);
Result<TargetSpec> decode_target_spec(std::string_view text);

// One refit as the engine sees it.
struct TargetRefit {
  RefitPhases phases;
  int64_t pause_us = 0;  // the engine stood still: all of the refit in place, else commit()
  uint64_t size_bytes = 0;
  uint32_t attempts = 0;
};

// The commanding end. The destructor ends the process. Used from one thread.
class TargetProcess {
 public:
  static Result<std::unique_ptr<TargetProcess>> start(const TargetSpec& spec);
  // Brings exactly `version` in, verified; several targets may be at it at once.
  Result<void> begin_refit(uint64_t version);
  Result<TargetRefit> end_refit();
  Result<ProcessUsage> usage() { return child_->usage(); }
  int64_t open_us() const { return open_us_; }  // what Receiver::open() took

 private:
  explicit TargetProcess(std::unique_ptr<ChildProcess> child) : child_(std::move(child)) {}
  std::unique_ptr<ChildProcess> child_;
  int64_t open_us_ = 0;
};

// The other end: serves orders from stdin until it closes. An error is answered, not returned.
Result<void> run_target(const TargetSpec& spec);

}  // namespace transfuse::bench

// The coordinator inside one process: for tests and for trainer and engine in one process.
#pragma once

#include <memory>
#include <string_view>

#include "control/lease_table.h"
#include "transfuse/control.h"

namespace transfuse {

// Several Control handles onto one lease table. Handles may outlive it. Safe to call from any
// thread.
class LocalCoordinator {
 public:
  explicit LocalCoordinator(const ControlOptions& options = {}, const TableLimits& limits = {});
  ~LocalCoordinator();
  LocalCoordinator(const LocalCoordinator&) = delete;
  LocalCoordinator& operator=(const LocalCoordinator&) = delete;

  // The handle's members leave with it.
  std::unique_ptr<Control> connect();
  // For tests: as if the process of the member with this name had died. False: no such member.
  bool lose(std::string_view model, MemberRole role, std::string_view name);
  TableStats stats() const;

  class State;

 private:
  std::shared_ptr<State> state_;  // shared with the handles, whichever lives longest
};

}  // namespace transfuse

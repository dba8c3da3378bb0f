// A target's place in its job: what it serves, and its part in the rounds of its group.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string_view>

#include "session/fetch.h"
#include "session/memory.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

namespace transfuse {

// Used from one thread. Outlived by the transport, the control and the memory.
class TargetMember {
 public:
  // Registers the target and begins to serve.
  static Result<std::unique_ptr<TargetMember>> open(Transport& transport, Control& control,
                                                    const Layout& layout, BoundMemory memory,
                                                    const ReceiverOptions& options);

  MemberId id() const { return id_; }
  const Layout& layout() const { return layout_; }
  const ReceiverOptions& options() const { return options_; }
  ServedWeights& weights() { return *weights_; }
  bool in_group() const { return !options_.group.empty(); }
  bool in_forked_child() const;
  Result<void> check_usable() const;  // not closed, not in a forked child

  // What the coordinator knows this target to hold.
  Result<void> hold(uint64_t version, Deadline deadline);
  // Votes if that is due and waits for the decision. At the deadline, or when cancelled, the rank
  // gives the round up; only kGroupBroken leaves it unknown what was decided.
  Result<Decision> decide(const Fetched& fetched, Deadline deadline,
                          const std::atomic<bool>& cancelled);
  // Takes the vote back. kAlreadyExists: the round is decided, and the version to be committed.
  Result<void> give_up(const Fetched& fetched, std::string_view reason);
  // Success: every rank holds the version. Else kGroupBroken, and this rank holds it.
  Result<void> applied(const Fetched& fetched, Deadline deadline,
                       const std::atomic<bool>& cancelled);
  // This rank holds `version`, which no round has decided; waits until every rank does. Else
  // kGroupBroken.
  Result<void> hold_all(uint64_t version, Deadline deadline, const std::atomic<bool>& cancelled);
  // kGroupBroken unless every rank holds `version`.
  Result<GroupInfo> check_group(uint64_t version);

  // Ends what it serves, and its membership. A second call does nothing.
  Result<void> close();
  // Leaks what must not be touched in a forked child.
  void abandon_in_forked_child() { (void)weights_.release(); }

 private:
  TargetMember(Control& control, Layout layout, ReceiverOptions options,
               std::unique_ptr<ServedWeights> weights, MemberId id);

  Control& control_;
  const Layout layout_;
  const ReceiverOptions options_;
  std::unique_ptr<ServedWeights> weights_;
  const MemberId id_;
  const pid_t owner_pid_;
  bool closed_ = false;
};

}  // namespace transfuse

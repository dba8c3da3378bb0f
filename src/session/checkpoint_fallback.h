// A checkpoint as the last source of a refit: every rank of it by way of files.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "files/checkpoint_source.h"
#include "session/refit_attempt.h"
#include "session/source_link.h"
#include "transfuse/checkpoint.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// Opens the checkpoint when it is first needed, and again when its files have changed. Used from
// one thread; outlived by the progress and the target's memory.
class CheckpointFallback final : private SourceDirectory {
 public:
  // options.checkpoint is set. `transport` writes the target when peers serve it.
  CheckpointFallback(Transport& transport, const Layout& target, const TargetMemory& memory,
                     const ReceiverOptions& options, MemberId member, AttemptProgress& progress);

  const Checkpoint& checkpoint() const { return *options_.checkpoint; }
  // The version that it has now. Else why it cannot serve `request` of a target that holds `held`
  // (0: none): nothing goes back to older weights that was not asked for exactly. kNoFittingSource:
  // it is not what `request` demands. A demanded revision takes one pass over its tensors, once.
  Result<uint64_t> choose(const VersionRequest& request, uint64_t held, Deadline deadline,
                          const std::atomic<bool>& cancelled);
  // As those of a RefitAttempt, for what was chosen.
  Result<void> prepare(Deadline deadline, RefitReport& report);
  Result<void> transfer(Deadline deadline, const std::atomic<bool>& cancelled, RefitReport& report);

  // Of what is prepared from then on.
  Result<void> set_demand(const Demand& demand) { return attempt_->set_demand(demand); }
  void set_limits(const CopyLimits& limits) { attempt_->set_limits(limits); }
  void forget_padding() { attempt_->forget_padding(); }
  void close() { attempt_->close(); }
  // Leaks what must not be touched in a forked child.
  void abandon_in_forked_child();

 private:
  Result<void> open();
  Result<void> check_demand(const Demand& demand, Deadline deadline,
                            const std::atomic<bool>& cancelled);
  Result<Digest> compute_revision(Deadline deadline, const std::atomic<bool>& cancelled) const;
  Result<Layout> layout(const Digest& digest, Deadline deadline) override;
  Result<std::unique_ptr<SourceLink>> open(const MemberInfo& info, const Layout& layout,
                                           Deadline deadline) override;

  const ReceiverOptions options_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<CheckpointSource> source_;  // null: not open
  Digest revision_;                           // of the source; zero: not computed
  std::unique_ptr<RefitAttempt> attempt_;     // its links read the source
};

}  // namespace transfuse

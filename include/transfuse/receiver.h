// The reading side: brings one version into this process's parameters, proved, or says why not.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "transfuse/checkpoint.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/transport.h"

namespace transfuse {

enum class Verify : uint8_t { kFull, kOff };

enum class ReceiveInto : uint8_t {
  kInPlace,  // the parameters themselves: least memory; after a failure they hold no version
  kShadow,  // a second copy in memory of the transport, while the engine serves; commit() copies it
            // into the parameters. A failure before the commit leaves the version that was there
};

struct ReceiverOptions {
  std::string model = "model";
  std::string name;  // of this target, unique in the model: "engine0"
  Verify verify = Verify::kFull;
  PlanOptions plan;  // chunks of at least 64 MiB where the parameters lie on a device
  std::vector<const LocalRegion*> arenas;  // outlive the receiver; see ParameterMemory
  std::string token;                       // TransportOptions::token of `transport`
  uint64_t spread = 0;  // this target's number among its peers: spreads readers over replicas
  int64_t no_progress_ms = 2000;  // a source without progress for so long counts as stalled
  uint32_t max_attempts = 8;      // of one refit, over all reasons
  ReceiveInto into = ReceiveInto::kInPlace;
  // kShadow: commit() exchanges shadow and parameters instead of copying, so that rollback() can
  // bring the version before back until the next stage() begins.
  bool keep_previous = false;
  // The ranks of one engine commit all or none: the same group name and size for each of them.
  std::string group;
  uint32_t group_size = 0;
  int64_t round_ms = 60000;  // a group without a decision after so long gives the round up
  // The last step of the fallback order: read when no peer can serve what is asked for. Peers have
  // half of a refit's time; without a version that fits they are waited for so long at most. In a
  // group only ranks that hold no version fall back.
  std::optional<Checkpoint> checkpoint = {};
  int64_t checkpoint_wait_ms = 2000;
  // Of every version; a VersionRequest may demand more. The ranks of a group demand the same.
  Demand demand;
};

struct StageOptions {
  double max_gigabytes_per_second = 0;  // of bytes written; 0: as fast as possible
  uint32_t max_multiprocessors = 0;     // of the GPU, where the shadow lies on one; 0: all
};

enum class StageState : uint8_t { kNone, kMoving, kReady, kFailed };
struct StageProgress {
  StageState state = StageState::kNone;
  uint64_t version = 0;  // 0: not known yet
  uint64_t landed_bytes = 0;
  uint64_t size_bytes = 0;  // of the target
};

struct RefitPhases {        // microseconds
  int64_t discover_us = 0;  // descriptors, connections, layouts, plan: zero when warm
  int64_t lease_us = 0;
  int64_t transfer_us = 0;
  int64_t verify_us = 0;
  int64_t decide_us = 0;  // a group's vote and decision
  int64_t commit_us = 0;  // of a shadow: the copy, while the engine stands still
  int64_t total_us = 0;
};

struct RefitRoute {
  std::string source;     // member name
  std::string transport;  // kind
  std::string route;      // "memfd", "process_vm_readv", ...
  uint64_t size_bytes = 0;
  uint64_t run_count = 0;
};

// One step of the way from a failure to success or an error (I12).
struct RefitStep {
  ErrorCode code = ErrorCode::kUnavailable;
  std::string source;  // empty: not about one source
  std::string what;    // the failure, and what was done: "retry", "next source", "replan"
};

struct RefitReport {
  uint64_t version = 0;
  RefitPhases phases;
  uint64_t size_bytes = 0;    // written to the target
  uint64_t source_bytes = 0;  // read from sources (larger under a narrowing cast)
  uint64_t reread_bytes = 0;  // by retries
  uint64_t chunk_count = 0;
  uint64_t verified_bytes = 0;  // covered by matching fingerprints
  uint32_t attempts = 1;
  bool planned = false;             // a plan was compiled in this cycle
  std::string checkpoint;           // all of it came from here, not from peers; empty: from peers
  double gigabytes_per_second = 0;  // size_bytes / transfer
  std::vector<RefitRoute> routes;
  std::vector<RefitStep> steps;  // sources that do not fit the demand, too
  Digest revision;               // as the version's sources state it; zero: none does
  Metadata metadata;             // what they all say alike, of themselves and of the version
  std::string to_json() const;
  std::string to_text() const;
};

// Memory that ReceiveInto::kShadow needs beside the parameters.
uint64_t shadow_bytes(const Layout& layout);

// in_place: the target parameters are overwritten by refit(), which the engine calls at its own
// safe point (I9). After a refit that failed in or after the transfer the parameters hold no
// version (version() is 0) until one succeeds. `transport` and `control` outlive it. Used from one
// thread at a time; cancel() from any.
class Receiver {
 public:
  static Result<std::unique_ptr<Receiver>> open(Transport& transport, Control& control,
                                                const Layout& layout,
                                                std::vector<ParameterMemory> memory,
                                                const ReceiverOptions& options);
  virtual ~Receiver() = default;

  // Returns when every byte of the one version in the report is in place and proved, else a typed
  // error. What went on before success or failure is in the report (also after a failure:
  // last_report()).
  virtual Result<RefitReport> refit(const VersionRequest& request, Deadline deadline) = 0;
  virtual const RefitReport& last_report() const = 0;
  virtual uint64_t version() const = 0;  // what the parameters hold; 0: none
  virtual void cancel() = 0;             // a running refit or stage ends with kCancelled

  // -- kShadow, in two steps; refit() makes both. kUnsupported with kInPlace --
  // Begins to move and verify a version in the background, on own threads. kAlreadyExists while
  // another one moves; one that is ready and not committed is replaced.
  virtual Result<void> stage(const VersionRequest& request, Deadline deadline,
                             const StageOptions& options = {}) = 0;
  virtual StageProgress staged() const = 0;
  // Waits until the stage is ready or has failed (its error), or the deadline passes.
  virtual Result<StageProgress> wait_staged(Deadline deadline) = 0;
  // At the engine's safe point: brings what is staged into the parameters at the speed of memory.
  // In a group it votes, waits for the one decision, applies it, and returns when every rank holds
  // the version: kCancelled if the group decided to abort (the version before stays), kGroupBroken
  // if the decision or a rank was lost (do not serve).
  virtual Result<RefitReport> commit(Deadline deadline) = 0;
  // The version before the last commit() comes back. kNotFound: it was not kept, or the shadow was
  // used since.
  virtual Result<uint64_t> rollback(Deadline deadline) = 0;
  // kGroupBroken if the ranks of the group do not all hold the same version. Asks the coordinator.
  virtual Result<GroupInfo> check_group() = 0;
  virtual Result<void> close() = 0;
};

}  // namespace transfuse

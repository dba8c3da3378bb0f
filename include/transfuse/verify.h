// Compares what running engines hold with what running trainers publish, by fingerprints alone.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

struct BoxMismatch {
  std::string tensor;
  Box box;
  uint64_t source_fingerprint = 0;
  uint64_t target_fingerprint = 0;
};

// One target against the sources of the version that it says it holds.
struct TargetVerdict {
  std::string target;
  uint64_t version = 0;
  uint64_t box_count = 0;   // tiles compared
  uint64_t size_bytes = 0;  // in the target's dtypes
  std::vector<BoxMismatch> mismatches;
  std::string not_compared;  // why this target could not be compared; empty if it was
  bool matches() const { return not_compared.empty() && mismatches.empty(); }
};

struct VerifyReport {
  std::string model;
  std::vector<TargetVerdict> targets;
  bool matches() const;  // false if there is no target
  std::string to_json() const;
  std::string to_text() const;
};

// Asks every target of `model`, and the sources of its version under a lease, to sum the boxes that
// the target holds, in the target's dtypes. Moves no weights. Fails only where the coordinator
// does; what concerns one target is in its verdict.
Result<VerifyReport> verify_model(Transport& transport, Control& control, std::string_view model,
                                  Deadline deadline);

// The revision of a version, whoever holds its tensors and however they are sharded: every tensor
// counts once, in the dtype in which its sources hold it. See content_revision().
struct VersionRevision {
  uint64_t version = 0;
  Digest computed;
  Digest stated;  // by all of its sources alike; zero: not
};
// Takes a lease on the version meanwhile (0: the newest) and asks its sources for sums, as
// verify_model() does; moves no weights.
Result<VersionRevision> version_revision(Transport& transport, Control& control,
                                         std::string_view model, uint64_t version,
                                         Deadline deadline);

}  // namespace transfuse

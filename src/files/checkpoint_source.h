// A checkpoint that holds one version of a model, open to be read by a refit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "files/safetensors.h"
#include "files/side.h"
#include "plan/copies.h"
#include "transfuse/checkpoint.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"

namespace transfuse {

// Of all its files: another one once any of them was written, cut or replaced.
struct CheckpointIdentity {
  uint64_t high = 0;
  uint64_t low = 0;
};

// Headers are checked and held against the layouts when it is opened. Immutable. Safe to use from
// any thread.
class CheckpointSource {
 public:
  static Result<std::unique_ptr<CheckpointSource>> open(const Checkpoint& checkpoint);

  uint64_t version() const { return words_.version; }
  const std::string& kind() const { return words_.kind; }  // of its layouts, too; "": none
  const Metadata& metadata() const { return words_.words; }
  const std::string& path() const { return path_; }
  const ReadableSide& side() const { return side_; }
  const CheckpointIdentity& identity() const { return identity_; }
  // kTornRead, naming the file, once it has another identity.
  Result<void> check_unchanged() const { return side_.check_unchanged(); }
  // For connect() of a `file` transport: region i + 1 is file i of side().
  std::string endpoint() const;

  // Reads again what rank `rank` holds of a plan, in which its layout is `source_layout`: the sum
  // of every held run. `go_on` is asked from time to time, on any of the `threads`; its error ends
  // it.
  Result<void> sum_runs(const CopyTable& copies, uint32_t source_layout, size_t rank,
                        std::span<uint64_t> sums, uint32_t threads,
                        const std::function<Result<void>()>& go_on) const;

 private:
  CheckpointSource(std::string path, ReadableSide side, Recorded words);

  const std::string path_;
  const ReadableSide side_;
  const Recorded words_;
  CheckpointIdentity identity_;
};

}  // namespace transfuse

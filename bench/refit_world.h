// Source processes, a coordinator of their own, and one target in this process: what refits are
// measured in.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "source_process.h"
#include "transfuse/control.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "weights.h"

namespace transfuse::bench {

struct WorldSpec {
  std::string name;  // of the stream of versions, and in messages
  ModelConfig config;
  std::string source;  // parallelism specs; one process per source rank
  std::string target;  // rank 0 of it is measured
  SourceMemory memory = SourceMemory::kMemfd;
  uint32_t threads = 1;
};

// A folder that ends with its owner.
class TemporaryFolder {
 public:
  static Result<TemporaryFolder> make();
  ~TemporaryFolder();
  TemporaryFolder(TemporaryFolder&& other) noexcept = default;
  TemporaryFolder& operator=(TemporaryFolder&&) = delete;
  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

// Everything in it ends with it: processes, sockets, shared memory. Used from one thread.
class RefitWorld {
 public:
  static Result<std::unique_ptr<RefitWorld>> open(const WorldSpec& spec);

  // Every source publishes the next version.
  Result<void> publish();
  // Brings the newest version into the target. Fails with kUnsupported if bytes came by another
  // route than the memory of the sources asks for: a slower one is never measured in silence.
  Result<RefitReport> refit(Verify verify);
  // Another receiver into the same target, through a shadow; ends before the world.
  Result<std::unique_ptr<Receiver>> open_shadow(bool keep_previous);

  Weights& target() { return target_; }
  uint64_t version() const { return version_; }
  const std::vector<std::unique_ptr<SourceProcess>>& sources() const { return sources_; }
  TransportStats stats() const { return transport_->stats(); }
  // Private memory that the target has beyond its weights.
  uint64_t extra_target_bytes() const;
  uint64_t coordinator_bytes() const;  // private resident memory of the coordinator's process

 private:
  RefitWorld(WorldSpec spec, TemporaryFolder folder)
      : spec_(std::move(spec)), folder_(std::move(folder)) {}
  Result<void> start();
  Result<std::unique_ptr<Receiver>> open_receiver(const Layout& layout, Verify verify);

  const WorldSpec spec_;
  TemporaryFolder folder_;  // destroyed last: sockets lie in it
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Control> control_;
  Weights target_;
  std::vector<std::unique_ptr<SourceProcess>> sources_;
  std::unique_ptr<Receiver> verifying_;
  std::unique_ptr<Receiver> trusting_;
  uint64_t version_ = 0;
  uint64_t memory_before_ = 0;
  uint32_t coordinator_pid_ = 0;
};

}  // namespace transfuse::bench

// A coordinator, sources and targets in processes of their own.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "counting_relay.h"
#include "member_spec.h"
#include "process_memory.h"
#include "source_process.h"
#include "target_process.h"
#include "transfuse/control.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse::bench {

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

struct FleetSpec {
  std::string name;  // of the stream of versions, and in messages
  ModelConfig config;
  std::string source;  // parallelism specs; one process per source rank
  std::string target;
  SourceMemory memory = SourceMemory::kMemfd;
  uint32_t threads = 0;         // of each target; 0: one per core
  uint32_t snapshot_slots = 0;  // of each source; 0: versions are read in place
  bool count_wire = false;      // members reach the coordinator through relays
};

// Everything in it ends with it: processes, sockets, shared memory. Used from one thread.
class Fleet {
 public:
  // The sources are there when it returns.
  static Result<std::unique_ptr<Fleet>> open(const FleetSpec& spec);

  struct TargetChoice {
    std::string name;
    int64_t rank = 0;
    ReceiveInto into = ReceiveInto::kInPlace;
    std::string group{};
  };
  Result<void> add_target(const TargetChoice& choice);

  Result<void> publish();  // every source, the next version
  // Every target at once brings the newest version in, verified. In the order of targets().
  Result<std::vector<TargetRefit>> refit();

  uint64_t version() const { return version_; }
  const std::vector<std::unique_ptr<SourceProcess>>& sources() const { return sources_; }
  const std::vector<std::unique_ptr<TargetProcess>>& targets() const { return targets_; }
  Control& control() { return *control_; }
  const std::string& folder() const { return folder_.path(); }
  // With count_wire: since the member was started.
  WireBytes source_wire(size_t source) const { return source_relays_[source]->bytes(); }
  WireBytes target_wire(size_t target) const { return target_relays_[target]->bytes(); }

  uint64_t coordinator_bytes() const;  // private resident memory of the coordinator's process
  uint64_t coordinator_files() const;

 private:
  using Relays = std::vector<std::unique_ptr<CountingRelay>>;
  Fleet(FleetSpec spec, TemporaryFolder folder)
      : spec_(std::move(spec)), folder_(std::move(folder)) {}
  Result<void> start();
  Result<MemberSpec> member(const std::string& name, const std::string& layout, int64_t rank,
                            Relays& relays);

  const FleetSpec spec_;
  TemporaryFolder folder_;  // destroyed last: sockets lie in it
  std::unique_ptr<Control> control_;
  std::string coordinator_socket_;
  std::string coordinator_pid_;
  Relays source_relays_;
  Relays target_relays_;
  std::vector<std::unique_ptr<SourceProcess>> sources_;
  std::vector<std::unique_ptr<TargetProcess>> targets_;
  uint64_t version_ = 0;
};

}  // namespace transfuse::bench

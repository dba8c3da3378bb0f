// Starting and commanding the processes.
#include "fleet.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "counting_relay.h"
#include "member_spec.h"
#include "process_memory.h"
#include "rpc/rpc.h"
#include "source_process.h"
#include "target_process.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::bench {
namespace {

std::string own_program() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).string();
}

}  // namespace

Result<TemporaryFolder> TemporaryFolder::make() {
  std::string path = "/tmp/transfuse-bench-XXXXXX";
  if (mkdtemp(path.data()) == nullptr)
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("mkdtemp {}: {}", path, std::strerror(errno))};
  return TemporaryFolder(std::move(path));
}

TemporaryFolder::~TemporaryFolder() {
  if (path_.empty()) return;
  std::error_code ignored;  // nothing more can be done about what stays in /tmp
  std::filesystem::remove_all(path_, ignored);
}

Result<std::unique_ptr<Fleet>> Fleet::open(const FleetSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(TemporaryFolder folder, TemporaryFolder::make());
  auto fleet = std::unique_ptr<Fleet>(new Fleet(spec, std::move(folder)));
  TRANSFUSE_RETURN_IF_ERROR(fleet->start());
  return fleet;
}

Result<void> Fleet::start() {
  ConnectOptions connect;
  connect.runtime_folder = folder_.path();
  connect.serve_command = own_program();
  TRANSFUSE_ASSIGN_OR_RETURN(control_, connect_control(connect));
  TRANSFUSE_ASSIGN_OR_RETURN(const CoordinatorInfo coordinator, find_coordinator(connect));
  coordinator_pid_ = std::to_string(coordinator.pid);
  coordinator_socket_ = coordinator.address.substr(std::string("unix:").size());

  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec source, parse_parallel_spec(spec_.source));
  for (int64_t rank = 0; rank < source.rank_count(); ++rank) {
    TRANSFUSE_ASSIGN_OR_RETURN(const MemberSpec told, member(fmt::format("source{}", rank),
                                                             spec_.source, rank, source_relays_));
    TRANSFUSE_ASSIGN_OR_RETURN(auto process,
                               SourceProcess::start({told, spec_.memory, spec_.snapshot_slots}));
    sources_.push_back(std::move(process));
  }
  return {};
}

Result<MemberSpec> Fleet::member(const std::string& name, const std::string& layout, int64_t rank,
                                 Relays& relays) {
  MemberSpec spec{.config = spec_.config,
                  .layout = layout,
                  .rank = rank,
                  .stream = spec_.name,
                  .runtime_folder = folder_.path()};
  if (!spec_.count_wire) return spec;
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto relay,
      CountingRelay::open(fmt::format("{}/{}.relay", folder_.path(), name), coordinator_socket_));
  spec.address = relay->address();
  relays.push_back(std::move(relay));
  return spec;
}

Result<void> Fleet::add_target(const TargetChoice& choice) {
  TRANSFUSE_ASSIGN_OR_RETURN(MemberSpec told,
                             member(choice.name, spec_.target, choice.rank, target_relays_));
  told.threads = spec_.threads;
  TRANSFUSE_ASSIGN_OR_RETURN(auto process,
                             TargetProcess::start({told, choice.name, choice.into, choice.group}));
  targets_.push_back(std::move(process));
  return {};
}

Result<void> Fleet::publish() {
  ++version_;
  for (auto& source : sources_) TRANSFUSE_RETURN_IF_ERROR(source->publish(version_));
  return {};
}

Result<std::vector<TargetRefit>> Fleet::refit() {
  for (auto& target : targets_) TRANSFUSE_RETURN_IF_ERROR(target->begin_refit(version_));
  std::vector<TargetRefit> refits;
  for (auto& target : targets_) {
    TRANSFUSE_ASSIGN_OR_RETURN(const TargetRefit refit, target->end_refit());
    refits.push_back(refit);
  }
  return refits;
}

uint64_t Fleet::coordinator_bytes() const {
  return process_memory_bytes("RssAnon", coordinator_pid_);
}

uint64_t Fleet::coordinator_files() const { return open_file_count(coordinator_pid_); }

}  // namespace transfuse::bench

// Setting up and taking down the processes of a measurement.
#include "refit_world.h"

#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "bench/source_process.h"
#include "bench/weights.h"
#include "process_memory.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kRefitDeadlineMs = 120000;

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

Result<std::unique_ptr<RefitWorld>> RefitWorld::open(const WorldSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(TemporaryFolder folder, TemporaryFolder::make());
  auto world = std::unique_ptr<RefitWorld>(new RefitWorld(spec, std::move(folder)));
  TRANSFUSE_RETURN_IF_ERROR(world->start());
  return world;
}

Result<void> RefitWorld::start() {
  ConnectOptions connect;
  connect.runtime_folder = folder_.path();
  connect.serve_command = own_program();
  TRANSFUSE_ASSIGN_OR_RETURN(control_, connect_control(connect));
  TRANSFUSE_ASSIGN_OR_RETURN(const CoordinatorInfo coordinator, find_coordinator(connect));
  coordinator_pid_ = coordinator.pid;

  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec source, parse_parallel_spec(spec_.source));
  for (int64_t rank = 0; rank < source.rank_count(); ++rank) {
    TRANSFUSE_ASSIGN_OR_RETURN(auto process,
                               SourceProcess::start({spec_.config, spec_.source, rank, spec_.memory,
                                                     spec_.name, folder_.path()}));
    sources_.push_back(std::move(process));
  }

  TransportOptions options;
  options.threads = spec_.threads;
  TRANSFUSE_ASSIGN_OR_RETURN(transport_, open_shm_transport(folder_.path(), options));
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec target, parse_parallel_spec(spec_.target));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, make_layout(spec_.config, target, 0));
  TRANSFUSE_ASSIGN_OR_RETURN(target_, Weights::allocate(layout, nullptr));
  memory_before_ = process_memory_bytes("RssAnon");
  TRANSFUSE_ASSIGN_OR_RETURN(verifying_, open_receiver(layout, Verify::kFull));
  TRANSFUSE_ASSIGN_OR_RETURN(trusting_, open_receiver(layout, Verify::kOff));
  return {};
}

Result<std::unique_ptr<Receiver>> RefitWorld::open_receiver(const Layout& layout, Verify verify) {
  ReceiverOptions options;
  options.model = spec_.name;
  options.name = verify == Verify::kFull ? "verifying" : "trusting";
  options.verify = verify;
  return Receiver::open(*transport_, *control_, layout, target_.memory(), options);
}

Result<std::unique_ptr<Receiver>> RefitWorld::open_shadow(bool keep_previous) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec target, parse_parallel_spec(spec_.target));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, make_layout(spec_.config, target, 0));
  ReceiverOptions options;
  options.model = spec_.name;
  options.name = "shadow";
  options.into = ReceiveInto::kShadow;
  options.keep_previous = keep_previous;
  return Receiver::open(*transport_, *control_, layout, target_.memory(), options);
}

Result<void> RefitWorld::publish() {
  ++version_;
  for (auto& source : sources_) TRANSFUSE_RETURN_IF_ERROR(source->publish(version_));
  return {};
}

Result<RefitReport> RefitWorld::refit(Verify verify) {
  Receiver& receiver = verify == Verify::kFull ? *verifying_ : *trusting_;
  const VersionRequest request{VersionRequest::Kind::kExactly, version_};
  TRANSFUSE_ASSIGN_OR_RETURN(RefitReport report,
                             receiver.refit(request, Deadline::after_ms(kRefitDeadlineMs)));
  const std::string_view expected =
      spec_.memory == SourceMemory::kMemfd ? "memfd" : "process_vm_readv";
  for (const RefitRoute& route : report.routes) {
    if (route.route != expected)
      return Error{ErrorCode::kUnsupported,
                   fmt::format("{}: bytes of {} came by {}, expected {}", spec_.name, route.source,
                               route.route, expected)};
  }
  if (verify == Verify::kFull && report.verified_bytes < report.size_bytes)
    return Error{ErrorCode::kFingerprintMismatch,
                 fmt::format("{}: {} of {} bytes were verified", spec_.name, report.verified_bytes,
                             report.size_bytes)};
  return report;
}

uint64_t RefitWorld::extra_target_bytes() const {
  const uint64_t now = process_memory_bytes("RssAnon");
  return now - std::min(now, memory_before_);
}

uint64_t RefitWorld::coordinator_bytes() const {
  return process_memory_bytes("RssAnon", std::to_string(coordinator_pid_));
}

}  // namespace transfuse::bench

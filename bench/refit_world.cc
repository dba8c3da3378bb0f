// The target of this process, and its receivers.
#include "refit_world.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "fleet.h"
#include "process_memory.h"
#include "source_process.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/versions.h"
#include "weights.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kRefitDeadlineMs = 120000;

}  // namespace

Result<std::unique_ptr<RefitWorld>> RefitWorld::open(const FleetSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto fleet, Fleet::open(spec));
  auto world = std::unique_ptr<RefitWorld>(new RefitWorld(spec, std::move(fleet)));
  TRANSFUSE_RETURN_IF_ERROR(world->start());
  return world;
}

Result<void> RefitWorld::start() {
  TransportOptions options;
  options.threads = spec_.threads;
  TRANSFUSE_ASSIGN_OR_RETURN(transport_, open_shm_transport(fleet_->folder(), options));
  TRANSFUSE_ASSIGN_OR_RETURN(layout_, layout_of(spec_.config, spec_.target, 0));
  TRANSFUSE_ASSIGN_OR_RETURN(target_, Weights::allocate(layout_, nullptr));
  memory_before_ = process_memory_bytes("RssAnon");
  TRANSFUSE_ASSIGN_OR_RETURN(verifying_, open_receiver(Verify::kFull));
  TRANSFUSE_ASSIGN_OR_RETURN(trusting_, open_receiver(Verify::kOff));
  return {};
}

Result<std::unique_ptr<Receiver>> RefitWorld::open_receiver(Verify verify) {
  ReceiverOptions options;
  options.model = spec_.name;
  options.name = verify == Verify::kFull ? "verifying" : "trusting";
  options.verify = verify;
  return Receiver::open(*transport_, fleet_->control(), layout_, target_.memory(), options);
}

Result<std::unique_ptr<Receiver>> RefitWorld::open_shadow(const ShadowChoice& choice) {
  ReceiverOptions options;
  options.model = spec_.name;
  options.name = "shadow";
  options.into = ReceiveInto::kShadow;
  options.verify = choice.verify;
  options.keep_previous = choice.keep_previous;
  return Receiver::open(*transport_, fleet_->control(), layout_, target_.memory(), options);
}

Result<RefitReport> RefitWorld::refit(Verify verify) {
  Receiver& receiver = verify == Verify::kFull ? *verifying_ : *trusting_;
  const VersionRequest request{VersionRequest::Kind::kExactly, version()};
  TRANSFUSE_ASSIGN_OR_RETURN(RefitReport report,
                             receiver.refit(request, Deadline::after_ms(kRefitDeadlineMs)));
  // Snapshots lie in memory of the transport, wherever the weights are.
  const std::string_view expected = spec_.memory == SourceMemory::kMemfd || spec_.snapshot_slots > 0
                                        ? "memfd"
                                        : "process_vm_readv";
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

}  // namespace transfuse::bench

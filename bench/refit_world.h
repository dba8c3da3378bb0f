// A fleet's sources and one target in this process: what refits are measured in.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fleet.h"
#include "source_process.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "weights.h"

namespace transfuse::bench {

// Everything in it ends with it: processes, sockets, shared memory. Used from one thread.
class RefitWorld {
 public:
  // Rank 0 of spec.target is in this process.
  static Result<std::unique_ptr<RefitWorld>> open(const FleetSpec& spec);

  // Every source publishes the next version.
  Result<void> publish() { return fleet_->publish(); }
  // Brings the newest version into the target. Fails with kUnsupported if bytes came by another
  // route than the memory of the sources asks for: a slower one is never measured in silence.
  Result<RefitReport> refit(Verify verify);
  // Another receiver into the same target, through a shadow; ends before the world.
  struct ShadowChoice {
    bool keep_previous = false;
    Verify verify = Verify::kFull;
  };
  Result<std::unique_ptr<Receiver>> open_shadow(const ShadowChoice& choice);

  Weights& target() { return target_; }
  uint64_t version() const { return fleet_->version(); }
  const std::vector<std::unique_ptr<SourceProcess>>& sources() const { return fleet_->sources(); }
  // Private memory that the target has beyond its weights.
  uint64_t extra_target_bytes() const;

 private:
  RefitWorld(FleetSpec spec, std::unique_ptr<Fleet> fleet)
      : spec_(std::move(spec)), fleet_(std::move(fleet)) {}
  Result<void> start();
  Result<std::unique_ptr<Receiver>> open_receiver(Verify verify);

  const FleetSpec spec_;
  std::unique_ptr<Fleet> fleet_;
  std::unique_ptr<Transport> transport_;
  Layout layout_;
  Weights target_;
  std::unique_ptr<Receiver> verifying_;
  std::unique_ptr<Receiver> trusting_;
  uint64_t memory_before_ = 0;
};

}  // namespace transfuse::bench

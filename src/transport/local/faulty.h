// A transport that misbehaves by a plan, around any other: what sessions are tested against.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

enum class Fault : uint8_t {
  kNone,
  kDelay,      // the read begins FaultPlan::delay_ms later
  kDrop,       // nothing happens until the ticket is cancelled
  kCorrupt,    // lands with one bit of the target flipped; the fingerprint is of what was written
  kLie,        // lands without having moved anything; fingerprints are of what the target held
  kLateWrite,  // like kDrop; the read happens FaultPlan::late_write_ms after the cancel. Poisoned
               // until then, or until the region handle is closed
  kDie,        // the peer is gone: all its tickets fail, it cannot be reached again
  kPartial,    // half of the copies are done, then the ticket fails
};
inline constexpr size_t kFaultCount = 8;

struct ScriptedFault {
  uint64_t submit_index = 0;  // counted over all submits of the transport, from 0
  Fault fault = Fault::kNone;
};

struct FaultPlan {
  uint64_t seed = 1;
  // Chance of each fault per submit, indexed by Fault; drawn from the seed.
  std::array<double, kFaultCount> chance{};
  std::vector<ScriptedFault> script;  // goes before chance
  int64_t delay_ms = 5;
  int64_t late_write_ms = 20;
};

// As thread-safe as any transport. Its peers and regions are its own wrappers; LocalRegions are
// those of the transport inside.
class FaultyTransport : public Transport {
 public:
  // The submit counter goes on: script entries count from the beginning.
  virtual void set_plan(const FaultPlan& plan) = 0;
  virtual uint64_t submit_count() const = 0;
  virtual uint64_t fault_count(Fault fault) const = 0;  // how often it was done
};

std::unique_ptr<FaultyTransport> make_faulty(std::unique_ptr<Transport> inside,
                                             const FaultPlan& plan);
Result<std::unique_ptr<FaultyTransport>> open_faulty_local_transport(
    const FaultPlan& plan, const TransportOptions& options = {});

}  // namespace transfuse

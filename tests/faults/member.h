// A trainer or an engine that does what it is told: one JSON object in, one JSON object out.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "faults/gated_transport.h"
#include "faults/liar.h"
#include "faults/weights.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse::faults {

using Json = nlohmann::json;

// Requests are answered on one thread; interrupt() may be called from another meanwhile.
class Member {
 public:
  // `tell` takes events ({"event": ...}) from any thread.
  Member(std::string folder, std::string job, std::function<void(const Json&)> tell);

  // {"ok": true, ...}, or {"ok": false, "code": ..., "message": ...} with the steps of a refit.
  Json answer(const Json& request);
  // "go" (what is held goes on) and "cancel" (the refit under way); false: not one of these.
  bool interrupt(const Json& request);

 private:
  Result<Json> connect(const Json& request);
  Result<Json> coordinator();
  Result<Json> open_publisher(const Json& request);
  Result<Json> publisher_call(const std::string& call, const Json& request);
  Result<Json> write(const Json& request);
  Result<Json> open_receiver(const Json& request);
  Result<Json> receiver_call(const std::string& call, const Json& request);
  Result<Json> refit(const Json& request);
  Result<Json> save(const Json& request);
  Result<Json> check(const Json& request);
  Result<Json> control_call(const std::string& call, const Json& request);
  Result<Json> stats();
  Result<Json> allocate(const Json& request);
  Result<Json> fork_child();
  Result<Json> dispatch(const std::string& call, const Json& request);
  Json use_in_child();
  Result<void> require(bool there, const char* what) const;

  ConnectOptions options_;
  const std::function<void(const Json&)> tell_;
  // In the order in which they need each other.
  std::unique_ptr<GatedTransport> transport_;
  std::unique_ptr<Control> control_;
  std::unique_ptr<LocalRegion> spare_;
  std::unique_ptr<Weights> weights_;
  std::unique_ptr<Liar> liar_;
  std::unique_ptr<Publisher> publisher_;
  std::unique_ptr<Receiver> receiver_;
  // What interrupt() may use.
  std::atomic<GatedTransport*> gate_{nullptr};
  std::atomic<Receiver*> cancellable_{nullptr};
};

}  // namespace transfuse::faults

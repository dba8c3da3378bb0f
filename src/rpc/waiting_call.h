// How a call of the service is answered: at once, or by a later effect of the table.
#pragma once

#include <fmt/format.h>
#include <grpcpp/support/server_callback.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/convert.h"
#include "rpc/service.h"
#include "rpc/streams.h"
#include "transfuse/result.h"

namespace transfuse {

// Lives until gRPC is done with it. Whoever takes it out of waiting_ finishes it, once.
class CoordinatorService::WaitingCall final : public grpc::ServerUnaryReactor {
 public:
  WaitingCall(CoordinatorService& service, WaiterId id, WaitingReply to, uint64_t roster)
      : waiter(id), reply(to), known_roster(roster), service_(service) {}
  void OnDone() override { delete this; }
  void OnCancel() override { service_.give_up(this); }

  const WaiterId waiter;
  const WaitingReply reply;
  const uint64_t known_roster;

 private:
  CoordinatorService& service_;
};

struct CoordinatorService::Outbox {
  std::vector<std::pair<WaitingCall*, grpc::Status>> finished;
  std::vector<std::shared_ptr<AttendStream>> attending;
  std::vector<std::shared_ptr<WatchStream>> watching;

  void send() {
    for (auto& [call, status] : finished) call->Finish(status);
    for (const auto& stream : attending) stream->pump();
    for (const auto& stream : watching) stream->pump();
  }
};

// A call that is answered at once. `caller`: the member that acts, 0 if none does.
template <typename Call>
CoordinatorService::Unary* CoordinatorService::answer(Context* context, uint64_t caller,
                                                      Call call) {
  Unary* reactor = context->DefaultReactor();
  grpc::Status status = to_status(authorize(*context));
  Outbox outbox;
  if (status.ok()) {
    const MutexLock lock(mutex_);
    const Result<void> done = call(table_, std::chrono::steady_clock::now());
    if (!done) {
      const bool unknown = caller != 0 && !table_.is_member(caller);
      status = to_status(done.error(), unknown);
    }
    outbox = collect();
  }
  reactor->Finish(status);
  outbox.send();
  return reactor;
}

// A call that is answered by an effect of the table, which comes by the deadline at the latest.
template <typename Start>
CoordinatorService::Unary* CoordinatorService::wait(Context* context, uint64_t caller,
                                                    WaitingReply reply, uint64_t known_roster,
                                                    Start start) {
  if (const auto allowed = authorize(*context); !allowed) {
    Unary* reactor = context->DefaultReactor();
    reactor->Finish(to_status(allowed));
    return reactor;
  }
  Outbox outbox;
  WaitingCall* call = nullptr;
  {
    const MutexLock lock(mutex_);
    const WaiterId waiter{++last_waiter_};
    call = new WaitingCall(*this, waiter, reply, known_roster);
    if (caller != 0 && !table_.is_member(caller)) {
      outbox.finished.emplace_back(
          call, to_status(Error{ErrorCode::kNotFound,
                                fmt::format("member {:x} is not registered (any more)", caller)},
                          true));
    } else {
      waiting_.emplace(waiter, call);
      start(table_, waiter, std::chrono::steady_clock::now());
      outbox = collect();
    }
  }
  outbox.send();
  return call;
}

}  // namespace transfuse

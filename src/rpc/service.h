// The gRPC service around one lease table.
#pragma once

#include <grpcpp/support/server_callback.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/streams.h"
#include "transfuse.grpc.pb.h"

namespace transfuse {

struct ServiceOptions {
  uint64_t epoch = 1;
  std::string token;  // every call must carry it; empty: none is asked for
  TableLimits limits;
};

// Calls run on gRPC's bounded set of callback threads and never block there: a call that waits is
// an entry in the table and a reactor, no thread. Outlives its grpc::Server. Safe to call from any
// thread.
class CoordinatorService final : public wire::Coordinator::CallbackService {
 public:
  explicit CoordinatorService(const ServiceOptions& options);
  ~CoordinatorService() override;

  // How long nobody has been connected or registered.
  Duration idle_for();
  // No more deadlines, and every stream ends: a server can be shut down afterwards.
  void close();

  // For the streams.
  grpc::Status beat(AttendStream* stream, const wire::Beat& beat);
  void detach(AttendStream* stream);
  void detach(WatchStream* stream);

  using Context = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;
  Unary* Hello(Context* context, const wire::HelloRequest* request,
               wire::HelloReply* reply) override;
  grpc::ServerBidiReactor<wire::Beat, wire::Notice>* Attend(Context* context) override;
  Unary* PutLayout(Context* context, const wire::PutLayoutRequest* request,
                   wire::PutLayoutReply* reply) override;
  Unary* GetLayout(Context* context, const wire::GetLayoutRequest* request,
                   wire::GetLayoutReply* reply) override;
  Unary* Join(Context* context, const wire::JoinRequest* request, wire::JoinReply* reply) override;
  Unary* Leave(Context* context, const wire::LeaveRequest* request, wire::Done* reply) override;
  Unary* Describe(Context* context, const wire::DescribeRequest* request,
                  wire::DescribeReply* reply) override;
  Unary* Members(Context* context, const wire::ModelRequest* request,
                 wire::MembersReply* reply) override;
  Unary* Versions(Context* context, const wire::ModelRequest* request,
                  wire::VersionsReply* reply) override;
  Unary* History(Context* context, const wire::HistoryRequest* request,
                 wire::HistoryReply* reply) override;
  Unary* Groups(Context* context, const wire::ModelRequest* request,
                wire::GroupsReply* reply) override;
  Unary* BeginWrite(Context* context, const wire::BeginWriteRequest* request,
                    wire::BeginWriteReply* reply) override;
  Unary* Publish(Context* context, const wire::PublishRequest* request, wire::Done* reply) override;
  Unary* AbortVersion(Context* context, const wire::AbortVersionRequest* request,
                      wire::Done* reply) override;
  Unary* Acquire(Context* context, const wire::AcquireRequest* request,
                 wire::AcquireReply* reply) override;
  Unary* Release(Context* context, const wire::ReleaseRequest* request, wire::Done* reply) override;
  Unary* Hold(Context* context, const wire::HoldRequest* request, wire::Done* reply) override;
  Unary* Vote(Context* context, const wire::VoteRequest* request, wire::Done* reply) override;
  Unary* Decide(Context* context, const wire::DecideRequest* request,
                wire::DecideReply* reply) override;
  Unary* Applied(Context* context, const wire::AppliedRequest* request, wire::Done* reply) override;
  grpc::ServerWriteReactor<wire::Version>* Watch(Context* context,
                                                 const wire::ModelRequest* request) override;
  Unary* RequestTable(Context* context, const wire::RequestTableRequest* request,
                      wire::Done* reply) override;
  Unary* PutTable(Context* context, const wire::PutTableRequest* request,
                  wire::Done* reply) override;
  Unary* GetTable(Context* context, const wire::GetTableRequest* request,
                  wire::GetTableReply* reply) override;

 private:
  class WaitingCall;
  struct Outbox;  // what is sent after the mutex is released
  using WaitingReply = std::variant<wire::AcquireReply*, wire::BeginWriteReply*,
                                    wire::GetTableReply*, wire::DecideReply*, wire::Done*>;

  Result<void> authorize(const Context& context) const;
  template <typename Call>
  Unary* answer(Context* context, uint64_t caller, Call call);
  Unary* refuse(Context* context, const Error& error);
  template <typename Start>
  Unary* wait(Context* context, uint64_t caller, WaitingReply reply, uint64_t known_roster,
              Start start);
  void give_up(WaitingCall* call);
  Outbox collect() REQUIRES(mutex_);
  void answer_waiting(const Effect& effect, Outbox& outbox) REQUIRES(mutex_);
  WaitingCall* take_waiting(WaiterId waiter) REQUIRES(mutex_);
  void fill(const LeaseReply& from, uint64_t known_roster, wire::AcquireReply* to) REQUIRES(mutex_);
  void run_timers();

  const ServiceOptions options_;
  Mutex mutex_;
  CondVar changed_;
  LeaseTable table_ GUARDED_BY(mutex_);
  std::map<WaiterId, WaitingCall*> waiting_ GUARDED_BY(mutex_);
  // Streams are shared with gRPC, see OutStream.
  std::map<uint64_t, std::shared_ptr<AttendStream>> attending_ GUARDED_BY(mutex_);  // by owner
  std::map<WatchStream*, std::shared_ptr<WatchStream>> watching_ GUARDED_BY(mutex_);
  uint64_t last_waiter_ GUARDED_BY(mutex_) = 0;
  TimePoint last_used_ GUARDED_BY(mutex_);
  TimePoint timers_sleep_until_ GUARDED_BY(mutex_);
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread timers_;
};

}  // namespace transfuse

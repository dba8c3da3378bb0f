// A client's connection to a coordinator that may die and come back: the link, the members that are
// registered over it, and the thread that keeps both alive.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/attendance.h"
#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "transfuse.grpc.pb.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

// One life of the coordinator, reached over one channel. Shared by the calls that are under way on
// it when it breaks.
struct Link {
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<wire::Coordinator::Stub> stub;
  std::string address;
  uint64_t epoch = 0;
  uint32_t pid = 0;
};

// What is repeated to the next coordinator, and what the caller has not taken yet.
struct LocalMember {
  Registration registration;
  std::optional<Layout> layout;  // if it was put through this handle
  Resume state;                  // with the coordinator's number
  uint64_t epoch = 0;            // of the coordinator that knows it; 0: none
  std::optional<Error> refused;  // the coordinator does not take it back
  uint64_t round_version = 0;    // of its last lease
  std::deque<MemberEvent> events;
};

// Shared by a Control and its watches. Safe to call from any thread. In a forked child only
// check_process() may be called.
class Connection {
 public:
  static Result<std::shared_ptr<Connection>> open(ConnectOptions options);
  // Only asks who is there.
  static Result<CoordinatorInfo> find(ConnectOptions options);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // The members leave; every later call fails with kUnavailable.
  void close();
  Result<void> check_process() const;
  bool in_owner_process() const;
  const ControlOptions& control() const { return options_.control; }
  Deadline default_deadline() const {
    return Deadline::after_ms(options_.control.call_deadline_ms);
  }

  // Sends what `make(Request&, const Link&, bool again)` fills in, on every link until one answers,
  // or to the deadline. `member`: who acts; its registration is waited for, and repeated if the
  // coordinator has forgotten it.
  template <typename Request, typename Reply, typename Make>
  Result<void> call(std::string_view name,
                    grpc::Status (wire::Coordinator::Stub::*method)(grpc::ClientContext*,
                                                                    const Request&, Reply*),
                    std::optional<MemberId> member, Deadline deadline, Make make, Reply* reply) {
    for (bool again = false;; again = true) {
      TRANSFUSE_ASSIGN_OR_RETURN(const std::shared_ptr<Link> link, ready(name, member, deadline));
      Request request;
      make(request, *link, again);
      reply->Clear();
      grpc::ClientContext context;
      prepare(context, deadline);
      const grpc::Status status = (link->stub.get()->*method)(&context, request, reply);
      if (status.ok()) return {};
      auto error = failed(name, *link, member, status);
      if (error) return std::move(*error);
    }
  }
  // Waits until somebody answers and `member` is registered there.
  Result<std::shared_ptr<Link>> ready(std::string_view name, std::optional<MemberId> member,
                                      Deadline deadline);
  // Token and deadline.
  void prepare(grpc::ClientContext& context, std::optional<Deadline> deadline) const;
  void link_broke(const Link& link, std::string_view why);

  // -- members --
  JoinRequest join_request(const Registration& registration) const;
  Result<void> check_new(const Registration& registration);
  MemberId add_member(LocalMember member);
  std::optional<LocalMember> remove_member(MemberId member);
  uint64_t coordinator_id(MemberId member);  // 0: no such member
  // Runs `change(LocalMember&)` if the member is there.
  template <typename Change>
  void change_member(MemberId member, Change change) {
    const MutexLock lock(mutex_);
    if (const auto found = members_.find(member); found != members_.end()) change(found->second);
  }
  // As change_member(), if what a coordinator of `epoch` said is still what the next one will be
  // told: false if the member is being registered elsewhere, and has to ask there.
  template <typename Change>
  bool change_member_of(uint64_t epoch, MemberId member, Change change) {
    const MutexLock lock(mutex_);
    const auto found = members_.find(member);
    if (found == members_.end()) return true;
    if (!link_ || link_->epoch != epoch || found->second.epoch != epoch) return false;
    change(found->second);
    return true;
  }
  Result<std::optional<MemberEvent>> next_event(MemberId member, Deadline deadline);
  void add_lease(LeaseId lease, MemberId target, uint64_t version);
  std::optional<std::pair<MemberId, uint64_t>> take_lease(LeaseId lease);

 private:
  explicit Connection(ConnectOptions options);

  Result<void> connect(Deadline deadline);
  Result<std::shared_ptr<Link>> open_link(Deadline deadline);
  Result<std::shared_ptr<Link>> greet(const std::string& address, Deadline deadline);
  Result<void> register_members(const Link& link, Deadline deadline);
  Result<void> register_member(const Link& link, MemberId id, const LocalMember& member,
                               Deadline deadline);
  std::optional<Error> failed(std::string_view name, const Link& link,
                              std::optional<MemberId> member, const grpc::Status& status);
  // A call of the keeper, which close() cuts short.
  class KeeperCall;
  void run();
  void handle_notices();
  wire::Beat make_beat(uint64_t epoch) REQUIRES(mutex_);
  void wake();

  const ConnectOptions options_;
  const std::optional<RuntimePaths> embedded_;
  const uint64_t owner_;
  const pid_t owner_pid_;

  Mutex mutex_;
  CondVar changed_;
  std::shared_ptr<Link> link_ GUARDED_BY(mutex_);              // null: broken
  std::shared_ptr<Attendance> attendance_ GUARDED_BY(mutex_);  // shared with its last reactions
  std::optional<Error> last_failure_ GUARDED_BY(mutex_);
  std::map<MemberId, LocalMember> members_ GUARDED_BY(mutex_);
  std::map<LeaseId, std::pair<MemberId, uint64_t>> leases_ GUARDED_BY(mutex_);
  uint64_t last_member_ GUARDED_BY(mutex_) = 0;
  uint64_t epoch_ GUARDED_BY(mutex_) = 0;  // of the last link
  grpc::ClientContext* keeper_call_ GUARDED_BY(mutex_) = nullptr;
  bool woken_ GUARDED_BY(mutex_) = false;
  bool closed_ GUARDED_BY(mutex_) = false;
  std::thread keeper_;
};

}  // namespace transfuse

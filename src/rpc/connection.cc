// Connecting, noticing that the coordinator is gone, and telling the next one what was.
#include "rpc/connection.h"

#include <fmt/format.h>
#include <grpcpp/create_channel.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/mutex.h"
#include "base/random.h"
#include "control/lease_table.h"
#include "rpc/attendance.h"
#include "rpc/convert.h"
#include "rpc/embedded.h"
#include "rpc/protocol.h"
#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr size_t kMaxEvents = 256;  // of one member, not yet taken
constexpr Duration kFirstBackoff = std::chrono::milliseconds(20);
constexpr Duration kLastBackoff = std::chrono::milliseconds(500);
constexpr Duration kLongestCall = std::chrono::hours(24 * 365);
constexpr int kKeepaliveMs = 5000;  // a host that vanished without a word; unix sockets need none

std::string from_environment(const char* name, std::string_view otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || value[0] == '\0' ? std::string(otherwise) : std::string(value);
}

std::shared_ptr<grpc::Channel> open_channel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  // Two handles in one process are two members: neither may live on the other's connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  // Also how long a connection may take to be made: the deadline of the call is the limit.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 20000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  if (!address.starts_with("unix:")) {
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveMs);
    arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  }
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

Result<std::optional<RuntimePaths>> embedded_paths(const ConnectOptions& options) {
  if (!options.address.empty()) return std::optional<RuntimePaths>();
  TRANSFUSE_ASSIGN_OR_RETURN(RuntimePaths paths,
                             runtime_paths(options.runtime_folder, options.job));
  return std::optional<RuntimePaths>(std::move(paths));
}

ConnectOptions with_defaults(ConnectOptions options) {
  if (options.address.empty()) options.address = from_environment("TRANSFUSE_COORDINATOR", "");
  if (options.job.empty()) options.job = from_environment("TRANSFUSE_JOB", "default");
  return options;
}

Result<void> check_options(const ControlOptions& control) {
  if (control.heartbeat_ms > 0 && control.member_ttl_ms > control.heartbeat_ms &&
      control.lease_ttl_ms > control.heartbeat_ms && control.call_deadline_ms > 0) {
    return {};
  }
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("times to live ({} ms of a member, {} ms of a lease) must exceed the "
                           "heartbeat period ({} ms), and the call deadline ({} ms) must exceed 0",
                           control.member_ttl_ms, control.lease_ttl_ms, control.heartbeat_ms,
                           control.call_deadline_ms)};
}

// gRPC's threads do not survive a fork: a child that used it again would wait for ever. The pid of
// the first use is remembered until an exec.
Result<void> check_not_forked() {
  static std::atomic<pid_t> first_user{0};
  pid_t user = 0;
  if (first_user.compare_exchange_strong(user, getpid()) || user == getpid()) return {};
  return Error{ErrorCode::kUnsupported,
               fmt::format("process {} was forked from process {}, which was connected to a "
                           "coordinator before: start members with spawn or exec instead of fork",
                           getpid(), user)};
}

std::chrono::system_clock::time_point wall(Deadline deadline) {
  return std::chrono::system_clock::now() + std::min(deadline.remaining(), kLongestCall);
}

}  // namespace

// -- opening and closing --

Connection::Connection(ConnectOptions options)
    : options_(std::move(options)),
      embedded_(embedded_paths(options_).value()),
      owner_(random_identity()),
      owner_pid_(getpid()) {}

Result<std::shared_ptr<Connection>> Connection::open(ConnectOptions options) {
  TRANSFUSE_RETURN_IF_ERROR(check_not_forked());
  options = with_defaults(std::move(options));
  TRANSFUSE_RETURN_IF_ERROR(check_options(options.control));
  TRANSFUSE_RETURN_IF_ERROR(embedded_paths(options));
  std::shared_ptr<Connection> connection(new Connection(std::move(options)));
  TRANSFUSE_RETURN_IF_ERROR(connection->connect(connection->default_deadline()));
  connection->keeper_ = std::thread([raw = connection.get()] { raw->run(); });
  return connection;
}

Result<CoordinatorInfo> Connection::find(ConnectOptions options) {
  TRANSFUSE_RETURN_IF_ERROR(check_not_forked());
  options = with_defaults(std::move(options));
  TRANSFUSE_RETURN_IF_ERROR(check_options(options.control));
  TRANSFUSE_RETURN_IF_ERROR(embedded_paths(options));
  Connection connection(std::move(options));
  if (connection.embedded_ && !somebody_listens(connection.embedded_->socket)) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("no coordinator listens on {}", connection.embedded_->socket)};
  }
  const std::string address =
      connection.embedded_ ? "unix:" + connection.embedded_->socket : connection.options_.address;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto link,
                             connection.greet(address, connection.default_deadline()));
  return CoordinatorInfo{.address = address, .epoch = link->epoch, .pid = link->pid};
}

Connection::~Connection() { close(); }

void Connection::close() {
  std::shared_ptr<Attendance> attendance;
  wire::Beat last;
  {
    const MutexLock lock(mutex_);
    if (closed_) return;
    closed_ = true;
    if (keeper_call_ != nullptr) keeper_call_->TryCancel();
    changed_.notify_all();
  }
  if (keeper_.joinable()) keeper_.join();
  {
    const MutexLock lock(mutex_);
    last = make_beat(epoch_);
    last.set_leaving(true);
    attendance = std::move(attendance_);
    link_.reset();
    members_.clear();
    changed_.notify_all();
  }
  if (attendance) attendance->close(last);
}

bool Connection::in_owner_process() const { return getpid() == owner_pid_; }

Result<void> Connection::check_process() const {
  if (in_owner_process()) return {};
  return Error{ErrorCode::kUnavailable,
               fmt::format("this control handle was opened by process {}; a forked child must open "
                           "its own",
                           owner_pid_)};
}

// -- calls --

void Connection::prepare(grpc::ClientContext& context, std::optional<Deadline> deadline) const {
  if (deadline) context.set_deadline(wall(*deadline));
  if (!options_.token.empty()) context.AddMetadata(kTokenKey, options_.token);
}

Result<std::shared_ptr<Link>> Connection::ready(std::string_view name,
                                                std::optional<MemberId> member, Deadline deadline) {
  const MutexLock lock(mutex_);
  while (true) {
    if (closed_) {
      return Error{ErrorCode::kUnavailable, fmt::format("{}: the control handle is closed", name)};
    }
    bool registered = true;
    if (member) {
      const auto found = members_.find(*member);
      if (found == members_.end()) {
        return Error{ErrorCode::kNotFound, fmt::format("{}: this control handle has no member {}",
                                                       name, static_cast<uint64_t>(*member))};
      }
      if (found->second.refused) return *found->second.refused;
      registered = link_ && found->second.epoch == link_->epoch;
    }
    if (link_ && registered) return link_;
    if (deadline.passed()) {
      const bool stuck = last_failure_ && last_failure_->code == ErrorCode::kDeadlineExceeded;
      return Error{stuck ? ErrorCode::kDeadlineExceeded : ErrorCode::kUnavailable,
                   fmt::format("{}: no coordinator could be reached in time: {}", name,
                               last_failure_ ? last_failure_->message : "connecting")};
    }
    changed_.wait_until(mutex_, deadline);
  }
}

// The error for the caller, or nothing if the call is to be made again.
std::optional<Error> Connection::failed(std::string_view name, const Link& link,
                                        std::optional<MemberId> member,
                                        const grpc::Status& status) {
  if (from_coordinator(status)) {
    if (!member || !caller_unknown(status)) return to_error(status, name);
    const MutexLock lock(mutex_);
    if (const auto found = members_.find(*member); found != members_.end()) {
      found->second.epoch = 0;
      woken_ = true;
      changed_.notify_all();
    }
    return std::nullopt;
  }
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::CANCELLED:  // by the end of the server
      link_broke(link, fmt::format("{}: {}", name, status.error_message()));
      return std::nullopt;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return Error{ErrorCode::kDeadlineExceeded,
                   fmt::format("{}: the coordinator at {} (process {}) did not answer in time; it "
                               "is stopped or overloaded",
                               name, link.address, link.pid)};
    default:
      return to_error(status, name);
  }
}

void Connection::link_broke(const Link& link, std::string_view why) {
  const MutexLock lock(mutex_);
  if (link_.get() != &link) return;
  link_.reset();
  last_failure_ = Error{ErrorCode::kUnavailable, std::string(why)};
  woken_ = true;
  changed_.notify_all();
}

// -- the keeper --

// Used from the keeper, or before it runs.
class Connection::KeeperCall {
 public:
  KeeperCall(Connection& connection, Deadline deadline) : connection_(connection) {
    connection.prepare(context_, deadline);
    const MutexLock lock(connection.mutex_);
    connection.keeper_call_ = &context_;
    if (connection.closed_) context_.TryCancel();
  }
  ~KeeperCall() {
    const MutexLock lock(connection_.mutex_);
    connection_.keeper_call_ = nullptr;
  }
  KeeperCall(const KeeperCall&) = delete;
  KeeperCall& operator=(const KeeperCall&) = delete;
  grpc::ClientContext* context() { return &context_; }

 private:
  Connection& connection_;
  grpc::ClientContext context_;
};

// Asks who is there.
Result<std::shared_ptr<Link>> Connection::greet(const std::string& address, Deadline deadline) {
  auto link = std::make_shared<Link>();
  link->address = address;
  link->channel = open_channel(address);
  link->stub = wire::Coordinator::NewStub(link->channel);
  KeeperCall call(*this, deadline);
  wire::HelloRequest request;
  request.set_protocol(kProtocol);
  wire::HelloReply reply;
  const grpc::Status status = link->stub->Hello(call.context(), request, &reply);
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED && !from_coordinator(status)) {
    return Error{
        ErrorCode::kDeadlineExceeded,
        fmt::format("the coordinator at {} does not answer; it is stopped or overloaded", address)};
  }
  if (!status.ok()) return to_error(status, fmt::format("connecting to {}", address));
  if (reply.protocol() != kProtocol) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("the coordinator at {} (process {}) speaks protocol {}, this build of "
                             "transfuse speaks {}: use one version for a job, or another job name",
                             address, reply.pid(), reply.protocol(), kProtocol)};
  }
  link->epoch = reply.epoch();
  link->pid = reply.pid();
  return link;
}

Result<std::shared_ptr<Link>> Connection::open_link(Deadline deadline) {
  if (!embedded_) return greet(options_.address, deadline);
  TRANSFUSE_RETURN_IF_ERROR(ensure_coordinator(*embedded_, options_, deadline));
  return greet("unix:" + embedded_->socket, deadline);
}

Result<void> Connection::connect(Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::shared_ptr<Link> link, open_link(deadline));
  std::shared_ptr<Attendance> old;
  wire::Beat first;
  {
    const MutexLock lock(mutex_);
    old = std::move(attendance_);
    first = make_beat(link->epoch);
    first.set_owner(owner_);
  }
  if (old) old->close(wire::Beat());
  auto attendance =
      std::make_shared<Attendance>(*link->stub, options_.token, first, [this] { wake(); });
  auto registered = attendance->wait_for_welcome(deadline);
  if (registered) {
    {
      const MutexLock lock(mutex_);
      attendance_ = attendance;
    }
    handle_notices();
    registered = register_members(*link, deadline);
  }
  const MutexLock lock(mutex_);
  attendance_ = attendance;
  if (!registered) return registered;
  const bool restarted = epoch_ != 0 && epoch_ != link->epoch;
  epoch_ = link->epoch;
  link_ = link;
  last_failure_.reset();
  if (restarted) {
    log_event(LogLevel::kInfo, "coordinator_restarted",
              {{"address", link->address}, {"epoch", std::to_string(epoch_)}});
    for (auto& [id, member] : members_) {
      MemberEvent event;
      event.kind = MemberEvent::Kind::kEpoch;
      event.epoch = epoch_;
      member.events.push_back(std::move(event));
    }
  }
  changed_.notify_all();
  return {};
}

Result<void> Connection::register_members(const Link& link, Deadline deadline) {
  std::map<MemberId, LocalMember> absent;
  {
    const MutexLock lock(mutex_);
    for (const auto& [id, member] : members_) {
      if (member.epoch != link.epoch && !member.refused) absent.emplace(id, member);
    }
  }
  for (const auto& [id, member] : absent) {
    TRANSFUSE_RETURN_IF_ERROR(register_member(link, id, member, deadline));
  }
  return {};
}

// Fails if the coordinator cannot be reached. If it refuses the member, the member is told.
Result<void> Connection::register_member(const Link& link, MemberId id, const LocalMember& member,
                                         Deadline deadline) {
  const auto made = [&](const grpc::Status& status) -> Result<void> {
    if (status.ok()) return {};
    if (!from_coordinator(status)) return to_error(status, "registering again");
    const MutexLock lock(mutex_);
    if (const auto found = members_.find(id); found != members_.end()) {
      Error error = to_error(status, "registering again");
      error.message = fmt::format("the coordinator does not take {} back: {}",
                                  member.registration.name, error.message);
      found->second.refused = std::move(error);
      changed_.notify_all();
    }
    return {};
  };
  if (member.layout) {
    KeeperCall call(*this, deadline);
    wire::PutLayoutRequest request;
    to_wire(member.layout->digest(), request.mutable_digest());
    request.set_layout(encode(*member.layout));
    wire::PutLayoutReply reply;
    const grpc::Status status = link.stub->PutLayout(call.context(), request, &reply);
    if (!status.ok()) return made(status);
  }
  JoinRequest join = join_request(member.registration);
  join.resume = member.state;
  wire::JoinRequest request;
  to_wire(join, &request);
  wire::JoinReply reply;
  grpc::Status joined;
  {
    KeeperCall call(*this, deadline);
    joined = link.stub->Join(call.context(), request, &reply);
  }
  if (!joined.ok()) return made(joined);
  const MutexLock lock(mutex_);
  if (const auto found = members_.find(id); found != members_.end()) {
    found->second.state.id = reply.member();
    found->second.epoch = link.epoch;
    changed_.notify_all();
  }
  return {};
}

void Connection::run() {
  Duration backoff = kFirstBackoff;
  const Duration period = std::chrono::milliseconds(options_.control.heartbeat_ms);
  while (true) {
    std::shared_ptr<Link> link;
    {
      const MutexLock lock(mutex_);
      if (closed_) return;
      if (attendance_ && attendance_->broken()) link_.reset();
      link = link_;
    }
    Result<void> kept;
    if (!link) {
      kept = connect(default_deadline());
    } else {
      handle_notices();
      kept = register_members(*link, default_deadline());
      if (!kept) link_broke(*link, kept.error().message);
    }
    const MutexLock lock(mutex_);
    Duration pause = period;
    if (kept) {
      backoff = kFirstBackoff;
      if (attendance_) attendance_->beat(make_beat(epoch_));
    } else {
      last_failure_ = kept.error();
      pause = backoff;
      backoff = std::min(backoff * 2, kLastBackoff);
    }
    const Deadline next = Deadline::after(pause);
    while (!closed_ && !(woken_ && kept) && !next.passed()) changed_.wait_until(mutex_, next);
    woken_ = false;
  }
}

void Connection::handle_notices() {
  const MutexLock lock(mutex_);
  if (!attendance_) return;
  for (const wire::Notice& notice : attendance_->take()) {
    for (auto& [id, member] : members_) {
      const auto& unknown = notice.unknown_members();
      if (std::find(unknown.begin(), unknown.end(), member.state.id) != unknown.end()) {
        member.epoch = 0;
      }
      if (notice.event() == wire::EVENT_NONE || notice.member() != member.state.id) continue;
      MemberEvent event;
      if (notice.event() == wire::REVOKED) {
        event.kind = MemberEvent::Kind::kRevoked;
      } else {
        event.kind = MemberEvent::Kind::kTableRequest;
        event.table = from_wire(notice.table());
      }
      if (member.events.size() >= kMaxEvents) member.events.pop_front();
      member.events.push_back(std::move(event));
    }
  }
  changed_.notify_all();
}

wire::Beat Connection::make_beat(uint64_t epoch) {
  wire::Beat beat;
  for (const auto& [id, member] : members_) {
    if (member.epoch == epoch && !member.refused) beat.add_members(member.state.id);
  }
  for (const auto& [lease, held] : leases_) beat.add_leases(static_cast<uint64_t>(lease));
  return beat;
}

void Connection::wake() {
  const MutexLock lock(mutex_);
  woken_ = true;
  changed_.notify_all();
}

// -- members --

JoinRequest Connection::join_request(const Registration& registration) const {
  return {.registration = registration,
          .owner = owner_,
          .ttl = std::chrono::milliseconds(options_.control.member_ttl_ms),
          .lease_ttl = std::chrono::milliseconds(options_.control.lease_ttl_ms)};
}

Result<void> Connection::check_new(const Registration& registration) {
  const MutexLock lock(mutex_);
  for (const auto& [id, member] : members_) {
    const Registration& other = member.registration;
    if (other.role == registration.role && other.model == registration.model &&
        other.name == registration.name) {
      return Error{ErrorCode::kAlreadyExists,
                   fmt::format("{} of model {} has joined over this control handle already",
                               registration.name, registration.model)};
    }
  }
  return {};
}

MemberId Connection::add_member(LocalMember member) {
  const MutexLock lock(mutex_);
  const MemberId id{++last_member_};
  woken_ = woken_ || member.epoch != epoch_;  // it joined a coordinator that has died since
  members_.emplace(id, std::move(member));
  changed_.notify_all();
  return id;
}

std::optional<LocalMember> Connection::remove_member(MemberId member) {
  const MutexLock lock(mutex_);
  const auto found = members_.find(member);
  if (found == members_.end()) return std::nullopt;
  LocalMember removed = std::move(found->second);
  members_.erase(found);
  std::erase_if(leases_, [&](const auto& lease) { return lease.second.first == member; });
  changed_.notify_all();
  return removed;
}

uint64_t Connection::coordinator_id(MemberId member) {
  const MutexLock lock(mutex_);
  const auto found = members_.find(member);
  return found == members_.end() ? 0 : found->second.state.id;
}

Result<std::optional<MemberEvent>> Connection::next_event(MemberId member, Deadline deadline) {
  const MutexLock lock(mutex_);
  while (true) {
    const auto found = members_.find(member);
    if (closed_ || found == members_.end()) {
      return Error{closed_ ? ErrorCode::kUnavailable : ErrorCode::kNotFound,
                   fmt::format("this control handle has no member {} (any more)",
                               static_cast<uint64_t>(member))};
    }
    auto& events = found->second.events;
    if (!events.empty()) {
      std::optional<MemberEvent> event = std::move(events.front());
      events.pop_front();
      return event;
    }
    if (found->second.refused) return *found->second.refused;
    if (deadline.passed()) return std::optional<MemberEvent>();
    changed_.wait_until(mutex_, deadline);
  }
}

void Connection::add_lease(LeaseId lease, MemberId target, uint64_t version) {
  const MutexLock lock(mutex_);
  leases_[lease] = {target, version};
}

std::optional<std::pair<MemberId, uint64_t>> Connection::take_lease(LeaseId lease) {
  const MutexLock lock(mutex_);
  const auto found = leases_.find(lease);
  if (found == leases_.end()) return std::nullopt;
  const auto held = found->second;
  leases_.erase(found);
  return held;
}

}  // namespace transfuse

// Each call: check, change the table under the mutex, send what follows from it outside.
#include "rpc/service.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/convert.h"
#include "rpc/protocol.h"
#include "rpc/streams.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr Duration kTimerPeriod = std::chrono::milliseconds(250);
// Beyond this the process itself was stopped (SIGSTOP, a frozen container), not its members.
constexpr Duration kStoodStill = std::chrono::milliseconds(1000);
constexpr int64_t kLongestWaitUs = 86'400'000'000;

TimePoint clock_now() { return std::chrono::steady_clock::now(); }

TimePoint deadline_of(int64_t timeout_us, TimePoint now) {
  return now + std::chrono::microseconds(std::clamp<int64_t>(timeout_us, 0, kLongestWaitUs));
}

// Takes the same time wherever the first difference is.
bool equal_secret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    difference |= static_cast<unsigned>(a[i]) ^ static_cast<unsigned>(b[i]);
  }
  return difference == 0;
}

Result<void> check_layout(const wire::PutLayoutRequest& request) {
  const std::string& bytes = request.layout();
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout,
                             decode_layout(std::as_bytes(std::span(bytes.data(), bytes.size()))));
  const Digest said = from_wire(request.digest());
  if (layout.digest() == said) return {};
  return Error{ErrorCode::kCorrupt, fmt::format("a layout was put as {}, its digest is {}",
                                                said.to_string(), layout.digest().to_string())};
}

}  // namespace

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

CoordinatorService::CoordinatorService(const ServiceOptions& options)
    : options_(options), table_(options.limits), last_used_(clock_now()) {
  timers_ = std::thread([this] { run_timers(); });
}

CoordinatorService::~CoordinatorService() { close(); }

void CoordinatorService::close() {
  std::vector<std::shared_ptr<AttendStream>> attending;
  std::vector<std::shared_ptr<WatchStream>> watching;
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    for (const auto& [owner, stream] : attending_) attending.push_back(stream);
    for (const auto& [key, stream] : watching_) watching.push_back(stream);
    changed_.notify_all();
  }
  const grpc::Status leaving(grpc::StatusCode::UNAVAILABLE, "the coordinator shuts down");
  for (const auto& stream : attending) stream->end(leaving);
  for (const auto& stream : watching) stream->end(leaving);
  if (timers_.joinable()) timers_.join();
}

Duration CoordinatorService::idle_for() {
  const MutexLock lock(mutex_);
  const TimePoint now = clock_now();
  if (table_.member_count() > 0 || !attending_.empty()) last_used_ = now;
  return now - last_used_;
}

void CoordinatorService::run_timers() {
  while (true) {
    Outbox outbox;
    {
      const MutexLock lock(mutex_);
      if (stopping_) return;
      const TimePoint now = clock_now();
      if (timers_sleep_until_ != TimePoint{} && now - timers_sleep_until_ > kStoodStill) {
        table_.forgive(now);
      }
      table_.tick(now);
      outbox = collect();
      timers_sleep_until_ = now + kTimerPeriod;
      if (const auto next = table_.next_deadline()) {
        timers_sleep_until_ = std::min(timers_sleep_until_, std::max(*next, now));
      }
    }
    outbox.send();
    const MutexLock lock(mutex_);
    if (stopping_) return;
    if (clock_now() < timers_sleep_until_) {
      changed_.wait_until(mutex_, Deadline(timers_sleep_until_));
    }
  }
}

Result<void> CoordinatorService::authorize(const Context& context) const {
  if (options_.token.empty()) return {};
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find(kTokenKey);
  const bool right = found != metadata.end() &&
                     equal_secret({found->second.data(), found->second.size()}, options_.token);
  if (right) return {};
  return Error{ErrorCode::kPermissionDenied,
               found == metadata.end()
                   ? "this coordinator asks for a token, and none was given"
                   : "the token that was given is not the one of this coordinator"};
}

CoordinatorService::WaitingCall* CoordinatorService::take_waiting(WaiterId waiter) {
  const auto found = waiting_.find(waiter);
  if (found == waiting_.end()) return nullptr;
  WaitingCall* const call = found->second;
  waiting_.erase(found);
  return call;
}

void CoordinatorService::answer_waiting(const Effect& effect, Outbox& outbox) {
  WaitingCall* call = nullptr;
  grpc::Status status;
  if (const auto* lease = std::get_if<LeaseReply>(&effect)) {
    if ((call = take_waiting(lease->waiter)) == nullptr) return;
    if (lease->result) {
      fill(*lease, call->known_roster, std::get<wire::AcquireReply*>(call->reply));
    } else {
      status = to_status(lease->result.error());
    }
  } else if (const auto* drain = std::get_if<DrainReply>(&effect)) {
    if ((call = take_waiting(drain->waiter)) == nullptr) return;
    if (drain->result) {
      auto* reply = std::get<wire::BeginWriteReply*>(call->reply);
      reply->set_revoked(drain->result->revoked);
      reply->set_waited_us(drain->result->waited_us);
    } else {
      status = to_status(drain->result.error());
    }
  } else if (const auto* table = std::get_if<TableReply>(&effect)) {
    if ((call = take_waiting(table->waiter)) == nullptr) return;
    if (table->result) {
      std::get<wire::GetTableReply*>(call->reply)->set_description(*table->result);
    } else {
      status = to_status(table->result.error());
    }
  }
  if (call != nullptr) outbox.finished.emplace_back(call, status);
}

// Everything that the last change of the table has caused, in its order.
CoordinatorService::Outbox CoordinatorService::collect() {
  Outbox outbox;
  for (const Effect& effect : table_.take_effects()) {
    if (const auto* changed = std::get_if<VersionChanged>(&effect)) {
      wire::Version version;
      to_wire(changed->version, &version);
      for (const auto& [key, stream] : watching_) {
        stream->add(version);
        outbox.watching.push_back(stream);
      }
    } else if (const auto* notice = std::get_if<MemberNotice>(&effect)) {
      const auto found = attending_.find(notice->owner);
      if (found == attending_.end()) continue;  // repeated when it attends again
      wire::Notice message;
      message.set_member(notice->member);
      if (notice->event.kind == MemberEvent::Kind::kRevoked) {
        message.set_event(wire::REVOKED);
      } else {
        message.set_event(wire::TABLE_REQUEST);
        to_wire(notice->event.table, message.mutable_table());
      }
      found->second->enqueue(std::move(message));
      outbox.attending.push_back(found->second);
    } else {
      answer_waiting(effect, outbox);
    }
  }
  const auto next = table_.next_deadline();
  if (next && *next < timers_sleep_until_) {
    timers_sleep_until_ = *next;
    changed_.notify_all();
  }
  return outbox;
}

void CoordinatorService::fill(const LeaseReply& from, uint64_t known_roster,
                              wire::AcquireReply* to) {
  const Lease& lease = *from.result;
  to->set_lease(static_cast<uint64_t>(lease.id));
  to->set_version(lease.version);
  to->set_ttl_ms(lease.ttl_ms);
  to->set_roster(from.roster);
  for (const MemberInfo& source : lease.sources) {
    wire::LeaseSource* each = to->add_sources();
    each->set_member(source.id);
    to_wire(source.generation, each->mutable_generation());
  }
  if (from.roster == known_roster || lease.sources.empty()) return;
  for (const MemberInfo& member : table_.members(lease.sources.front().model)) {
    if (member.role == MemberRole::kSource) to_wire(member, to->add_members());
  }
}

// A call that is answered at once. `caller`: the member that acts, 0 if none does.
template <typename Call>
CoordinatorService::Unary* CoordinatorService::answer(Context* context, uint64_t caller,
                                                      Call call) {
  Unary* reactor = context->DefaultReactor();
  grpc::Status status = to_status(authorize(*context));
  Outbox outbox;
  if (status.ok()) {
    const MutexLock lock(mutex_);
    const Result<void> done = call(table_, clock_now());
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
      start(table_, waiter, clock_now());
      outbox = collect();
    }
  }
  outbox.send();
  return call;
}

void CoordinatorService::give_up(WaitingCall* call) {
  Outbox outbox;
  {
    const MutexLock lock(mutex_);
    if (waiting_.erase(call->waiter) == 0) return;  // answered at the same moment
    table_.cancel(call->waiter, clock_now());
    outbox = collect();
  }
  call->Finish(grpc::Status::CANCELLED);
  outbox.send();
}

// -- streams --

grpc::ServerBidiReactor<wire::Beat, wire::Notice>* CoordinatorService::Attend(Context* context) {
  const auto stream = AttendStream::open(*this);
  if (const auto allowed = authorize(*context); !allowed) stream->end(to_status(allowed));
  return stream.get();
}

grpc::Status CoordinatorService::beat(AttendStream* stream, const wire::Beat& beat) {
  std::vector<LeaseId> leases;
  for (const uint64_t lease : beat.leases()) leases.push_back(LeaseId{lease});
  const std::vector<uint64_t> members(beat.members().begin(), beat.members().end());
  Outbox outbox;
  {
    const MutexLock lock(mutex_);
    const TimePoint now = clock_now();
    wire::Notice notice;
    if (stream->owner == 0) {
      if (beat.owner() == 0 || stopping_) {
        return to_status(Error{ErrorCode::kInvalidArgument, "the first beat names its owner"});
      }
      stream->owner = beat.owner();
      attending_[stream->owner] = std::static_pointer_cast<AttendStream>(stream->share());
      notice.set_welcome(true);
      table_.repeat_requests(stream->owner);
    }
    if (beat.leaving()) {
      stream->leaving = true;
      for (const uint64_t member : members) (void)table_.leave(member, now);  // may be gone before
    } else {
      for (const uint64_t id : table_.beat(members, leases, now)) notice.add_unknown_members(id);
    }
    if (notice.welcome() || notice.unknown_members_size() > 0) stream->enqueue(std::move(notice));
    if (stream->queued() >= AttendStream::kMaxQueued) {
      return to_status(
          Error{ErrorCode::kResourceExhausted, "this client does not read what it is told"});
    }
    outbox = collect();
  }
  stream->pump();
  outbox.send();
  return grpc::Status::OK;
}

void CoordinatorService::detach(AttendStream* stream) {
  Outbox outbox;
  {
    const MutexLock lock(mutex_);
    const auto found = attending_.find(stream->owner);
    if (found == attending_.end() || found->second.get() != stream) return;
    attending_.erase(found);
    last_used_ = clock_now();
    if (!stream->leaving) table_.suspect(stream->owner, clock_now());
    outbox = collect();
  }
  outbox.send();
}

grpc::ServerWriteReactor<wire::Version>* CoordinatorService::Watch(
    Context* context, const wire::ModelRequest* request) {
  const auto stream = WatchStream::open(*this, request->model());
  if (const auto allowed = authorize(*context); !allowed) {
    stream->end(to_status(allowed));
    return stream.get();
  }
  {
    const MutexLock lock(mutex_);
    for (const VersionInfo& each : table_.versions(request->model())) {
      wire::Version version;
      to_wire(each, &version);
      stream->add(version);
    }
    watching_.emplace(stream.get(), stream);
  }
  stream->pump();
  return stream.get();
}

void CoordinatorService::detach(WatchStream* stream) {
  const MutexLock lock(mutex_);
  watching_.erase(stream);
}

// -- calls --

CoordinatorService::Unary* CoordinatorService::Hello(Context* context,
                                                     const wire::HelloRequest* /*request*/,
                                                     wire::HelloReply* reply) {
  return answer(context, 0, [&](LeaseTable&, TimePoint) -> Result<void> {
    reply->set_protocol(kProtocol);
    reply->set_epoch(options_.epoch);
    reply->set_pid(static_cast<uint32_t>(getpid()));
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::PutLayout(Context* context,
                                                         const wire::PutLayoutRequest* request,
                                                         wire::PutLayoutReply* reply) {
  const bool asks = request->layout().empty();
  const Result<void> valid = asks ? Result<void>() : check_layout(*request);
  return answer(context, 0, [&](LeaseTable& table, TimePoint now) -> Result<void> {
    const Digest digest = from_wire(request->digest());
    TRANSFUSE_RETURN_IF_ERROR(valid);
    reply->set_known(table.layouts().contains(digest));
    if (asks && !reply->known()) return {};
    return table.layouts().put(digest, request->layout(), now);
  });
}

CoordinatorService::Unary* CoordinatorService::GetLayout(Context* context,
                                                         const wire::GetLayoutRequest* request,
                                                         wire::GetLayoutReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto bytes, table.layouts().get(from_wire(request->digest())));
    reply->set_layout(*bytes);
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::Join(Context* context,
                                                    const wire::JoinRequest* request,
                                                    wire::JoinReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint now) -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(const JoinRequest join, from_wire(*request));
    TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t id, table.join(join, now));
    reply->set_member(id);
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::Leave(Context* context,
                                                     const wire::LeaveRequest* request,
                                                     wire::Done* /*reply*/) {
  return answer(context, request->member(), [&](LeaseTable& table, TimePoint now) {
    return table.leave(request->member(), now);
  });
}

CoordinatorService::Unary* CoordinatorService::Describe(Context* context,
                                                        const wire::DescribeRequest* request,
                                                        wire::DescribeReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto description,
                               table.describe(request->member(), request->incarnation()));
    reply->set_description(*description);
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::Members(Context* context,
                                                       const wire::ModelRequest* request,
                                                       wire::MembersReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    for (const MemberInfo& member : table.members(request->model())) {
      to_wire(member, reply->add_members());
    }
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::Versions(Context* context,
                                                        const wire::ModelRequest* request,
                                                        wire::VersionsReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    for (const VersionInfo& version : table.versions(request->model())) {
      to_wire(version, reply->add_versions());
    }
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::BeginWrite(Context* context,
                                                          const wire::BeginWriteRequest* request,
                                                          wire::BeginWriteReply* reply) {
  return wait(context, request->source(), reply, 0,
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.begin_write(waiter, request->source(), request->version(),
                                  deadline_of(request->timeout_us(), now), now);
              });
}

CoordinatorService::Unary* CoordinatorService::Publish(Context* context,
                                                       const wire::PublishRequest* request,
                                                       wire::Done* /*reply*/) {
  return answer(context, request->source(), [&](LeaseTable& table, TimePoint now) {
    return table.publish(request->source(), request->version(), from_wire(request->generation()),
                         now);
  });
}

CoordinatorService::Unary* CoordinatorService::AbortVersion(
    Context* context, const wire::AbortVersionRequest* request, wire::Done* /*reply*/) {
  return answer(context, request->source(), [&](LeaseTable& table, TimePoint now) {
    return table.abort_version(request->source(), request->version(), request->reason(), now);
  });
}

CoordinatorService::Unary* CoordinatorService::Acquire(Context* context,
                                                       const wire::AcquireRequest* request,
                                                       wire::AcquireReply* reply) {
  const auto wanted = from_wire(*request);
  if (!wanted) {
    return answer(context, 0,
                  [&](LeaseTable&, TimePoint) -> Result<void> { return wanted.error(); });
  }
  return wait(context, request->target(), reply, request->roster(),
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.acquire(waiter, request->target(), *wanted,
                              deadline_of(request->timeout_us(), now), now);
              });
}

CoordinatorService::Unary* CoordinatorService::Release(Context* context,
                                                       const wire::ReleaseRequest* request,
                                                       wire::Done* /*reply*/) {
  const auto end = from_wire(request->end());
  return answer(context, request->target(), [&](LeaseTable& table, TimePoint now) -> Result<void> {
    if (!end) return end.error();
    return table.release(request->target(), LeaseId{request->lease()}, request->version(), *end,
                         now);
  });
}

CoordinatorService::Unary* CoordinatorService::RequestTable(
    Context* context, const wire::RequestTableRequest* request, wire::Done* /*reply*/) {
  return answer(context, request->from(), [&](LeaseTable& table, TimePoint) {
    return table.request_table(request->from(), request->holder(), from_wire(request->table()));
  });
}

CoordinatorService::Unary* CoordinatorService::PutTable(Context* context,
                                                        const wire::PutTableRequest* request,
                                                        wire::Done* /*reply*/) {
  return answer(context, request->holder(), [&](LeaseTable& table, TimePoint) {
    return table.put_table(request->holder(), from_wire(request->plan_key()),
                           request->description());
  });
}

CoordinatorService::Unary* CoordinatorService::GetTable(Context* context,
                                                        const wire::GetTableRequest* request,
                                                        wire::GetTableReply* reply) {
  return wait(context, 0, reply, 0, [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
    table.get_table(waiter, request->holder(), from_wire(request->plan_key()),
                    deadline_of(request->timeout_us(), now), now);
  });
}

}  // namespace transfuse

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

#include "base/log.h"
#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/convert.h"
#include "rpc/protocol.h"
#include "rpc/streams.h"
#include "rpc/waiting_call.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr Duration kTimerPeriod = std::chrono::milliseconds(250);
// Beyond this the process itself was stopped (SIGSTOP, a frozen container), not its members.
constexpr Duration kStoodStill = std::chrono::milliseconds(1000);

void log_version(const VersionInfo& version) {
  const bool aborted = version.state == VersionState::kAborted;
  log_event(aborted ? LogLevel::kWarn : LogLevel::kDebug, "version_changed",
            {{"model", version.model},
             {"version", std::to_string(version.version)},
             {"state", std::string(version_state_name(version.state))},
             {"published", fmt::format("{}/{}", version.published, version.source_count)},
             {"reason", version.reason}});
}

// What is worth a line: who comes and goes, versions that end badly, engines that may not serve.
void log_effect(const Effect& effect) {
  if (const auto* version = std::get_if<VersionChanged>(&effect)) {
    log_version(version->version);
  } else if (const auto* member = std::get_if<MemberChanged>(&effect)) {
    const bool well = member->joined || member->why == kLeftWord;
    log_event(well ? LogLevel::kInfo : LogLevel::kWarn,
              member->joined ? "member_joined" : "member_gone",
              {{"model", member->model},
               {"role", member->role == MemberRole::kSource ? "source" : "target"},
               {"name", member->name},
               {"id", fmt::format("{:x}", member->member)},
               {"why", member->why}});
  } else if (const auto* changed = std::get_if<GroupChanged>(&effect)) {
    const GroupInfo& group = changed->group;
    const bool broken = group.state == GroupState::kBroken;
    log_event(broken ? LogLevel::kWarn : LogLevel::kInfo, "group_changed",
              {{"model", group.model},
               {"group", group.name},
               {"state", std::string(group_state_name(group.state))},
               {"version", std::to_string(group.version)},
               {"reason", group.reason}});
  }
}

// Takes the same time wherever the first difference is.
bool equal_secret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    difference |= static_cast<unsigned>(a[i]) ^ static_cast<unsigned>(b[i]);
  }
  return difference == 0;
}

}  // namespace

CoordinatorService::CoordinatorService(const ServiceOptions& options)
    : options_(options), table_(options.limits), last_used_(std::chrono::steady_clock::now()) {
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
  const TimePoint now = std::chrono::steady_clock::now();
  if (table_.member_count() > 0 || !attending_.empty()) last_used_ = now;
  return now - last_used_;
}

void CoordinatorService::run_timers() {
  while (true) {
    Outbox outbox;
    {
      const MutexLock lock(mutex_);
      if (stopping_) return;
      const TimePoint now = std::chrono::steady_clock::now();
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
    if (std::chrono::steady_clock::now() < timers_sleep_until_) {
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
      reply->set_replaced(drain->result->replaced);
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
  } else if (const auto* decision = std::get_if<DecisionReply>(&effect)) {
    if ((call = take_waiting(decision->waiter)) == nullptr) return;
    if (decision->result) {
      auto* reply = std::get<wire::DecideReply*>(call->reply);
      reply->set_commit(decision->result->commit);
      reply->set_reason(decision->result->reason);
    } else {
      status = to_status(decision->result.error());
    }
  } else if (const auto* applied = std::get_if<AppliedReply>(&effect)) {
    if ((call = take_waiting(applied->waiter)) == nullptr) return;
    status = to_status(applied->result);
  }
  if (call != nullptr) outbox.finished.emplace_back(call, status);
}

// Everything that the last change of the table has caused, in its order.
CoordinatorService::Outbox CoordinatorService::collect() {
  Outbox outbox;
  for (const Effect& effect : table_.take_effects()) {
    log_effect(effect);
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
  to->set_round(lease.round);
  for (const MemberInfo& source : lease.sources) {
    wire::LeaseSource* each = to->add_sources();
    each->set_member(source.id);
    to_wire(source.generation, each->mutable_generation());
    each->set_slot(source.slot);
    to_wire(source.version_metadata, each->mutable_metadata());
    if (source.revision != Digest{}) to_wire(source.revision, each->mutable_revision());
  }
  for (const Refusal& refusal : lease.refused) {
    wire::Refusal* each = to->add_refused();
    each->set_member(refusal.member);
    each->set_reason(refusal.reason);
  }
  if (from.roster == known_roster || lease.sources.empty()) return;
  for (const MemberInfo& member : table_.members(lease.sources.front().model)) {
    if (member.role == MemberRole::kSource) to_wire(member, to->add_members());
  }
}

void CoordinatorService::give_up(WaitingCall* call) {
  Outbox outbox;
  {
    const MutexLock lock(mutex_);
    if (waiting_.erase(call->waiter) == 0) return;  // answered at the same moment
    table_.cancel(call->waiter, std::chrono::steady_clock::now());
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
    const TimePoint now = std::chrono::steady_clock::now();
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
    last_used_ = std::chrono::steady_clock::now();
    if (!stream->leaving) table_.suspect(stream->owner, std::chrono::steady_clock::now());
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

}  // namespace transfuse

// The calls of the service: from the wire into the table, and what it answers at once.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <span>
#include <string>

#include "control/lease_table.h"
#include "rpc/convert.h"
#include "rpc/protocol.h"
#include "rpc/service.h"
#include "rpc/waiting_call.h"  // IWYU pragma: keep: bodies of templates
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr int64_t kLongestWaitUs = 86'400'000'000;

TimePoint deadline_of(int64_t timeout_us, TimePoint now) {
  return now + std::chrono::microseconds(std::clamp<int64_t>(timeout_us, 0, kLongestWaitUs));
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

// A request that this build cannot read.
CoordinatorService::Unary* CoordinatorService::refuse(Context* context, const Error& error) {
  return answer(context, 0, [&](LeaseTable&, TimePoint) -> Result<void> { return error; });
}

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

CoordinatorService::Unary* CoordinatorService::History(Context* context,
                                                       const wire::HistoryRequest* request,
                                                       wire::HistoryReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto events,
                               table.history(request->model(), request->version()));
    for (const VersionEvent& event : events) to_wire(event, reply->add_events());
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::Groups(Context* context,
                                                      const wire::ModelRequest* request,
                                                      wire::GroupsReply* reply) {
  return answer(context, 0, [&](LeaseTable& table, TimePoint) -> Result<void> {
    for (const GroupInfo& group : table.groups(request->model())) {
      to_wire(group, reply->add_groups());
    }
    return {};
  });
}

CoordinatorService::Unary* CoordinatorService::BeginWrite(Context* context,
                                                          const wire::BeginWriteRequest* request,
                                                          wire::BeginWriteReply* reply) {
  const auto wanted = from_wire(*request);
  if (!wanted) return refuse(context, wanted.error());
  return wait(context, request->source(), reply, 0,
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.begin_write(waiter, request->source(), *wanted,
                                  deadline_of(request->timeout_us(), now), now);
              });
}

CoordinatorService::Unary* CoordinatorService::Publish(Context* context,
                                                       const wire::PublishRequest* request,
                                                       wire::Done* /*reply*/) {
  return answer(context, request->source(), [&](LeaseTable& table, TimePoint now) {
    return table.publish(request->source(), from_wire(request->offer()), now);
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
  if (!wanted) return refuse(context, wanted.error());
  return wait(context, request->target(), reply, request->roster(),
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.acquire(waiter, request->target(), *wanted,
                              deadline_of(request->timeout_us(), now), now);
              });
}

CoordinatorService::Unary* CoordinatorService::Release(Context* context,
                                                       const wire::ReleaseRequest* request,
                                                       wire::Done* /*reply*/) {
  const auto outcome = from_wire(*request);
  if (!outcome) return refuse(context, outcome.error());
  return answer(context, request->target(), [&](LeaseTable& table, TimePoint now) {
    return table.release(request->target(), LeaseId{request->lease()}, request->version(), *outcome,
                         now);
  });
}

CoordinatorService::Unary* CoordinatorService::Hold(Context* context,
                                                    const wire::HoldRequest* request,
                                                    wire::Done* /*reply*/) {
  return answer(context, request->target(), [&](LeaseTable& table, TimePoint now) {
    return table.hold(request->target(), request->version(), now);
  });
}

CoordinatorService::Unary* CoordinatorService::Vote(Context* context,
                                                    const wire::VoteRequest* request,
                                                    wire::Done* /*reply*/) {
  return answer(context, request->target(), [&](LeaseTable& table, TimePoint now) {
    return table.vote(request->target(), request->round(), request->ready(), request->reason(),
                      now);
  });
}

CoordinatorService::Unary* CoordinatorService::Decide(Context* context,
                                                      const wire::DecideRequest* request,
                                                      wire::DecideReply* reply) {
  return wait(context, request->target(), reply, 0,
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.decision(waiter, request->target(), request->round(),
                               deadline_of(request->timeout_us(), now), now);
              });
}

CoordinatorService::Unary* CoordinatorService::Applied(Context* context,
                                                       const wire::AppliedRequest* request,
                                                       wire::Done* reply) {
  return wait(context, request->target(), reply, 0,
              [&](LeaseTable& table, WaiterId waiter, TimePoint now) {
                table.applied(waiter, request->target(), request->round(), request->version(),
                              deadline_of(request->timeout_us(), now), now);
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

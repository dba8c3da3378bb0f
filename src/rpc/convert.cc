// One row per error code; field by field for the rest.
#include "rpc/convert.h"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

struct ErrorRow {
  ErrorCode code;
  wire::ErrorKind kind;
  grpc::StatusCode status;  // for people and tools that know only gRPC
};

constexpr std::array<ErrorRow, kErrorCodeCount> kErrors{{
    {ErrorCode::kInvalidArgument, wire::INVALID_ARGUMENT, grpc::StatusCode::INVALID_ARGUMENT},
    {ErrorCode::kLayoutMismatch, wire::LAYOUT_MISMATCH, grpc::StatusCode::FAILED_PRECONDITION},
    {ErrorCode::kCorrupt, wire::CORRUPT, grpc::StatusCode::DATA_LOSS},
    {ErrorCode::kNotFound, wire::NOT_FOUND, grpc::StatusCode::NOT_FOUND},
    {ErrorCode::kAlreadyExists, wire::ALREADY_EXISTS, grpc::StatusCode::ALREADY_EXISTS},
    {ErrorCode::kPermissionDenied, wire::PERMISSION_DENIED, grpc::StatusCode::PERMISSION_DENIED},
    {ErrorCode::kResourceExhausted, wire::RESOURCE_EXHAUSTED, grpc::StatusCode::RESOURCE_EXHAUSTED},
    {ErrorCode::kUnavailable, wire::UNAVAILABLE, grpc::StatusCode::UNAVAILABLE},
    {ErrorCode::kDeadlineExceeded, wire::DEADLINE_EXCEEDED, grpc::StatusCode::DEADLINE_EXCEEDED},
    {ErrorCode::kTornRead, wire::TORN_READ, grpc::StatusCode::ABORTED},
    {ErrorCode::kVersionGone, wire::VERSION_GONE, grpc::StatusCode::FAILED_PRECONDITION},
    {ErrorCode::kFingerprintMismatch, wire::FINGERPRINT_MISMATCH, grpc::StatusCode::DATA_LOSS},
    {ErrorCode::kPoisoned, wire::POISONED, grpc::StatusCode::FAILED_PRECONDITION},
    {ErrorCode::kCancelled, wire::CANCELLED, grpc::StatusCode::CANCELLED},
    {ErrorCode::kUnsupported, wire::UNSUPPORTED, grpc::StatusCode::UNIMPLEMENTED},
}};

const ErrorRow& row_of(ErrorCode code) {
  for (const ErrorRow& row : kErrors) {
    if (row.code == code) return row;
  }
  check_failed(__FILE__, __LINE__, "an ErrorCode without a row");
}

// For a status that gRPC made itself: what the caller may do about it.
ErrorCode code_of_connection(grpc::StatusCode status) {
  switch (status) {
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return ErrorCode::kDeadlineExceeded;
    case grpc::StatusCode::CANCELLED:
      return ErrorCode::kCancelled;
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return ErrorCode::kResourceExhausted;
    case grpc::StatusCode::UNIMPLEMENTED:
      return ErrorCode::kUnsupported;
    case grpc::StatusCode::INTERNAL:
    case grpc::StatusCode::DATA_LOSS:
      return ErrorCode::kCorrupt;
    case grpc::StatusCode::UNAUTHENTICATED:
    case grpc::StatusCode::PERMISSION_DENIED:
      return ErrorCode::kPermissionDenied;
    default:
      return ErrorCode::kUnavailable;
  }
}

bool parse_detail(const grpc::Status& status, wire::ErrorDetail* detail) {
  return !status.error_details().empty() && detail->ParseFromString(status.error_details()) &&
         detail->kind() != wire::ERROR_KIND_NONE;
}

Error out_of_range(std::string_view what, int value) {
  return Error{ErrorCode::kCorrupt,
               fmt::format("{} {} is not known to this build of transfuse", what, value)};
}

Result<MemberRole> role_from_wire(wire::Role role) {
  switch (role) {
    case wire::SOURCE:
      return MemberRole::kSource;
    case wire::TARGET:
      return MemberRole::kTarget;
    default:
      return out_of_range("role", role);
  }
}

wire::Role role_to_wire(MemberRole role) {
  return role == MemberRole::kSource ? wire::SOURCE : wire::TARGET;
}

}  // namespace

wire::ErrorKind to_wire(ErrorCode code) { return row_of(code).kind; }

Result<ErrorCode> from_wire(wire::ErrorKind kind) {
  for (const ErrorRow& row : kErrors) {
    if (row.kind == kind) return row.code;
  }
  return out_of_range("error kind", kind);
}

grpc::Status to_status(const Error& error, bool caller_unknown) {
  const ErrorRow& row = row_of(error.code);
  wire::ErrorDetail detail;
  detail.set_kind(row.kind);
  detail.set_caller_unknown(caller_unknown);
  return {row.status, error.message, detail.SerializeAsString()};
}

grpc::Status to_status(const Result<void>& result) {
  return result ? grpc::Status::OK : to_status(result.error());
}

bool from_coordinator(const grpc::Status& status) {
  wire::ErrorDetail detail;
  return parse_detail(status, &detail);
}

bool caller_unknown(const grpc::Status& status) {
  wire::ErrorDetail detail;
  return parse_detail(status, &detail) && detail.caller_unknown();
}

Error to_error(const grpc::Status& status, std::string_view call) {
  wire::ErrorDetail detail;
  if (!parse_detail(status, &detail)) {
    return Error{code_of_connection(status.error_code()),
                 fmt::format("{}: {}", call, status.error_message())};
  }
  const auto code = from_wire(detail.kind());
  if (!code) return code.error();
  return Error{*code, status.error_message()};
}

void to_wire(const Digest& from, wire::Digest* to) {
  to->set_high(from.high);
  to->set_low(from.low);
}

Digest from_wire(const wire::Digest& from) { return {.high = from.high(), .low = from.low()}; }

void to_wire(const Generation& from, wire::Generation* to) {
  to->set_incarnation(from.incarnation);
  to->set_counter(from.counter);
}

Generation from_wire(const wire::Generation& from) {
  return {.incarnation = from.incarnation(), .counter = from.counter()};
}

void to_wire(const MemberInfo& from, wire::Member* to) {
  to->set_id(from.id);
  to->set_role(role_to_wire(from.role));
  to->set_model(from.model);
  to->set_name(from.name);
  to->set_incarnation(from.incarnation);
  to_wire(from.layout, to->mutable_layout());
  to->set_version(from.version);
  to_wire(from.generation, to->mutable_generation());
}

Result<MemberInfo> from_wire(const wire::Member& from) {
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberRole role, role_from_wire(from.role()));
  return MemberInfo{.id = from.id(),
                    .role = role,
                    .model = from.model(),
                    .name = from.name(),
                    .incarnation = from.incarnation(),
                    .layout = from_wire(from.layout()),
                    .version = from.version(),
                    .generation = from_wire(from.generation())};
}

void to_wire(const VersionInfo& from, wire::Version* to) {
  to->set_model(from.model);
  to->set_version(from.version);
  switch (from.state) {
    case VersionState::kOpen:
      to->set_state(wire::OPEN);
      break;
    case VersionState::kReady:
      to->set_state(wire::READY);
      break;
    case VersionState::kRetired:
      to->set_state(wire::RETIRED);
      break;
    case VersionState::kAborted:
      to->set_state(wire::ABORTED);
      break;
  }
  to->set_published(from.published);
  to->set_source_count(from.source_count);
  to->set_leases(from.leases);
  to->set_reason(from.reason);
}

Result<VersionInfo> from_wire(const wire::Version& from) {
  VersionInfo to{.model = from.model(),
                 .version = from.version(),
                 .state = VersionState::kOpen,
                 .published = from.published(),
                 .source_count = from.source_count(),
                 .leases = from.leases(),
                 .reason = from.reason()};
  switch (from.state()) {
    case wire::OPEN:
      break;
    case wire::READY:
      to.state = VersionState::kReady;
      break;
    case wire::RETIRED:
      to.state = VersionState::kRetired;
      break;
    case wire::ABORTED:
      to.state = VersionState::kAborted;
      break;
    default:
      return out_of_range("version state", from.state());
  }
  return to;
}

void to_wire(const TableRequest& from, wire::TableRequest* to) {
  to_wire(from.plan_key, to->mutable_plan_key());
  to_wire(from.target, to->mutable_target());
  for (const Digest& source : from.sources) to_wire(source, to->add_sources());
  to->set_chunk_bytes(from.chunk_bytes);
}

TableRequest from_wire(const wire::TableRequest& from) {
  TableRequest to{.plan_key = from_wire(from.plan_key()),
                  .target = from_wire(from.target()),
                  .sources = {},
                  .chunk_bytes = from.chunk_bytes()};
  for (const wire::Digest& source : from.sources()) to.sources.push_back(from_wire(source));
  return to;
}

void to_wire(const VersionRequest& from, wire::AcquireRequest* to) {
  switch (from.kind) {
    case VersionRequest::Kind::kNewest:
      to->set_want(wire::NEWEST);
      break;
    case VersionRequest::Kind::kExactly:
      to->set_want(wire::EXACTLY);
      break;
    case VersionRequest::Kind::kAtLeast:
      to->set_want(wire::AT_LEAST);
      break;
  }
  to->set_version(from.version);
}

Result<VersionRequest> from_wire(const wire::AcquireRequest& from) {
  switch (from.want()) {
    case wire::NEWEST:
      return VersionRequest{VersionRequest::Kind::kNewest, from.version()};
    case wire::EXACTLY:
      return VersionRequest{VersionRequest::Kind::kExactly, from.version()};
    case wire::AT_LEAST:
      return VersionRequest{VersionRequest::Kind::kAtLeast, from.version()};
    default:
      return out_of_range("kind of version request", from.want());
  }
}

void to_wire(const JoinRequest& from, wire::JoinRequest* to) {
  const Registration& registration = from.registration;
  to->set_owner(from.owner);
  to->set_role(role_to_wire(registration.role));
  to->set_model(registration.model);
  to->set_name(registration.name);
  to->set_source_count(registration.source_count);
  to->set_incarnation(registration.incarnation);
  to_wire(registration.layout, to->mutable_layout());
  to->set_description(registration.descriptor);
  to->set_ttl_ms(from.ttl / std::chrono::milliseconds(1));
  to->set_lease_ttl_ms(from.lease_ttl / std::chrono::milliseconds(1));
  if (!from.resume) return;
  wire::Resume* resume = to->mutable_resume();
  resume->set_id(from.resume->id);
  resume->set_last_published(from.resume->last_published);
  resume->set_readable(from.resume->readable);
  to_wire(from.resume->generation, resume->mutable_generation());
  resume->set_writing(from.resume->writing);
  resume->set_landed(from.resume->landed);
}

wire::LeaseEnd to_wire(LeaseEnd from) {
  switch (from) {
    case LeaseEnd::kUnchanged:
      return wire::UNCHANGED;
    case LeaseEnd::kLanded:
      return wire::LANDED;
    case LeaseEnd::kLost:
      return wire::LOST;
  }
  check_failed(__FILE__, __LINE__, "a LeaseEnd outside the enum");
}

Result<LeaseEnd> from_wire(wire::LeaseEnd from) {
  switch (from) {
    case wire::UNCHANGED:
      return LeaseEnd::kUnchanged;
    case wire::LANDED:
      return LeaseEnd::kLanded;
    case wire::LOST:
      return LeaseEnd::kLost;
    default:
      return out_of_range("lease end", from);
  }
}

Result<JoinRequest> from_wire(const wire::JoinRequest& from) {
  constexpr int64_t kLongestMs = 86'400'000;
  if (from.ttl_ms() < 0 || from.ttl_ms() > kLongestMs || from.lease_ttl_ms() < 0 ||
      from.lease_ttl_ms() > kLongestMs) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} asks for times to live of {} and {} ms, at most {} are possible",
                             from.name(), from.ttl_ms(), from.lease_ttl_ms(), kLongestMs)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberRole role, role_from_wire(from.role()));
  JoinRequest to{.registration = {.role = role,
                                  .model = from.model(),
                                  .name = from.name(),
                                  .source_count = from.source_count(),
                                  .incarnation = from.incarnation(),
                                  .layout = from_wire(from.layout()),
                                  .descriptor = from.description()},
                 .owner = from.owner(),
                 .ttl = std::chrono::milliseconds(from.ttl_ms()),
                 .lease_ttl = std::chrono::milliseconds(from.lease_ttl_ms())};
  if (from.has_resume()) {
    to.resume = Resume{.id = from.resume().id(),
                       .last_published = from.resume().last_published(),
                       .readable = from.resume().readable(),
                       .generation = from_wire(from.resume().generation()),
                       .writing = from.resume().writing(),
                       .landed = from.resume().landed()};
  }
  return to;
}

}  // namespace transfuse

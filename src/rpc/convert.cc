// One row per error code; field by field for the rest.
#include "rpc/convert.h"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
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
    {ErrorCode::kGroupBroken, wire::GROUP_BROKEN, grpc::StatusCode::FAILED_PRECONDITION},
    {ErrorCode::kNoFittingSource, wire::NO_FITTING_SOURCE, grpc::StatusCode::FAILED_PRECONDITION},
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

void to_wire(const Metadata& from, WireMetadata* to) {
  for (const auto& [key, value] : from) (*to)[key] = value;
}

Metadata from_wire(const WireMetadata& from) { return {from.begin(), from.end()}; }

void to_wire(const Offer& from, wire::Offer* to) {
  to->set_version(from.version);
  to_wire(from.generation, to->mutable_generation());
  to->set_slot(from.slot);
  to_wire(from.metadata, to->mutable_metadata());
  if (from.revision != Digest{}) to_wire(from.revision, to->mutable_revision());
}

Offer from_wire(const wire::Offer& from) {
  return {.version = from.version(),
          .generation = from_wire(from.generation()),
          .slot = from.slot(),
          .metadata = from_wire(from.metadata()),
          .revision = from_wire(from.revision())};
}

void to_wire(const RefitSummary& from, wire::RefitSummary* to) {
  to->set_version(from.version);
  to->set_total_us(from.total_us);
  to->set_transfer_us(from.transfer_us);
  to->set_size_bytes(from.size_bytes);
  to->set_attempts(from.attempts);
}

RefitSummary from_wire(const wire::RefitSummary& from) {
  return {.version = from.version(),
          .total_us = from.total_us(),
          .transfer_us = from.transfer_us(),
          .size_bytes = from.size_bytes(),
          .attempts = from.attempts()};
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
  to->set_slot(from.slot);
  to->set_writing(from.writing);
  to->set_leases(from.leases);
  to->set_group(from.group);
  if (from.last_refit.version != 0) to_wire(from.last_refit, to->mutable_last_refit());
  to->set_kind(from.kind);
  to_wire(from.metadata, to->mutable_metadata());
  to_wire(from.version_metadata, to->mutable_version_metadata());
  if (from.revision != Digest{}) to_wire(from.revision, to->mutable_revision());
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
                    .generation = from_wire(from.generation()),
                    .slot = from.slot(),
                    .writing = from.writing(),
                    .leases = from.leases(),
                    .group = from.group(),
                    .last_refit = from_wire(from.last_refit()),
                    .kind = from.kind(),
                    .metadata = from_wire(from.metadata()),
                    .version_metadata = from_wire(from.version_metadata()),
                    .revision = from_wire(from.revision())};
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
  if (from.revision != Digest{}) to_wire(from.revision, to->mutable_revision());
  to_wire(from.metadata, to->mutable_metadata());
}

Result<VersionInfo> from_wire(const wire::Version& from) {
  VersionInfo to{.model = from.model(),
                 .version = from.version(),
                 .state = VersionState::kOpen,
                 .published = from.published(),
                 .source_count = from.source_count(),
                 .leases = from.leases(),
                 .reason = from.reason(),
                 .revision = from_wire(from.revision()),
                 .metadata = from_wire(from.metadata())};
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

void to_wire(const Demand& from, wire::Demand* to) {
  for (const std::string& kind : from.kinds) to->add_kinds(kind);
  for (const Requirement& requirement : from.require) {
    wire::Requirement* each = to->add_require();
    each->set_key(requirement.key);
    switch (requirement.kind) {
      case Requirement::Kind::kEquals:
        each->set_kind(wire::EQUALS);
        break;
      case Requirement::Kind::kAtLeast:
        each->set_kind(wire::NUMBER_AT_LEAST);
        break;
      case Requirement::Kind::kPresent:
        each->set_kind(wire::PRESENT);
        break;
    }
    each->set_value(requirement.value);
    each->set_tensors(requirement.tensors);
  }
  if (from.revision != Digest{}) to_wire(from.revision, to->mutable_revision());
}

Result<Demand> from_wire(const wire::Demand& from) {
  Demand to{.kinds = {from.kinds().begin(), from.kinds().end()},
            .revision = from_wire(from.revision())};
  for (const wire::Requirement& each : from.require()) {
    Requirement& requirement = to.require.emplace_back(
        Requirement{.key = each.key(), .value = each.value(), .tensors = each.tensors()});
    switch (each.kind()) {
      case wire::EQUALS:
        break;
      case wire::NUMBER_AT_LEAST:
        requirement.kind = Requirement::Kind::kAtLeast;
        break;
      case wire::PRESENT:
        requirement.kind = Requirement::Kind::kPresent;
        break;
      default:
        return out_of_range("kind of requirement", each.kind());
    }
  }
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
  to->set_round_ms(from.round_ms);
  if (!from.demand.empty()) to_wire(from.demand, to->mutable_demand());
}

Result<VersionRequest> from_wire(const wire::AcquireRequest& from) {
  using Kind = VersionRequest::Kind;
  TRANSFUSE_ASSIGN_OR_RETURN(Demand demand, from_wire(from.demand()));
  switch (from.want()) {
    case wire::NEWEST:
      return VersionRequest{Kind::kNewest, from.version(), from.round_ms(), std::move(demand)};
    case wire::EXACTLY:
      return VersionRequest{Kind::kExactly, from.version(), from.round_ms(), std::move(demand)};
    case wire::AT_LEAST:
      return VersionRequest{Kind::kAtLeast, from.version(), from.round_ms(), std::move(demand)};
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
  to->set_group(registration.group);
  to->set_group_size(registration.group_size);
  to->set_kind(registration.kind);
  to_wire(registration.metadata, to->mutable_metadata());
  if (!from.resume) return;
  wire::Resume* resume = to->mutable_resume();
  resume->set_id(from.resume->id);
  resume->set_last_published(from.resume->last_published);
  for (const Offer& offer : from.resume->offers) to_wire(offer, resume->add_offers());
  resume->set_writing(from.resume->writing);
  resume->set_landed(from.resume->landed);
  resume->set_voted_round(from.resume->voted_round);
  resume->set_voted_version(from.resume->voted_version);
  resume->set_told_commit(from.resume->told_commit);
  resume->set_applied(from.resume->applied);
  resume->set_last_round(from.resume->last_round);
}

void to_wire(const LeaseOutcome& from, wire::ReleaseRequest* to) {
  switch (from.end) {
    case LeaseEnd::kUnchanged:
      to->set_end(wire::UNCHANGED);
      break;
    case LeaseEnd::kLanded:
      to->set_end(wire::LANDED);
      break;
    case LeaseEnd::kLost:
      to->set_end(wire::LOST);
      break;
  }
  if (from.summary.version != 0) to_wire(from.summary, to->mutable_summary());
}

Result<LeaseOutcome> from_wire(const wire::ReleaseRequest& from) {
  LeaseOutcome to{.end = LeaseEnd::kUnchanged, .summary = from_wire(from.summary())};
  switch (from.end()) {
    case wire::UNCHANGED:
      return to;
    case wire::LANDED:
      to.end = LeaseEnd::kLanded;
      return to;
    case wire::LOST:
      to.end = LeaseEnd::kLost;
      return to;
    default:
      return out_of_range("lease end", from.end());
  }
}

void to_wire(const WriteRequest& from, wire::BeginWriteRequest* to) {
  to->set_version(from.version);
  for (const uint64_t version : from.replaces) to->add_replaces(version);
  switch (from.when_leased) {
    case WhenLeased::kRevokeAtDeadline:
      to->set_when_leased(wire::REVOKE_AT_DEADLINE);
      break;
    case WhenLeased::kWait:
      to->set_when_leased(wire::WAIT);
      break;
    case WhenLeased::kRevoke:
      to->set_when_leased(wire::REVOKE);
      break;
    case WhenLeased::kSkip:
      to->set_when_leased(wire::SKIP);
      break;
  }
}

Result<WriteRequest> from_wire(const wire::BeginWriteRequest& from) {
  WriteRequest to{.version = from.version(),
                  .replaces = {from.replaces().begin(), from.replaces().end()},
                  .when_leased = WhenLeased::kRevokeAtDeadline};
  switch (from.when_leased()) {
    case wire::REVOKE_AT_DEADLINE:
      return to;
    case wire::WAIT:
      to.when_leased = WhenLeased::kWait;
      return to;
    case wire::REVOKE:
      to.when_leased = WhenLeased::kRevoke;
      return to;
    case wire::SKIP:
      to.when_leased = WhenLeased::kSkip;
      return to;
    default:
      return out_of_range("policy of a write", from.when_leased());
  }
}

void to_wire(const GroupInfo& from, wire::Group* to) {
  to->set_model(from.model);
  to->set_name(from.name);
  to->set_size(from.size);
  switch (from.state) {
    case GroupState::kForming:
      to->set_state(wire::FORMING);
      break;
    case GroupState::kWhole:
      to->set_state(wire::WHOLE);
      break;
    case GroupState::kSwitching:
      to->set_state(wire::SWITCHING);
      break;
    case GroupState::kBroken:
      to->set_state(wire::BROKEN);
      break;
  }
  to->set_version(from.version);
  to->set_round(from.round);
  to->set_reason(from.reason);
  for (const GroupRank& rank : from.ranks) {
    wire::GroupRank* each = to->add_ranks();
    each->set_name(rank.name);
    each->set_version(rank.version);
  }
}

Result<GroupInfo> from_wire(const wire::Group& from) {
  GroupInfo to{.model = from.model(),
               .name = from.name(),
               .size = from.size(),
               .state = GroupState::kForming,
               .version = from.version(),
               .round = from.round(),
               .reason = from.reason()};
  switch (from.state()) {
    case wire::FORMING:
      break;
    case wire::WHOLE:
      to.state = GroupState::kWhole;
      break;
    case wire::SWITCHING:
      to.state = GroupState::kSwitching;
      break;
    case wire::BROKEN:
      to.state = GroupState::kBroken;
      break;
    default:
      return out_of_range("group state", from.state());
  }
  for (const wire::GroupRank& rank : from.ranks()) {
    to.ranks.push_back({.name = rank.name(), .version = rank.version()});
  }
  return to;
}

void to_wire(const VersionEvent& from, wire::VersionEvent* to) {
  to->set_at_us(from.at_us);
  to->set_who(from.who);
  to->set_what(from.what);
}

VersionEvent from_wire(const wire::VersionEvent& from) {
  return {.at_us = from.at_us(), .who = from.who(), .what = from.what()};
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
                                  .descriptor = from.description(),
                                  .group = from.group(),
                                  .group_size = from.group_size(),
                                  .kind = from.kind(),
                                  .metadata = from_wire(from.metadata())},
                 .owner = from.owner(),
                 .ttl = std::chrono::milliseconds(from.ttl_ms()),
                 .lease_ttl = std::chrono::milliseconds(from.lease_ttl_ms())};
  if (from.has_resume()) {
    to.resume = Resume{.id = from.resume().id(),
                       .last_published = from.resume().last_published(),
                       .offers = {},
                       .writing = from.resume().writing(),
                       .landed = from.resume().landed(),
                       .voted_round = from.resume().voted_round(),
                       .voted_version = from.resume().voted_version(),
                       .told_commit = from.resume().told_commit(),
                       .applied = from.resume().applied(),
                       .last_round = from.resume().last_round()};
    for (const wire::Offer& offer : from.resume().offers()) {
      to.resume->offers.push_back(from_wire(offer));
    }
  }
  return to;
}

}  // namespace transfuse

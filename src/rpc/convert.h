// Our types and error codes to the wire and back.
#pragma once

#include <grpcpp/support/status.h>

#include "control/lease_table.h"
#include "transfuse.pb.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

// An error that a coordinator answered with; without a detail of ours, gRPC itself failed.
grpc::Status to_status(const Error& error, bool caller_unknown = false);
grpc::Status to_status(const Result<void>& result);
bool from_coordinator(const grpc::Status& status);
bool caller_unknown(const grpc::Status& status);
// `call` names what was tried, for errors of gRPC itself. The status is not OK.
Error to_error(const grpc::Status& status, std::string_view call);

wire::ErrorKind to_wire(ErrorCode code);
Result<ErrorCode> from_wire(wire::ErrorKind kind);

// from_wire() fails with kCorrupt where an enum lies outside what this build knows.
void to_wire(const Digest& from, wire::Digest* to);
Digest from_wire(const wire::Digest& from);
void to_wire(const Generation& from, wire::Generation* to);
Generation from_wire(const wire::Generation& from);
void to_wire(const Offer& from, wire::Offer* to);
Offer from_wire(const wire::Offer& from);
void to_wire(const RefitSummary& from, wire::RefitSummary* to);
RefitSummary from_wire(const wire::RefitSummary& from);
void to_wire(const MemberInfo& from, wire::Member* to);
Result<MemberInfo> from_wire(const wire::Member& from);
void to_wire(const VersionInfo& from, wire::Version* to);
Result<VersionInfo> from_wire(const wire::Version& from);
void to_wire(const TableRequest& from, wire::TableRequest* to);
TableRequest from_wire(const wire::TableRequest& from);
void to_wire(const Demand& from, wire::Demand* to);
Result<Demand> from_wire(const wire::Demand& from);
using WireMetadata = google::protobuf::Map<std::string, std::string>;
void to_wire(const Metadata& from, WireMetadata* to);
Metadata from_wire(const WireMetadata& from);
void to_wire(const VersionRequest& from, wire::AcquireRequest* to);
Result<VersionRequest> from_wire(const wire::AcquireRequest& from);
void to_wire(const LeaseOutcome& from, wire::ReleaseRequest* to);
Result<LeaseOutcome> from_wire(const wire::ReleaseRequest& from);
void to_wire(const WriteRequest& from, wire::BeginWriteRequest* to);
Result<WriteRequest> from_wire(const wire::BeginWriteRequest& from);
void to_wire(const GroupInfo& from, wire::Group* to);
Result<GroupInfo> from_wire(const wire::Group& from);
void to_wire(const VersionEvent& from, wire::VersionEvent* to);
VersionEvent from_wire(const wire::VersionEvent& from);
void to_wire(const JoinRequest& from, wire::JoinRequest* to);
Result<JoinRequest> from_wire(const wire::JoinRequest& from);

}  // namespace transfuse

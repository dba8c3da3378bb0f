// Tests of what goes over the wire: every code, every field, and how little a version costs.
#include "rpc/convert.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <set>
#include <tuple>
#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

TEST(Convert, EveryErrorCodeHasOneRowWithItsOwnNameOnTheWire) {
  std::set<int> kinds;
  for (int i = 0; i < kErrorCodeCount; ++i) {
    const auto code = static_cast<ErrorCode>(i);
    const wire::ErrorKind kind = to_wire(code);
    EXPECT_TRUE(kinds.insert(kind).second);
    EXPECT_EQ(wire::ErrorKind_Name(kind), error_code_name(code));
    EXPECT_EQ(from_wire(kind).value(), code);
    const grpc::Status status = to_status(Error{code, "what was found"}, true);
    EXPECT_TRUE(from_coordinator(status));
    EXPECT_TRUE(caller_unknown(status));
    EXPECT_EQ(to_error(status, "call").code, code);
    EXPECT_EQ(to_error(status, "call").message, "what was found");
  }
  EXPECT_EQ(kinds.size() + 1, static_cast<size_t>(wire::ErrorKind_ARRAYSIZE))
      << "a kind on the wire without a code";
}

TEST(Convert, AStatusOfGrpcItselfIsNotTakenForAnAnswer) {
  const grpc::Status status(grpc::StatusCode::UNAVAILABLE, "socket closed");
  EXPECT_FALSE(from_coordinator(status));
  EXPECT_FALSE(caller_unknown(status));
  EXPECT_EQ(to_error(status, "publish").code, ErrorCode::kUnavailable);
  EXPECT_EQ(to_error(status, "publish").message, "publish: socket closed");
  const grpc::Status garbled(grpc::StatusCode::UNAVAILABLE, "x", "\xff\xff garbage");
  EXPECT_FALSE(from_coordinator(garbled));
}

TEST(Convert, AnEnumThatThisBuildDoesNotKnowIsCorrupt) {
  wire::Version version;
  version.set_state(static_cast<wire::State>(99));
  EXPECT_EQ(from_wire(version).error().code, ErrorCode::kCorrupt);
  wire::Member member;
  member.set_role(static_cast<wire::Role>(99));
  EXPECT_EQ(from_wire(member).error().code, ErrorCode::kCorrupt);
  wire::AcquireRequest request;
  request.set_want(static_cast<wire::Want>(99));
  EXPECT_EQ(from_wire(request).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(from_wire(static_cast<wire::ErrorKind>(99)).error().code, ErrorCode::kCorrupt);
}

TEST(Convert, EveryFieldOfAMemberAVersionAndAJoinComesBack) {
  const MemberInfo member{.id = 1,
                          .role = MemberRole::kTarget,
                          .model = "policy",
                          .name = "engine0",
                          .incarnation = 2,
                          .layout = {3, 4},
                          .version = 5,
                          .generation = {6, 8}};
  wire::Member wire_member;
  to_wire(member, &wire_member);
  const MemberInfo back = from_wire(wire_member).value();
  EXPECT_EQ(std::tie(back.id, back.role, back.model, back.name, back.incarnation, back.layout,
                     back.version, back.generation),
            std::tie(member.id, member.role, member.model, member.name, member.incarnation,
                     member.layout, member.version, member.generation));

  for (const auto state : {VersionState::kOpen, VersionState::kReady, VersionState::kRetired,
                           VersionState::kAborted}) {
    const VersionInfo version{.model = "policy",
                              .version = 7,
                              .state = state,
                              .published = 1,
                              .source_count = 2,
                              .leases = 3,
                              .reason = "why"};
    wire::Version wire_version;
    to_wire(version, &wire_version);
    const VersionInfo again = from_wire(wire_version).value();
    EXPECT_EQ(std::tie(again.model, again.version, again.state, again.published, again.source_count,
                       again.leases, again.reason),
              std::tie(version.model, version.version, version.state, version.published,
                       version.source_count, version.leases, version.reason));
  }

  JoinRequest join;
  join.registration = {.role = MemberRole::kSource,
                       .model = "policy",
                       .name = "trainer0",
                       .source_count = 3,
                       .incarnation = 4,
                       .layout = {5, 6},
                       .descriptor = std::string("\0\xff", 2)};
  join.owner = 7;
  join.ttl = std::chrono::milliseconds(8);
  join.lease_ttl = std::chrono::milliseconds(9);
  join.resume = Resume{
      .id = 1, .last_published = 2, .readable = 3, .generation = {4, 6}, .writing = 5, .landed = 6};
  wire::JoinRequest wire_join;
  to_wire(join, &wire_join);
  const JoinRequest joined = from_wire(wire_join).value();
  EXPECT_EQ(joined.registration.descriptor, join.registration.descriptor);
  EXPECT_EQ(joined.registration.source_count, 3u);
  EXPECT_EQ(joined.owner, 7u);
  EXPECT_EQ(joined.ttl, join.ttl);
  EXPECT_EQ(joined.lease_ttl, join.lease_ttl);
  ASSERT_TRUE(joined.resume.has_value());
  EXPECT_EQ(joined.resume->generation, (Generation{4, 6}));
  EXPECT_EQ(joined.resume->writing, 5u);
}

// T13. A member publishes, leases, releases and watches one version of 8 sources.
TEST(Convert, AVersionCostsAMemberLessThanOneKibibyteOnTheWire) {
  wire::BeginWriteRequest begin;
  begin.set_source(~0ull);
  begin.set_version(1 << 30);
  begin.set_timeout_us(30'000'000);
  wire::PublishRequest publish;
  publish.set_source(~0ull);
  publish.set_version(1 << 30);
  to_wire(Generation{~0ull, 1 << 30}, publish.mutable_generation());
  wire::AcquireRequest acquire;
  acquire.set_target(~0ull);
  to_wire(VersionRequest{VersionRequest::Kind::kAtLeast, 1 << 30}, &acquire);
  acquire.set_timeout_us(30'000'000);
  acquire.set_roster(1 << 20);
  wire::AcquireReply lease;
  lease.set_lease(~0ull);
  lease.set_version(1 << 30);
  lease.set_ttl_ms(60000);
  lease.set_roster(1 << 20);
  for (int i = 0; i < 8; ++i) {
    wire::LeaseSource* source = lease.add_sources();
    source->set_member(~0ull);
    to_wire(Generation{~0ull, 1 << 30}, source->mutable_generation());
  }
  wire::ReleaseRequest release;
  release.set_target(~0ull);
  release.set_lease(~0ull);
  release.set_version(1 << 30);
  release.set_end(wire::LANDED);
  wire::Version change;
  to_wire(VersionInfo{.model = "policy",
                      .version = 1 << 30,
                      .state = VersionState::kRetired,
                      .published = 8,
                      .source_count = 8,
                      .leases = 0,
                      .reason = "source trainer0 writes version 1073741825"},
          &change);
  const size_t bytes = begin.ByteSizeLong() + publish.ByteSizeLong() + acquire.ByteSizeLong() +
                       lease.ByteSizeLong() + release.ByteSizeLong() + 3 * change.ByteSizeLong();
  EXPECT_LT(bytes, 1024u);
}

}  // namespace
}  // namespace transfuse

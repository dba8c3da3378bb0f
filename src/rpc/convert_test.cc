// Tests of what goes over the wire: every code, every field, and how little a version costs.
#include "rpc/convert.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <tuple>
#include "control/lease_table.h"
#include "rpc/lease_reply.h"
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
  wire::BeginWriteRequest write;
  write.set_when_leased(static_cast<wire::WhenLeased>(99));
  EXPECT_EQ(from_wire(write).error().code, ErrorCode::kCorrupt);
  wire::ReleaseRequest release;
  release.set_end(static_cast<wire::LeaseEnd>(99));
  EXPECT_EQ(from_wire(release).error().code, ErrorCode::kCorrupt);
  wire::Group group;
  group.set_state(static_cast<wire::GroupState>(99));
  EXPECT_EQ(from_wire(group).error().code, ErrorCode::kCorrupt);
}

TEST(Convert, EveryFieldOfAMemberAVersionAndAJoinComesBack) {
  const MemberInfo member{.id = 1,
                          .role = MemberRole::kTarget,
                          .model = "policy",
                          .name = "engine0",
                          .incarnation = 2,
                          .layout = {3, 4},
                          .version = 5,
                          .generation = {6, 8},
                          .slot = 9,
                          .writing = 10,
                          .leases = 11,
                          .group = "engine",
                          .last_refit = {.version = 12,
                                         .total_us = 13,
                                         .transfer_us = 14,
                                         .size_bytes = 15,
                                         .attempts = 16},
                          .kind = "hf_raw",
                          .metadata = {{"run", "x"}},
                          .version_metadata = {{"step", "17"}, {"empty", ""}},
                          .revision = {18, 19}};
  wire::Member wire_member;
  to_wire(member, &wire_member);
  const MemberInfo back = from_wire(wire_member).value();
  EXPECT_EQ(
      std::tie(back.id, back.role, back.model, back.name, back.incarnation, back.layout,
               back.version, back.generation, back.slot, back.writing, back.leases, back.group,
               back.last_refit, back.kind, back.metadata, back.version_metadata, back.revision),
      std::tie(member.id, member.role, member.model, member.name, member.incarnation, member.layout,
               member.version, member.generation, member.slot, member.writing, member.leases,
               member.group, member.last_refit, member.kind, member.metadata,
               member.version_metadata, member.revision));

  for (const auto state : {VersionState::kOpen, VersionState::kReady, VersionState::kRetired,
                           VersionState::kAborted}) {
    const VersionInfo version{.model = "policy",
                              .version = 7,
                              .state = state,
                              .published = 1,
                              .source_count = 2,
                              .leases = 3,
                              .reason = "why",
                              .revision = {4, 5},
                              .metadata = {{"step", "6"}}};
    wire::Version wire_version;
    to_wire(version, &wire_version);
    const VersionInfo again = from_wire(wire_version).value();
    EXPECT_EQ(std::tie(again.model, again.version, again.state, again.published, again.source_count,
                       again.leases, again.reason, again.revision, again.metadata),
              std::tie(version.model, version.version, version.state, version.published,
                       version.source_count, version.leases, version.reason, version.revision,
                       version.metadata));
  }

  JoinRequest join;
  join.registration = {.role = MemberRole::kTarget,
                       .model = "policy",
                       .name = "engine0",
                       .source_count = 3,
                       .incarnation = 4,
                       .layout = {5, 6},
                       .descriptor = std::string("\0\xff", 2),
                       .group = "engine",
                       .group_size = 2,
                       .kind = "hf_raw",
                       .metadata = {{"run", "x"}}};
  join.owner = 7;
  join.ttl = std::chrono::milliseconds(8);
  join.lease_ttl = std::chrono::milliseconds(9);
  join.resume = Resume{.id = 1,
                       .last_published = 2,
                       .offers = {{.version = 2, .generation = {4, 6}, .slot = 1},
                                  {.version = 3,
                                   .generation = {4, 8},
                                   .slot = 2,
                                   .metadata = {{"step", "30"}},
                                   .revision = {7, 8}}},
                       .writing = 5,
                       .landed = 6,
                       .voted_round = 7,
                       .voted_version = 8,
                       .told_commit = true,
                       .applied = true,
                       .last_round = 9};
  wire::JoinRequest wire_join;
  to_wire(join, &wire_join);
  const JoinRequest joined = from_wire(wire_join).value();
  EXPECT_EQ(joined.registration.descriptor, join.registration.descriptor);
  EXPECT_EQ(joined.registration.source_count, 3u);
  EXPECT_EQ(joined.owner, 7u);
  EXPECT_EQ(joined.ttl, join.ttl);
  EXPECT_EQ(joined.lease_ttl, join.lease_ttl);
  ASSERT_TRUE(joined.resume.has_value());
  EXPECT_EQ(joined.registration.group, "engine");
  EXPECT_EQ(joined.registration.group_size, 2u);
  ASSERT_EQ(joined.resume->offers.size(), 2u);
  EXPECT_EQ(joined.resume->offers[1].version, 3u);
  EXPECT_EQ(joined.resume->offers[1].generation, (Generation{4, 8}));
  EXPECT_EQ(joined.resume->offers[1].slot, 2u);
  EXPECT_EQ(joined.resume->offers[1].metadata, (Metadata{{"step", "30"}}));
  EXPECT_EQ(joined.resume->offers[1].revision, (Digest{7, 8}));
  EXPECT_EQ(joined.resume->offers[0].revision, Digest{});
  EXPECT_EQ(joined.registration.kind, "hf_raw");
  EXPECT_EQ(joined.registration.metadata, join.registration.metadata);
  EXPECT_EQ(joined.resume->writing, 5u);
  EXPECT_EQ(joined.resume->voted_round, 7u);
  EXPECT_EQ(joined.resume->voted_version, 8u);
  EXPECT_TRUE(joined.resume->told_commit);
  EXPECT_TRUE(joined.resume->applied);
  EXPECT_EQ(joined.resume->last_round, 9u);
}

TEST(Convert, EveryFieldOfADemandComesBack) {
  using Kind = Requirement::Kind;
  const Demand demand{.kinds = {"hf_raw", "of_ours"},
                      .require = {{.key = "step", .kind = Kind::kAtLeast, .value = "7"},
                                  {.key = "run", .kind = Kind::kPresent},
                                  {.key = "scales", .value = "ue8m0", .tensors = "*.experts.*"}},
                      .revision = {1, 2}};
  wire::AcquireRequest request;
  to_wire(VersionRequest{VersionRequest::Kind::kAtLeast, 3, 4, demand}, &request);
  EXPECT_EQ(from_wire(request)->demand, demand);
  EXPECT_EQ(from_wire(request)->round_ms, 4);
  request.mutable_demand()->mutable_require(0)->set_kind(static_cast<wire::RequirementKind>(99));
  EXPECT_EQ(from_wire(request).error().code, ErrorCode::kCorrupt);
  wire::AcquireRequest nothing;
  to_wire(VersionRequest{}, &nothing);
  EXPECT_FALSE(nothing.has_demand());
}

TEST(Convert, ALeaseThatNamesOrRefusesASourceThatIsNotDescribedIsCorrupt) {
  std::map<uint64_t, MemberInfo> sources;
  sources[7].name = "a";
  sources[7].layout = {1, 2};
  wire::AcquireReply reply;
  reply.add_sources()->set_member(7);
  reply.add_refused()->set_member(7);
  reply.mutable_refused(0)->set_reason("why");
  const Lease lease = lease_from_wire(reply, sources, "policy").value();
  EXPECT_EQ(lease.refused.at(0).source, "a");
  EXPECT_EQ(lease.refused.at(0).layout, (Digest{1, 2}));
  EXPECT_EQ(lease.refused.at(0).reason, "why");
  reply.mutable_refused(0)->set_member(8);
  EXPECT_EQ(lease_from_wire(reply, sources, "policy").error().code, ErrorCode::kCorrupt);
  reply.clear_refused();
  reply.mutable_sources(0)->set_member(8);
  EXPECT_EQ(lease_from_wire(reply, sources, "policy").error().code, ErrorCode::kCorrupt);
}

TEST(Convert, EveryFieldOfAWriteAnOutcomeAndAGroupComesBack) {
  for (const auto policy :
       {WhenLeased::kRevokeAtDeadline, WhenLeased::kWait, WhenLeased::kRevoke, WhenLeased::kSkip}) {
    wire::BeginWriteRequest request;
    to_wire(WriteRequest{.version = 4, .replaces = {1, 3}, .when_leased = policy}, &request);
    const WriteRequest back = from_wire(request).value();
    EXPECT_EQ(back.version, 4u);
    EXPECT_EQ(back.replaces, (std::vector<uint64_t>{1, 3}));
    EXPECT_EQ(back.when_leased, policy);
  }
  for (const auto end : {LeaseEnd::kUnchanged, LeaseEnd::kLanded, LeaseEnd::kLost}) {
    const LeaseOutcome outcome{
        .end = end,
        .summary = {.version = 1, .total_us = 2, .transfer_us = 3, .size_bytes = 4, .attempts = 5}};
    wire::ReleaseRequest request;
    to_wire(outcome, &request);
    const LeaseOutcome back = from_wire(request).value();
    EXPECT_EQ(back.end, end);
    EXPECT_EQ(back.summary, outcome.summary);
  }
  for (const auto state :
       {GroupState::kForming, GroupState::kWhole, GroupState::kSwitching, GroupState::kBroken}) {
    wire::Group group;
    to_wire(GroupInfo{.model = "policy",
                      .name = "engine",
                      .size = 2,
                      .state = state,
                      .version = 3,
                      .round = 4,
                      .reason = "why",
                      .ranks = {{.name = "rank0", .version = 3}, {.name = "rank1", .version = 2}}},
            &group);
    const GroupInfo back = from_wire(group).value();
    EXPECT_EQ(std::tie(back.model, back.name, back.size, back.state, back.version, back.round),
              std::make_tuple("policy", "engine", 2u, state, 3u, 4u));
    EXPECT_EQ(back.reason, "why");
    ASSERT_EQ(back.ranks.size(), 2u);
    EXPECT_EQ(back.ranks[1].name, "rank1");
    EXPECT_EQ(back.ranks[1].version, 2u);
  }
  wire::VersionEvent event;
  to_wire(VersionEvent{.at_us = 1, .who = "trainer0", .what = "published"}, &event);
  EXPECT_EQ(from_wire(event).at_us, 1);
  EXPECT_EQ(from_wire(event).who, "trainer0");
  EXPECT_EQ(from_wire(event).what, "published");
}

// T13. A member publishes, leases, releases and watches one version of 8 sources.
TEST(Convert, AVersionCostsAMemberLessThanOneKibibyteOnTheWire) {
  wire::BeginWriteRequest begin;
  begin.set_source(~0ull);
  begin.set_version(1 << 30);
  begin.set_timeout_us(30'000'000);
  for (int i = 0; i < 3; ++i) begin.add_replaces(1 << 30);
  wire::PublishRequest publish;
  publish.set_source(~0ull);
  to_wire(Offer{.version = 1 << 30, .generation = {~0ull, 1 << 30}, .slot = 2},
          publish.mutable_offer());
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
    source->set_slot(2);
    to_wire(Generation{~0ull, 1 << 30}, source->mutable_generation());
  }
  wire::ReleaseRequest release;
  release.set_target(~0ull);
  release.set_lease(~0ull);
  release.set_version(1 << 30);
  to_wire(LeaseOutcome{.end = LeaseEnd::kLanded,
                       .summary = {.version = 1 << 30,
                                   .total_us = 1 << 30,
                                   .transfer_us = 1 << 30,
                                   .size_bytes = ~0ull,
                                   .attempts = 2}},
          &release);
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

// Who may be leased to a target that demands something, and what it is told of the others.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "control/lease_table.h"
#include "control/table_fixture.h"
#include "transfuse/digest.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

constexpr Digest kRevision{.high = 5, .low = 6};

class Demands : public Table {
 protected:
  uint64_t source_of(const std::string& name, const std::string& kind, uint32_t count = 2,
                     Metadata metadata = {}) {
    return try_join(registration(name, kind, count, std::move(metadata))).value();
  }
  static Registration registration(const std::string& name, const std::string& kind, uint32_t count,
                                   Metadata metadata) {
    Registration registration;
    registration.role = MemberRole::kSource;
    registration.name = name;
    registration.source_count = count;
    registration.incarnation = 7;
    registration.kind = kind;
    registration.metadata = std::move(metadata);
    return registration;
  }
  Result<void> try_write(uint64_t member, uint64_t version, Metadata metadata,
                         const Digest& revision = {}) {
    EXPECT_TRUE(drained(begin(member, version)));
    Offer offer = offer_of(version);
    offer.metadata = std::move(metadata);
    offer.revision = revision;
    return table().publish(member, offer, now_);
  }
  void write_with(uint64_t member, uint64_t version, Metadata metadata,
                  const Digest& revision = {}) {
    EXPECT_TRUE(try_write(member, version, std::move(metadata), revision));
  }
  static VersionRequest accepting(const std::string& kind) { return {.demand = {.kinds = {kind}}}; }
  static VersionRequest at_least(uint64_t step) {
    return {.demand = {.require = {{.key = "step",
                                    .kind = Requirement::Kind::kAtLeast,
                                    .value = std::to_string(step)}}}};
  }
  Error refused(WaiterId waiter) {
    const auto* told = reply<LeaseReply>(waiter);
    EXPECT_NE(told, nullptr);
    return told == nullptr || told->result ? Error{} : told->result.error();
  }
};

TEST_F(Demands, ALeaseNamesTheReplicaThatFitsAndSaysWhyTheOtherDoesNot) {
  const uint64_t raw = source_of("raw", "hf_raw");
  const uint64_t packed = source_of("packed", "cutlass_fp8");
  write(raw, 1);
  write(packed, 1);
  const Lease lease = this->lease(target("engine"), accepting("hf_raw"));
  ASSERT_EQ(lease.sources.size(), 1U);
  EXPECT_EQ(lease.sources[0].name, "raw");
  EXPECT_EQ(lease.sources[0].kind, "hf_raw");
  ASSERT_EQ(lease.refused.size(), 1U);
  EXPECT_EQ(lease.refused[0].source, "packed");
  EXPECT_EQ(lease.refused[0].layout, kLayout);
  EXPECT_EQ(lease.refused[0].reason, "its kind is 'cutlass_fp8', accepted: hf_raw");
  EXPECT_EQ(this->lease(target("other")).sources.size(), 2U);
  std::string story;
  for (const VersionEvent& event : table().history("policy", 1).value()) story += event.what + "\n";
  EXPECT_THAT(story, HasSubstr("not from packed: its kind is 'cutlass_fp8'"));
}

TEST_F(Demands, WhatASourceSaysOfAVersionGoesBeforeWhatItSaysOfItself) {
  const uint64_t source = source_of("a", "", 1, {{"step", "1"}, {"run", "x"}});
  write_with(source, 1, {{"step", "40"}}, kRevision);
  const Lease lease = this->lease(target("engine"), at_least(40));
  EXPECT_EQ(lease.sources[0].metadata, (Metadata{{"step", "1"}, {"run", "x"}}));
  EXPECT_EQ(lease.sources[0].version_metadata, (Metadata{{"step", "40"}}));
  EXPECT_EQ(lease.sources[0].revision, kRevision);
}

TEST_F(Demands, AWaitGoesOnUntilAVersionFits) {
  const uint64_t source = source_of("a", "", 1);
  write_with(source, 1, {{"step", "40"}});
  const uint64_t engine = target("engine");
  const WaiterId waiter = ask(engine, at_least(41));
  EXPECT_EQ(reply<LeaseReply>(waiter), nullptr);
  write_with(source, 2, {{"step", "41"}});
  ASSERT_NE(reply<LeaseReply>(waiter), nullptr);
  EXPECT_EQ(reply<LeaseReply>(waiter)->result.value().version, 2U);
}

TEST_F(Demands, AWaitInVainIsToldWhichSourceDoesNotFitAndWhy) {
  const uint64_t a = source_of("a", "hf_raw");
  const uint64_t b = source_of("b", "");
  write(a, 1);
  write(b, 1);
  const WaiterId waiter = ask(target("engine"), accepting("trtllm"));
  EXPECT_EQ(reply<LeaseReply>(waiter), nullptr);
  wait_ms(1000);
  const Error error = refused(waiter);
  EXPECT_EQ(error.code, ErrorCode::kNoFittingSource);
  EXPECT_THAT(error.message, HasSubstr("source 'a': its kind is 'hf_raw', accepted: trtllm"));
  EXPECT_THAT(error.message, HasSubstr("source 'b': it states no kind"));
}

TEST_F(Demands, AWaitForAVersionThatNobodyHasPublishedIsTheOldKindOfWait) {
  source_of("a", "hf_raw", 1);
  const WaiterId waiter = ask(target("engine"), accepting("trtllm"));
  wait_ms(1000);
  EXPECT_EQ(refused(waiter).code, ErrorCode::kDeadlineExceeded);
}

TEST_F(Demands, ExactlyAVersionThatDoesNotFitIsToldAtOnce) {
  const uint64_t source = source_of("a", "", 1);
  write_with(source, 3, {{"step", "40"}});
  VersionRequest request = at_least(41);
  request.kind = VersionRequest::Kind::kExactly;
  request.version = 3;
  const Error error = refused(ask(target("engine"), request));
  EXPECT_EQ(error.code, ErrorCode::kNoFittingSource);
  EXPECT_THAT(error.message, HasSubstr("'step' is '40', at least 41 is demanded"));
}

TEST_F(Demands, OfSeveralSnapshotsTheNewestThatFitsIsLeased) {
  const uint64_t source = source_of("a", "", 1);
  for (const uint64_t version : {1U, 2U, 3U}) {
    EXPECT_TRUE(drained(begin(source, replacing(version, {}))));
    Offer offer = offer_of(version, static_cast<uint32_t>(version));
    offer.metadata = {{"evaluated", version == 3 ? "no" : "yes"}};
    ASSERT_TRUE(table().publish(source, offer, now_));
  }
  const VersionRequest evaluated{.demand = {.require = {{.key = "evaluated", .value = "yes"}}}};
  EXPECT_EQ(lease(target("engine"), evaluated).version, 2U);
  EXPECT_EQ(lease(target("other")).version, 3U);
}

TEST_F(Demands, ARevisionChoosesAmongSourcesThatDisagree) {
  const uint64_t a = source_of("a", "");
  const uint64_t b = source_of("b", "");
  write_with(a, 1, {}, kRevision);
  write_with(b, 1, {}, {.high = 5, .low = 7});
  const Lease lease = this->lease(target("engine"), {.demand = {.revision = kRevision}});
  ASSERT_EQ(lease.sources.size(), 1U);
  EXPECT_EQ(lease.sources[0].name, "a");
  EXPECT_THAT(lease.refused[0].reason, HasSubstr("revision"));
}

TEST_F(Demands, AVersionShowsWhatAllOfItsSourcesSayAlike) {
  const uint64_t a = source_of("a", "");
  const uint64_t b = source_of("b", "");
  write_with(a, 1, {{"step", "9"}, {"rank", "0"}}, kRevision);
  EXPECT_EQ(version(1).metadata, (Metadata{{"step", "9"}, {"rank", "0"}}));
  write_with(b, 1, {{"step", "9"}, {"rank", "1"}}, kRevision);
  EXPECT_EQ(version(1).metadata, (Metadata{{"step", "9"}}));
  EXPECT_EQ(version(1).revision, kRevision);
  // Also when it has ended, and others after it.
  write_with(a, 2, {}, kRevision);
  write_with(b, 2, {}, {.high = 5, .low = 7});
  EXPECT_EQ(version(2).revision, Digest{});
  write(a, 3);
  write(b, 3);
  EXPECT_EQ(version(1).state, VersionState::kRetired);
  EXPECT_EQ(version(1).metadata, (Metadata{{"step", "9"}}));
  EXPECT_EQ(version(1).revision, kRevision);
}

TEST_F(Demands, ARankWhoseDemandTheVersionOfTheRoundDoesNotMeetIsTold) {
  const uint64_t source = source_of("a", "hf_raw", 1);
  write(source, 1);
  const uint64_t first = rank("rank0");
  const uint64_t second = rank("rank1");
  EXPECT_EQ(lease(first, accepting("hf_raw")).version, 1U);
  EXPECT_EQ(refused(ask(second, accepting("trtllm"))).code, ErrorCode::kNoFittingSource);
  EXPECT_EQ(lease(second, accepting("hf_raw")).version, 1U);
}

TEST_F(Demands, AfterARestartOfTheCoordinatorTheSameFits) {
  Offer offer = offer_of(4);
  offer.metadata = {{"step", "40"}};
  offer.revision = kRevision;
  const Registration again = registration("a", "hf_raw", 1, {{"run", "x"}});
  restart();
  ASSERT_TRUE(try_join(again, Resume{.last_published = 4, .offers = {offer}}));
  const Lease lease = this->lease(target("engine"), at_least(40));
  EXPECT_EQ(lease.sources[0].kind, "hf_raw");
  EXPECT_EQ(lease.sources[0].revision, kRevision);
}

TEST_F(Demands, I13_WhatMembersSayIsBounded) {
  const Metadata large{{"k", std::string(kMaxMetadataValueBytes + 1, 'v')}};
  EXPECT_EQ(try_join(registration("a", "", 1, large)).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(try_join(registration("a", "two words", 1, {})).error().code,
            ErrorCode::kInvalidArgument);
  const uint64_t source = source_of("a", "", 1);
  EXPECT_EQ(try_write(source, 1, large).error().code, ErrorCode::kInvalidArgument);
  ASSERT_TRUE(publish(source, 1));  // the version is still open
  EXPECT_EQ(refused(ask(target("engine"), accepting("two words"))).code,
            ErrorCode::kInvalidArgument);
  // Told by a member to a coordinator that has restarted: the offer is as good as none.
  Offer offer = offer_of(4);
  offer.metadata = large;
  restart();
  ASSERT_TRUE(
      try_join(registration("a", "", 1, {}), Resume{.last_published = 4, .offers = {offer}}));
  EXPECT_EQ(version(4).version, 0U);
}

TEST_F(Demands, ReasonsOfManySourcesDoNotMakeALongMessage) {
  for (int i = 0; i < 300; ++i) {
    const uint64_t source = source_of("source" + std::to_string(i), std::string(60, 'x'), 300);
    write(source, 1);
  }
  VersionRequest request = accepting("hf_raw");
  request.kind = VersionRequest::Kind::kExactly;
  request.version = 1;
  const Error error = refused(ask(target("engine"), request));
  EXPECT_EQ(error.code, ErrorCode::kNoFittingSource);
  EXPECT_LT(error.message.size(), 3000U);
  EXPECT_THAT(error.message, HasSubstr("more"));
}

}  // namespace
}  // namespace transfuse

// Tests of sources that offer several versions at once, and of what makes room for the next.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "control/lease_table.h"
#include "control/table_fixture.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using enum VersionRequest::Kind;
using enum WhenLeased;

// A source with a ring of two slots, both in use, and two engines.
class Ring : public Table {
 protected:
  void SetUp() override {
    write_slot(a_, replacing(1, {}), 1);
    write_slot(a_, replacing(2, {}), 2);
  }
  Lease lease_of(uint64_t member, uint64_t version) { return lease(member, {kExactly, version}); }

  uint64_t a_ = source("a");
  uint64_t t_ = target("t");
  uint64_t u_ = target("u");
};

TEST_F(Ring, EveryOfferIsReadyAndALeaseNamesGenerationAndSlotOfItsVersion) {
  EXPECT_EQ(version(1).state, VersionState::kReady);
  EXPECT_EQ(version(2).state, VersionState::kReady);
  for (const uint64_t number : {1u, 2u}) {
    const Lease held = lease_of(t_, number);
    ASSERT_EQ(held.sources.size(), 1u);
    EXPECT_EQ(held.sources[0].version, number);
    EXPECT_EQ(held.sources[0].generation, generation_of(number));
    EXPECT_EQ(held.sources[0].slot, number);
  }
  EXPECT_EQ(lease(t_).version, 2u) << "the newest";
}

TEST_F(Ring, WhatNobodyReadsMakesRoomThoughItIsNotTheOldest) {
  const Lease held = lease_of(t_, 1);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}));
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  EXPECT_EQ(drained(writing)->replaced, 2u);
  EXPECT_EQ(version(1).state, VersionState::kReady);
  EXPECT_EQ(version(2).state, VersionState::kRetired);
  EXPECT_TRUE(release(t_, held, LeaseEnd::kLanded)) << "its lease is untouched";
}

TEST_F(Ring, TheOldestOfSeveralThatNobodyReadsMakesRoom) {
  EXPECT_EQ(drained(begin(a_, replacing(3, {2, 1})))->replaced, 1u);
}

TEST_F(Ring, AnOfferThatHasEndedAlreadyMakesRoomFirst) {
  write_slot(a_, replacing(3, {1}), 1);
  EXPECT_EQ(drained(begin(a_, replacing(4, {2, 1})))->replaced, 1u);
  EXPECT_EQ(version(2).state, VersionState::kReady);
}

TEST_F(Ring, AVersionThatReplacesNothingLeavesAllAsItIs) {
  const WaiterId writing = begin(a_, replacing(3, {}));
  EXPECT_EQ(drained(writing)->replaced, 0u);
  ASSERT_TRUE(publish(a_, 3, 3));
  for (const uint64_t number : {1u, 2u, 3u}) EXPECT_EQ(version(number).state, VersionState::kReady);
}

TEST_F(Ring, ToWaitIsToLeaveAllAsItWasAtTheDeadline) {
  const Lease one = lease_of(t_, 1), two = lease_of(t_, 2);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}, kWait), 100);
  const WaiterId meanwhile = ask(u_, {kExactly, 1});
  EXPECT_EQ(reply<LeaseReply>(meanwhile), nullptr) << "no new lease on what is drained";
  EXPECT_EQ(lease(u_).version, 2u) << "only the oldest is drained";
  wait_ms(100);
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  EXPECT_EQ(drained(writing).error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(drained(writing).error().message, HasSubstr("the oldest is 1"));
  EXPECT_EQ(reply<LeaseReply>(meanwhile)->result->version, 1u);
  EXPECT_TRUE(release(t_, one, LeaseEnd::kLanded));
  EXPECT_TRUE(release(t_, two, LeaseEnd::kLanded));
  EXPECT_EQ(version(3).version, 0u) << "it was never opened";
  ASSERT_TRUE(release(u_, *reply<LeaseReply>(meanwhile)->result, LeaseEnd::kLanded));
  write_slot(a_, replacing(3, {1, 2}, kWait), 1);
}

TEST_F(Ring, ToWaitIsToGoOnAsSoonAsTheReadersOfTheOldestAreDone) {
  const Lease one = lease_of(t_, 1), two = lease_of(u_, 2);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}, kWait), 1000);
  wait_ms(40);
  ASSERT_TRUE(release(t_, one, LeaseEnd::kLanded));
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  EXPECT_EQ(drained(writing)->replaced, 1u);
  EXPECT_EQ(drained(writing)->waited_us, 40000);
  EXPECT_EQ(drained(writing)->revoked, 0u);
  EXPECT_TRUE(release(u_, two, LeaseEnd::kLanded));
}

TEST_F(Ring, AtTheDeadlineOnlyTheReadersOfTheOldestAreRevoked) {
  const Lease one = lease_of(t_, 1), two = lease_of(u_, 2);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}, kRevokeAtDeadline), 100);
  wait_ms(99);
  EXPECT_EQ(reply<DrainReply>(writing), nullptr);
  wait_ms(1);
  EXPECT_EQ(drained(writing)->replaced, 1u);
  EXPECT_EQ(drained(writing)->revoked, 1u);
  EXPECT_THAT(events_of(t_), ElementsAre(MemberEvent::Kind::kRevoked));
  EXPECT_FALSE(release(t_, one, LeaseEnd::kUnchanged));
  EXPECT_TRUE(release(u_, two, LeaseEnd::kLanded));
}

TEST_F(Ring, ToRevokeIsToRevokeTheOldestAtOnce) {
  (void)lease_of(t_, 1);
  (void)lease_of(u_, 2);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}, kRevoke), 60000);
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  EXPECT_EQ(drained(writing)->replaced, 1u);
  EXPECT_EQ(drained(writing)->revoked, 1u);
  EXPECT_EQ(drained(writing)->waited_us, 0);
  EXPECT_THAT(events_of(t_), ElementsAre(MemberEvent::Kind::kRevoked));
  EXPECT_TRUE(events_of(u_).empty());
}

TEST_F(Ring, ToSkipIsToEndTheVersionAndTouchNoReader) {
  const Lease one = lease_of(t_, 1), two = lease_of(u_, 2);
  const WaiterId writing = begin(a_, replacing(3, {1, 2}, kSkip));
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  EXPECT_EQ(drained(writing).error().code, ErrorCode::kVersionGone);
  EXPECT_EQ(version(3).state, VersionState::kAborted);
  EXPECT_THAT(version(3).reason, HasSubstr("skipped: source a"));
  EXPECT_THAT(changes(), Contains("3 ABORTED"));
  EXPECT_EQ(table().stats().waiters, 0u);
  EXPECT_TRUE(release(t_, one, LeaseEnd::kLanded));
  EXPECT_TRUE(release(u_, two, LeaseEnd::kLanded));
  EXPECT_EQ(publish(a_, 3).error().code, ErrorCode::kInvalidArgument) << "it was not begun";
  EXPECT_EQ(reply<LeaseReply>(ask(t_, {kExactly, 3}))->result.error().code,
            ErrorCode::kVersionGone);
  write_slot(a_, replacing(4, {1, 2}, kSkip), 1);
  EXPECT_EQ(version(4).state, VersionState::kReady);
}

TEST_F(Ring, ToSkipWithRoomIsToGoOn) {
  (void)lease_of(t_, 1);
  EXPECT_EQ(drained(begin(a_, replacing(3, {1, 2}, kSkip)))->replaced, 2u);
}

// Two sources that publish the same versions, each with one slot.
class TwoSources : public Table {
 protected:
  void SetUp() override {
    write(a_, 1);
    write(b_, 1);
    held_ = lease(t_);
  }
  uint64_t a_ = source("a", 2);
  uint64_t b_ = source("b", 2);
  uint64_t t_ = target("t");
  Lease held_;
};

TEST_F(TwoSources, AVersionThatOneSourceSkipsIsGoneForThoseThatComeLater) {
  const WaiterId first = begin(a_, replacing(2, {1}, kSkip));
  EXPECT_EQ(drained(first).error().code, ErrorCode::kVersionGone);
  const WaiterId second = begin(b_, replacing(2, {}));
  ASSERT_NE(reply<DrainReply>(second), nullptr);
  EXPECT_EQ(drained(second).error().code, ErrorCode::kVersionGone);
  EXPECT_THAT(drained(second).error().message, HasSubstr("skipped: source a"));
  EXPECT_EQ(version(1).state, VersionState::kReady) << "a skip touches no offer";
  ASSERT_TRUE(release(t_, held_, LeaseEnd::kLanded));
  write(a_, 3);
  write(b_, 3);
  EXPECT_EQ(version(3).state, VersionState::kReady);
}

TEST_F(TwoSources, AVersionThatOneSourceSkipsIsGoneForThoseThatHaveBegunOrPublished) {
  ASSERT_TRUE(drained(begin(b_, replacing(2, {}))));
  (void)begin(a_, replacing(2, {1}, kSkip));
  EXPECT_EQ(publish(b_, 2, 1).error().code, ErrorCode::kVersionGone);
  EXPECT_THAT(publish(b_, 2, 1).error().message, HasSubstr("skipped: source a"));

  ASSERT_TRUE(drained(begin(b_, replacing(3, {}))));
  ASSERT_TRUE(publish(b_, 3, 1));
  (void)begin(a_, replacing(3, {1}, kSkip));
  EXPECT_EQ(version(3).state, VersionState::kAborted);
  EXPECT_EQ(drained(begin(b_, replacing(4, {1, 3})))->replaced, 3u) << "it ended already";
}

TEST_F(TwoSources, ASourceThatWaitsForRoomWhileAnotherSkipsIsToldAtOnceAndRevokesNobody) {
  const WaiterId waits = begin(b_, replacing(2, {1}, kRevokeAtDeadline), 50);
  EXPECT_EQ(reply<DrainReply>(waits), nullptr);
  (void)begin(a_, replacing(2, {1}, kSkip));
  ASSERT_NE(reply<DrainReply>(waits), nullptr);
  EXPECT_EQ(drained(waits).error().code, ErrorCode::kVersionGone);
  EXPECT_THAT(drained(waits).error().message, HasSubstr("skipped: source a"));
  EXPECT_EQ(lease(target("u")).version, 1u) << "open to readers again";
  wait_ms(50);
  EXPECT_TRUE(release(t_, held_, LeaseEnd::kLanded));
}

TEST_F(TwoSources, OneThatWaitsInVainDoesNotOpenWhatAnotherStillDrains) {
  const WaiterId patient = begin(a_, replacing(2, {1}, kWait), 50);
  const WaiterId stern = begin(b_, replacing(2, {1}, kRevokeAtDeadline), 100);
  wait_ms(50);
  EXPECT_EQ(drained(patient).error().code, ErrorCode::kDeadlineExceeded);
  const uint64_t u = target("u");
  const WaiterId late = ask(u, {kExactly, 1});
  EXPECT_EQ(reply<LeaseReply>(late), nullptr);
  wait_ms(50);
  EXPECT_EQ(drained(stern)->revoked, 1u);
  EXPECT_EQ(reply<LeaseReply>(late)->result.error().code, ErrorCode::kVersionGone);
}

// The answer to its publish() was lost: it comes back as one that is still writing.
TEST_F(TwoSources, AReadyVersionEndsWithTheLastThatOffersItThoughAnotherWouldPublishItAgain) {
  table().lose(a_, "silent", now_);
  a_ = try_join(MemberRole::kSource, "a", 7, 2, Resume{.writing = 1}).value();
  EXPECT_EQ(version(1).state, VersionState::kReady);
  table().lose(b_, "killed", now_);
  EXPECT_EQ(version(1).state, VersionState::kRetired);
  EXPECT_EQ(publish(a_, 1).error().code, ErrorCode::kVersionGone);
}

// A source dies before it has published what the other has, and comes back.
class Revived : public Table {
 protected:
  void SetUp() override {
    for (const uint64_t number : {1u, 2u}) {
      write_slot(a_, replacing(number, {}), static_cast<uint32_t>(number));
      ASSERT_TRUE(drained(begin(b_, replacing(number, {}))));
      if (number == 1) {
        ASSERT_TRUE(publish(b_, number, 1));
      }
    }
    table().lose(b_, "silent", now_);
  }
  void come_back() {
    b_ = try_join(MemberRole::kSource, "b", 7, 2,
                  Resume{.last_published = 1, .offers = {offer_of(1, 1)}, .writing = 2})
             .value();
  }
  uint64_t a_ = source("a", 2);
  uint64_t b_ = source("b", 2);
};

TEST_F(Revived, WhatTheOthersStillOfferIsOpenAgain) {
  EXPECT_EQ(version(2).state, VersionState::kAborted);
  come_back();
  EXPECT_EQ(version(2).state, VersionState::kOpen);
  ASSERT_TRUE(publish(b_, 2, 2));
  EXPECT_EQ(version(2).state, VersionState::kReady);
  const Lease held = lease(target("t"));
  EXPECT_EQ(held.sources.size(), 2u);
  EXPECT_EQ(drained(begin(a_, replacing(3, {2, 1})))->replaced, 1u) << "2 is read, and no slot is "
                                                                       "taken for one that ended";
}

TEST_F(Revived, WhatTheOthersMayHaveWrittenOverIsNotReadyAgain) {
  EXPECT_EQ(drained(begin(a_, replacing(3, {2})))->replaced, 2u);
  ASSERT_TRUE(table().abort_version(a_, 3, "the trainer failed", now_));
  come_back();
  ASSERT_TRUE(publish(b_, 2, 2));
  EXPECT_EQ(version(2).state, VersionState::kOpen) << "the bytes of a are gone";
}

TEST_F(Table, AnOpenOfferThatIsReplacedIsAborted) {
  const auto a = source("a", 2);
  (void)source("b", 2);
  write(a, 1);
  EXPECT_EQ(drained(begin(a, replacing(2, {1})))->replaced, 1u);
  EXPECT_EQ(version(1).state, VersionState::kAborted);
  EXPECT_THAT(version(1).reason, HasSubstr("before all had published"));
}

TEST_F(Ring, TheStoryOfAVersionSaysWhatARefitWaitedFor) {
  const Lease one = lease_of(t_, 1);
  wait_ms(5);
  const WaiterId writing = begin(a_, replacing(3, {1}));
  ASSERT_TRUE(table().release(
      t_, one.id, 1,
      {.end = LeaseEnd::kLanded,
       .summary =
           {.version = 1, .total_us = 4000, .transfer_us = 3000, .size_bytes = 64, .attempts = 1}},
      now_));
  ASSERT_NE(reply<DrainReply>(writing), nullptr);
  std::vector<std::string> story;
  for (const VersionEvent& event : table().history("policy", 1).value()) {
    story.push_back(event.who + ": " + event.what);
  }
  EXPECT_THAT(story,
              ElementsAre("a: began to write", "a: published", ": READY", "t: leased, after 0 us",
                          "a: waits to write version 3 until 1 readers are done",
                          "t: landed in 4000 us (64 bytes in 3000 us, 1 attempts)",
                          ": RETIRED: source a writes version 3"));
  EXPECT_EQ(table().history("policy", 1)->at(4).at_us, 5000);
  EXPECT_EQ(table().history("policy", 9).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(table().history("other", 1).error().code, ErrorCode::kNotFound);
}

TEST_F(Ring, TheStoryOfAVersionIsBoundedAndKeepsItsBeginningAndItsEnd) {
  for (int i = 0; i < 1000; ++i) {
    const Lease held = lease_of(t_, 2);
    ASSERT_TRUE(release(t_, held, LeaseEnd::kUnchanged));
  }
  const auto story = table().history("policy", 2).value();
  EXPECT_EQ(story.size(), TableLimits{}.version_events);
  EXPECT_EQ(story.front().what, "began to write");
  EXPECT_EQ(story.back().what, "gave the lease back");
}

TEST_F(Ring, ARestartedCoordinatorLearnsEveryOfferOfASource) {
  restart();
  a_ = try_join(MemberRole::kSource, "a", 7, 1,
                Resume{.id = a_, .last_published = 2, .offers = {offer_of(1, 1), offer_of(2, 2)}})
           .value();
  t_ = target("t");
  EXPECT_EQ(version(1).state, VersionState::kReady);
  EXPECT_EQ(version(2).state, VersionState::kReady);
  EXPECT_EQ(lease_of(t_, 1).sources.at(0).slot, 1u);
  EXPECT_EQ(drained(begin(a_, replacing(3, {1, 2})))->replaced, 2u) << "1 is read";
}

TEST_F(Ring, ALostSourceTakesAllItsOffersWithItAndBringsThemBack) {
  table().lose(a_, "stopped", now_);
  EXPECT_EQ(version(1).state, VersionState::kRetired);
  EXPECT_EQ(version(2).state, VersionState::kRetired);
  (void)try_join(MemberRole::kSource, "a", 7, 1,
                 Resume{.last_published = 2, .offers = {offer_of(1, 1), offer_of(2, 2)}})
      .value();
  EXPECT_EQ(version(1).state, VersionState::kReady);
  EXPECT_EQ(version(2).state, VersionState::kReady);
}

}  // namespace
}  // namespace transfuse

// Tests of the lease table: a made-up clock, calls in, effects out.
#include "control/lease_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "control/table_fixture.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TableRequest table_of(const Digest& plan) {
  TableRequest request;
  request.plan_key = plan;
  return request;
}

using enum VersionRequest::Kind;

TEST_F(Table, AVersionIsReadyOnlyWhenAllSourcesHavePublishedTheSameNumber) {
  const auto a = source("a", 2), b = source("b", 2), t = target("t");
  const WaiterId waiter = ask(t);
  write(a, 1);
  EXPECT_EQ(version(1).state, VersionState::kOpen);
  EXPECT_EQ(version(1).published, 1u);
  EXPECT_EQ(reply<LeaseReply>(waiter), nullptr);
  write(b, 1);
  EXPECT_EQ(version(1).state, VersionState::kReady);
  ASSERT_NE(reply<LeaseReply>(waiter), nullptr);
  const Lease lease = reply<LeaseReply>(waiter)->result.value();
  EXPECT_EQ(lease.version, 1u);
  ASSERT_EQ(lease.sources.size(), 2u);
  EXPECT_EQ(lease.sources[0].name, "a");
  EXPECT_EQ(lease.sources[0].generation, (Generation{9, 2}));
  EXPECT_THAT(changes(), ElementsAre("1 OPEN", "1 READY"));
}

TEST_F(Table, BeginningToWriteRetiresWhatTheSourceOffered) {
  const auto a = source("a");
  write(a, 1);
  write(a, 5);
  EXPECT_EQ(version(1).state, VersionState::kRetired);
  EXPECT_THAT(version(1).reason, HasSubstr("source a writes version 5"));
  EXPECT_EQ(version(5).state, VersionState::kReady);
}

TEST_F(Table, BeginWriteWaitsForReadersAndGrantsNoNewLeaseMeanwhile) {
  const auto a = source("a"), t = target("t"), u = target("u");
  write(a, 1);
  const Lease held = lease(t);
  const WaiterId drain = begin(a, 2);
  const WaiterId late = ask(u);
  EXPECT_EQ(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(reply<LeaseReply>(late), nullptr);
  now_ += std::chrono::milliseconds(30);
  ASSERT_TRUE(table().release(t, held.id, 1, {.end = LeaseEnd::kLanded}, now_));
  ASSERT_NE(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(reply<DrainReply>(drain)->result->revoked, 0u);
  EXPECT_EQ(reply<DrainReply>(drain)->result->waited_us, 30000);
  EXPECT_EQ(version(2).state, VersionState::kOpen);
  ASSERT_TRUE(publish(a, 2));
  EXPECT_EQ(reply<LeaseReply>(late)->result->version, 2u);
  EXPECT_TRUE(events_of(t).empty());
}

TEST_F(Table, AtItsDeadlineBeginWriteRevokesTheReadersThatAreLeft) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  const Lease held = lease(t);
  const WaiterId drain = begin(a, 2, 100);
  wait_ms(99);
  EXPECT_EQ(reply<DrainReply>(drain), nullptr);
  wait_ms(1);
  ASSERT_NE(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(reply<DrainReply>(drain)->result->revoked, 1u);
  EXPECT_THAT(events_of(t), ElementsAre(MemberEvent::Kind::kRevoked));
  EXPECT_EQ(table().release(t, held.id, 1, {.end = LeaseEnd::kUnchanged}, now_).error().code,
            ErrorCode::kNotFound);
  EXPECT_EQ(table().stats().leases, 0u);
}

TEST_F(Table, TheSecondSourceOfAVersionNeedNotDrainItAgain) {
  const auto a = source("a", 2), b = source("b", 2), t = target("t");
  write(a, 1);
  write(b, 1);
  const Lease held = lease(t);
  const WaiterId first = begin(a, 2), second = begin(b, 2, 50);
  wait_ms(50);
  EXPECT_EQ(reply<DrainReply>(first)->result->revoked, 1u);
  EXPECT_EQ(reply<DrainReply>(second)->result->revoked, 1u);
  ASSERT_TRUE(publish(a, 2));
  ASSERT_TRUE(publish(b, 2));
  EXPECT_EQ(version(2).state, VersionState::kReady);
  EXPECT_EQ(lease(t).version, 2u);
  (void)held;
}

TEST_F(Table, ACancelledBeginWriteLeavesTheOldVersionReadable) {
  const auto a = source("a"), t = target("t"), u = target("u");
  write(a, 1);
  (void)lease(t);
  const WaiterId drain = begin(a, 2);
  const WaiterId late = ask(u);
  table().cancel(drain, now_);
  EXPECT_EQ(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(reply<LeaseReply>(late)->result->version, 1u);
}

TEST_F(Table, PublishingTwiceOrBackwardsIsAlreadyExists) {
  const auto a = source("a");
  write(a, 3);
  EXPECT_EQ(publish(a, 3).error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(reply<DrainReply>(begin(a, 3))->result.error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(reply<DrainReply>(begin(a, 2))->result.error().code, ErrorCode::kAlreadyExists);
  EXPECT_EQ(version(3).state, VersionState::kReady) << "a refused begin_write() must close nothing";
}

TEST_F(Table, PublishingNeedsBeginWriteAndAnEvenGeneration) {
  const auto a = source("a");
  EXPECT_EQ(publish(a, 1).error().code, ErrorCode::kInvalidArgument);
  (void)begin(a, 1);
  EXPECT_EQ(table()
                .publish(a, {.version = 1, .generation = {.incarnation = 9, .counter = 3}}, now_)
                .error()
                .code,
            ErrorCode::kInvalidArgument);
  EXPECT_TRUE(publish(a, 1));
}

TEST_F(Table, TwoLiveSourcesWithOneNameAreRefused) {
  (void)source("a");
  const auto second = try_join(MemberRole::kSource, "a", 8);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
  EXPECT_THAT(second.error().message, HasSubstr("a of model policy is alive"));
  EXPECT_TRUE(try_join(MemberRole::kTarget, "a", 8)) << "a target may share the name of a source";
}

TEST_F(Table, AModelHasAsManySourcesAsTheyAgreeOn) {
  (void)source("a", 2);
  EXPECT_EQ(try_join(MemberRole::kSource, "b", 7, 3).error().code, ErrorCode::kInvalidArgument);
  (void)source("b", 2);
  const auto third = try_join(MemberRole::kSource, "c", 7, 2);
  EXPECT_EQ(third.error().code, ErrorCode::kAlreadyExists);
  EXPECT_THAT(third.error().message, HasSubstr("(a, b)"));
}

TEST_F(Table, ASilentMemberIsReplacedWhenItsTimeHasRunOut) {
  const auto a = source("a");
  wait_ms(4999);
  EXPECT_FALSE(try_join(MemberRole::kSource, "a", 8));
  wait_ms(1);
  EXPECT_NE(source("a", 1, 8), a);
}

TEST_F(Table, ASuspectIsReplacedAtOnceAndExpiresAfterItsGraceOtherwise) {
  (void)source("a");
  table().suspect(1, now_);
  EXPECT_TRUE(try_join(MemberRole::kSource, "a", 8, 1, {}, 2));
  table().suspect(2, now_);
  wait_ms(499);
  EXPECT_EQ(table().stats().members, 1u);
  wait_ms(1);
  EXPECT_EQ(table().stats().members, 0u);
}

TEST_F(Table, ASuspectThatBeatsAgainStays) {
  const auto a = source("a");
  table().suspect(1, now_);
  wait_ms(400);
  beat({a});
  wait_ms(4999);
  EXPECT_EQ(table().stats().members, 1u);
  wait_ms(1);
  EXPECT_EQ(table().stats().members, 0u);
}

TEST_F(Table, ALostSourceAbortsTheVersionThatItWasWriting) {
  const auto a = source("a", 2), b = source("b", 2);
  (void)begin(a, 1);
  write(b, 1);
  table().lose(a, "no heartbeat", now_);
  EXPECT_EQ(version(1).state, VersionState::kAborted);
  EXPECT_THAT(version(1).reason, HasSubstr("source a was lost: no heartbeat"));
}

TEST_F(Table, PublishingAnAbortedVersionSaysWhyItIsGone) {
  const auto a = source("a", 2), b = source("b", 2);
  (void)begin(a, 1);
  (void)begin(b, 1);
  ASSERT_TRUE(table().abort_version(b, 1, "out of memory", now_));
  const auto published = publish(a, 1);
  EXPECT_EQ(published.error().code, ErrorCode::kVersionGone);
  EXPECT_THAT(published.error().message, HasSubstr("source b gave it up: out of memory"));
  write(a, 2);
  write(b, 2);
  EXPECT_EQ(version(2).state, VersionState::kReady);
}

TEST_F(Table, AReadyVersionKeepsTheSourcesThatAreLeftAndEndsWithTheLast) {
  const auto a = source("a", 2), b = source("b", 2), t = target("t");
  write(a, 1);
  write(b, 1);
  table().lose(a, "killed", now_);
  EXPECT_EQ(version(1).state, VersionState::kReady);
  const Lease held = lease(t);
  ASSERT_EQ(held.sources.size(), 1u);
  EXPECT_EQ(held.sources[0].name, "b");
  table().lose(b, "killed", now_);
  EXPECT_EQ(version(1).state, VersionState::kRetired);
  EXPECT_THAT(events_of(t), ElementsAre(MemberEvent::Kind::kRevoked));
}

TEST_F(Table, ANewIncarnationDropsTheVersionsOfTheOldOne) {
  const auto a = source("a", 2), b = source("b", 2);
  write(a, 6);
  write(b, 6);
  table().lose(a, "killed", now_);
  const auto again = source("a", 2, 8);
  EXPECT_EQ(version(6).state, VersionState::kRetired);
  EXPECT_THAT(version(6).reason, HasSubstr("source a has restarted"));
  table().lose(b, "killed", now_);
  const auto b_again = source("b", 2, 8);
  write(again, 4);  // from the checkpoint
  write(b_again, 4);
  EXPECT_EQ(version(4).state, VersionState::kReady);
  const auto t = target("t");
  EXPECT_EQ(reply<LeaseReply>(ask(t, {kExactly, 6})), nullptr) << "6 will come again";
}

TEST_F(Table, TheSameProcessRejoinsWithWhatItOffered) {
  const auto a = source("a"), t = target("t");
  write(a, 3);
  wait_ms(4000);
  beat({t});
  wait_ms(1000);  // stopped for too long, then running again
  EXPECT_EQ(version(3).state, VersionState::kRetired);
  const auto again = try_join(MemberRole::kSource, "a", 7, 1,
                              Resume{.id = a, .last_published = 3, .offers = {offer_of(3)}});
  EXPECT_EQ(again.value(), a) << "its number is still free";
  EXPECT_EQ(version(3).state, VersionState::kReady);
  EXPECT_EQ(lease(t).sources.at(0).generation, (Generation{9, 6}));
  EXPECT_EQ(publish(a, 3).error().code, ErrorCode::kAlreadyExists);
}

TEST_F(Table, ARejoinedSourceDoesNotBringBackWhatOthersHaveLeftBehind) {
  const auto a = source("a", 2), b = source("b", 2);
  write(a, 3);
  write(b, 3);
  table().lose(a, "stopped", now_);
  write(b, 4);
  (void)try_join(MemberRole::kSource, "a", 7, 2,
                 Resume{.last_published = 3, .offers = {offer_of(3)}})
      .value();
  EXPECT_EQ(version(3).state, VersionState::kRetired);
  EXPECT_EQ(version(4).state, VersionState::kOpen);
}

TEST_F(Table, AnEmptyTableIsRebuiltFromWhatItsMembersKnow) {
  const Resume offered{.id = 0xABC0000000001, .last_published = 5, .offers = {offer_of(5)}};
  const auto a = try_join(MemberRole::kSource, "a", 7, 2, offered).value();
  EXPECT_EQ(a, offered.id);
  EXPECT_EQ(version(5).state, VersionState::kOpen);
  const auto b =
      try_join(MemberRole::kSource, "b", 7, 2, Resume{.last_published = 5, .offers = {offer_of(5)}})
          .value();
  EXPECT_EQ(version(5).state, VersionState::kReady);
  const auto t = target("t");
  EXPECT_EQ(lease(t).version, 5u);
  EXPECT_EQ(reply<LeaseReply>(ask(t, {kExactly, 4}))->result.error().code, ErrorCode::kVersionGone);
  (void)b;
}

TEST_F(Table, ASourceThatWasWritingGoesOnWritingAfterARestart) {
  const auto a =
      try_join(MemberRole::kSource, "a", 7, 1, Resume{.last_published = 5, .writing = 6}).value();
  EXPECT_TRUE(publish(a, 6));
  EXPECT_EQ(version(6).state, VersionState::kReady);
}

TEST_F(Table, RequestsForNewestExactlyAndAtLeast) {
  const auto a = source("a"), t = target("t");
  const WaiterId at_least = ask(t, {kAtLeast, 3}), exactly = ask(t, {kExactly, 2});
  write(a, 1);
  EXPECT_EQ(lease(t).version, 1u);
  EXPECT_EQ(reply<LeaseReply>(exactly), nullptr);
  const WaiterId drain = begin(a, 3, 10);
  wait_ms(10);
  ASSERT_TRUE(reply<DrainReply>(drain)->result);
  EXPECT_EQ(reply<LeaseReply>(at_least), nullptr);
  ASSERT_TRUE(publish(a, 3));
  EXPECT_EQ(reply<LeaseReply>(at_least)->result->version, 3u);
  EXPECT_EQ(reply<LeaseReply>(exactly)->result.error().code, ErrorCode::kVersionGone);
  EXPECT_THAT(reply<LeaseReply>(exactly)->result.error().message, HasSubstr("version 3 is READY"));
}

TEST_F(Table, AnAcquireThatTimesOutNamesWhoHasNotPublished) {
  const auto a = source("trainer0", 3), b = source("trainer1", 3), t = target("engine0");
  write(a, 4);
  (void)begin(b, 4);
  const WaiterId waiter = ask(t, {kAtLeast, 2}, 100);
  wait_ms(100);
  const Error error = reply<LeaseReply>(waiter)->result.error();
  EXPECT_EQ(error.code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(error.message, HasSubstr("trainer1 (writing 4)"));
  EXPECT_THAT(error.message, HasSubstr("2 of 3 sources have joined"));
  EXPECT_THAT(error.message, testing::Not(HasSubstr("trainer0")));
  EXPECT_EQ(table().stats().waiters, 0u);
}

TEST_F(Table, ALeaseLivesAsLongAsItsHolderBeatsForIt) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  const Lease kept = lease(t), forgotten = lease(t);
  for (int second = 0; second < 60; second += 4) {
    beat({a, t}, {kept.id});
    wait_ms(4000);
  }
  EXPECT_EQ(table().stats().leases, 1u);
  EXPECT_EQ(version(1).leases, 1u);
  EXPECT_TRUE(table().release(t, kept.id, 1, {.end = LeaseEnd::kLanded}, now_));
  EXPECT_FALSE(table().release(t, forgotten.id, 1, {.end = LeaseEnd::kLanded}, now_));
}

TEST_F(Table, ALeaseWhoseGrantWasLostEndsAfterAFewBeatsOfItsHolder) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  (void)lease(t);  // its holder never learns of it
  const WaiterId drain = begin(a, 2, 60000);
  for (int beats = 0; beats < 3; ++beats) {
    wait_ms(500);
    beat({a, t});
  }
  EXPECT_EQ(reply<DrainReply>(drain), nullptr) << "the grant may be under way";
  wait_ms(500);
  beat({a, t});
  ASSERT_NE(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(table().stats().leases, 0u);
}

TEST_F(Table, AFailedWriteOfATargetLeavesItWithoutAVersion) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  ASSERT_TRUE(table().release(t, lease(t).id, 1, {.end = LeaseEnd::kLanded}, now_));
  EXPECT_EQ(held(t), 1u);
  ASSERT_TRUE(table().release(t, lease(t).id, 1, {.end = LeaseEnd::kUnchanged}, now_));
  EXPECT_EQ(held(t), 1u);
  ASSERT_TRUE(table().release(t, lease(t).id, 1, {.end = LeaseEnd::kLost}, now_));
  EXPECT_EQ(held(t), 0u);
}

TEST_F(Table, TheLeaseOfALostTargetEndsAndTheWriterGoesOn) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  (void)lease(t);
  const WaiterId drain = begin(a, 2, 60000);
  wait_ms(3000);
  beat({a});
  wait_ms(2000);
  ASSERT_NE(reply<DrainReply>(drain), nullptr);
  EXPECT_EQ(reply<DrainReply>(drain)->result->revoked, 0u) << "it died, nobody was revoked";
}

TEST_F(Table, ALeaseIsReleasedOnlyByItsHolder) {
  const auto a = source("a"), t = target("t"), u = target("u");
  write(a, 1);
  const Lease held = lease(t);
  EXPECT_EQ(table().release(u, held.id, 1, {.end = LeaseEnd::kUnchanged}, now_).error().code,
            ErrorCode::kNotFound);
  EXPECT_EQ(table().stats().leases, 1u);
}

TEST_F(Table, ACoordinatorThatStoodStillBlamesNobody) {
  const auto a = source("a"), t = target("t");
  write(a, 1);
  (void)lease(t);
  now_ += std::chrono::hours(1);
  table().forgive(now_);
  table().tick(now_);
  EXPECT_EQ(table().stats().members, 2u);
  EXPECT_EQ(table().stats().leases, 1u);
}

TEST_F(Table, FinishedVersionsAreForgottenButExactlyThemStaysGone) {
  const auto a = source("a"), t = target("t");
  for (uint64_t v = 1; v <= 200; ++v) write(a, v);
  EXPECT_EQ(table().stats().versions, 65u);
  EXPECT_EQ(reply<LeaseReply>(ask(t, {kExactly, 3}))->result.error().code, ErrorCode::kVersionGone);
}

TEST_F(Table, AFingerprintTableIsAskedForAnnouncedAndRead) {
  const auto a = source("a"), t = target("t");
  const Digest plan{5, 5};
  const auto get = [&](int64_t deadline_ms) {
    const WaiterId waiter{++last_waiter_};
    table().get_table(waiter, a, plan, now_ + std::chrono::milliseconds(deadline_ms), now_);
    return waiter;
  };
  EXPECT_EQ(reply<TableReply>(get(10))->result.error().code, ErrorCode::kNotFound);
  ASSERT_TRUE(table().request_table(t, a, table_of(plan)));
  EXPECT_THAT(events_of(a), ElementsAre(MemberEvent::Kind::kTableRequest));
  const WaiterId early = get(10), waiting = get(1000);
  wait_ms(10);
  EXPECT_EQ(reply<TableReply>(early)->result.error().code, ErrorCode::kDeadlineExceeded);
  ASSERT_TRUE(table().put_table(a, plan, "here"));
  EXPECT_EQ(reply<TableReply>(waiting)->result.value(), "here");
  EXPECT_EQ(reply<TableReply>(get(10))->result.value(), "here");
  ASSERT_TRUE(table().leave(t, now_));
  EXPECT_EQ(table().stats().tables, 0u) << "nobody asks for it any more";
}

TEST_F(Table, RequestsThatWereNotAnsweredAreRepeatedToABrokenConnection) {
  const auto a = source("a"), t = target("t");
  ASSERT_TRUE(table().request_table(t, a, table_of({5, 5})));
  ASSERT_TRUE(table().request_table(t, a, table_of({6, 6})));
  ASSERT_TRUE(table().put_table(a, {6, 6}, "here"));
  (void)events_of(a);
  seen_.clear();
  table().repeat_requests(1);
  EXPECT_EQ(events_of(a).size(), 1u);
}

TEST_F(Table, TablesOfOneMemberAreBoundedAndTheOldestGoes) {
  const auto a = source("a"), t = target("t");
  for (uint64_t i = 1; i <= 100; ++i) {
    ASSERT_TRUE(table().request_table(t, a, table_of({i, i})));
  }
  EXPECT_EQ(table().stats().tables, TableLimits{}.tables_per_member);
}

TEST_F(Table, WhoWaitsForADeadMemberIsToldAtOnce) {
  const auto a = source("a"), t = target("t");
  ASSERT_TRUE(table().request_table(t, a, table_of({5, 5})));
  const WaiterId waiter{++last_waiter_};
  table().get_table(waiter, a, {5, 5}, now_ + std::chrono::hours(1), now_);
  table().lose(a, "killed", now_);
  EXPECT_EQ(reply<TableReply>(waiter)->result.error().code, ErrorCode::kUnavailable);
}

TEST_F(Table, LayoutsAreKeptForTheirMembersAndGoAfterThem) {
  const auto a = source("a");
  for (int i = 0; i < 30; ++i) {
    wait_ms(4000);
    beat({a});
  }
  EXPECT_TRUE(table().layouts().contains(kLayout));
  ASSERT_TRUE(table().leave(a, now_));
  wait_ms(60000);
  EXPECT_FALSE(table().layouts().contains(kLayout));
  EXPECT_EQ(table()
                .join({.registration = {.role = MemberRole::kTarget,
                                        .model = "m",
                                        .name = "n",
                                        .incarnation = 1,
                                        .layout = kLayout,
                                        .descriptor = ""}},
                      now_)
                .error()
                .code,
            ErrorCode::kNotFound);
}

TEST_F(Table, NothingIsLeftWhenAllHaveGone) {
  const auto a = source("a", 2), b = source("b", 2), t = target("t");
  write(a, 1);
  write(b, 1);
  (void)lease(t);
  ASSERT_TRUE(table().request_table(t, a, table_of({5, 5})));
  (void)begin(a, 2, 60000);
  (void)ask(t, {kAtLeast, 9}, 60000);
  ASSERT_TRUE(table().leave(a, now_));
  ASSERT_TRUE(table().leave(b, now_));
  ASSERT_TRUE(table().leave(t, now_));
  wait_ms(60000);
  EXPECT_EQ(table().stats(), TableStats{});
}

TEST_F(Table, I3_AThousandCyclesLeaveTheTableAsItWasWhenItsHistoryWasFull) {
  const auto a = source("a"), t = target("t");
  TableStats full;
  for (uint64_t v = 1; v <= 1000; ++v) {
    write(a, v);
    const Lease held = lease(t);
    ASSERT_TRUE(table().release(t, held.id, v, {.end = LeaseEnd::kLanded}, now_));
    ASSERT_TRUE(table().request_table(t, a, table_of({1, 1})));
    seen_.clear();
    if (v == 70) full = table().stats();
  }
  EXPECT_EQ(table().stats(), full);
}

TEST_F(Table, IdsOfAnotherLifeNeverCollideWithNewOnes) {
  const auto joined = try_join(MemberRole::kTarget, "t", 7, 1, Resume{.id = 50}).value();
  EXPECT_NE(joined, 50u) << "50 is a number that this table may still hand out";
}

TEST(LayoutStore, RoomIsMadeByLayoutsThatNobodyUses) {
  LayoutStore store({.layout_bytes = 60, .total_bytes = 100, .unused = std::chrono::seconds(1)});
  const TimePoint now{};
  EXPECT_EQ(store.put({0, 1}, std::string(61, 'x'), now).error().code,
            ErrorCode::kResourceExhausted);
  ASSERT_TRUE(store.put({0, 1}, std::string(60, 'x'), now));
  store.use({0, 1});
  ASSERT_TRUE(store.put({0, 2}, std::string(40, 'x'), now));
  ASSERT_TRUE(store.put({0, 3}, std::string(40, 'x'), now));
  EXPECT_FALSE(store.contains({0, 2}));
  store.use({0, 3});
  EXPECT_EQ(store.put({0, 4}, "x", now).error().code, ErrorCode::kResourceExhausted);
  EXPECT_EQ(store.size_bytes(), 100u);
}

}  // namespace
}  // namespace transfuse

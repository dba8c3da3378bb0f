// Tests of the coordinator inside one process: real threads, real clock.
#include "control/local_control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {
namespace {

Layout small_layout() {
  LayoutBuilder builder;
  const auto tensor = builder.tensor({"w", Dtype::kF32, Dims{4}});
  const auto parameter = builder.parameter({"w", Dtype::kF32, 4});
  builder.tile(tensor, Box::whole(Dims{4}), parameter, 0);
  return builder.build().value();
}

// In place: what was offered before is overwritten.
WriteRequest replacing(uint64_t version) {
  WriteRequest request{.version = version, .replaces = {}, .when_leased = {}};
  if (version > 1) request.replaces.push_back(version - 1);
  return request;
}

Offer offer_of(uint64_t version, uint32_t slot = 0) {
  return {.version = version, .generation = {7, 2 * version}, .slot = slot};
}

class Local : public testing::Test {
 protected:
  MemberId join(Control& control, MemberRole role, const std::string& name, uint32_t count = 1) {
    const Layout layout = small_layout();
    EXPECT_TRUE(control.put_layout(layout));
    return control
        .join({.role = role,
               .model = "policy",
               .name = name,
               .source_count = count,
               .incarnation = 7,
               .layout = layout.digest(),
               .descriptor = "at " + name})
        .value();
  }
  void write(Control& control, MemberId source, uint64_t version) {
    ASSERT_TRUE(control.begin_write(source, replacing(version), Deadline::after_ms(5000)));
    ASSERT_TRUE(control.publish(source, offer_of(version)));
  }

  LocalCoordinator coordinator_;
  std::unique_ptr<Control> trainer_ = coordinator_.connect();
  std::unique_ptr<Control> engine_ = coordinator_.connect();
  Mutex mutex_;
  std::vector<std::unique_ptr<Control>> handles_ GUARDED_BY(mutex_);
};

TEST_F(Local, AnAcquireInOneThreadEndsWhenAnotherPublishes) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  const MemberId target = join(*engine_, MemberRole::kTarget, "engine0");
  std::thread trainer([&] { write(*trainer_, source, 1); });
  const auto lease = engine_->acquire(target, {}, Deadline::after_ms(10000));
  trainer.join();
  ASSERT_TRUE(lease);
  EXPECT_EQ(lease->version, 1u);
  ASSERT_EQ(lease->sources.size(), 1u);
  EXPECT_EQ(engine_->describe(lease->sources[0].id, 7, Deadline::after_ms(5000)).value(),
            "at trainer0");
  EXPECT_EQ(engine_->get_layout(lease->sources[0].layout, Deadline::after_ms(5000))->digest(),
            small_layout().digest());
  EXPECT_TRUE(engine_->release(lease->id, {.end = LeaseEnd::kLanded}, Deadline::after_ms(5000)));
  EXPECT_EQ(engine_->release(lease->id, {.end = LeaseEnd::kLanded}, Deadline::after_ms(5000))
                .error()
                .code,
            ErrorCode::kNotFound);
  EXPECT_EQ(engine_->members("policy")->at(1).version, 1u) << "what has landed is known";
}

TEST_F(Local, I11_AnAcquireWithoutAPublisherEndsAtItsDeadline) {
  const MemberId target = join(*engine_, MemberRole::kTarget, "engine0");
  const auto lease = engine_->acquire(target, {}, Deadline::after_ms(50));
  ASSERT_FALSE(lease);
  EXPECT_EQ(lease.error().code, ErrorCode::kDeadlineExceeded);
}

TEST_F(Local, BeginWriteRevokesAReaderThatNeverReleases) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  const MemberId target = join(*engine_, MemberRole::kTarget, "engine0");
  write(*trainer_, source, 1);
  const auto lease = engine_->acquire(target, {}, Deadline::after_ms(1000));
  ASSERT_TRUE(lease);
  const auto drained = trainer_->begin_write(source, replacing(2), Deadline::after_ms(50));
  ASSERT_TRUE(drained);
  EXPECT_EQ(drained->revoked, 1u);
  const auto event = engine_->next_event(target, Deadline::after_ms(1000));
  ASSERT_TRUE(event && event->has_value());
  EXPECT_EQ((*event)->kind, MemberEvent::Kind::kRevoked);
  EXPECT_TRUE(engine_->release(lease->id, {.end = LeaseEnd::kUnchanged}, Deadline::after_ms(5000)))
      << "releasing what was revoked is no error";
}

TEST_F(Local, AWatchSeesEveryVersionThroughToItsLastState) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  write(*trainer_, source, 1);
  auto watch = engine_->watch("policy").value();
  EXPECT_EQ(watch->next(Deadline::after_ms(1000))->value().version, 1u);
  write(*trainer_, source, 2);
  VersionInfo last;
  for (int i = 0; i < 2; ++i) last = watch->next(Deadline::after_ms(1000))->value();
  EXPECT_EQ(last.version, 2u);
  EXPECT_EQ(last.state, VersionState::kReady);
  EXPECT_FALSE(watch->next(Deadline::after_ms(10))->has_value());
}

TEST_F(Local, TheMembersOfAClosedHandleAreGone) {
  (void)join(*engine_, MemberRole::kTarget, "engine0");
  engine_.reset();
  EXPECT_EQ(coordinator_.stats().members, 0u);
}

TEST_F(Local, ALostMemberIsUnknownToItsOwnHandle) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  write(*trainer_, source, 1);
  EXPECT_TRUE(coordinator_.lose("policy", MemberRole::kSource, "trainer0"));
  EXPECT_FALSE(coordinator_.lose("policy", MemberRole::kSource, "trainer0"));
  EXPECT_EQ(trainer_->publish(source, offer_of(2)).error().code, ErrorCode::kNotFound);
}

TEST_F(Local, AHandleCannotActForAMemberOfAnother) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  EXPECT_EQ(engine_->leave(source).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(coordinator_.stats().members, 1u);
}

TEST_F(Local, RanksInTwoThreadsCommitTogether) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  write(*trainer_, source, 1);
  const auto rank = [&](const std::string& name) {
    auto control = coordinator_.connect();
    Registration registration;
    registration.role = MemberRole::kTarget;
    registration.model = "policy";
    registration.name = name;
    registration.incarnation = 7;
    registration.layout = small_layout().digest();
    registration.group = "engine";
    registration.group_size = 2;
    const MemberId id = control->join(registration).value();
    const Deadline deadline = Deadline::after_ms(10000);
    const Lease lease = control->acquire(id, {}, deadline).value();
    EXPECT_TRUE(control->release(lease.id, {.end = LeaseEnd::kUnchanged}, deadline));
    EXPECT_TRUE(control->vote(id, lease.round, true, "", deadline));
    EXPECT_TRUE(control->decision(id, lease.round, deadline)->commit);
    EXPECT_TRUE(control->applied(id, lease.round, lease.version, deadline));
    const GroupInfo group = control->groups("policy")->front();
    EXPECT_EQ(group.state, GroupState::kWhole);
    EXPECT_EQ(group.version, 1u);
    EXPECT_TRUE(control->hold(id, 1, deadline));
    // Whoever leaves first must not break the group before the other has looked.
    const MutexLock lock(mutex_);
    handles_.push_back(std::move(control));
  };
  std::thread first([&] { rank("rank0"); });
  rank("rank1");
  first.join();
  EXPECT_EQ(trainer_->groups("")->size(), 1u);
  EXPECT_FALSE(trainer_->history("policy", 1)->empty());
}

TEST_F(Local, AHandleOfTheParentIsInertInAForkedChild) {
  const MemberId source = join(*trainer_, MemberRole::kSource, "trainer0");
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool inert = trainer_->leave(source).error().code == ErrorCode::kUnavailable &&
                       trainer_->acquire(source, {}, Deadline::after_ms(1)).error().code ==
                           ErrorCode::kUnavailable;
    trainer_.reset();
    _exit(inert ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(coordinator_.stats().members, 1u);
  write(*trainer_, source, 1);
}

TEST(OpenLocalControl, GivesAHandleThatOutlivesItsCoordinatorObject) {
  const auto control = open_local_control();
  EXPECT_TRUE(control->put_layout(small_layout()));
  EXPECT_TRUE(control->members("")->empty());
}

}  // namespace
}  // namespace transfuse

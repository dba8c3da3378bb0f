// The embedded coordinator and its clients: real processes, sockets and kills.
#include <gmock/gmock.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "rpc/member_process.h"
#include "rpc/rpc.h"
#include "transfuse.grpc.pb.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;
using testing::StartsWith;
using enum VersionRequest::Kind;

class Coordinator : public CoordinatorTest {};

TEST_F(Coordinator, AVersionOfTwoProcessesIsReadyWhenBothHavePublished) {
  auto other = member();
  ASSERT_EQ(other->line(), "ok");
  ASSERT_EQ(other->ask("join source trainer1 2"), "ok");
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0", 2).value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  ASSERT_TRUE(write_version(*control, source, 1));
  const auto early = control->acquire(target, {}, Deadline::after_ms(200));
  ASSERT_FALSE(early);
  EXPECT_EQ(early.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(early.error().message, HasSubstr("trainer1"));
  ASSERT_EQ(other->ask("write 1"), "ok");

  const auto lease = control->acquire(target, {}, Deadline::after_ms(20000));
  ASSERT_TRUE(lease) << lease.error().to_string();
  ASSERT_EQ(lease->sources.size(), 2u);
  const MemberInfo& peer = lease->sources[1];
  EXPECT_EQ(peer.name, "trainer1");
  EXPECT_EQ(peer.generation, (Generation{9, 2}));
  EXPECT_EQ(control->describe(peer.id, peer.incarnation, Deadline::after_ms(5000)).value(),
            "at trainer1");
  EXPECT_EQ(control->get_layout(peer.layout, Deadline::after_ms(5000))->digest(),
            small_layout().digest());
  EXPECT_TRUE(control->release(lease->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)));
  EXPECT_EQ(control->release(lease->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)).error().code,
            ErrorCode::kNotFound);
  const auto members = control->members("policy").value();
  ASSERT_EQ(members.size(), 3u);
  EXPECT_EQ(members[2].version, 1u) << "what landed is known";
}

TEST_F(Coordinator, AWatchIsToldOfEveryChangeThatAnotherProcessMakes) {
  auto control = connect();
  auto watch = control->watch("policy").value();
  auto trainer = member();
  ASSERT_EQ(trainer->line(), "ok");
  ASSERT_EQ(trainer->ask("join source trainer0"), "ok");
  ASSERT_EQ(trainer->ask("begin 1"), "ok 0");
  EXPECT_EQ(watch->next(Deadline::after_ms(20000))->value().state, VersionState::kOpen);
  ASSERT_EQ(trainer->ask("publish 1"), "ok");
  EXPECT_EQ(watch->next(Deadline::after_ms(20000))->value().state, VersionState::kReady);
  trainer->kill(SIGKILL);
  const auto last = watch->next(Deadline::after_ms(20000))->value();
  EXPECT_EQ(last.state, VersionState::kRetired);
  EXPECT_THAT(last.reason, HasSubstr("source trainer0 was lost: its connection broke"));
  EXPECT_FALSE(watch->next(Deadline::after_ms(20))->has_value());
}

TEST_F(Coordinator, AKilledCoordinatorIsStartedAgainAndItsMembersGoOn) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  auto watch = control->watch("policy").value();
  ASSERT_TRUE(write_version(*control, source, 7));
  const auto before = control->acquire(target, {}, Deadline::after_ms(20000));
  ASSERT_TRUE(before);
  const CoordinatorInfo first = coordinator();
  ASSERT_EQ(::kill(static_cast<pid_t>(first.pid), SIGKILL), 0);

  EXPECT_TRUE(control->release(before->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)))
      << "a lease of the dead one is no error";
  const auto after = control->acquire(target, {kExactly, 7}, Deadline::after_ms(20000));
  ASSERT_TRUE(after) << after.error().to_string();
  EXPECT_EQ(after->sources.at(0).id, before->sources.at(0).id) << "caches by number stay true";
  EXPECT_EQ(after->sources.at(0).generation, before->sources.at(0).generation);
  EXPECT_EQ(
      control
          ->describe(after->sources[0].id, after->sources[0].incarnation, Deadline::after_ms(5000))
          .value(),
      "at trainer0");
  EXPECT_GT(coordinator().epoch, first.epoch);
  EXPECT_NE(coordinator().pid, first.pid);
  const auto event = control->next_event(source, Deadline::after_ms(20000));
  ASSERT_TRUE(event && event->has_value());
  EXPECT_EQ((*event)->kind, MemberEvent::Kind::kEpoch);
  EXPECT_EQ((*event)->epoch, coordinator().epoch);
  ASSERT_TRUE(control->release(after->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)));
  EXPECT_EQ(control->publish(source, offer(7)).error().code, ErrorCode::kAlreadyExists);
  ASSERT_TRUE(write_version(*control, source, 8));
  EXPECT_TRUE(eventually([&] {
    const auto change = watch->next(Deadline::after_ms(1000));
    return change && change->has_value() && (*change)->version == 8 &&
           (*change)->state == VersionState::kReady;
  })) << "a watch outlives the coordinator, too";
}

TEST_F(Coordinator, ASourceThatWasWritingPublishesToTheNextCoordinator) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  ASSERT_TRUE(control->begin_write(source, in_place(3), Deadline::after_ms(20000)));
  ASSERT_EQ(::kill(static_cast<pid_t>(coordinator().pid), SIGKILL), 0);
  const auto published = control->publish(source, offer(3));
  ASSERT_TRUE(published) << published.error().to_string();
  EXPECT_EQ(control->acquire(target, {}, Deadline::after_ms(20000))->version, 3u);
}

TEST_F(Coordinator, I11_AStoppedCoordinatorIsATypedErrorWithinTheDeadline) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  ASSERT_TRUE(write_version(*control, source, 1));
  const auto pid = static_cast<pid_t>(coordinator().pid);
  std::optional<Stopped> stopped(pid);
  ASSERT_TRUE(stopped->still());
  const auto lease = control->acquire(target, {}, Deadline::after_ms(300));
  ASSERT_FALSE(lease);
  EXPECT_EQ(lease.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_THAT(lease.error().message, HasSubstr("did not answer"));
  ConnectOptions hasty = options();
  hasty.control.call_deadline_ms = 300;
  const auto second = connect_control(hasty);
  ASSERT_FALSE(second) << "a stopped coordinator is alive: nobody may start another one";
  EXPECT_EQ(second.error().code, ErrorCode::kDeadlineExceeded);
  stopped.reset();
  EXPECT_EQ(control->acquire(target, {}, Deadline::after_ms(20000))->version, 1u);
  EXPECT_EQ(coordinator().pid, static_cast<uint32_t>(pid));
}

TEST_F(Coordinator, ACoordinatorThatWasStoppedDoesNotExpireItsMembers) {
  ConnectOptions short_lived = options();
  short_lived.control.heartbeat_ms = 100;
  short_lived.control.member_ttl_ms = 1000;
  auto control = connect_control(short_lived).value();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  ASSERT_TRUE(write_version(*control, source, 1));
  auto watch = control->watch("policy").value();
  ASSERT_EQ(watch->next(Deadline::after_ms(20000))->value().state, VersionState::kReady);
  const auto pid = static_cast<pid_t>(coordinator().pid);
  std::optional<Stopped> stopped(pid);
  ASSERT_TRUE(stopped->still());
  std::this_thread::sleep_for(std::chrono::milliseconds(2500));
  stopped.reset();
  const auto change = watch->next(Deadline::after_ms(500));
  ASSERT_TRUE(change);
  EXPECT_FALSE(change->has_value()) << "the version went with its source";
}

TEST_F(Coordinator, AMemberThatWasStoppedForTooLongIsTakenBackWhenItGoesOn) {
  auto control = connect();
  auto trainer = member(1000);
  ASSERT_EQ(trainer->line(), "ok");
  ASSERT_EQ(trainer->ask("join source trainer0"), "ok");
  ASSERT_EQ(trainer->ask("write 4"), "ok");
  auto watch = control->watch("policy").value();
  ASSERT_EQ(watch->next(Deadline::after_ms(20000))->value().state, VersionState::kReady);
  trainer->kill(SIGSTOP);
  const auto lost = watch->next(Deadline::after_ms(20000))->value();
  EXPECT_EQ(lost.state, VersionState::kRetired);
  EXPECT_THAT(lost.reason, HasSubstr("no heartbeat for"));
  trainer->kill(SIGCONT);
  EXPECT_TRUE(eventually([&] {
    const auto change = watch->next(Deadline::after_ms(1000));
    return change && change->has_value() && (*change)->state == VersionState::kReady;
  })) << "what it offers is offered again";
  EXPECT_EQ(trainer->ask("write 5"), "ok");
}

TEST_F(Coordinator, AMemberThatWasStoppedWhileTheCoordinatorDiedFindsTheNextOne) {
  auto control = connect();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  auto trainer = member();
  ASSERT_EQ(trainer->line(), "ok");
  ASSERT_EQ(trainer->ask("join source trainer0"), "ok");
  ASSERT_EQ(trainer->ask("write 4"), "ok");
  trainer->kill(SIGSTOP);
  ASSERT_EQ(::kill(static_cast<pid_t>(coordinator().pid), SIGKILL), 0);
  EXPECT_EQ(control->acquire(target, {}, Deadline::after_ms(500)).error().code,
            ErrorCode::kDeadlineExceeded);
  trainer->kill(SIGCONT);
  EXPECT_EQ(control->acquire(target, {}, Deadline::after_ms(20000))->version, 4u);
}

TEST_F(Coordinator, AnIdleCoordinatorEndsAndLeavesNothingBehind) {
  ConnectOptions brief = options();
  brief.idle_exit_ms = 300;
  auto control = connect_control(brief).value();
  (void)join_as(*control, MemberRole::kTarget, "engine0").value();
  const auto pid = static_cast<pid_t>(coordinator().pid);
  std::this_thread::sleep_for(std::chrono::milliseconds(700));
  EXPECT_TRUE(process_exists(pid)) << "it has a member";
  control.reset();
  EXPECT_TRUE(eventually([&] { return !process_exists(pid); }));
  EXPECT_FALSE(std::filesystem::exists(folder_));
}

TEST_F(Coordinator, AStaleSocketOfADeadRunIsReplaced) {
  ASSERT_EQ(::mkdir(folder_.c_str(), 0700), 0);
  const std::string path = folder_ + "/test.sock";
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path.c_str());
  {
    const UniqueFd stale(::socket(AF_UNIX, SOCK_STREAM, 0));
    ASSERT_EQ(::bind(stale.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  }
  std::ofstream(folder_ + "/test.epoch") << 9'000'000'000'000'000 << "\n";
  auto control = connect();
  EXPECT_TRUE(control->members("")->empty());
  EXPECT_GT(coordinator().epoch, 9'000'000'000'000'000u) << "rises, whatever the clock says";
  struct stat found{};
  ASSERT_EQ(::stat(path.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777u, 0600u);
}

TEST_F(Coordinator, TwoPublishersWithOneNameAreRefusedWhileTheFirstLives) {
  auto first = member();
  ASSERT_EQ(first->line(), "ok");
  ASSERT_EQ(first->ask("join source trainer0"), "ok");
  auto control = connect();
  const auto second = join_as(*control, MemberRole::kSource, "trainer0");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
  first->kill(SIGKILL);
  EXPECT_TRUE(eventually([&] { return bool{join_as(*control, MemberRole::kSource, "trainer0")}; }))
      << "a dead one is replaced";
}

TEST_F(Coordinator, TheLeaseOfAKilledReceiverIsFreedLongBeforeItsTimeToLive) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  ASSERT_TRUE(write_version(*control, source, 1));
  auto engine = member();
  ASSERT_EQ(engine->line(), "ok");
  ASSERT_EQ(engine->ask("join target engine0"), "ok");
  ASSERT_EQ(engine->ask("acquire 1"), "ok 1");
  engine->kill(SIGKILL);
  const auto drained = control->begin_write(source, in_place(2), Deadline::after_ms(60000));
  ASSERT_TRUE(drained) << drained.error().to_string();
  EXPECT_EQ(drained->revoked, 0u) << "its lease ended with it, it was not revoked at the deadline";
}

TEST_F(Coordinator, WhoComesLeavesAndIsLostIsALineOfTheLog) {
  auto control = connect();
  const MemberId leaving = join_as(*control, MemberRole::kSource, "leaving").value();
  auto killed = member();
  ASSERT_EQ(killed->line(), "ok");
  ASSERT_EQ(killed->ask("join target killed"), "ok");
  ASSERT_TRUE(control->leave(leaving));
  killed->kill(SIGKILL);
  const auto logged = [&] {
    std::ifstream log(folder_ + "/test.log");
    return std::string(std::istreambuf_iterator<char>(log), {});
  };
  ASSERT_TRUE(eventually(
      [&] { return logged().find("member_gone model=policy role=target") != std::string::npos; }));
  const std::string text = logged();
  EXPECT_THAT(text, HasSubstr("warning member_gone model=policy role=target name=killed id="));
  EXPECT_THAT(text, HasSubstr("why=\"its connection broke"));
  EXPECT_THAT(text, HasSubstr("info member_joined model=policy role=source name=leaving id="));
  EXPECT_THAT(text, HasSubstr("why=\"it left\"\n"));
  EXPECT_THAT(text, testing::Not(HasSubstr("warning member_gone model=policy role=source")));
}

TEST_F(Coordinator, BeginWriteWaitsForAReaderOfAnotherProcess) {
  auto control = connect();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  auto trainer = member();
  ASSERT_EQ(trainer->line(), "ok");
  ASSERT_EQ(trainer->ask("join source trainer0"), "ok");
  ASSERT_EQ(trainer->ask("write 1"), "ok");
  const auto lease = control->acquire(target, {}, Deadline::after_ms(20000));
  ASSERT_TRUE(lease);
  trainer->send("begin 2");
  EXPECT_EQ(control->acquire(target, {kAtLeast, 2}, Deadline::after_ms(300)).error().code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_EQ(control->versions("policy")->at(0).state, VersionState::kReady);
  ASSERT_TRUE(control->release(lease->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)));
  EXPECT_EQ(trainer->line(), "ok 0");
}

TEST_F(Coordinator, BeginWriteRevokesAReaderAtItsDeadlineAndTellsIt) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  ASSERT_TRUE(write_version(*control, source, 1));
  const auto lease = control->acquire(target, {}, Deadline::after_ms(20000));
  ASSERT_TRUE(lease);
  const auto drained = control->begin_write(source, in_place(2), Deadline::after_ms(500));
  ASSERT_TRUE(drained) << drained.error().to_string();
  EXPECT_EQ(drained->revoked, 1u);
  const auto event = control->next_event(target, Deadline::after_ms(20000));
  ASSERT_TRUE(event && event->has_value());
  EXPECT_EQ((*event)->kind, MemberEvent::Kind::kRevoked);
}

TEST_F(Coordinator, AFingerprintTableIsRequestedAndAnnouncedAcrossHandles) {
  auto trainer = connect();
  auto engine = connect();
  const MemberId source = join_as(*trainer, MemberRole::kSource, "trainer0").value();
  const MemberId target = join_as(*engine, MemberRole::kTarget, "engine0").value();
  const uint64_t holder = engine->members("policy")->at(0).id;
  const TableRequest wanted{
      .plan_key = {1, 2}, .target = {3, 4}, .sources = {{5, 6}, {7, 8}}, .chunk_bytes = 1 << 20};
  ASSERT_TRUE(engine->request_table(target, holder, wanted, Deadline::after_ms(5000)));
  EXPECT_EQ(engine->get_table(holder, {1, 2}, Deadline::after_ms(50)).error().code,
            ErrorCode::kDeadlineExceeded);
  const auto event = trainer->next_event(source, Deadline::after_ms(20000));
  ASSERT_TRUE(event && event->has_value());
  EXPECT_EQ((*event)->table.sources, wanted.sources);
  EXPECT_EQ((*event)->table.chunk_bytes, wanted.chunk_bytes);
  ASSERT_TRUE(trainer->put_table(source, {1, 2}, "the table"));
  EXPECT_EQ(engine->get_table(holder, {1, 2}, Deadline::after_ms(20000)).value(), "the table");
}

TEST_F(Coordinator, TheHandlesOfAForkedChildAreInert) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  auto watch = control->watch("policy").value();
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const bool inert = control->publish(source, offer(1)).error().code == ErrorCode::kUnavailable &&
                       control->leave(source).error().code == ErrorCode::kUnavailable &&
                       watch->next(Deadline::after_ms(1)).error().code == ErrorCode::kUnavailable;
    // gRPC's threads are the parent's: a new connection is refused, not waited for.
    const auto own = connect_control(options());
    const bool refused = !own && own.error().code == ErrorCode::kUnsupported;
    watch.reset();
    control.reset();
    ::_exit(inert && refused ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_TRUE(write_version(*control, source, 1)) << "the parent goes on";
}

TEST_F(Coordinator, EightProcessesThatStartAtOnceHaveOneCoordinator) {
  std::vector<std::unique_ptr<Process>> processes;
  processes.reserve(8);
  for (int i = 0; i < 8; ++i) processes.push_back(member());
  for (const auto& each : processes) ASSERT_EQ(each->line(), "ok");
  const std::string pid = processes[0]->ask("coordinator");
  EXPECT_NE(std::stoll(pid), 0);
  for (const auto& each : processes) EXPECT_EQ(each->ask("coordinator"), pid);
}

TEST_F(Coordinator, CallsThatWaitTakeNoThreadsOfTheCoordinator) {
  auto control = connect();
  const MemberId source = join_as(*control, MemberRole::kSource, "trainer0").value();
  const auto threads = [pid = coordinator().pid] {
    std::ifstream status("/proc/" + std::to_string(pid) + "/status");
    std::string word;
    while (status >> word && word != "Threads:") continue;
    int count = 0;
    status >> count;
    return count;
  };
  const int before = threads();
  std::vector<std::thread> waiting;
  std::atomic<int> granted = 0;
  waiting.reserve(64);
  for (int i = 0; i < 64; ++i) {
    waiting.emplace_back([&, i] {
      const MemberId target =
          join_as(*control, MemberRole::kTarget, "engine" + std::to_string(i)).value();
      if (control->acquire(target, {}, Deadline::after_ms(60000))) ++granted;
    });
  }
  ASSERT_TRUE(eventually([&] { return control->members("policy")->size() == 65; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LE(threads(), before + 8);
  ASSERT_TRUE(write_version(*control, source, 1));
  for (std::thread& each : waiting) each.join();
  EXPECT_EQ(granted, 64);
}

TEST_F(Coordinator, AProgramThatIsNoCoordinatorIsNamedWithWhatItSaid) {
  ::setenv("TRANSFUSE_SERVE_COMMAND", "/bin/false", 1);
  const auto control = connect_control(options());
  ASSERT_FALSE(control);
  EXPECT_EQ(control.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(control.error().message, HasSubstr("/bin/false serve ended before it listened"));
  EXPECT_FALSE(std::filesystem::exists(folder_));
}

TEST_F(Coordinator, AFolderThatOthersMayEnterIsRefused) {
  ASSERT_EQ(::mkdir(folder_.c_str(), 0755), 0);
  const auto control = connect_control(options());
  ASSERT_FALSE(control);
  EXPECT_EQ(control.error().code, ErrorCode::kPermissionDenied);
  EXPECT_THAT(control.error().message, HasSubstr("mode 0755"));
  std::filesystem::remove_all(folder_);
}

class ByHand : public CoordinatorTest {
 protected:
  std::unique_ptr<Process> serve_with(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "serve");
    return std::make_unique<Process>(folder_, arguments);
  }
  void write_token(const std::string& token, mode_t mode = 0600) {
    std::ofstream(token_file_) << token << "\n";
    ::chmod(token_file_.c_str(), mode);
  }
  const std::string token_file_ = parent_ + "/token";
};

TEST_F(ByHand, OverTcpOnlyTheRightTokenIsServed) {
  write_token("sixteen-bytes-or-more");
  auto server = serve_with({"--tcp", "127.0.0.1:0", "--token-file", token_file_});
  ConnectOptions tcp = options();
  tcp.address = server->line();
  ASSERT_THAT(tcp.address, StartsWith("127.0.0.1:"));
  EXPECT_EQ(connect_control(tcp).error().code, ErrorCode::kPermissionDenied);
  tcp.token = "sixteen-bytes-or-les";
  EXPECT_EQ(connect_control(tcp).error().code, ErrorCode::kPermissionDenied);
  tcp.token = "sixteen-bytes-or-more";
  auto control = connect_control(tcp);
  ASSERT_TRUE(control) << control.error().to_string();
  const MemberId source = join_as(**control, MemberRole::kSource, "trainer0").value();
  EXPECT_TRUE(write_version(**control, source, 1));
  server->kill(SIGTERM);
}

TEST_F(ByHand, BeyondLoopbackATokenFileIsDemandedAndNobodyElseMayReadIt) {
  auto open = serve_with({"--tcp", "0.0.0.0:0"});
  EXPECT_THAT(open->line(), StartsWith("PERMISSION_DENIED: 0.0.0.0:0 can be reached"));
  write_token("sixteen-bytes-or-more", 0644);
  auto readable = serve_with({"--tcp", "127.0.0.1:0", "--token-file", token_file_});
  EXPECT_THAT(readable->line(), HasSubstr("others can read it"));
  write_token("short");
  auto weak = serve_with({"--tcp", "127.0.0.1:0", "--token-file", token_file_});
  EXPECT_THAT(weak->line(), HasSubstr("at least 16 are expected"));
}

TEST_F(ByHand, ASocketServesOneCoordinatorAndGoesWithIt) {
  const std::string socket = parent_ + "/by-hand.sock";
  auto server = serve_with({"--socket", socket});
  ASSERT_EQ(server->line(), "unix:" + socket);
  auto second = serve_with({"--socket", socket});
  EXPECT_THAT(second->line(), StartsWith("ALREADY_EXISTS"));
  ConnectOptions by_hand = options();
  by_hand.address = "unix:" + socket;
  EXPECT_TRUE(connect_control(by_hand));
  server->kill(SIGTERM);
  EXPECT_FALSE(std::filesystem::exists(socket));
}

TEST_F(ByHand, ACoordinatorThatIsNotThereIsATypedError) {
  ConnectOptions nobody = options();
  nobody.address = "unix:" + parent_ + "/nobody.sock";
  const auto control = connect_control(nobody);
  ASSERT_FALSE(control);
  EXPECT_EQ(control.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(find_coordinator(options()).error().code, ErrorCode::kNotFound);
}

TEST_F(ByHand, I11_CallsEndWhenACoordinatorOnTcpIsGoneForGood) {
  auto server = serve_with({"--tcp", "127.0.0.1:0"});
  ConnectOptions tcp = options();
  tcp.address = server->line();
  tcp.control.call_deadline_ms = 500;
  auto control = connect_control(tcp).value();
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  server->kill(SIGKILL);
  EXPECT_EQ(control->members("").error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(control->acquire(target, {}, Deadline::after_ms(300)).error().code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_FALSE(control->next_event(target, Deadline::after_ms(10))->has_value());
}

// Speaks another protocol, as an older or newer build would.
class OtherProtocol final : public wire::Coordinator::Service {
  grpc::Status Hello(grpc::ServerContext* /*context*/, const wire::HelloRequest* /*request*/,
                     wire::HelloReply* reply) override {
    reply->set_protocol(999);
    reply->set_epoch(1);
    reply->set_pid(4711);
    return grpc::Status::OK;
  }
};

TEST_F(ByHand, ACoordinatorOfAnotherProtocolIsRefusedInPlainWords) {
  OtherProtocol service;
  grpc::ServerBuilder builder;
  const std::string address = "unix:" + parent_ + "/other.sock";
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  ConnectOptions other = options();
  other.address = address;
  const auto control = connect_control(other);
  ASSERT_FALSE(control);
  EXPECT_EQ(control.error().code, ErrorCode::kUnsupported);
  EXPECT_THAT(control.error().message, HasSubstr("(process 4711) speaks protocol 999"));
}

}  // namespace
}  // namespace transfuse

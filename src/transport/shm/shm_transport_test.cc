// Reads between real processes: what is served, refused, killed, stopped and forked.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/sched.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/child_role.h"

namespace transfuse::shm {
namespace {

constexpr int64_t kLongMs = 30000;
constexpr uint64_t kMiB = uint64_t{1} << 20;

Deadline soon() { return Deadline::after_ms(kLongMs); }

// Copies of `size` bytes at most `piece` long, one after another.
std::vector<StridedCopy> pieces(std::span<std::byte> target, uint64_t piece) {
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < target.size(); at += piece) {
    StridedCopy copy;
    copy.source_offset_bytes = at;
    copy.target = target.data() + at;
    copy.count[2] = static_cast<uint32_t>(std::min(piece, target.size() - at));
    copy.source_stride[2] = copy.target_stride[2] = 1;
    copies.push_back(copy);
  }
  return copies;
}

bool holds_pattern(std::span<const std::byte> bytes, uint64_t seed) {
  for (uint64_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] != pattern(seed, i)) return false;
  }
  return true;
}

class ShmTransportTest : public testing::Test {
 protected:
  void SetUp() override { transport_ = open_shm_transport(folder_.path()).value(); }

  std::unique_ptr<Peer> connect(const ServingProcess& process) {
    return transport_->connect(process.endpoint, "", soon()).value();
  }
  Result<void> read(const RemoteRegion& region, std::span<std::byte> target) {
    const auto copies = pieces(target, kMiB);
    TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket, transport_->submit({&region, copies, {}}));
    EXPECT_TRUE(transport_->wait_any({&ticket, 1}, soon()));
    return transport_->finish(ticket);
  }
  Serving serving(const std::string& kind, uint64_t size_bytes, uint64_t count = 1) const {
    Serving s;
    s.folder = folder_.path();
    s.kind = kind;
    s.size_bytes = size_bytes;
    s.count = count;
    return s;
  }

  TestFolder folder_;
  std::unique_ptr<Transport> transport_;
};

class EitherKind : public ShmTransportTest, public testing::WithParamInterface<const char*> {};
INSTANTIATE_TEST_SUITE_P(Shm, EitherKind, testing::Values("memfd", "owned"));

TEST_P(EitherKind, ReadsWhatAnotherProcessWrote) {
  const uint64_t size = 3 * kMiB + 12345;
  const ServingProcess source(serving(GetParam(), size, 2));
  const auto peer = connect(source);
  for (uint64_t i = 0; i < 2; ++i) {
    const auto region = peer->open_region({RegionId{source.regions[i].id}, size}, soon()).value();
    EXPECT_EQ(region->size_bytes(), size);
    EXPECT_EQ(region->route(), std::string(GetParam()) == "memfd" ? "memfd" : "process_vm_readv");
    std::vector<std::byte> target(size);
    ASSERT_TRUE(read(*region, target));
    EXPECT_TRUE(holds_pattern(target, 1 + i));
  }
}

TEST_P(EitherKind, I13_RefusesACopyBeyondTheRegion) {
  const ServingProcess source(serving(GetParam(), 4096));
  const auto peer = connect(source);
  const auto region = peer->open_region({RegionId{source.regions[0].id}, 4096}, soon()).value();
  std::vector<std::byte> target(4097);
  const auto copies = pieces(target, 8192);
  EXPECT_EQ(transport_->submit({region.get(), copies, {}}).error().code, ErrorCode::kCorrupt);
}

TEST_P(EitherKind, I13_RefusesADescriptorWithAnotherSize) {
  const ServingProcess source(serving(GetParam(), 4096));
  const auto peer = connect(source);
  for (const uint64_t size : {4095u, 4097u, 0u}) {
    const auto region = peer->open_region({RegionId{source.regions[0].id}, size}, soon());
    EXPECT_EQ(region.error().code, ErrorCode::kCorrupt);
  }
  EXPECT_EQ(transport_->stats().remote_regions, 0u);
}

TEST_P(EitherKind, AReleasedRegionIsNotFoundAndWhatIsMappedStays) {
  ServingProcess source(serving(GetParam(), 8192, 2));
  const auto peer = connect(source);
  const RegionDescriptor first{RegionId{source.regions[0].id}, 8192};
  const auto mapped = peer->open_region(first, soon()).value();
  source.child.say("release 0");
  ASSERT_EQ(source.child.hear(), "ok");
  EXPECT_EQ(peer->open_region(first, soon()).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(peer->open_region({RegionId{999}, 8192}, soon()).error().code, ErrorCode::kNotFound);
  EXPECT_TRUE(peer->open_region({RegionId{source.regions[1].id}, 8192}, soon()));
  std::vector<std::byte> target(8192);
  ASSERT_TRUE(read(*mapped, target));
  EXPECT_TRUE(holds_pattern(target, 1));
}

TEST_P(EitherKind, I3_ThousandOpensAndClosesLeaveNothingOnEitherSide) {
  const ServingProcess source(serving(GetParam(), 65536));
  const RegionDescriptor descriptor{RegionId{source.regions[0].id}, 65536};
  std::vector<std::byte> target(65536);
  const auto cycle = [&] {
    const auto peer = connect(source);
    const auto region = peer->open_region(descriptor, soon()).value();
    ASSERT_TRUE(read(*region, target));
    EXPECT_EQ(transport_->stats().peers, 1u);
    EXPECT_EQ(transport_->stats().remote_regions, 1u);
  };
  cycle();
  TransportStats before = transport_->stats();
  EXPECT_EQ(before.peers + before.remote_regions + before.tickets + before.poisoned_bytes, 0u);
  const uint64_t descriptors = open_descriptors(getpid());
  const uint64_t maps = mappings(getpid());
  for (int i = 0; i < 1000; ++i) cycle();
  EXPECT_EQ(open_descriptors(getpid()), descriptors);
  EXPECT_LE(mappings(getpid()), maps + 2) << "the heap may have grown by a mapping";
  before.read_bytes += 1000 * 65536;
  EXPECT_EQ(transport_->stats(), before);
  // The serving side forgets a connection when its thread next looks.
  const uint64_t served = open_descriptors(source.child.pid());
  const auto last = connect(source);
  EXPECT_LE(open_descriptors(source.child.pid()), served + 1);
  EXPECT_LT(served, 40u);
}

TEST_P(EitherKind, AProcessThatIsKilledIsNoticedAndEveryTicketEnds) {
  const uint64_t size = 32 * kMiB;
  ServingProcess source(serving(GetParam(), size));
  const auto peer = connect(source);
  const auto region = peer->open_region({RegionId{source.regions[0].id}, size}, soon()).value();
  EXPECT_TRUE(peer->alive());
  std::vector<std::byte> target(size);
  const auto copies = pieces(target, kMiB);
  const TicketId ticket = transport_->submit({region.get(), copies, {}}).value();
  while (transport_->progress_bytes(ticket) == 0) std::this_thread::yield();
  source.child.signal(SIGKILL);
  ASSERT_TRUE(transport_->wait_any({&ticket, 1}, soon()));
  const auto outcome = transport_->finish(ticket);
  if (outcome) {
    EXPECT_TRUE(holds_pattern(target, 1));
  } else {
    EXPECT_EQ(outcome.error().code, ErrorCode::kUnavailable);
  }
  EXPECT_EQ(source.child.wait(), -SIGKILL);
  EXPECT_FALSE(peer->alive());
  EXPECT_EQ(peer->open_region({RegionId{1}, size}, soon()).error().code, ErrorCode::kUnavailable);
  const auto later = read(*region, target);
  if (std::string(GetParam()) == "memfd") {
    EXPECT_TRUE(later) << "the memory lives as long as it is mapped";
    EXPECT_TRUE(holds_pattern(target, 1));
  } else {
    EXPECT_EQ(later.error().code, ErrorCode::kUnavailable);
  }
  // What it left in the folder goes with the next transport that is opened there.
  EXPECT_EQ(folder_.files().size(), 1u);
  EXPECT_TRUE(open_shm_transport(folder_.path()));
}

TEST_P(EitherKind, I11_AStoppedProcessIsReadButAnswersNothingByTheDeadline) {
  ServingProcess source(serving(GetParam(), 8192, 2));
  const auto peer = connect(source);
  const auto region = peer->open_region({RegionId{source.regions[0].id}, 8192}, soon()).value();
  source.child.signal(SIGSTOP);
  ASSERT_EQ(waitpid(source.child.pid(), nullptr, WUNTRACED), source.child.pid());
  const RegionDescriptor second{RegionId{source.regions[1].id}, 8192};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(peer->open_region(second, Deadline::after_ms(30)).error().code,
              ErrorCode::kDeadlineExceeded);
  }
  EXPECT_EQ(transport_->connect(source.endpoint, "", Deadline::after_ms(30)).error().code,
            ErrorCode::kDeadlineExceeded);
  EXPECT_TRUE(peer->alive()) << "stopped is not gone";
  std::vector<std::byte> target(8192);
  EXPECT_TRUE(read(*region, target));
  const uint64_t descriptors = open_descriptors(getpid());
  source.child.signal(SIGCONT);
  const auto late = peer->open_region(second, soon()).value();
  ASSERT_TRUE(read(*late, target));
  EXPECT_TRUE(holds_pattern(target, 2));
  EXPECT_EQ(open_descriptors(getpid()), descriptors) << "late answers brought descriptors";
}

TEST_P(EitherKind, AForkedChildIsInertAndTheParentGoesOn) {
  TransportOptions options;
  options.threads = 2;
  auto transport = open_shm_transport(folder_.path(), options).value();
  auto allocated = transport->allocate(4096).value();
  std::vector<std::byte> memory(4096);
  auto registered = transport->register_memory(memory).value();
  const std::string endpoint = transport->endpoint().value();
  const ServingProcess source(serving(GetParam(), 4096));
  auto peer = transport->connect(source.endpoint, "", soon()).value();
  const RegionDescriptor descriptor{RegionId{source.regions[0].id}, 4096};
  auto region = peer->open_region(descriptor, soon()).value();
  std::vector<std::byte> target(4096);
  const auto copies = pieces(target, 4096);
  const TicketId ticket = transport->submit({region.get(), copies, {}}).value();
  ASSERT_TRUE(transport->wait_any({&ticket, 1}, soon()));

  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang is a failure, not a leftover
    const auto gone = [](const auto& result) {
      return !result && result.error().code == ErrorCode::kUnavailable;
    };
    bool inert = gone(transport->allocate(4096)) && gone(transport->register_memory(memory));
    inert = inert && gone(transport->endpoint()) && gone(transport->connect(endpoint, "", soon()));
    inert = inert && gone(transport->submit({region.get(), copies, {}})) && !peer->alive();
    inert = inert && gone(peer->open_region(descriptor, soon())) && gone(transport->finish(ticket));
    inert = inert && transport->poll(ticket) == TicketState::kFailed;
    inert = inert && transport->stats() == TransportStats{};
    region.reset();
    peer.reset();
    allocated.reset();
    registered.reset();
    transport.reset();
    _exit(inert ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(transport->finish(ticket));
  EXPECT_TRUE(peer->alive());
  EXPECT_TRUE(peer->open_region(descriptor, soon()));
  EXPECT_TRUE(transport_->connect(endpoint, "", soon())) << "the socket is still there";
  EXPECT_EQ(transport->stats().regions, 2u);
}

TEST_F(ShmTransportTest, PassesThreeHundredDescriptorsWithoutMixingThemUp) {
  const ServingProcess source(serving("memfd", 1024, 300));
  const auto peer = connect(source);
  std::vector<std::unique_ptr<RemoteRegion>> regions(300);
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (size_t t = 0; t < 4; ++t) {  // threads share a peer
    threads.emplace_back([&, t] {
      for (size_t i = t; i < 300; i += 4) {
        regions[i] = peer->open_region({RegionId{source.regions[i].id}, 1024}, soon()).value();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<std::byte> target(1024);
  for (size_t i = 0; i < 300; ++i) {
    ASSERT_TRUE(read(*regions[i], target));
    EXPECT_TRUE(holds_pattern(target, 1 + i)) << i;
  }
  EXPECT_EQ(transport_->stats().remote_regions, 300u);
}

TEST_F(ShmTransportTest, AsksForItsToken) {
  Serving s = serving("memfd", 4096);
  s.token = "correct-horse";
  const ServingProcess source(s);
  EXPECT_EQ(transport_->connect(source.endpoint, "", soon()).error().code,
            ErrorCode::kPermissionDenied);
  EXPECT_EQ(transport_->connect(source.endpoint, "correct-hors", soon()).error().code,
            ErrorCode::kPermissionDenied);
  const auto peer = transport_->connect(source.endpoint, "correct-horse", soon()).value();
  EXPECT_TRUE(peer->open_region({RegionId{source.regions[0].id}, 4096}, soon()));
  TransportOptions too_long;
  too_long.token.assign(5000, 'x');
  EXPECT_EQ(open_shm_transport(folder_.path(), too_long).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ShmTransportTest, AnotherUserIsTurnedAwayEvenWhereTheFolderIsOpen) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to become another user";
  const ServingProcess source(serving("memfd", 4096));
  const TestFolder theirs;
  ASSERT_EQ(chown(theirs.path().c_str(), 65534, 65534), 0);
  const auto attempt = [&] {
    ChildProcess reader({"read", theirs.path(), source.endpoint, "",
                         std::to_string(source.regions[0].id), "4096", "1", "nobody"});
    const std::string said = reader.hear();
    EXPECT_EQ(reader.wait(), 0);
    return said;
  };
  EXPECT_TRUE(attempt().starts_with("PERMISSION_DENIED")) << "by the mode of the folder";
  ASSERT_EQ(chmod(folder_.path().c_str(), 0711), 0);
  ASSERT_EQ(chmod(source.endpoint.substr(4).c_str(), 0666), 0);
  const std::string said = attempt();
  EXPECT_TRUE(said.starts_with("PERMISSION_DENIED")) << said;
  EXPECT_NE(said.find("user 65534"), std::string::npos) << said;
  ASSERT_EQ(chmod(folder_.path().c_str(), 0700), 0);
}

TEST_F(ShmTransportTest, WhereTheKernelRefusesTheErrorNamesTheRemedy) {
  // A process that may not be traced, read by another one of its user.
  const TestFolder shared;
  if (geteuid() == 0) {
    ASSERT_EQ(chown(shared.path().c_str(), 65534, 65534), 0);
  }
  Serving s = serving("owned", 4096);
  s.folder = shared.path();
  s.as = "hidden";
  const ServingProcess owned(s);
  s.kind = "memfd";
  const ServingProcess sealed(s);
  const auto attempt = [&](const ServingProcess& source) {
    ChildProcess reader({"read", shared.path(), source.endpoint, "",
                         std::to_string(source.regions[0].id), "4096", "1", "nobody"});
    const std::string said = reader.hear();
    EXPECT_EQ(reader.wait(), 0);
    return said;
  };
  const std::string said = attempt(owned);
  EXPECT_TRUE(said.starts_with("PERMISSION_DENIED")) << said;
  for (const char* word :
       {"ptrace_scope", "namespace", "seccomp", "allow_any_tracer", "allocate()"}) {
    EXPECT_NE(said.find(word), std::string::npos) << word << " is not in: " << said;
  }
  EXPECT_EQ(attempt(sealed), "ok") << "sealed memory needs no such right";
}

TEST_F(ShmTransportTest, I13_MemoryThatIsNotThereIsAnError) {
  ServingProcess source(serving("owned", 4 * kMiB));
  const auto peer = connect(source);
  const RegionDescriptor descriptor{RegionId{source.regions[0].id}, 4 * kMiB};
  const auto region = peer->open_region(descriptor, soon()).value();
  source.child.say("unmap 0");
  ASSERT_EQ(source.child.hear(), "ok");
  std::vector<std::byte> target(4 * kMiB);
  const auto outcome = read(*region, target);
  EXPECT_EQ(outcome.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(outcome.error().message.find("process_vm_readv"), std::string::npos);
  EXPECT_EQ(peer->open_region(descriptor, soon()).error().code, ErrorCode::kCorrupt);
}

// A process with the number `pid`, whose memory at `address` holds other bytes; 0 if it cannot be
// had.
pid_t take_number(pid_t pid, uint64_t address, uint64_t size_bytes) {
  clone_args arguments{};
  arguments.exit_signal = SIGCHLD;
  arguments.set_tid = reinterpret_cast<uint64_t>(&pid);
  arguments.set_tid_size = 1;
  const auto child = syscall(SYS_clone3, &arguments, sizeof arguments);
  if (child != 0) return child < 0 ? 0 : static_cast<pid_t>(child);
  void* const wanted = reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  void* memory = mmap(wanted, size_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (memory == MAP_FAILED) _exit(1);
  alarm(60);
  while (true) pause();
}

TEST_F(ShmTransportTest, I8_AnotherProcessWithTheSameNumberIsNotReadForTheFirst) {
  const uint64_t size = 65536;
  ServingProcess source(serving("owned", size));
  const auto peer = connect(source);
  const auto region = peer->open_region({RegionId{source.regions[0].id}, size}, soon()).value();
  std::vector<std::byte> target(size);
  ASSERT_TRUE(read(*region, target));
  // A child of the source keeps its sockets open: they do not tell that it is gone.
  source.child.say("fork");
  const pid_t heir = std::stoi(source.child.hear());
  const pid_t number = source.child.pid();
  source.child.signal(SIGKILL);
  source.child.wait();
  const pid_t impostor = take_number(number, source.regions[0].address, size);
  bool mapped = false;
  for (int i = 0; i < 500 && impostor != 0 && !mapped; ++i) {
    std::byte seen{};
    iovec here{&seen, 1};
    iovec there{reinterpret_cast<void*>(source.regions[0].address), 1};  // NOLINT
    mapped = process_vm_readv(impostor, &here, 1, &there, 1, 0) == 1;
    if (!mapped) poll(nullptr, 0, 10);
  }
  const auto outcome = read(*region, target);
  const bool alive = peer->alive();
  if (impostor != 0) {
    kill(impostor, SIGKILL);
    waitpid(impostor, nullptr, 0);
  }
  kill(heir, SIGKILL);
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().code, ErrorCode::kUnavailable) << outcome.error().message;
  EXPECT_FALSE(alive);
  // Its socket is dead once the heir is.
  for (int i = 0; i < 1000 && !folder_.files().empty(); ++i) {
    ASSERT_TRUE(open_shm_transport(folder_.path()));
    poll(nullptr, 0, 10);
  }
  if (!mapped) GTEST_SKIP() << "no second process with that number could be had (needs root)";
}

TEST_F(ShmTransportTest, ServesItsOwnProcessToo) {
  auto serving_side = open_shm_transport(folder_.path()).value();
  auto region = serving_side->allocate(4096).value();
  region->bytes()[17] = std::byte{42};
  const auto peer = transport_->connect(serving_side->endpoint().value(), "", soon()).value();
  const auto remote = peer->open_region(region->descriptor(), soon()).value();
  std::vector<std::byte> target(4096);
  ASSERT_TRUE(read(*remote, target));
  EXPECT_EQ(target[17], std::byte{42});
}

TEST_F(ShmTransportTest, StatsCountRegionsExactly) {
  auto first = transport_->allocate(5000).value();
  std::vector<std::byte> memory(700);
  auto second = transport_->register_memory(memory).value();
  EXPECT_NE(first->descriptor().id, second->descriptor().id);
  EXPECT_EQ(transport_->stats().regions, 2u);
  EXPECT_EQ(transport_->stats().region_bytes, 5700u);
  first.reset();
  EXPECT_EQ(transport_->stats().region_bytes, 700u);
  second.reset();
  EXPECT_EQ(transport_->stats(), TransportStats{});
  EXPECT_EQ(transport_->register_memory({}).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(transport_->allocate(0).error().code, ErrorCode::kInvalidArgument);
  EXPECT_EQ(transport_->allocate(uint64_t{1} << 60).error().code, ErrorCode::kResourceExhausted);
}

TEST_F(ShmTransportTest, ARegionOfAnotherTransportIsRefused) {
  const ServingProcess source(serving("memfd", 4096));
  const auto other = open_shm_transport(folder_.path()).value();
  const auto peer = other->connect(source.endpoint, "", soon()).value();
  const auto region = peer->open_region({RegionId{source.regions[0].id}, 4096}, soon()).value();
  std::vector<std::byte> target(4096);
  EXPECT_EQ(transport_->submit({region.get(), pieces(target, 4096), {}}).error().code,
            ErrorCode::kInvalidArgument);
  EXPECT_EQ(transport_->submit({nullptr, {}, {}}).error().code, ErrorCode::kInvalidArgument);
}

TEST_F(ShmTransportTest, OpensNothingInAFolderThatIsNotPrivate) {
  const TestFolder open_folder;
  ASSERT_EQ(chmod(open_folder.path().c_str(), 0755), 0);
  EXPECT_EQ(open_shm_transport(open_folder.path()).error().code, ErrorCode::kPermissionDenied);
  EXPECT_EQ(open_shm_transport("/nonexistent").error().code, ErrorCode::kNotFound);
}

}  // namespace
}  // namespace transfuse::shm

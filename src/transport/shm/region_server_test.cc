// The serving thread against peers that lie, flood, stall or say nonsense.
#include "transport/shm/region_server.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/child_role.h"
#include "transport/shm/connection.h"
#include "transport/shm/fd_message.h"
#include "transport/shm/runtime_folder.h"
#include "transport/shm/shared_memory.h"
#include "transport/shm/wire.h"

namespace transfuse::shm {
namespace {

constexpr int64_t kLongMs = 20000;

// A server of this process with one sealed region of 4,096 bytes.
class RegionServerTest : public testing::Test {
 protected:
  void SetUp() override {
    memory_ = create_shared_memory(4096).value();
    region_ = table_.add(
        {.fd = memory_.fd.get(), .address = 0, .size_bytes = 4096, .kind = RegionKind::kMemfd});
    auto runtime = RuntimeFolder::open(folder_.path()).value();
    server_ = RegionServer::start(runtime.listen().value(), table_, "secret").value();
    endpoint_ = runtime.endpoint();
  }
  void TearDown() override {
    server_.reset();
    table_.remove(region_);
  }

  UniqueFd raw() { return connect_socket(endpoint_, Deadline::after_ms(kLongMs)).value(); }
  static bool readable(const UniqueFd& socket) {
    pollfd wait{socket.get(), POLLIN, 0};
    return poll(&wait, 1, kLongMs) == 1;
  }
  // What the server says next; nullopt once it has closed the connection.
  static std::optional<Refused> refusal(const UniqueFd& socket, std::string& storage) {
    storage.resize(kMaxMessageBytes);
    EXPECT_TRUE(readable(socket));
    const Received received = receive_message(socket.get(), storage, true);
    if (received.transfer != Transfer::kDone) return std::nullopt;
    return std::get<Refused>(decode(received.bytes).value().body);
  }
  static bool closed(const UniqueFd& socket) {
    std::string buffer(kMaxMessageBytes, '\0');
    while (readable(socket)) {
      const Received received = receive_message(socket.get(), buffer, true);
      if (received.transfer == Transfer::kClosed) return true;
    }
    return false;
  }
  void expect_it_still_serves() {
    auto connection = Connection::open(endpoint_, "secret", Deadline::after_ms(kLongMs)).value();
    const auto offered = connection->open_region(region_, Deadline::after_ms(kLongMs)).value();
    EXPECT_EQ(offered.size_bytes, 4096u);
    EXPECT_TRUE(map_peer_memory(offered.fd, 4096));
  }

  TestFolder folder_;
  SharedMemory memory_;
  RegionTable table_;
  RegionId region_{};
  std::unique_ptr<RegionServer> server_;
  std::string endpoint_;
};

TEST_F(RegionServerTest, HandsNothingOutBeforeTheRightToken) {
  for (const std::string token : {"", "secre", "secrets", "SECRET"}) {
    const auto connection = Connection::open(endpoint_, token, Deadline::after_ms(kLongMs));
    ASSERT_FALSE(connection);
    EXPECT_EQ(connection.error().code, ErrorCode::kPermissionDenied);
    EXPECT_EQ(connection.error().message.find("secret"), std::string::npos) << "keeps it a secret";
  }
  const UniqueFd socket = raw();
  std::string storage;
  ASSERT_EQ(send_message(socket.get(), encode({1, OpenRegion{static_cast<uint64_t>(region_)}}), -1),
            Transfer::kDone);
  EXPECT_EQ(refusal(socket, storage)->code, ErrorCode::kCorrupt);
  EXPECT_TRUE(closed(socket));
  expect_it_still_serves();
}

TEST_F(RegionServerTest, TellsAnotherProtocolVersionApart) {
  const UniqueFd socket = raw();
  std::string storage;
  send_message(socket.get(), encode({1, Hello{kWireVersion + 1, "secret"}}), -1);
  EXPECT_EQ(refusal(socket, storage)->code, ErrorCode::kUnsupported);
  EXPECT_TRUE(closed(socket));
}

TEST_F(RegionServerTest, I13_SurvivesRandomBytesOnItsSocket) {
  Random random(7);
  for (int round = 0; round < 300; ++round) {
    const UniqueFd socket = raw();
    if (random.chance(0.5)) {
      send_message(socket.get(), encode({1, Hello{kWireVersion, "secret"}}), -1);
    }
    for (uint64_t messages = 1 + random.below(3); messages > 0; --messages) {
      std::string bytes = encode({random.next(), OpenRegion{random.next()}});
      if (random.chance(0.3)) bytes.assign(1 + random.below(2 * kMaxMessageBytes), '\0');
      for (uint64_t flips = random.below(20); flips > 0; --flips) {
        bytes[random.below(bytes.size())] = static_cast<char>(random.next());
      }
      send_message(socket.get(), bytes, -1);
    }
  }
  expect_it_still_serves();
}

TEST_F(RegionServerTest, KeepsNoDescriptorThatAPeerSends) {
  const auto other = Connection::open(endpoint_, "secret", Deadline::after_ms(kLongMs)).value();
  const uint64_t before = open_descriptors(getpid());
  const UniqueFd socket = raw();
  const UniqueFd gift(open("/dev/null", O_RDONLY | O_CLOEXEC));
  send_message(socket.get(), encode({1, Hello{kWireVersion, "secret"}}), gift.get());
  ASSERT_TRUE(readable(socket));
  // One for each end of the socket and the gift itself.
  EXPECT_EQ(open_descriptors(getpid()), before + 3);
}

TEST_F(RegionServerTest, DropsAPeerThatDoesNotReadItsAnswersAndServesTheOthers) {
  const UniqueFd socket = raw();
  send_message(socket.get(), encode({1, Hello{kWireVersion, "secret"}}), -1);
  const std::string request = encode({2, OpenRegion{static_cast<uint64_t>(region_)}});
  Transfer sent = Transfer::kDone;
  for (int i = 0; i < 1000000 && sent != Transfer::kClosed; ++i) {
    sent = send_message(socket.get(), request, -1);
  }
  EXPECT_EQ(sent, Transfer::kClosed);
  expect_it_still_serves();
}

TEST_F(RegionServerTest, SilentConnectionsDoNotKeepOthersOut) {
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  if (limit.rlim_max < 2000) GTEST_SKIP() << "needs 2,000 descriptors (ulimit -n)";
  limit.rlim_cur = std::max<rlim_t>(limit.rlim_cur, 2000);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
  std::vector<UniqueFd> silent;
  silent.reserve(600);
  for (int i = 0; i < 600; ++i) silent.push_back(raw());
  std::string storage;
  EXPECT_EQ(refusal(silent.back(), storage)->code, ErrorCode::kResourceExhausted);
  // They are thrown out after the time to say hello, and then there is room again.
  Deadline deadline = Deadline::after_ms(kLongMs);
  while (true) {
    auto connection = Connection::open(endpoint_, "secret", deadline);
    if (connection) break;
    ASSERT_EQ(connection.error().code, ErrorCode::kResourceExhausted);
    ASSERT_FALSE(deadline.passed());
    poll(nullptr, 0, 50);
  }
  expect_it_still_serves();
}

TEST_F(RegionServerTest, EndsAtOnceWithPeersConnected) {
  auto connection = Connection::open(endpoint_, "secret", Deadline::after_ms(kLongMs)).value();
  EXPECT_TRUE(connection->alive());
  server_.reset();
  EXPECT_FALSE(connection->alive());
  EXPECT_EQ(connection->open_region(region_, Deadline::after_ms(kLongMs)).error().code,
            ErrorCode::kUnavailable);
  EXPECT_TRUE(folder_.files().empty());
}

// The other side: a serving process that answers an OpenRegion with whatever `answer` sends.
using Answer = std::function<void(int socket, uint64_t request)>;

// What `ask` makes of the connection to it.
template <class Ask>
auto ask_a_liar(const Answer& answer, const Ask& ask) {
  const TestFolder folder;
  auto runtime = RuntimeFolder::open(folder.path()).value();
  const auto listener = runtime.listen().value();
  std::thread liar([&] {
    pollfd wait{listener.fd(), POLLIN, 0};
    poll(&wait, 1, kLongMs);
    const UniqueFd socket(accept4(listener.fd(), nullptr, nullptr, SOCK_CLOEXEC));
    std::array<char, kMaxMessageBytes> buffer;
    for (int i = 0; i < 2; ++i) {
      wait = {socket.get(), POLLIN, 0};
      poll(&wait, 1, kLongMs);
      const Received received = receive_message(socket.get(), buffer, false);
      if (received.transfer != Transfer::kDone) return;
      const uint64_t request = decode(received.bytes).value().request;
      if (i == 0) {
        send_message(socket.get(), encode({request, Welcome{}}), -1);
      } else {
        answer(socket.get(), request);
      }
    }
  });
  auto outcome = [&]() -> decltype(ask(std::declval<Connection&>())) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        const auto connection,
        Connection::open(runtime.endpoint(), "", Deadline::after_ms(kLongMs)));
    return ask(*connection);
  }();
  liar.join();
  return outcome;
}

Result<std::unique_ptr<Mapping>> open_from(const Answer& answer) {
  return ask_a_liar(answer, [](Connection& connection) -> Result<std::unique_ptr<Mapping>> {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto offered,
                               connection.open_region(RegionId{1}, Deadline::after_ms(kLongMs)));
    TRANSFUSE_ASSIGN_OR_RETURN(auto mapping, map_peer_memory(offered.fd, 4096));
    return std::make_unique<Mapping>(std::move(mapping));
  });
}

Result<OfferedRegion> handle_from(const Answer& answer) {
  return ask_a_liar(answer, [](Connection& connection) {
    return connection.open_handle(RegionId{1}, 0, Deadline::after_ms(kLongMs));
  });
}

TEST(ReaderOfALiar, I13_TakesAHandleOnlyWithItsDescriptorAndSize) {
  const auto memory = create_shared_memory(4096).value();
  const uint64_t before = open_descriptors(getpid());
  const auto opened = [](uint64_t request, RegionKind kind, uint64_t size_bytes) {
    return encode({request, RegionOpened{kind, size_bytes, 0}});
  };
  const int fd = memory.fd.get();
  EXPECT_TRUE(handle_from(
      [&](int s, uint64_t r) { send_message(s, opened(r, RegionKind::kHandle, 4096), fd); }));
  const std::vector<std::pair<const char*, Answer>> answers = {
      {"no descriptor",
       [&](int s, uint64_t r) { send_message(s, opened(r, RegionKind::kHandle, 4096), -1); }},
      {"no bytes",
       [&](int s, uint64_t r) { send_message(s, opened(r, RegionKind::kHandle, 0), fd); }},
      {"memory", [&](int s, uint64_t r) { send_message(s, opened(r, RegionKind::kMemfd, 9), fd); }},
      {"a welcome", [&](int s, uint64_t r) { send_message(s, encode({r, Welcome{}}), fd); }},
  };
  for (const auto& [name, answer] : answers) {
    const auto handle = handle_from(answer);
    ASSERT_FALSE(handle) << name;
    EXPECT_EQ(handle.error().code, ErrorCode::kCorrupt) << name;
  }
  EXPECT_FALSE(open_from([&](int s, uint64_t r) {
    send_message(s, opened(r, RegionKind::kHandle, 4096), fd);
  })) << "a handle is no region";
  EXPECT_EQ(open_descriptors(getpid()), before);
}

TEST(ReaderOfALiar, TakesAnHonestAnswer) {
  const auto memory = create_shared_memory(4096).value();
  EXPECT_TRUE(open_from([&](int socket, uint64_t request) {
    send_message(socket, encode({request, RegionOpened{RegionKind::kMemfd, 4096, 0}}),
                 memory.fd.get());
  }));
}

TEST(ReaderOfALiar, I13_RefusesEveryWrongAnswer) {
  const auto memory = create_shared_memory(4096).value();
  const auto longer = create_shared_memory(8192).value();
  const UniqueFd unsealed(memfd_create("unsealed", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(unsealed.get(), 4096), 0);
  const auto opened = [](uint64_t request) {
    return encode({request, RegionOpened{RegionKind::kMemfd, 4096, 0}});
  };
  const std::vector<std::pair<const char*, Answer>> answers = {
      {"no descriptor", [&](int s, uint64_t r) { send_message(s, opened(r), -1); }},
      {"unsealed", [&](int s, uint64_t r) { send_message(s, opened(r), unsealed.get()); }},
      {"longer", [&](int s, uint64_t r) { send_message(s, opened(r), longer.fd.get()); }},
      {"its own socket", [&](int s, uint64_t r) { send_message(s, opened(r), s); }},
      {"a welcome", [&](int s, uint64_t r) { send_message(s, encode({r, Welcome{}}), -1); }},
      {"caller-owned with a descriptor",
       [&](int s, uint64_t r) {
         send_message(s, encode({r, RegionOpened{RegionKind::kCallerOwned, 4096, 0x1000}}),
                      memory.fd.get());
       }},
      {"nonsense", [&](int s, uint64_t) { send_message(s, "nonsense", memory.fd.get()); }},
      {"too long",
       [&](int s, uint64_t) { send_message(s, std::string(kMaxMessageBytes + 1, 'x'), -1); }},
  };
  for (const auto& [name, answer] : answers) {
    const uint64_t before = open_descriptors(getpid());
    const auto mapping = open_from(answer);
    ASSERT_FALSE(mapping) << name;
    EXPECT_EQ(mapping.error().code, ErrorCode::kCorrupt) << name << mapping.error().message;
    EXPECT_EQ(open_descriptors(getpid()), before) << name;
  }
}

TEST(ReaderOfALiar, I13_ClosesEveryDescriptorOfAMessageWithTwo) {
  const auto memory = create_shared_memory(4096).value();
  const uint64_t before = open_descriptors(getpid());
  const auto mapping = open_from([&](int socket, uint64_t request) {
    const std::string bytes = encode({request, RegionOpened{RegionKind::kMemfd, 4096, 0}});
    iovec data{const_cast<char*>(bytes.data()), bytes.size()};
    alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
    msghdr header{};
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* part = CMSG_FIRSTHDR(&header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(2 * sizeof(int));
    const int two[2] = {memory.fd.get(), memory.fd.get()};
    std::memcpy(CMSG_DATA(part), two, sizeof two);
    EXPECT_GT(sendmsg(socket, &header, MSG_NOSIGNAL), 0);
  });
  ASSERT_FALSE(mapping);
  EXPECT_EQ(mapping.error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(open_descriptors(getpid()), before);
}

TEST(ReaderOfALiar, SeesAPeerThatHangsUpInsteadOfAnswering) {
  EXPECT_EQ(open_from([](int, uint64_t) {}).error().code, ErrorCode::kUnavailable);
}

}  // namespace
}  // namespace transfuse::shm

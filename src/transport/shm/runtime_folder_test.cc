// Whose folder it must be, which sockets are stale, and who may connect.
#include "transport/shm/runtime_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <ctime>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transport/shm/child_role.h"

namespace transfuse::shm {
namespace {

// A socket file that nobody listens on, as a killed process leaves it.
void leave_socket(const std::string& path) {
  const UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  ASSERT_LT(path.size(), sizeof address.sun_path);
  std::strcpy(address.sun_path, path.c_str());
  ASSERT_EQ(bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(listen(fd.get(), 1), 0);
}

TEST(RuntimeFolder, RefusesAFolderThatOthersMayEnter) {
  const TestFolder folder;
  for (const mode_t mode : {0755u, 0701u, 0770u, 0500u}) {
    ASSERT_EQ(chmod(folder.path().c_str(), mode), 0);
    const auto opened = RuntimeFolder::open(folder.path());
    ASSERT_FALSE(opened);
    EXPECT_EQ(opened.error().code, ErrorCode::kPermissionDenied);
    EXPECT_NE(opened.error().message.find("expected owner"), std::string::npos);
    EXPECT_NE(opened.error().message.find(fmt::format("{:04o}", mode)), std::string::npos);
  }
  ASSERT_EQ(chmod(folder.path().c_str(), 0700), 0);
  EXPECT_TRUE(RuntimeFolder::open(folder.path()));
}

TEST(RuntimeFolder, RefusesAFolderOfAnotherUser) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root to give a folder away";
  const TestFolder folder;
  ASSERT_EQ(chown(folder.path().c_str(), 65534, 65534), 0);
  EXPECT_EQ(RuntimeFolder::open(folder.path()).error().code, ErrorCode::kPermissionDenied);
}

TEST(RuntimeFolder, IsMadeAgainIfItWasRemovedBeforeAnybodyListened) {
  const TestFolder parent;
  const std::string path = parent.path() + "/folder";
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  auto opened = RuntimeFolder::open(path);
  ASSERT_TRUE(opened);
  ASSERT_EQ(rmdir(path.c_str()), 0);
  {
    const auto listener = opened->listen();
    ASSERT_TRUE(listener) << listener.error().to_string();
    EXPECT_TRUE(connect_socket(opened->endpoint(), Deadline::after_ms(1000)));
  }
  EXPECT_TRUE(std::filesystem::is_empty(path));
  // Not where somebody else has put something in its place.
  ASSERT_EQ(rmdir(path.c_str()), 0);
  ASSERT_EQ(mkdir(path.c_str(), 0755), 0);
  EXPECT_EQ(opened->listen().error().code, ErrorCode::kPermissionDenied);
  ASSERT_EQ(rmdir(path.c_str()), 0);
}

TEST(RuntimeFolder, SaysThatAMissingFolderIsMissing) {
  EXPECT_EQ(RuntimeFolder::open("/nonexistent/folder").error().code, ErrorCode::kNotFound);
  EXPECT_EQ(RuntimeFolder::open("/proc/self/exe").error().code, ErrorCode::kNotFound);
}

TEST(RuntimeFolder, TheSocketIsForItsOwnerOnlyAndGoesWithTheListener) {
  const TestFolder folder;
  auto runtime = RuntimeFolder::open(folder.path()).value();
  {
    const auto listener = runtime.listen().value();
    ASSERT_EQ(folder.files().size(), 1u);
    struct stat status{};
    ASSERT_EQ(stat((folder.path() + "/" + folder.files()[0]).c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 0777, 0600u);
    EXPECT_TRUE(connect_socket(runtime.endpoint(), Deadline::after_ms(1000)));
  }
  EXPECT_TRUE(folder.files().empty());
}

TEST(RuntimeFolder, RemovesSocketsOfDeadProcessesAndKeepsLiveOnes) {
  const TestFolder folder;
  leave_socket(folder.path() + "/tf-1-dead.sock");
  leave_socket(folder.path() + fmt::format("/tf-{}-reused.sock", getpid()));
  leave_socket(folder.path() + "/tf-1-young.sock.new");
  leave_socket(folder.path() + "/somebody-else.sock");
  {
    auto first = RuntimeFolder::open(folder.path()).value();
    const auto listener = first.listen().value();
    const auto second = RuntimeFolder::open(folder.path());
    ASSERT_TRUE(second);
    EXPECT_EQ(folder.files().size(), 3u) << "live, unfinished, not ours";
    EXPECT_TRUE(connect_socket(first.endpoint(), Deadline::after_ms(1000)));
  }
  // Whoever was to finish it has had its time.
  const std::string unfinished = folder.path() + "/tf-1-young.sock.new";
  const timespec old[2] = {{1000000000, 0}, {1000000000, 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, unfinished.c_str(), old, 0), 0);
  ASSERT_TRUE(RuntimeFolder::open(folder.path()));
  EXPECT_EQ(folder.files(), std::vector<std::string>{"somebody-else.sock"});
  std::filesystem::remove(folder.path() + "/somebody-else.sock");
}

TEST(RuntimeFolder, WorksWhereThePathIsLongerThanASocketAddress) {
  const TestFolder folder;
  const std::string deep = folder.path() + "/" + std::string(120, 'd');
  ASSERT_EQ(mkdir(deep.c_str(), 0700), 0);
  {
    auto runtime = RuntimeFolder::open(deep).value();
    const auto listener = runtime.listen().value();
    ASSERT_TRUE(RuntimeFolder::open(deep)) << "must not take it for a dead one";
    EXPECT_TRUE(connect_socket(runtime.endpoint(), Deadline::after_ms(1000)));
  }
  EXPECT_TRUE(std::filesystem::is_empty(deep));
  std::filesystem::remove(deep);
}

TEST(RuntimeFolder, ConnectTellsAWrongEndpointFromOneThatIsGone) {
  const auto code = [](std::string_view endpoint) {
    return connect_socket(endpoint, Deadline::after_ms(100)).error().code;
  };
  EXPECT_EQ(code(""), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("shm:"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("shm:relative/path"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("tcp://127.0.0.1:1"), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code(std::string("shm:/a\0b", 8)), ErrorCode::kInvalidArgument);
  EXPECT_EQ(code("shm:/a/" + std::string(200, 'x')), ErrorCode::kUnavailable);
  EXPECT_EQ(code("shm:/nonexistent/tf-1-x.sock"), ErrorCode::kUnavailable);
}

TEST(RuntimeFolder, AFullQueueOfConnectionsEndsAtTheDeadline) {
  const TestFolder folder;
  auto runtime = RuntimeFolder::open(folder.path()).value();
  const auto listener = runtime.listen().value();
  std::vector<UniqueFd> waiting;
  while (true) {
    auto fd = connect_socket(runtime.endpoint(), Deadline::after_ms(20));
    if (!fd) {
      EXPECT_EQ(fd.error().code, ErrorCode::kDeadlineExceeded);
      break;
    }
    waiting.push_back(std::move(fd).value());
    ASSERT_LT(waiting.size(), 10000u);
  }
}

}  // namespace
}  // namespace transfuse::shm

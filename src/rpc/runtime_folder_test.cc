// Tests of where the embedded coordinator lives, and of its lock.
#include "rpc/runtime_folder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>

#include "rpc/embedded.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// Sets an environment variable for one test.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    ::setenv(name, value.c_str(), 1);
  }
  ~Variable() { ::setenv(name_, before_.c_str(), 1); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::string before_;
};

class RuntimeFolder : public testing::Test {
 protected:
  RuntimeFolder() {
    std::string pattern = "/tmp/tf-folder-XXXXXX";
    folder_ = ::mkdtemp(pattern.data());
  }
  ~RuntimeFolder() override { std::filesystem::remove_all(folder_); }
  std::string folder_;
};

TEST_F(RuntimeFolder, LiesInTheRunTimeDirectoryOfTheUser) {
  const Variable xdg("XDG_RUNTIME_DIR", folder_);
  EXPECT_EQ(runtime_paths("", "policy")->socket, folder_ + "/transfuse/policy.sock");
}

TEST_F(RuntimeFolder, IsInTmpWhereThatDirectoryIsMissingOrTooDeepForASocket) {
  const std::string fallback = "/tmp/transfuse-" + std::to_string(getuid());
  const Variable missing("XDG_RUNTIME_DIR", folder_ + "/missing");
  EXPECT_EQ(runtime_paths("", "policy")->folder, fallback);
  const std::string deep = folder_ + "/" + std::string(90, 'd');
  std::filesystem::create_directory(deep);
  const Variable too_deep("XDG_RUNTIME_DIR", deep);
  EXPECT_EQ(runtime_paths("", "policy")->folder, fallback);
}

TEST_F(RuntimeFolder, AJobNameThatIsNoFileNameIsReplacedByItsHash) {
  const auto long_name = runtime_paths(folder_, std::string(500, 'x')).value();
  EXPECT_THAT(long_name.socket, StartsWith(folder_ + "/job-"));
  EXPECT_LE(long_name.socket.size(), max_socket_path_bytes());
  EXPECT_THAT(runtime_paths(folder_, "../escape")->socket, StartsWith(folder_ + "/job-"));
  EXPECT_NE(runtime_paths(folder_, "a/b")->socket, runtime_paths(folder_, "a/c")->socket);
}

TEST_F(RuntimeFolder, AChosenFolderThatIsTooDeepOrRelativeIsAnError) {
  const auto deep = runtime_paths(folder_ + "/" + std::string(90, 'd'), "policy");
  EXPECT_EQ(deep.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(deep.error().message, HasSubstr("shorter run-time folder"));
  EXPECT_EQ(runtime_paths("run", "policy").error().code, ErrorCode::kInvalidArgument);
}

TEST_F(RuntimeFolder, AFolderThatIsALinkOrOpenToOthersIsRefused) {
  std::filesystem::create_directory_symlink("/tmp", folder_ + "/link");
  EXPECT_EQ(prepare_folder(folder_ + "/link").error().code, ErrorCode::kPermissionDenied);
  std::filesystem::create_directory(folder_ + "/open");
  ::chmod((folder_ + "/open").c_str(), 0750);
  EXPECT_EQ(prepare_folder(folder_ + "/open").error().code, ErrorCode::kPermissionDenied);
  EXPECT_TRUE(prepare_folder(folder_ + "/new"));
  EXPECT_TRUE(prepare_folder(folder_ + "/new"));
}

TEST_F(RuntimeFolder, I11_TheLockIsWaitedForToTheDeadline) {
  const auto paths = runtime_paths(folder_, "policy").value();
  const auto held = FolderLock::take(paths, Deadline::after_ms(10000));
  ASSERT_TRUE(held);
  const auto second = FolderLock::take(paths, Deadline::after_ms(30));
  EXPECT_EQ(second.error().code, ErrorCode::kDeadlineExceeded);
}

TEST_F(RuntimeFolder, ALockWhoseFileWasRemovedIsTakenOnTheNewFile) {
  const auto paths = runtime_paths(folder_ + "/run", "policy").value();
  auto held =
      std::make_unique<FolderLock>(FolderLock::take(paths, Deadline::after_ms(10000)).value());
  std::thread other([&] {
    const auto lock = FolderLock::take(paths, Deadline::after_ms(10000));
    EXPECT_TRUE(lock);
    EXPECT_TRUE(std::filesystem::exists(paths.lock)) << "a lock on a file that others see, too";
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  held->remove_files(paths);
  held.reset();
  other.join();
}

TEST_F(RuntimeFolder, TheProgramThatServesIsTheNamedOneOrAnError) {
  const Variable none("TRANSFUSE_SERVE_COMMAND", "");
  EXPECT_EQ(find_serve_program("/bin/true", folder_).value(), "/bin/true");
  EXPECT_EQ(find_serve_program("/bin", folder_).error().code, ErrorCode::kNotFound) << "a folder";
  const Variable wrong("TRANSFUSE_SERVE_COMMAND", folder_ + "/nothing");
  EXPECT_THAT(find_serve_program("/bin/true", folder_).error().message,
              HasSubstr("TRANSFUSE_SERVE_COMMAND names"));
}

TEST_F(RuntimeFolder, TheProgramThatServesLiesBesideTheLibraryOrInThePath) {
  const Variable none("TRANSFUSE_SERVE_COMMAND", "");
  const std::string beside = folder_ + "/lib";
  std::filesystem::create_directories(beside + "/bin");
  std::filesystem::create_directories(folder_ + "/path");
  const Variable path("PATH", "/nowhere::" + folder_ + "/path");
  const auto nowhere = find_serve_program("", beside);
  EXPECT_EQ(nowhere.error().code, ErrorCode::kNotFound);
  for (const std::string& place :
       {std::string("TRANSFUSE_SERVE_COMMAND"), std::string("serve_command"), beside + "/transfuse",
        beside + "/bin/transfuse", std::string("$PATH")}) {
    EXPECT_THAT(nowhere.error().message, HasSubstr(place));
  }
  for (const std::string& place : {folder_ + "/path", beside + "/bin", beside}) {
    std::filesystem::create_symlink("/bin/true", place + "/transfuse");
    EXPECT_EQ(find_serve_program("", beside).value(), place + "/transfuse");
  }
}

}  // namespace
}  // namespace transfuse

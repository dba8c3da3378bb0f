// Peers to read from: in this process, or a program of their own that can be stopped and killed.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>

#include "base/unique_fd.h"
#include "conformance/backends.h"
#include "conformance/peer_commands.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

extern char** environ;

namespace transfuse::conformance {

// A folder of mode 0700 that goes with the object.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string path = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    TRANSFUSE_CHECK(mkdtemp(path.data()) != nullptr);
    path_ = path;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Used from one thread.
class TestPeer {
 public:
  virtual ~TestPeer() = default;
  virtual std::string ask(const std::string& command) = 0;  // "" if the peer is gone
  virtual pid_t pid() const { return 0; }

  std::string endpoint() { return ask("endpoint").substr(3); }
  RegionDescriptor allocate(uint64_t size_bytes, uint64_t seed) {
    return descriptor(ask("allocate " + std::to_string(size_bytes) + " " + std::to_string(seed)));
  }
  RegionDescriptor register_memory(uint64_t size_bytes, uint64_t seed) {
    return descriptor(ask("register " + std::to_string(size_bytes) + " " + std::to_string(seed)));
  }
  void fill(const RegionDescriptor& region, uint64_t seed) {
    EXPECT_EQ(ask("fill " + std::to_string(static_cast<uint64_t>(region.id)) + " " +
                  std::to_string(seed)),
              "ok");
  }
  void drop(const RegionDescriptor& region) {
    EXPECT_EQ(ask("drop " + std::to_string(static_cast<uint64_t>(region.id))), "ok");
  }

 private:
  static RegionDescriptor descriptor(const std::string& answer) {
    std::istringstream words(answer);
    std::string status;
    uint64_t id = 0;
    uint64_t size_bytes = 0;
    words >> status >> id >> size_bytes;
    EXPECT_EQ(status, "ok") << answer;
    return {RegionId{id}, size_bytes};
  }
};

// A transport of its own in this process.
class InsidePeer final : public TestPeer {
 public:
  explicit InsidePeer(const BackendOptions& options)
      : commands_(open_backend(options).value(), options.backend) {}
  std::string ask(const std::string& command) override { return commands_.answer(command); }

 private:
  PeerCommands commands_;
};

// A process started from a program file: nothing of this process' threads and locks is in it.
class ProcessPeer final : public TestPeer {
 public:
  explicit ProcessPeer(const BackendOptions& options) {
    std::array<int, 2> to{};
    std::array<int, 2> from{};
    TRANSFUSE_CHECK(pipe2(to.data(), O_CLOEXEC) == 0 && pipe2(from.data(), O_CLOEXEC) == 0);
    const UniqueFd its_input(to[0]);
    const UniqueFd its_output(from[1]);
    input_.reset(to[1]);
    output_.reset(from[0]);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, its_input.get(), STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, its_output.get(), STDOUT_FILENO);
    std::string program = TRANSFUSE_PEER_PROGRAM;
    BackendOptions copy = options;
    char* arguments[] = {program.data(), copy.backend.data(), copy.folder.data(), copy.token.data(),
                         nullptr};
    const int error = posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    TRANSFUSE_CHECK(error == 0);
  }
  ~ProcessPeer() override {
    if (pid_ <= 0) return;
    resume();  // before it ends: a SIGCONT in the middle of a leak check loses its SIGSTOP for good
    input_.reset();
    for (int i = 0; i < 6000; ++i) {
      if (waitpid(pid_, nullptr, WNOHANG) == pid_) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    ADD_FAILURE() << "the peer did not end when its input did";
    kill();
  }

  std::string ask(const std::string& command) override {
    const std::string line = command + "\n";
    if (write(input_.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
      return "";
    }
    std::string answer;
    char c = 0;
    while (read(output_.get(), &c, 1) == 1 && c != '\n') answer.push_back(c);
    return answer;
  }
  pid_t pid() const override { return pid_; }

  void stop() const {
    ::kill(pid_, SIGSTOP);
    int status = 0;
    waitpid(pid_, &status, WUNTRACED);
    EXPECT_TRUE(WIFSTOPPED(status));
  }
  void resume() const { ::kill(pid_, SIGCONT); }
  // Returns when it is gone.
  void kill() {
    ::kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

 private:
  pid_t pid_ = -1;
  UniqueFd input_;
  UniqueFd output_;
};

}  // namespace transfuse::conformance

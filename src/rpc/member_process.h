// For tests: members in processes of their own, driven over pipes, and the world around them.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"

namespace transfuse {

inline Layout small_layout(int64_t rows = 4) {
  LayoutBuilder builder;
  const auto tensor = builder.tensor({"w", Dtype::kF32, Dims{rows}});
  const auto parameter = builder.parameter({"w", Dtype::kF32, rows});
  builder.tile(tensor, Box::whole(Dims{rows}), parameter, 0);
  return builder.build().value();
}

inline Result<MemberId> join_as(Control& control, MemberRole role, const std::string& name,
                                uint32_t source_count = 1, uint64_t incarnation = 0,
                                uint32_t group_size = 0) {
  const Layout layout = small_layout();
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.role = role;
  registration.model = "policy";
  registration.name = name;
  registration.source_count = source_count;
  registration.incarnation = incarnation != 0 ? incarnation : static_cast<uint64_t>(getpid());
  registration.layout = layout.digest();
  registration.descriptor = "at " + name;
  if (group_size != 0) registration.group = "engine";
  registration.group_size = group_size;
  return control.join(registration);
}

// As a publisher in place writes: over the version before.
inline WriteRequest in_place(uint64_t version) {
  return {.version = version, .replaces = {version - 1}};
}

inline Offer offer(uint64_t version) {
  return {.version = version, .generation = {.incarnation = 9, .counter = 2 * version}};
}

inline Result<void> write_version(Control& control, MemberId source, uint64_t version) {
  TRANSFUSE_RETURN_IF_ERROR(
      control.begin_write(source, in_place(version), Deadline::after_ms(20000)));
  return control.publish(source, offer(version));
}

// Waits for what other processes do; generous, because a slow machine is no failure.
inline bool eventually(const std::function<bool()>& condition, int64_t limit_ms = 20000) {
  const Deadline limit = Deadline::after_ms(limit_ms);
  while (!condition()) {
    if (limit.passed()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

// A zombie has ended, whenever its parent takes note.
inline bool process_exists(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string id, name, state;
  return bool{stat >> id >> name >> state} && state != "Z";
}

// A process that was stopped, until the end of this object: a test that fails leaves none behind.
class Stopped {
 public:
  explicit Stopped(pid_t pid) : pid_(pid) { ::kill(pid, SIGSTOP); }
  ~Stopped() { ::kill(pid_, SIGCONT); }
  Stopped(const Stopped&) = delete;
  Stopped& operator=(const Stopped&) = delete;

  // Waits until every thread of it stands still: the signal itself does not wait.
  bool still() const {
    return eventually([this] {
      for (const auto& thread :
           std::filesystem::directory_iterator("/proc/" + std::to_string(pid_) + "/task")) {
        std::ifstream stat(thread.path() / "stat");
        const std::string line(std::istreambuf_iterator<char>(stat), {});
        if (line.find(") T ") == std::string::npos) return false;
      }
      return true;
    });
  }

 private:
  const pid_t pid_;
};

// This test program again, as `program <arguments>`: a coordinator or a member (see
// process_main_test.cc). Killed at the end of the test.
class Process {
 public:
  Process(const std::string& folder, const std::vector<std::string>& arguments) {
    std::array<int, 2> to{}, from{};
    EXPECT_EQ(::pipe2(to.data(), O_CLOEXEC), 0);
    EXPECT_EQ(::pipe2(from.data(), O_CLOEXEC), 0);
    std::vector<std::string> all{std::filesystem::canonical("/proc/self/exe")};
    all.insert(all.end(), arguments.begin(), arguments.end());
    std::vector<char*> argv;
    argv.reserve(all.size());
    for (std::string& each : all) argv.push_back(each.data());
    argv.push_back(nullptr);
    const std::string folder_variable = "TRANSFUSE_TEST_FOLDER=" + folder;
    pid_ = ::fork();
    if (pid_ == 0) {  // only what is safe after a fork of a program with threads
      ::dup2(to[0], 0);
      ::dup2(from[1], 1);
      ::putenv(const_cast<char*>(folder_variable.c_str()));
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(to[0]);
    ::close(from[1]);
    to_.reset(to[1]);
    from_.reset(::fdopen(from[0], "r"));
  }
  ~Process() { kill(SIGKILL); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  void kill(int signal) {
    if (pid_ <= 0) return;
    ::kill(pid_, signal);
    if (signal != SIGKILL && signal != SIGTERM) return;
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  void send(const std::string& line) {
    const std::string text = line + "\n";
    EXPECT_EQ(::write(to_.get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  std::string line() {
    std::array<char, 4096> text{};
    if (std::fgets(text.data(), text.size(), from_.get()) == nullptr) return "(ended)";
    std::string out(text.data());
    if (!out.empty() && out.back() == '\n') out.pop_back();
    return out;
  }
  // One command of process_main_test.cc and its answer: "ok ..." or an error.
  std::string ask(const std::string& command) {
    send(command);
    return line();
  }

 private:
  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  pid_t pid_ = -1;
  UniqueFd to_;
  std::unique_ptr<std::FILE, CloseFile> from_;
};

// A private run-time folder with its own embedded coordinator; checks that nothing is left of it.
class CoordinatorTest : public testing::Test {
 protected:
  CoordinatorTest() {
    std::string pattern = "/tmp/tf-test-XXXXXX";
    parent_ = ::mkdtemp(pattern.data());
    folder_ = parent_ + "/run";
    ::unsetenv("TRANSFUSE_COORDINATOR");
    ::setenv("TRANSFUSE_SERVE_COMMAND", std::filesystem::canonical("/proc/self/exe").c_str(), 1);
  }
  ~CoordinatorTest() override {
    end_coordinator();
    EXPECT_FALSE(std::filesystem::exists(folder_)) << "an ended coordinator leaves nothing behind";
    std::filesystem::remove_all(parent_);
  }

  ConnectOptions options() const {
    ConnectOptions options;
    options.runtime_folder = folder_;
    options.job = "test";
    options.control.call_deadline_ms = 20000;
    return options;
  }
  std::unique_ptr<Control> connect() {
    auto control = connect_control(options());
    EXPECT_TRUE(control) << control.error().to_string();
    return std::move(control).value();
  }
  CoordinatorInfo coordinator() const { return find_coordinator(options()).value(); }
  void end_coordinator() {
    const auto found = find_coordinator(options());
    if (!found) return;
    const auto pid = static_cast<pid_t>(found->pid);
    ::kill(pid, SIGTERM);
    EXPECT_TRUE(eventually([&] { return !process_exists(pid); }));
  }
  // By default its time to live is so long that only a broken connection can show it dead.
  std::unique_ptr<Process> member(int64_t ttl_ms = 600000) {
    return std::make_unique<Process>(folder_,
                                     std::vector<std::string>{"member", std::to_string(ttl_ms)});
  }

  std::string parent_;
  std::string folder_;
};

}  // namespace transfuse

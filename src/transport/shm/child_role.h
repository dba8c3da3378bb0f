// The other processes of a test: this program again, in a role.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/unique_fd.h"

namespace transfuse::shm {

// Byte `i` of the memory that a role with `seed` serves.
inline std::byte pattern(uint64_t seed, uint64_t i) {
  return static_cast<std::byte>((seed * 131 + i * 7 + (i >> 8) * 13 + (i >> 19)) & 0xFF);
}

// A folder of its own for one test, removed with what the test says may be left in it: nothing.
class TestFolder {
 public:
  TestFolder();
  ~TestFolder();
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;
  const std::string& path() const { return path_; }
  std::vector<std::string> files() const;

 private:
  std::string path_;
};

// Started by fork and exec; spoken to by lines. Ends with its input; the destructor waits for that.
// Used from one thread.
class ChildProcess {
 public:
  explicit ChildProcess(const std::vector<std::string>& role_and_arguments);
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  pid_t pid() const { return pid_; }
  void say(const std::string& line);
  std::string hear();  // the next line; "" once the child has closed its end
  void signal(int number) const { ::kill(pid_, number); }
  int wait();  // the exit status, -signal if it was killed

 private:
  pid_t pid_ = -1;
  UniqueFd to_;
  UniqueFd from_;
  std::string unread_;
};

// How a process that serves regions is started, and what it said.
struct Serving {
  std::string folder;
  std::string token = "-";
  std::string kind = "memfd";  // or "owned"
  uint64_t count = 1;
  uint64_t size_bytes = 4096;
  uint64_t seed = 1;
  std::string as = "self";  // or "nobody": drops root; "hidden": also refuses to be traced
};
struct ServedRegion {
  uint64_t id = 0;
  uint64_t address = 0;
};
struct ServingProcess {
  explicit ServingProcess(const Serving& serving);
  ChildProcess child;
  std::string endpoint;
  std::vector<ServedRegion> regions;
};

uint64_t open_descriptors(pid_t pid);
uint64_t mappings(pid_t pid);

}  // namespace transfuse::shm

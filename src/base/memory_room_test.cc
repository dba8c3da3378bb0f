// The room that a host and its control groups leave, from files as the kernel writes them.
#include "base/memory_room.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace transfuse {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;

class MemoryRoomOfAHost : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    root_ = pattern;
    write("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 8388608 kB\n");
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    const std::filesystem::path file = root() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  const std::string& root() const { return root_; }

 private:
  std::string root_;
};

TEST_F(MemoryRoomOfAHost, IsWhatTheKernelCallsAvailable) {
  const MemoryRoom room = memory_room(root());
  EXPECT_EQ(room.size_bytes, 8 * kGiB);
  EXPECT_EQ(room.limit, root() + "/proc/meminfo");
}

TEST_F(MemoryRoomOfAHost, IsLoweredByTheTightestGroupAbove) {
  write("/proc/self/cgroup", "0::/jobs/train\n");
  write("/sys/fs/cgroup/jobs/train/memory.max", "max\n");
  write("/sys/fs/cgroup/jobs/train/memory.current", "1024\n");
  write("/sys/fs/cgroup/jobs/memory.max", std::to_string(4 * kGiB) + "\n");
  write("/sys/fs/cgroup/jobs/memory.current", std::to_string(3 * kGiB) + "\n");
  write("/sys/fs/cgroup/jobs/memory.stat", "anon 1\ninactive_file " + std::to_string(kGiB) + "\n");
  const MemoryRoom room = memory_room(root());
  EXPECT_EQ(room.size_bytes, 2 * kGiB) << "page cache counts as free";
  EXPECT_EQ(room.limit, root() + "/sys/fs/cgroup/jobs/memory.max");
}

TEST_F(MemoryRoomOfAHost, KnowsTheOlderGroups) {
  write("/proc/self/cgroup", "9:name=systemd:/x\n4:memory:/job\n0::/\n");
  write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", std::to_string(2 * kGiB) + "\n");
  write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", std::to_string(3 * kGiB) + "\n");
  EXPECT_EQ(memory_room(root()).size_bytes, 0u);
}

TEST_F(MemoryRoomOfAHost, IsNotLimitedByFilesThatAreMissingOrMakeNoSense) {
  write("/proc/self/cgroup", "garbage\n:\n::\n0::nopath\n0::/a/b\n");
  write("/sys/fs/cgroup/a/b/memory.max", "12abc\n");
  EXPECT_EQ(memory_room(root()).size_bytes, 8 * kGiB);
}

}  // namespace
}  // namespace transfuse

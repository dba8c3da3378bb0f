// What tells files, and writings of one file, apart.
#include "base/file_identity.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

class FileIdentities : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ + "/file";
    write_file(path_, "twelve bytes");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static void write_file(const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  }
  IdentifiedFile identified() const {
    const UniqueFd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
    return {.path = path_, .identity = identify_file(fd.get(), path_).value()};
  }

  std::string folder_;
  std::string path_;
};

TEST_F(FileIdentities, EveryWayToChangeAFileIsFoundAndNamed) {
  const auto changed = [&](const IdentifiedFile& file) {
    const auto outcome = check_unchanged(file);
    return outcome ? "" : outcome.error().to_string();
  };
  IdentifiedFile file = identified();
  EXPECT_EQ(changed(file), "");
  // In place, as many bytes, and the time that anybody can set put back.
  write_file(path_, "TWELVE BYTES");
  const struct timespec times[2] = {{.tv_sec = 0, .tv_nsec = UTIME_OMIT},
                                    {.tv_sec = file.identity.modified_ns / 1'000'000'000,
                                     .tv_nsec = file.identity.modified_ns % 1'000'000'000}};
  ASSERT_EQ(utimensat(AT_FDCWD, path_.c_str(), times, 0), 0);
  EXPECT_EQ(identify_path(path_)->modified_ns, file.identity.modified_ns);
  EXPECT_EQ(changed(file), "TORN_READ: " + path_ + ": was written while it was read");
  file = identified();
  ASSERT_EQ(truncate(path_.c_str(), 3), 0);
  EXPECT_EQ(changed(file), "TORN_READ: " + path_ + ": was cut while it was read");
  file = identified();
  write_file(folder_ + "/other", "new");
  ASSERT_EQ(rename((folder_ + "/other").c_str(), path_.c_str()), 0);
  EXPECT_EQ(changed(file), "TORN_READ: " + path_ + ": was replaced while it was read");
  file = identified();
  ASSERT_EQ(unlink(path_.c_str()), 0);
  EXPECT_EQ(changed(file), "TORN_READ: " + path_ + ": was removed while it was read");
}

TEST_F(FileIdentities, WritesInOneTickOfTheClockAreToldApart) {
  for (int round = 0; round < 50; ++round) {
    write_file(path_, "round " + std::to_string(round));
    const IdentifiedFile file = identified();
    write_file(path_, "ROUND " + std::to_string(round));
    EXPECT_FALSE(check_unchanged(file)) << round;
  }
}

TEST_F(FileIdentities, EndpointsComeBackAsTheyWereAndNonsenseIsRefused) {
  const std::vector<IdentifiedFile> files = {identified(), {.path = "b\nc", .identity = {}}};
  const std::string text = file_endpoint(files);
  const auto parsed = parse_file_endpoint(text).value();
  ASSERT_EQ(parsed.size(), 2u);
  for (size_t i = 0; i < files.size(); ++i) {
    EXPECT_EQ(parsed[i].path, files[i].path);
    EXPECT_EQ(parsed[i].identity, files[i].identity);
  }
  for (size_t size = 0; size < text.size(); ++size) {
    const auto cut = parse_file_endpoint(text.substr(0, size));
    ASSERT_FALSE(cut) << size;
    EXPECT_EQ(cut.error().code, ErrorCode::kInvalidArgument);
  }
  EXPECT_FALSE(parse_file_endpoint(text + "x"));
}

TEST_F(FileIdentities, AFolderIsNoFile) {
  const UniqueFd fd(::open(folder_.c_str(), O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(identify_file(fd.get(), folder_).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace transfuse

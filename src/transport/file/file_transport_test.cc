// What is the file transport's own: files of others, and what becomes of them.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>

#include "base/file_identity.h"
#include "base/unique_fd.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

class FileTransportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    transport_ = open_file_transport().value();
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  IdentifiedFile make_file(const std::string& name, const std::string& text) const {
    const std::string path = folder_ + "/" + name;
    std::ofstream(path, std::ios::binary) << text;
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    return {.path = path, .identity = identify_file(fd.get(), path).value()};
  }
  std::unique_ptr<Peer> connect(const std::vector<IdentifiedFile>& files) const {
    return transport_->connect(file_endpoint(files), "", Deadline::after_ms(5000)).value();
  }
  static RegionDescriptor region(uint64_t number, const IdentifiedFile& file) {
    return {RegionId{number}, file.identity.size_bytes};
  }
  Result<std::string> read(const RemoteRegion& region, uint64_t size_bytes) const {
    std::string text(size_bytes, '-');
    StridedCopy copy;
    copy.target = reinterpret_cast<std::byte*>(text.data());
    copy.count[2] = static_cast<uint32_t>(size_bytes);
    copy.source_stride[2] = copy.target_stride[2] = 1;
    TRANSFUSE_ASSIGN_OR_RETURN(
        const TicketId ticket,
        transport_->submit({.region = &region, .copies = {&copy, 1}, .fingerprints = {}}));
    EXPECT_TRUE(transport_->wait_any({&ticket, 1}, Deadline::after_ms(30000)));
    TRANSFUSE_RETURN_IF_ERROR(transport_->finish(ticket));
    return text;
  }

  std::string folder_;
  std::unique_ptr<Transport> transport_;
};

TEST_F(FileTransportTest, FilesOfAListAreReadByTheirNumbers) {
  const std::vector<IdentifiedFile> files = {make_file("a", "first"), make_file("b", "the second")};
  const auto peer = connect(files);
  EXPECT_TRUE(peer->alive());
  const Deadline deadline = Deadline::after_ms(5000);
  const auto first = peer->open_region(region(1, files[0]), deadline).value();
  const auto second = peer->open_region(region(2, files[1]), deadline).value();
  EXPECT_EQ(first->route(), "pread");
  EXPECT_EQ(read(*first, 5).value(), "first");
  EXPECT_EQ(read(*second, 10).value(), "the second");
  EXPECT_EQ(peer->open_region({RegionId{3}, 5}, deadline).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(peer->open_region({RegionId{0}, 5}, deadline).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(peer->open_region({RegionId{1}, 6}, deadline).error().code, ErrorCode::kCorrupt);
}

TEST_F(FileTransportTest, I8_AFileThatWasReplacedOrWrittenSinceDoesNotOpen) {
  const IdentifiedFile file = make_file("a", "before");
  const auto peer = connect({file});
  (void)make_file("a", "after!");  // as long, another time
  const auto written = peer->open_region(region(1, file), Deadline::after_ms(5000));
  ASSERT_FALSE(written);
  EXPECT_EQ(written.error().code, ErrorCode::kTornRead) << written.error().message;
  (void)make_file("b", "before");
  std::filesystem::rename(folder_ + "/b", file.path);
  EXPECT_EQ(peer->open_region(region(1, file), Deadline::after_ms(5000)).error().code,
            ErrorCode::kTornRead);
}

// A mapping would end the process here.
TEST_F(FileTransportTest, AFileThatIsCutWhileItIsReadIsATornRead) {
  const IdentifiedFile file = make_file("a", std::string(100000, 'x'));
  const auto peer = connect({file});
  const auto opened = peer->open_region(region(1, file), Deadline::after_ms(5000)).value();
  std::filesystem::resize_file(file.path, 50);
  const auto text = read(*opened, 100000);
  ASSERT_FALSE(text);
  EXPECT_EQ(text.error().code, ErrorCode::kTornRead);
  EXPECT_NE(text.error().message.find("ends at byte 50"), std::string::npos)
      << text.error().message;
}

TEST_F(FileTransportTest, WithoutAFolderItOnlyReads) {
  EXPECT_EQ(transport_->allocate(5).error().code, ErrorCode::kUnsupported);
  EXPECT_EQ(transport_->endpoint().error().code, ErrorCode::kUnsupported);
  std::byte memory[8];
  EXPECT_EQ(transport_->register_memory(memory).error().code, ErrorCode::kUnsupported);
}

TEST_F(FileTransportTest, WhatItServedGoesWithIt) {
  auto serving = open_file_transport(folder_).value();
  auto memory = serving->allocate(4096).value();
  memory->bytes()[7] = std::byte{'!'};
  const auto peer = transport_->connect(serving->endpoint().value(), "", Deadline::after_ms(5000));
  const auto opened = peer.value()->open_region(memory->descriptor(), Deadline::after_ms(5000));
  EXPECT_EQ(read(*opened.value(), 8).value()[7], '!');
  EXPECT_EQ(serving->stats().region_bytes, 4096u);
  memory.reset();
  serving.reset();
  EXPECT_FALSE(peer.value()->alive());
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

}  // namespace
}  // namespace transfuse

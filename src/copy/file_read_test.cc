// Copies out of files against the element-by-element model, with buffers of any size.
#include "copy/file_read.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/unique_fd.h"
#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// A file that has no name, with bytes of a seed.
class FileRead : public ::testing::Test {
 protected:
  static constexpr uint64_t kSize = 300000;
  static constexpr uint64_t kOffset = 137;

  void SetUp() override {
    fd_.reset(memfd_create("file_read_test", 0));
    ASSERT_TRUE(fd_);
    Random random(11);
    bytes_.resize(kOffset + kSize);
    for (std::byte& byte : bytes_) byte = static_cast<std::byte>(random.next());
    ASSERT_EQ(write(fd_.get(), bytes_.data(), bytes_.size()), static_cast<ssize_t>(bytes_.size()));
  }
  FileSpan span() const { return {.fd = fd_.get(), .offset_bytes = kOffset, .path = "the file"}; }

  UniqueFd fd_;
  std::vector<std::byte> bytes_;
};

StridedCopy random_copy(Random& random) {
  constexpr std::array<ElementOp, kElementOpCount> kOps = {
      ElementOp::kCopy1, ElementOp::kCopy2,     ElementOp::kCopy4,
      ElementOp::kCopy8, ElementOp::kF32ToBF16, ElementOp::kF32ToF16};
  StridedCopy copy;
  copy.op = kOps[random.below(kOps.size())];
  copy.fingerprint_key = random.next();
  copy.linear_index = random.below(1u << 20);
  int64_t span = 1;
  const bool transposed = random.chance(0.3);
  for (size_t level = 3; level-- > 0;) {
    const bool wide = (level == 2) != transposed;
    copy.count[level] = 1 + static_cast<uint32_t>(random.below(level == 2 ? 9000 : 6));
    copy.source_stride[level] = 1 + static_cast<int64_t>(random.below(wide ? 2 : 6000));
    copy.target_stride[level] = span + static_cast<int64_t>(random.below(2));
    copy.index_stride[level] = static_cast<int64_t>(random.below(1000));
    span = copy.target_stride[level] * copy.count[level];
  }
  return copy;
}

TEST_F(FileRead, AnyCopyThroughAnyBufferIsThatOfTheSlowModel) {
  constexpr std::array<uint64_t, 4> kScratch = {16, 100, 5000, kFileScratchBytes};
  Random random(3);
  int direct = 0;
  for (int round = 0; round < 400;) {
    StridedCopy copy = random_copy(random);
    copy.source_offset_bytes = random.below(kSize);
    if (copy.source_end_bytes() > kSize) continue;
    SCOPED_TRACE("round " + std::to_string(round));
    uint64_t last = 0;
    for (int d = 0; d < 3; ++d) {
      last += (copy.count[d] - 1) * static_cast<uint64_t>(copy.target_stride[d]);
    }
    std::vector<std::byte> target((last + 1) * target_element_bytes(copy.op), std::byte{0x5A});
    std::vector<std::byte> expected = target;
    copy.target = target.data();
    const uint64_t sum =
        slow_copy(copy, bytes_.data() + kOffset + copy.source_offset_bytes, expected.data());
    std::vector<std::byte> scratch(kScratch[static_cast<size_t>(round) % kScratch.size()]);
    const bool summed = round % 3 != 0;
    direct += !summed;
    uint64_t found = 5;
    const auto done = run_file_copy(span(), copy, scratch, summed ? &found : nullptr);
    copy_fence();
    ASSERT_TRUE(done) << done.error().to_string();
    ASSERT_TRUE(target == expected);
    ASSERT_EQ(found, summed ? sum + 5 : 5);
    found = 7;
    copy.target = nullptr;
    ASSERT_TRUE(sum_file_copy(span(), copy, scratch, found));
    ASSERT_EQ(found, sum + 7);
    ++round;
  }
  EXPECT_GT(direct, 100);
}

TEST_F(FileRead, AFileThatWasCutIsATornReadThatSaysWhere) {
  ASSERT_EQ(ftruncate(fd_.get(), kOffset + 100), 0);
  std::vector<std::byte> target(40000);
  std::vector<std::byte> scratch(4096);
  StridedCopy copy;
  copy.target = target.data();
  copy.count[2] = 40000;
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  uint64_t sum = 0;
  for (uint64_t* wanted : {static_cast<uint64_t*>(nullptr), &sum}) {
    const auto done = run_file_copy(span(), copy, scratch, wanted);
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, ErrorCode::kTornRead);
    EXPECT_NE(done.error().message.find("the file: ends at byte 237"), std::string::npos)
        << done.error().message;
  }
  EXPECT_EQ(sum_file_copy(span(), copy, scratch, sum).error().code, ErrorCode::kTornRead);
}

}  // namespace
}  // namespace transfuse

// Messages of the socket: every one comes back, and nothing else is taken for one.
#include "transport/shm/wire.h"

#include <gtest/gtest.h>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/random.h"
#include "transfuse/result.h"

namespace transfuse::shm {
namespace {

std::vector<Message> examples() {
  return {{1, Hello{kWireVersion, "secret"}},
          {2, Welcome{}},
          {UINT64_MAX, OpenRegion{77}},
          {4, RegionOpened{RegionKind::kCallerOwned, uint64_t{1} << 40, 0x7F0012345000}},
          {5, Refused{ErrorCode::kNotFound, "region 77: not registered (any more)"}},
          {6, OpenHandle{77, 1500}},
          {7, RegionOpened{RegionKind::kHandle, uint64_t{20} << 20, 0}}};
}

TEST(Wire, EveryMessageComesBackAsItWasSent) {
  for (const Message& message : examples()) {
    const std::string bytes = encode(message);
    const auto back = decode(bytes).value();
    EXPECT_EQ(back.request, message.request);
    EXPECT_EQ(back.body.index(), message.body.index());
    EXPECT_EQ(encode(back), bytes);
  }
}

TEST(Wire, I13_EveryTruncationAndEveryTrailingByteIsRefused) {
  for (const Message& message : examples()) {
    const std::string bytes = encode(message);
    for (size_t size = 0; size < bytes.size(); ++size) {
      EXPECT_EQ(decode(bytes.substr(0, size)).error().code, ErrorCode::kCorrupt) << size;
    }
    EXPECT_FALSE(decode(bytes + '\0'));
  }
}

TEST(Wire, I13_FlippedBytesGiveAnErrorOrAnotherWholeMessage) {
  Random random(20240611);
  for (int round = 0; round < 20000; ++round) {
    const auto all = examples();
    std::string bytes = encode(all[random.below(all.size())]);
    for (uint64_t flips = 1 + random.below(4); flips > 0; --flips) {
      bytes[random.below(bytes.size())] = static_cast<char>(random.next());
    }
    const auto message = decode(bytes);
    if (message) {
      EXPECT_EQ(encode(*message).size(), bytes.size());
    } else {
      EXPECT_EQ(message.error().code, ErrorCode::kCorrupt);
    }
  }
}

TEST(Wire, LongTextIsCutOnTheWayOutAndRefusedOnTheWayIn) {
  const std::string reason(2 * kMaxReasonBytes, 'r');
  const std::string bytes = encode({1, Refused{ErrorCode::kCorrupt, reason}});
  EXPECT_EQ(std::get<Refused>(decode(bytes).value().body).reason.size(), kMaxReasonBytes);
  const std::string token(kMaxTokenBytes + 1, 't');
  EXPECT_FALSE(decode(encode({1, Hello{kWireVersion, token}})));
}

TEST(Wire, OnlyTheSameTokenMatches) {
  EXPECT_TRUE(token_matches("abcdef", "abcdef"));
  EXPECT_FALSE(token_matches("abcdeg", "abcdef"));
  EXPECT_FALSE(token_matches("Xbcdef", "abcdef"));
  EXPECT_FALSE(token_matches("abcde", "abcdef"));
  EXPECT_FALSE(token_matches("abcdefg", "abcdef"));
  EXPECT_FALSE(token_matches("", "abcdef"));
  EXPECT_FALSE(token_matches(std::string("abc\0ef", 6), "abcdef"));
}

}  // namespace
}  // namespace transfuse::shm

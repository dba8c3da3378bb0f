// What a reader and a serving process say to each other over the socket: one message per datagram,
// bounded in size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <variant>

#include "transfuse/result.h"

namespace transfuse::shm {

inline constexpr uint16_t kWireVersion = 2;
inline constexpr uint64_t kMaxTokenBytes = 4096;
inline constexpr uint64_t kMaxReasonBytes = 1024;
inline constexpr uint64_t kMaxMessageBytes = 8192;

enum class RegionKind : uint8_t { kMemfd, kCallerOwned, kHandle };

struct Hello {  // the first message of a reader
  uint16_t version = kWireVersion;
  std::string_view token;
};
struct Welcome {};
struct OpenRegion {
  uint64_t region = 0;
};
struct RegionOpened {  // kMemfd, kHandle: the descriptor travels beside it
  RegionKind kind = RegionKind::kMemfd;
  uint64_t size_bytes = 0;
  uint64_t address = 0;  // kCallerOwned: in the serving process
};
struct Refused {
  ErrorCode code = ErrorCode::kUnavailable;
  std::string_view reason;
};
struct OpenHandle {  // answered by RegionOpened of kHandle
  uint64_t region = 0;
  uint64_t index = 0;
};
using Body = std::variant<Hello, Welcome, OpenRegion, RegionOpened, Refused, OpenHandle>;

// Text points into the bytes that it was parsed from.
struct Message {
  uint64_t request = 0;  // an answer carries the number of its request
  Body body;
};

std::string encode(const Message& message);
// kCorrupt unless `bytes` is exactly one message.
Result<Message> decode(std::string_view bytes);

// Takes as long for a wrong token as for a right one of the same length.
bool token_matches(std::string_view presented, std::string_view expected);

}  // namespace transfuse::shm

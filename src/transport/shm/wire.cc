// Encoding and decoding of the messages.
#include "transport/shm/wire.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>

#include "base/bytes.h"
#include "transfuse/result.h"

namespace transfuse::shm {
namespace {

constexpr uint32_t kMagic = 0x4D485354;  // "TSHM"

struct BodyWriter {
  ByteWriter& out;
  void operator()(const Hello& hello) {
    out.fixed(hello.version);
    out.text(hello.token);
  }
  void operator()(const Welcome&) {}
  void operator()(const OpenRegion& open) { out.fixed(open.region); }
  void operator()(const RegionOpened& opened) {
    out.fixed(static_cast<uint8_t>(opened.kind));
    out.fixed(opened.size_bytes);
    out.fixed(opened.address);
  }
  void operator()(const Refused& refused) {
    out.fixed(static_cast<uint8_t>(refused.code));
    out.text(refused.reason.substr(0, kMaxReasonBytes));
  }
  void operator()(const OpenHandle& open) {
    out.fixed(open.region);
    out.fixed(open.index);
  }
};

// nullopt-like: false where the type or an enum is out of range.
bool read_body(uint8_t type, ByteReader& in, Body& body) {
  switch (type) {
    case 0: {
      Hello hello;
      hello.version = in.fixed<uint16_t>();
      hello.token = in.text(kMaxTokenBytes);
      body = hello;
      return true;
    }
    case 1:
      body = Welcome{};
      return true;
    case 2:
      body = OpenRegion{in.fixed<uint64_t>()};
      return true;
    case 3: {
      const auto kind = in.fixed<uint8_t>();
      RegionOpened opened;
      opened.kind = static_cast<RegionKind>(kind);
      opened.size_bytes = in.fixed<uint64_t>();
      opened.address = in.fixed<uint64_t>();
      body = opened;
      return kind <= static_cast<uint8_t>(RegionKind::kHandle);
    }
    case 4: {
      const auto code = in.fixed<uint8_t>();
      body = Refused{static_cast<ErrorCode>(code), in.text(kMaxReasonBytes)};
      return code < kErrorCodeCount;
    }
    case 5: {
      OpenHandle open;
      open.region = in.fixed<uint64_t>();
      open.index = in.fixed<uint64_t>();
      body = open;
      return true;
    }
    default:
      return false;
  }
}

}  // namespace

std::string encode(const Message& message) {
  ByteWriter out;
  out.fixed(kMagic);
  out.fixed(static_cast<uint8_t>(message.body.index()));
  out.fixed(message.request);
  std::visit(BodyWriter{out}, message.body);
  return std::move(out).take();
}

Result<Message> decode(std::string_view bytes) {
  ByteReader in(bytes);
  const auto magic = in.fixed<uint32_t>();
  const auto type = in.fixed<uint8_t>();
  Message message;
  message.request = in.fixed<uint64_t>();
  const bool known = in.ok() && magic == kMagic && read_body(type, in, message.body);
  if (!known || !in.ok() || in.remaining() != 0) {
    return Error{
        ErrorCode::kCorrupt,
        fmt::format("shm socket: expected one message of the shm transport, found {} bytes "
                    "that are none (magic {:#x}, type {})",
                    bytes.size(), magic, type)};
  }
  return message;
}

bool token_matches(std::string_view presented, std::string_view expected) {
  unsigned difference = presented.size() == expected.size() ? 0 : 1;
  const size_t size = std::min(presented.size(), expected.size());
  for (size_t i = 0; i < size; ++i) {
    difference |= static_cast<unsigned char>(presented[i] ^ expected[i]);
    asm volatile("" : "+r"(difference));  // no early exit by the compiler
  }
  return difference == 0;
}

}  // namespace transfuse::shm

// A 128-bit name for content: of a layout, a plan, or the bytes of a version.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "transfuse/result.h"

namespace transfuse {

struct Digest {
  uint64_t high = 0;
  uint64_t low = 0;
  auto operator<=>(const Digest&) const = default;
  std::string to_string() const;  // 32 hexadecimal digits
};
struct DigestHash {
  size_t operator()(const Digest& d) const { return static_cast<size_t>(d.low); }
};
// What to_string() gives; kInvalidArgument otherwise.
Result<Digest> parse_digest(std::string_view text);

}  // namespace transfuse

// Bytes that both sides of a test can make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace transfuse {

inline std::vector<std::byte> pattern(uint64_t size, uint64_t seed) {
  std::vector<std::byte> bytes(size);
  uint64_t state = seed * 0x9E3779B97F4A7C15U + 1;
  for (auto& byte : bytes) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    byte = static_cast<std::byte>(state >> 40);
  }
  return bytes;
}

}  // namespace transfuse

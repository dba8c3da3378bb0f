// The mix behind element_fingerprint(), in the form that row kernels use. docs/fingerprint.md says
// why it is so.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace transfuse {

inline constexpr uint32_t kIndexFactor = 0x9E3779B1u;
inline constexpr uint32_t kKeyFactor = 0x85EBCA77u;
inline constexpr uint32_t kBitsFactor = 0xC2B2AE3Du;

// What all elements of one tensor share whose linear indices have the same upper 32 bits.
struct MixSeed {
  uint32_t first = 0;
  uint32_t second = 0;
};

// `part`: the element size in bytes; kUpperPart for the upper half of an 8-byte element, which is
// mixed like an element of its own.
inline constexpr uint32_t kUpperPart = 16;
TRANSFUSE_HOST_DEVICE inline MixSeed mix_seed(uint64_t key, uint32_t index_high, uint32_t part) {
  uint64_t z = key + 0x9E3779B97F4A7C15u * (uint64_t{index_high} + 1) + 0xD1B54A32D192ED03u * part;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// `place` = low 32 bits of the linear index * kIndexFactor + seed.first.
TRANSFUSE_HOST_DEVICE inline uint64_t mix_word(uint32_t place, uint32_t second, uint32_t bits) {
  const uint32_t value = (bits * kBitsFactor) ^ place;
  uint32_t weight = (place ^ (place >> 15)) * kKeyFactor;
  weight ^= (weight >> 13) ^ second;
  return uint64_t{value} * weight + (uint64_t{value} << 32);
}

}  // namespace transfuse

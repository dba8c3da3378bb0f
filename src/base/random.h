// Seeded random numbers for tests and simulation, and random identities that no other process has.
#pragma once

#include <cstdint>

namespace transfuse {

// SplitMix64 (Steele, Lea, Flood 2014): small, seeded, the same on every machine. Used from one
// thread.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound), bound > 0 (bias below 2^-32 for bounds below 2^32).
  uint64_t below(uint64_t bound) { return next() % bound; }
  bool chance(double probability) {
    return static_cast<double>(next() >> 11) * 0x1.0p-53 < probability;
  }

 private:
  uint64_t state_;
};

// From the kernel (getrandom), never 0: an incarnation.
uint64_t random_identity();

}  // namespace transfuse

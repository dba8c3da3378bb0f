// What the fingerprint must catch, tried many times: no corruption of any class goes unnoticed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "transfuse/copy.h"

namespace transfuse {
namespace {

constexpr uint32_t kRows = 24;
constexpr uint32_t kColumns = 64;
constexpr uint32_t kCount = kRows * kColumns;

// A matrix of elements of 1, 2, 4 or 8 bytes, as bits.
struct Matrix {
  uint32_t element_bytes = 2;
  std::vector<uint64_t> bits = std::vector<uint64_t>(kCount);

  uint64_t fingerprint(uint64_t key, uint64_t first_index) const {
    std::vector<std::byte> bytes(uint64_t{kCount} * element_bytes);
    for (size_t i = 0; i < kCount; ++i) {
      std::memcpy(bytes.data() + i * element_bytes, &bits[i], element_bytes);
    }
    StridedCopy copy;
    copy.op = plain_copy(element_bytes);
    copy.fingerprint_key = key;
    copy.linear_index = first_index;
    copy.count[2] = kCount;
    copy.source_stride[2] = copy.index_stride[2] = 1;
    return sum_copy(copy, bytes.data());
  }
  uint64_t sign_bit() const { return uint64_t{1} << (element_bytes * 8 - 1); }
  uint64_t mask() const { return sign_bit() | (sign_bit() - 1); }
};

// Weights as they are: many equal values, zeros, ones, or anything.
Matrix random_matrix(Random& random) {
  constexpr std::array<uint32_t, 4> kSizes = {1, 2, 4, 8};
  Matrix m;
  m.element_bytes = kSizes[random.below(4)];
  const uint64_t kind = random.below(4);
  const uint64_t one = random.next() & m.mask();
  for (auto& bits : m.bits) {
    if (kind == 0) bits = one;
    if (kind == 1) bits = random.chance(0.5) ? 0 : random.next() & m.mask();
    if (kind == 2) bits = (one + random.below(3)) & m.mask();
    if (kind == 3) bits = random.next() & m.mask();
  }
  return m;
}

size_t pick(Random& random) { return static_cast<size_t>(random.below(kCount)); }

using Corruption = void (*)(Random&, Matrix&);
struct NamedCorruption {
  const char* name;
  Corruption apply;
};

void swap_elements(Random& random, Matrix& m) {
  std::swap(m.bits[pick(random)], m.bits[pick(random)]);
}
void swap_rows(Random& random, Matrix& m) {
  const auto a = static_cast<long>(random.below(kRows) * kColumns);
  const auto b = static_cast<long>(random.below(kRows) * kColumns);
  if (a != b) {
    std::swap_ranges(m.bits.begin() + a, m.bits.begin() + a + kColumns, m.bits.begin() + b);
  }
}
void swap_columns(Random& random, Matrix& m) {
  const size_t a = random.below(kColumns);
  const size_t b = random.below(kColumns);
  for (size_t r = 0; r < kRows; ++r) std::swap(m.bits[r * kColumns + a], m.bits[r * kColumns + b]);
}
void flip_two_signs(Random& random, Matrix& m) {
  m.bits[pick(random)] ^= m.sign_bit();
  m.bits[pick(random)] ^= m.sign_bit();
}
void flip_signs_in_a_rectangle(Random& random, Matrix& m) {
  const size_t r[] = {random.below(kRows), random.below(kRows)};
  const size_t c[] = {random.below(kColumns), random.below(kColumns)};
  for (const size_t row : r) {
    for (const size_t column : c) m.bits[row * kColumns + column] ^= m.sign_bit();
  }
}
void negate_a_row(Random& random, Matrix& m) {
  const size_t row = random.below(kRows);
  for (size_t c = 0; c < kColumns; ++c) m.bits[row * kColumns + c] ^= m.sign_bit();
}
void zero_a_run(Random& random, Matrix& m) {
  const size_t begin = pick(random);
  const size_t end = std::min<size_t>(kCount, begin + 1 + random.below(300));
  std::fill(m.bits.begin() + static_cast<long>(begin), m.bits.begin() + static_cast<long>(end), 0);
}
void write_into_a_run(Random& random, Matrix& m) {
  const size_t begin = pick(random);
  const size_t end = std::min<size_t>(kCount, begin + 1 + random.below(300));
  for (size_t i = begin; i < end; ++i) m.bits[i] = random.next() & m.mask();
}
void shift(Random& random, Matrix& m) {
  std::rotate(m.bits.begin(), m.bits.begin() + 1 + static_cast<long>(random.below(kCount - 1)),
              m.bits.end());
}
void shift_by_one_or_a_row(Random& random, Matrix& m) {
  std::rotate(m.bits.begin(), m.bits.begin() + (random.chance(0.5) ? 1 : kColumns), m.bits.end());
}
void reverse(Random& /*random*/, Matrix& m) { std::reverse(m.bits.begin(), m.bits.end()); }
void another_tensor(Random& random, Matrix& m) {
  for (auto& bits : m.bits) bits = random.next() & m.mask();
}
void flip_one_bit(Random& random, Matrix& m) {
  m.bits[pick(random)] ^= uint64_t{1} << random.below(m.element_bytes * 8);
}
void add_and_subtract(Random& random, Matrix& m) {
  const uint64_t difference = 1 + random.below(100);
  uint64_t& a = m.bits[pick(random)];
  a = (a + difference) & m.mask();
  uint64_t& b = m.bits[pick(random)];
  b = (b - difference) & m.mask();
}

constexpr NamedCorruption kCorruptions[] = {
    {"swapped elements", swap_elements},
    {"swapped rows", swap_rows},
    {"swapped columns", swap_columns},
    {"paired sign flips", flip_two_signs},
    {"sign flips in a rectangle", flip_signs_in_a_rectangle},
    {"a negated row", negate_a_row},
    {"zeros in place of data", zero_a_run},
    {"data in place of zeros", write_into_a_run},
    {"shifted data", shift},
    {"data shifted by one or a row", shift_by_one_or_a_row},
    {"reversed data", reverse},
    {"another tensor's data", another_tensor},
    {"one flipped bit", flip_one_bit},
    {"a sum kept equal", add_and_subtract},
};

TEST(FingerprintProperty, NoCorruptionOfAnyClassGoesUnnoticed) {
  for (const NamedCorruption& corruption : kCorruptions) {
    uint64_t tried = 0;
    for (uint64_t seed = 1; seed <= 1000; ++seed) {
      Random random(seed);
      const Matrix good = random_matrix(random);
      const uint64_t key = fingerprint_key("layer." + std::to_string(seed));
      const uint64_t first = random.chance(0.5) ? 0 : random.next() >> 20;
      const uint64_t expected = good.fingerprint(key, first);
      for (int i = 0; i < 4; ++i) {
        Matrix bad = good;
        corruption.apply(random, bad);
        if (bad.bits == good.bits) continue;
        ++tried;
        ASSERT_NE(bad.fingerprint(key, first), expected) << corruption.name << ", seed " << seed;
      }
    }
    EXPECT_GT(tried, 500u) << corruption.name << " hardly ever changed anything";
  }
}

// Peers of different builds compare these numbers: they are part of the wire format. The values
// come from the reference in docs/fingerprint.md.
TEST(FingerprintProperty, TheNumbersAreThoseOfTheDocument) {
  const uint64_t key = fingerprint_key("model.embed_tokens.weight");
  EXPECT_EQ(key, 0x07878fab874758ceu);
  EXPECT_EQ(element_fingerprint(key, 0, 0, 2), 0x643082ab1ae8ffa8u);
  EXPECT_EQ(element_fingerprint(key, 1, 0x3F80, 2), 0xf82e6c22c55b8240u);
  EXPECT_EQ(element_fingerprint(key, (uint64_t{5} << 32) + 7, 0x3F800000, 4), 0x164f96b2a9ea9296u);
  EXPECT_EQ(element_fingerprint(key, 3, 0x0123456789ABCDEF, 8), 0x624cc6284e43148eu);
  EXPECT_EQ(element_fingerprint(key, 3, 0xEF, 1), 0x1b6432d3c14635a0u);
}

// Of many elements that all hold one value (a norm's weights), no two sign flips cancel: all
// differences are distinct, and so are they from each other's negatives.
TEST(FingerprintProperty, SignFlipsOfEqualValuesNeverCancel) {
  constexpr size_t kElements = 1 << 18;
  constexpr uint64_t kOne = 0x3F80;  // 1.0 in bf16
  for (const uint64_t key : {uint64_t{0}, fingerprint_key("model.norm.weight")}) {
    std::vector<uint64_t> differences;
    differences.reserve(2 * kElements);
    for (uint64_t i = 0; i < kElements; ++i) {
      const uint64_t d =
          element_fingerprint(key, i, kOne | 0x8000, 2) - element_fingerprint(key, i, kOne, 2);
      differences.push_back(d);
      differences.push_back(-d);
    }
    std::sort(differences.begin(), differences.end());
    EXPECT_EQ(std::adjacent_find(differences.begin(), differences.end()), differences.end());
  }
}

TEST(FingerprintProperty, ASingleChangedElementIsAlwaysSeenWhateverItsWeight) {
  // All 65,536 values at one place have distinct contributions: the map of a word is injective.
  for (const uint64_t index : {uint64_t{0}, uint64_t{12345}, (uint64_t{7} << 32) + 1}) {
    std::vector<uint64_t> contributions;
    for (uint64_t bits = 0; bits < 0x10000; ++bits) {
      contributions.push_back(element_fingerprint(42, index, bits, 2));
    }
    std::sort(contributions.begin(), contributions.end());
    EXPECT_EQ(std::adjacent_find(contributions.begin(), contributions.end()), contributions.end());
  }
}

TEST(FingerprintProperty, TheUpperHalfOfAnEightByteElementCountsLikeTheLower) {
  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t bits = random.next();
    const uint64_t swapped = (bits << 32) | (bits >> 32);
    const uint64_t same_xor = bits ^ 0x0000000100000001u;
    EXPECT_NE(element_fingerprint(5, 9, bits, 8), element_fingerprint(5, 9, swapped, 8));
    EXPECT_NE(element_fingerprint(5, 9, bits, 8), element_fingerprint(5, 9, same_xor, 8));
  }
}

TEST(FingerprintProperty, TensorNameIndexAndElementSizeAllCount) {
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t key = random.next();
    const uint64_t index = random.next();
    const uint64_t bits = random.next() & 0xFFFF;
    const uint64_t sum = element_fingerprint(key, index, bits, 2);
    EXPECT_NE(sum, element_fingerprint(key + 1, index, bits, 2));
    EXPECT_NE(sum, element_fingerprint(key, index + 1, bits, 2));
    EXPECT_NE(sum, element_fingerprint(key, index + (uint64_t{1} << 32), bits, 2));
    EXPECT_NE(sum, element_fingerprint(key, index, bits, 4));
  }
  EXPECT_NE(fingerprint_key("layers.1.weight"), fingerprint_key("layers.2.weight"));
}

// Every bit of an element, and of its index, moves about half of the upper bits of its
// contribution.
TEST(FingerprintProperty, EveryInputBitReachesTheUpperBits) {
  constexpr int kTrials = 4000;
  const auto mean_flips = [](auto&& flipped) {
    Random random(3);
    double sum = 0;
    for (int t = 0; t < kTrials; ++t) {
      const uint64_t key = random.next();
      const uint64_t index = random.next() >> 30;
      const uint64_t bits = random.next() & 0xFFFF;
      const uint64_t change = element_fingerprint(key, index, bits, 2) ^ flipped(key, index, bits);
      sum += std::popcount(change >> 33);
    }
    return sum / kTrials / 31;
  };
  for (uint64_t b = 0; b < 16; ++b) {
    const double moved = mean_flips([b](uint64_t key, uint64_t index, uint64_t bits) {
      return element_fingerprint(key, index, bits ^ (uint64_t{1} << b), 2);
    });
    EXPECT_GT(moved, 0.35) << "bit " << b << " of the element";
  }
  for (uint64_t b = 0; b < 34; ++b) {
    const double moved = mean_flips([b](uint64_t key, uint64_t index, uint64_t bits) {
      return element_fingerprint(key, index ^ (uint64_t{1} << b), bits, 2);
    });
    EXPECT_GT(moved, 0.35) << "bit " << b << " of the index";
  }
}

TEST(FingerprintProperty, TheSumDoesNotDependOnHowTheBoxIsCutOrStored) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    Random random(seed);
    Matrix whole = random_matrix(random);
    const uint64_t key = random.next();
    const uint64_t expected = whole.fingerprint(key, 100);
    // Cut at a column; the right part is held transposed.
    const uint32_t cut = 1 + static_cast<uint32_t>(random.below(kColumns - 1));
    const uint32_t size = whole.element_bytes;
    std::vector<std::byte> left(uint64_t{kRows} * cut * size);
    std::vector<std::byte> right(uint64_t{kRows} * (kColumns - cut) * size);
    for (uint64_t r = 0; r < kRows; ++r) {
      for (uint64_t c = 0; c < kColumns; ++c) {
        std::byte* to = c < cut ? left.data() + (r * cut + c) * size
                                : right.data() + ((c - cut) * kRows + r) * size;
        std::memcpy(to, &whole.bits[r * kColumns + c], size);
      }
    }
    StridedCopy part;
    part.op = plain_copy(size);
    part.fingerprint_key = key;
    part.linear_index = 100;
    part.count[1] = kRows;
    part.count[2] = cut;
    part.source_stride[1] = cut;
    part.index_stride[1] = kColumns;
    part.source_stride[2] = part.index_stride[2] = 1;
    const uint64_t sum_left = sum_copy(part, left.data());
    part.linear_index = 100 + cut;
    part.count[1] = kColumns - cut;
    part.count[2] = kRows;
    part.source_stride[1] = kRows;
    part.index_stride[1] = 1;
    part.source_stride[2] = 1;
    part.index_stride[2] = kColumns;
    EXPECT_EQ(sum_left + sum_copy(part, right.data()), expected) << "seed " << seed;
  }
}

}  // namespace
}  // namespace transfuse

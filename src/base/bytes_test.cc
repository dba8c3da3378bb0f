// Reading never leaves its span and a lie about a count cannot allocate.
#include "base/bytes.h"

#include <gtest/gtest.h>
#include "base/random.h"

namespace transfuse {
namespace {

TEST(Bytes, WhatIsWrittenIsReadBack) {
  ByteWriter out;
  out.fixed(uint32_t{0xDEADBEEF});
  for (const uint64_t value : {uint64_t{0}, uint64_t{127}, uint64_t{128}, UINT64_MAX}) {
    out.varint(value);
  }
  out.text("name");
  ByteReader in(out.bytes());
  EXPECT_EQ(in.fixed<uint32_t>(), 0xDEADBEEF);
  for (const uint64_t value : {uint64_t{0}, uint64_t{127}, uint64_t{128}, UINT64_MAX}) {
    EXPECT_EQ(in.varint(), value);
  }
  EXPECT_EQ(in.text(4), "name");
  EXPECT_TRUE(in.ok());
  EXPECT_EQ(in.remaining(), 0u);
}

TEST(Bytes, AReadBeyondTheEndFailsForGood) {
  ByteReader in(std::string_view("ab"));
  EXPECT_EQ(in.fixed<uint32_t>(), 0u);
  EXPECT_FALSE(in.ok());
  EXPECT_EQ(in.fixed<uint8_t>(), 0u);
}

TEST(Bytes, ACountIsBoundedByWhatIsLeft) {
  ByteWriter out;
  out.varint(1000000);
  ByteReader in(out.bytes());
  EXPECT_EQ(in.count(1), 0u);
  EXPECT_FALSE(in.ok());
}

TEST(Bytes, AVarintOfMoreThan64BitsIsRefused) {
  const std::string eleven = std::string(10, '\xFF') + '\x7F';
  ByteReader in(eleven);
  in.varint();
  EXPECT_FALSE(in.ok());
}

TEST(Bytes, RandomBytesNeverReadOutside) {
  Random random(7);
  for (int round = 0; round < 5000; ++round) {
    std::string noise(random.below(24), '\0');
    for (char& c : noise) c = static_cast<char>(random.next());
    ByteReader in(noise);
    while (in.ok() && in.remaining() > 0) {
      switch (random.below(4)) {
        case 0:
          in.varint();
          break;
        case 1:
          in.text(16);
          break;
        case 2:
          in.fixed<uint16_t>();
          break;
        default:
          in.count(3);
          break;
      }
    }
    EXPECT_LE(in.position(), noise.size());
  }
}

}  // namespace
}  // namespace transfuse

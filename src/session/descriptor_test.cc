// Member descriptors survive the wire, and lies in them do not.
#include "session/descriptor.h"

#include <gtest/gtest.h>
#include "base/random.h"

namespace transfuse {
namespace {

Layout two_parameters() {
  LayoutBuilder builder;
  for (const char* name : {"a", "b"}) {
    const uint32_t tensor = builder.tensor({.name = name, .dtype = Dtype::kF32, .shape = Dims{8}});
    const uint32_t parameter =
        builder.parameter({.name = name, .dtype = Dtype::kF32, .element_count = 8});
    builder.tile(tensor, Box::whole(Dims{8}), parameter, 0);
  }
  return builder.build().value();
}

MemberDescriptor descriptor_of(const Layout& layout) {
  MemberDescriptor descriptor;
  descriptor.transport = "shm";
  descriptor.endpoint = "/run/somewhere";
  descriptor.token = "secret";
  descriptor.control = {.id = RegionId{1}, .size_bytes = 16};
  descriptor.regions = {{.id = RegionId{2}, .size_bytes = 64},
                        {.id = RegionId{9}, .size_bytes = 32}};
  descriptor.binding = {
      .layout = layout.digest(),
      .places = {{.region = 0, .offset_bytes = 32}, {.region = 1, .offset_bytes = 0}}};
  return descriptor;
}

TEST(MemberDescriptor, SurvivesTheWire) {
  const Layout layout = two_parameters();
  const MemberDescriptor before = descriptor_of(layout);
  const auto after = decode_member_descriptor(encode(before), layout);
  ASSERT_TRUE(after) << after.error().to_string();
  EXPECT_EQ(after->transport, before.transport);
  EXPECT_EQ(after->endpoint, before.endpoint);
  EXPECT_EQ(after->token, before.token);
  ASSERT_EQ(after->regions.size(), 2u);
  EXPECT_EQ(after->regions[1].id, RegionId{9});
  EXPECT_EQ(after->binding.places, before.binding.places);
}

TEST(MemberDescriptor, I13_ParameterBeyondItsRegionIsCorruptAndNamed) {
  const Layout layout = two_parameters();
  MemberDescriptor lie = descriptor_of(layout);
  lie.binding.places[0].offset_bytes = 33;
  auto decoded = decode_member_descriptor(encode(lie), layout);
  ASSERT_FALSE(decoded);
  EXPECT_EQ(decoded.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(decoded.error().message.find("'a'"), std::string::npos);

  lie = descriptor_of(layout);
  lie.binding.places[1].region = 7;
  EXPECT_EQ(decode_member_descriptor(encode(lie), layout).error().code, ErrorCode::kCorrupt);
  lie = descriptor_of(layout);
  lie.binding.places[1].offset_bytes = UINT64_MAX - 3;
  EXPECT_EQ(decode_member_descriptor(encode(lie), layout).error().code, ErrorCode::kCorrupt);
  lie = descriptor_of(layout);
  lie.control.size_bytes = 8;
  EXPECT_EQ(decode_member_descriptor(encode(lie), layout).error().code, ErrorCode::kCorrupt);
}

TEST(MemberDescriptor, I2_BindingOfAnotherLayoutIsRefused) {
  const Layout layout = two_parameters();
  MemberDescriptor other = descriptor_of(layout);
  other.binding.layout.low ^= 1;
  EXPECT_EQ(decode_member_descriptor(encode(other), layout).error().code, ErrorCode::kCorrupt);
}

TEST(MemberDescriptor, EveryTruncationAndRandomBytesAreCorrupt) {
  const Layout layout = two_parameters();
  const std::string bytes = encode(descriptor_of(layout));
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(decode_member_descriptor(bytes.substr(0, size), layout)) << size;
  }
  Random random(20261121);
  for (int round = 0; round < 2000; ++round) {
    std::string noise(bytes);
    for (int i = 0; i < 4; ++i)
      noise[random.below(noise.size())] = static_cast<char>(random.next());
    const auto decoded = decode_member_descriptor(noise, layout);
    if (!decoded) {
      EXPECT_EQ(decoded.error().code, ErrorCode::kCorrupt);
    }
  }
}

}  // namespace
}  // namespace transfuse

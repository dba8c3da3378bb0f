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
  descriptor.control = {.id = RegionId{1}, .size_bytes = 64 + 16};
  descriptor.regions = {{.id = RegionId{2}, .size_bytes = 64},
                        {.id = RegionId{9}, .size_bytes = 32},
                        {.id = RegionId{11}, .size_bytes = 96}};
  descriptor.slots = {
      {.layout = layout.digest(),
       .places = {{.region = 0, .offset_bytes = 32}, {.region = 1, .offset_bytes = 0}}},
      {.layout = layout.digest(),
       .places = {{.region = 2, .offset_bytes = 0}, {.region = 2, .offset_bytes = 64}}}};
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
  ASSERT_EQ(after->regions.size(), 3u);
  EXPECT_EQ(after->regions[1].id, RegionId{9});
  ASSERT_EQ(after->slots.size(), 2u);
  for (size_t slot = 0; slot < 2; ++slot) {
    EXPECT_EQ(after->slots[slot].places, before.slots[slot].places);
  }
}

TEST(MemberDescriptor, I13_ParameterBeyondItsRegionIsCorruptAndNamed) {
  const Layout layout = two_parameters();
  for (size_t slot = 0; slot < 2; ++slot) {
    MemberDescriptor lie = descriptor_of(layout);
    lie.slots[slot].places[0].offset_bytes = slot == 0 ? 33 : 65;
    auto decoded = decode_member_descriptor(encode(lie), layout);
    ASSERT_FALSE(decoded);
    EXPECT_EQ(decoded.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(decoded.error().message.find("'a'"), std::string::npos);

    lie = descriptor_of(layout);
    lie.slots[slot].places[1].region = 7;
    EXPECT_EQ(decode_member_descriptor(encode(lie), layout).error().code, ErrorCode::kCorrupt);
    lie = descriptor_of(layout);
    lie.slots[slot].places[1].offset_bytes = UINT64_MAX - 3;
    EXPECT_EQ(decode_member_descriptor(encode(lie), layout).error().code, ErrorCode::kCorrupt);
  }
}

TEST(MemberDescriptor, I13_EverySlotHasItsGenerationInsideTheControlWords) {
  const Layout layout = two_parameters();
  MemberDescriptor descriptor = descriptor_of(layout);
  descriptor.control.size_bytes = 64 + 15;  // enough for the first slot alone
  EXPECT_EQ(decode_member_descriptor(encode(descriptor), layout).error().code, ErrorCode::kCorrupt);
  descriptor.slots.pop_back();
  EXPECT_TRUE(decode_member_descriptor(encode(descriptor), layout));
  descriptor.control.size_bytes = 8;
  EXPECT_EQ(decode_member_descriptor(encode(descriptor), layout).error().code, ErrorCode::kCorrupt);
}

TEST(MemberDescriptor, I13_SlotsAreCountedBeforeAnythingIsMadeOfThem) {
  const Layout layout = two_parameters();
  MemberDescriptor descriptor = descriptor_of(layout);
  descriptor.control.size_bytes = uint64_t{1} << 20;
  descriptor.slots.resize(kMaxSlots, descriptor.slots[0]);
  EXPECT_TRUE(decode_member_descriptor(encode(descriptor), layout));
  descriptor.slots.push_back(descriptor.slots[0]);
  EXPECT_EQ(decode_member_descriptor(encode(descriptor), layout).error().code, ErrorCode::kCorrupt);
  descriptor.slots.clear();
  EXPECT_EQ(decode_member_descriptor(encode(descriptor), layout).error().code, ErrorCode::kCorrupt);
}

TEST(MemberDescriptor, I2_BindingOfAnotherLayoutIsRefused) {
  const Layout layout = two_parameters();
  for (size_t slot = 0; slot < 2; ++slot) {
    MemberDescriptor other = descriptor_of(layout);
    other.slots[slot].layout.low ^= 1;
    EXPECT_EQ(decode_member_descriptor(encode(other), layout).error().code, ErrorCode::kCorrupt);
  }
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

// What fits a demand and what does not, and that the reason says why.
#include "transfuse/metadata.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transfuse/digest.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;
using Kind = Requirement::Kind;

constexpr Digest kRevision{.high = 1, .low = 2};

std::string why(const Demand& demand, std::string_view kind, const Metadata& source,
                const Metadata& version, const Digest& revision = {}) {
  return misfit(demand, Claim{kind, source, version, revision}).value_or("");
}

TEST(Demand, NothingIsDemandedByDefault) {
  EXPECT_TRUE(Demand{}.empty());
  EXPECT_EQ(why({}, "", {}, {}), "");
  EXPECT_EQ(why({}, "trtllm", {{"a", "b"}}, {}, kRevision), "");
}

TEST(Demand, AKindIsOneOfTheAccepted) {
  const Demand demand{.kinds = {"hf_raw", "of_ours"}};
  EXPECT_EQ(why(demand, "hf_raw", {}, {}), "");
  EXPECT_EQ(why(demand, "of_ours", {}, {}), "");
  EXPECT_EQ(why(demand, "trtllm", {}, {}), "its kind is 'trtllm', accepted: hf_raw, of_ours");
  EXPECT_EQ(why(demand, "", {}, {}), "it states no kind, accepted: hf_raw, of_ours");
}

TEST(Demand, WhatTheVersionSaysGoesBeforeWhatTheSourceSays) {
  const Demand demand{.require = {{.key = "step", .value = "7"}}};
  EXPECT_EQ(why(demand, "", {{"step", "7"}}, {}), "");
  EXPECT_EQ(why(demand, "", {{"step", "6"}}, {{"step", "7"}}), "");
  EXPECT_EQ(why(demand, "", {{"step", "7"}}, {{"step", "6"}}), "'step' is '6', '7' is demanded");
  EXPECT_EQ(why(demand, "", {}, {}), "'step' is not stated, '7' is demanded");
}

TEST(Demand, AtLeastComparesWholeNumbersAndNotText) {
  const Demand demand{.require = {{.key = "step", .kind = Kind::kAtLeast, .value = "9"}}};
  EXPECT_EQ(why(demand, "", {}, {{"step", "10"}}), "");
  EXPECT_EQ(why(demand, "", {}, {{"step", "9"}}), "");
  EXPECT_EQ(why(demand, "", {}, {{"step", "8"}}), "'step' is '8', at least 9 is demanded");
  for (const char* const no_number : {"", "x", "10x", " 10", "1e3", "99999999999999999999"}) {
    EXPECT_NE(why(demand, "", {}, {{"step", no_number}}), "") << no_number;
  }
  const Demand negative{.require = {{.key = "step", .kind = Kind::kAtLeast, .value = "-2"}}};
  EXPECT_EQ(why(negative, "", {}, {{"step", "-1"}}), "");
  EXPECT_NE(why(negative, "", {}, {{"step", "-3"}}), "");
}

TEST(Demand, PresentIsMetByAnyValue) {
  const Demand demand{.require = {{.key = "run", .kind = Kind::kPresent}}};
  EXPECT_EQ(why(demand, "", {{"run", ""}}, {}), "");
  EXPECT_EQ(why(demand, "", {}, {}), "'run' is not stated, it is demanded");
}

TEST(Demand, ARevisionIsStatedAndEqual) {
  const Demand demand{.revision = kRevision};
  EXPECT_EQ(why(demand, "", {}, {}, kRevision), "");
  EXPECT_THAT(why(demand, "", {}, {}), HasSubstr("revision is not stated"));
  EXPECT_THAT(why(demand, "", {}, {}, {.high = 2, .low = 1}),
              HasSubstr(Digest{.high = 2, .low = 1}.to_string()));
}

TEST(Demand, TheFirstReasonIsNamedAndForeignTextIsCutShort) {
  const Demand demand{.require = {{.key = "a", .value = "1"}, {.key = "b", .value = "2"}}};
  EXPECT_THAT(why(demand, "", {{"a", std::string(1000, 'x') + "\n"}, {"b", "3"}}, {}),
              HasSubstr("'a' is 'xxxx"));
  EXPECT_LT(why(demand, "", {{"a", std::string(1000, 'x')}}, {}).size(), 200U);
}

Layout layout_of_experts() {
  LayoutBuilder builder;
  for (const std::string name : {"experts.0.w1", "experts.0.w2", "norm"}) {
    const auto tensor = builder.tensor({name, Dtype::kBF16, {4}});
    if (name != "norm") builder.metadata(tensor, {{"scales", name == "experts.0.w1" ? "a" : "b"}});
    builder.tile(tensor, Box::whole({4}), builder.parameter({name, Dtype::kBF16, 4}), 0);
  }
  // Of the catalog, but not of this process.
  builder.tensor({"experts.1.w1", Dtype::kBF16, {4}});
  builder.kind("deepgemm_fp8");
  return builder.build().value();
}

TEST(Demand, EveryMatchingTensorThatASourceHoldsMeetsTheRequirementsOfTensors) {
  const Layout layout = layout_of_experts();
  const auto reason = [&](std::string value, std::string tensors) {
    const Demand demand{
        .require = {{.key = "scales", .value = std::move(value), .tensors = std::move(tensors)}}};
    EXPECT_EQ(why(demand, "", {}, {}), "");  // not about the source
    return misfit(demand, layout).value_or("");
  };
  EXPECT_EQ(reason("a", "*.w1"), "");
  EXPECT_EQ(reason("b", "experts.*.w2"), "");
  EXPECT_EQ(reason("c", "mlp.*"), "");  // of no tensor that is here
  EXPECT_EQ(reason("a", "experts.*"), "tensor 'experts.0.w2': 'scales' is 'b', 'a' is demanded");
  EXPECT_EQ(reason("a", "*norm*"), "tensor 'norm': 'scales' is not stated, 'a' is demanded");
  EXPECT_THAT(misfit(Demand{.kinds = {"cutlass_fp8"}}, layout).value_or(""),
              HasSubstr("'deepgemm_fp8', accepted: cutlass_fp8"));
}

// Against a search over all ways in which '*' may stand for text.
bool matches_slowly(std::string_view pattern, std::string_view name) {
  if (pattern.empty()) return name.empty();
  if (pattern[0] != '*') {
    return !name.empty() && name[0] == pattern[0] &&
           matches_slowly(pattern.substr(1), name.substr(1));
  }
  for (size_t i = 0; i <= name.size(); ++i) {
    if (matches_slowly(pattern.substr(1), name.substr(i))) return true;
  }
  return false;
}

TEST(Demand, PatternsOfTensorNamesMatchAsASearchOverAllReadingsDoes) {
  Random random(7);
  constexpr std::array kLetters{'a', 'b', '*'};
  for (int round = 0; round < 5000; ++round) {
    std::string name(1 + random.below(7), 'a');
    for (char& c : name) c = kLetters[random.below(2)];
    std::string pattern(1 + random.below(6), 'a');
    for (char& c : pattern) c = kLetters[random.below(3)];
    LayoutBuilder builder;
    const auto tensor = builder.tensor({name, Dtype::kBF16, {1}});
    builder.tile(tensor, Box::whole({1}), builder.parameter({name, Dtype::kBF16, 1}), 0);
    const Demand demand{.require = {{.key = "k", .kind = Kind::kPresent, .tensors = pattern}}};
    ASSERT_EQ(misfit(demand, builder.build().value()).has_value(), matches_slowly(pattern, name))
        << pattern << " " << name;
  }
}

TEST(Demand, ConditionsOfBothAreDemanded) {
  const Demand demand{.kinds = {"a"}, .require = {{.key = "x", .value = "1"}}};
  const Demand more{.require = {{.key = "y", .value = "2"}}, .revision = kRevision};
  const Demand together = both(demand, more);
  EXPECT_EQ(together.kinds, demand.kinds);
  EXPECT_EQ(together.require.size(), 2U);
  EXPECT_EQ(together.revision, kRevision);
  EXPECT_EQ(both(together, {.kinds = {"b"}}).kinds, std::vector<std::string>{"b"});
}

TEST(Metadata, IsBounded) {
  const auto refused = [](const Metadata& metadata) {
    const auto checked = check_metadata("source 'a'", metadata);
    if (!checked) {
      EXPECT_EQ(checked.error().code, ErrorCode::kInvalidArgument);
      EXPECT_THAT(checked.error().message, HasSubstr("source 'a'"));
    }
    return !checked;
  };
  EXPECT_FALSE(refused({}));
  EXPECT_FALSE(refused({{std::string(kMaxMetadataKeyBytes, 'k'), ""}}));
  EXPECT_TRUE(refused({{std::string(kMaxMetadataKeyBytes + 1, 'k'), ""}}));
  EXPECT_TRUE(refused({{"", "v"}}));
  EXPECT_TRUE(refused({{"two words", "v"}}));
  EXPECT_TRUE(refused({{"\x7F", "v"}}));
  EXPECT_FALSE(refused({{"k", std::string(kMaxMetadataValueBytes, ' ')}}));
  EXPECT_TRUE(refused({{"k", std::string(kMaxMetadataValueBytes + 1, 'v')}}));
  EXPECT_TRUE(refused({{"k", "two\nlines"}}));
  Metadata many;
  for (size_t i = 0; i < kMaxMetadataEntries; ++i) many["k" + std::to_string(i)] = "";
  EXPECT_FALSE(refused(many));
  many["one more"] = "";
  EXPECT_TRUE(refused(many));
  Metadata large;
  for (size_t i = 0; i < kMaxMetadataBytes / kMaxMetadataValueBytes; ++i) {
    large["k" + std::to_string(i)] = std::string(kMaxMetadataValueBytes - 2, 'v');
  }
  EXPECT_FALSE(refused(large));
  large["x"] = "";
  EXPECT_TRUE(refused(large));
}

TEST(Demand, IsBoundedAndItsNumbersAreNumbers) {
  const auto allowed = [](const Demand& demand) {
    return check_demand("receiver 'a'", demand).has_value();
  };
  EXPECT_TRUE(allowed({}));
  EXPECT_TRUE(allowed({.require = {{.key = "k", .kind = Kind::kAtLeast, .value = "-7"}}}));
  EXPECT_FALSE(allowed({.require = {{.key = "k", .kind = Kind::kAtLeast, .value = "7.5"}}}));
  EXPECT_FALSE(allowed({.require = {{.key = "", .value = "7"}}}));
  EXPECT_FALSE(allowed({.require = {{.key = "k", .value = "\n"}}}));
  EXPECT_FALSE(allowed({.require = {{.key = "k", .value = "7", .tensors = "\n"}}}));
  EXPECT_FALSE(allowed({.kinds = {""}}));
  EXPECT_FALSE(allowed({.kinds = {"two words"}}));
  EXPECT_FALSE(allowed({.kinds = std::vector<std::string>(kMaxDemandKinds + 1, "k")}));
  EXPECT_FALSE(allowed({.require = std::vector<Requirement>(kMaxRequirements + 1, {.key = "k"})}));
}

TEST(Layout, KindAndMetadataArePartOfItsIdentity) {
  const Layout layout = layout_of_experts();
  EXPECT_EQ(layout.kind(), "deepgemm_fp8");
  const Layout other = layout.with_kind("cutlass_fp8").value();
  EXPECT_EQ(other.kind(), "cutlass_fp8");
  EXPECT_NE(other.digest(), layout.digest());
  EXPECT_EQ(other.with_kind("deepgemm_fp8").value().digest(), layout.digest());
  EXPECT_EQ(other.metadata_of(*other.find_tensor("experts.0.w2")), (Metadata{{"scales", "b"}}));
  EXPECT_TRUE(other.metadata_of(*other.find_tensor("norm")).empty());
  EXPECT_EQ(layout.with_kind("two words").error().code, ErrorCode::kInvalidArgument);
  LayoutBuilder builder;
  builder.metadata(3, {{"k", "v"}});
  EXPECT_THAT(builder.build().error().message, HasSubstr("metadata is of tensor 3"));
}

TEST(Revision, IsOfNamesDtypesShapesAndFingerprints) {
  const std::vector<TensorSpec> tensors{{"a", Dtype::kBF16, {2, 3}}, {"b", Dtype::kF32, {4}}};
  const std::vector<uint64_t> sums{5, 6};
  const Digest revision = content_revision(tensors, sums);
  EXPECT_EQ(content_revision(tensors, sums), revision);
  EXPECT_NE(revision, Digest{});
  EXPECT_NE(content_revision(tensors, std::vector<uint64_t>{6, 5}), revision);
  for (const auto change : {0, 1, 2}) {
    std::vector<TensorSpec> changed = tensors;
    if (change == 0) changed[1].name = "c";
    if (change == 1) changed[1].dtype = Dtype::kF16;
    if (change == 2) changed[0].shape = {3, 2};
    EXPECT_NE(content_revision(changed, sums), revision) << change;
  }
  EXPECT_NE(content_revision({}, {}), Digest{});
}

TEST(Digest, IsReadBackFromItsTextAndFromNothingElse) {
  const Digest digest{.high = 0x0123456789ABCDEF, .low = 3};
  EXPECT_EQ(parse_digest(digest.to_string()).value(), digest);
  for (const char* const text :
       {"", "3", "0123456789abcdef000000000000000g", "+123456789abcdef0000000000000003",
        "0123456789abcdef00000000000000031"}) {
    EXPECT_EQ(parse_digest(text).error().code, ErrorCode::kInvalidArgument) << text;
  }
}

}  // namespace
}  // namespace transfuse

// compile() and diagnose(): what is refused and why, how chunks are cut, how small a plan is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "plan/oracle.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

using ::testing::HasSubstr;

// A layout of one box of one bf16 tensor in a parameter of its own.
struct Part {
  std::string tensor = "t";
  Dims shape;
  Box box;
  Dtype dtype = Dtype::kBF16;
  std::string parameter = "p";
};

Layout layout_of(const std::vector<Part>& parts) {
  LayoutBuilder builder;
  for (const Part& part : parts) {
    const uint32_t tensor = builder.tensor({part.tensor, Dtype::kBF16, part.shape});
    const uint32_t parameter =
        builder.parameter({part.parameter, part.dtype, part.box.element_count()});
    builder.tile(tensor, part.box, parameter, 0);
  }
  return builder.build().value();
}

Layout whole(const Dims& shape, Dtype dtype = Dtype::kBF16) {
  return layout_of({{.shape = shape, .box = Box::whole(shape), .dtype = dtype}});
}

Layout rows(const Dims& shape, int64_t low, int64_t high) {
  Box box = Box::whole(shape);
  box.offset[0] = low;
  box.length[0] = high - low;
  return layout_of({{.shape = shape, .box = box}});
}

std::vector<Layout> row_shards(const Dims& shape, int64_t count) {
  std::vector<Layout> shards;
  for (int64_t i = 0; i < count; ++i) {
    shards.push_back(rows(shape, shape[0] * i / count, shape[0] * (i + 1) / count));
  }
  return shards;
}

TEST(Plan, I1_AGapIsReportedWithTensorAndBox) {
  const std::vector<Layout> sources{rows({8, 4}, 0, 3), rows({8, 4}, 5, 8)};
  const auto findings = diagnose(whole({8, 4}), sources);
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kGap);
  EXPECT_EQ(findings[0].tensor, "t");
  EXPECT_EQ(findings[0].parameter, "p");
  EXPECT_EQ(findings[0].box, (Box{{3, 0}, {2, 4}}));
  const auto plan = compile(whole({8, 4}), sources);
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_THAT(plan.error().message, HasSubstr("[3:5, 0:4]"));
  EXPECT_THAT(plan.error().message, HasSubstr("\"t\""));
}

TEST(Plan, I1_ElementsWithoutATileOrFillAreReportedWithTheirParameter) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {4}});
  builder.tile(tensor, {{0}, {4}}, builder.parameter({"padded", Dtype::kBF16, 10}), 2);
  const auto findings = diagnose(builder.build().value(), std::vector{whole({4})});
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].kind, FindingKind::kUncovered);
  EXPECT_EQ(findings[0].parameter, "padded");
  EXPECT_EQ(findings[0].box, (Box{{0}, {2}}));
  EXPECT_EQ(findings[1].box, (Box{{6}, {4}}));
}

TEST(Plan, I1_OverlapIsReportedWithTensorAndBox) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {6, 4}});
  const uint32_t parameter = builder.parameter({"p", Dtype::kBF16, 20});
  builder.tile(tensor, {{0, 0}, {3, 4}}, parameter, 0);
  builder.tile(tensor, {{3, 0}, {3, 4}}, parameter, 8);
  const auto findings = diagnose(builder.build().value(), std::vector{whole({6, 4})});
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kOverlap);
  EXPECT_EQ(findings[0].tensor, "t");
  EXPECT_EQ(findings[0].box, (Box{{3, 0}, {1, 4}}));
  EXPECT_THAT(findings[0].reason, HasSubstr("[0:3, 0:4]"));
}

TEST(Plan, I1_ADtypeWithoutACastIsReportedForThatPairOfParametersAlone) {
  const Layout target =
      layout_of({{.shape = {4}, .box = {{0}, {2}}, .dtype = Dtype::kF16},
                 {.shape = {4}, .box = {{2}, {2}}, .dtype = Dtype::kBF16, .parameter = "q"}});
  const auto findings = diagnose(target, std::vector{whole({4}, Dtype::kBF16)});
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kDtype);
  EXPECT_EQ(findings[0].tensor, "t");
  EXPECT_EQ(findings[0].box, (Box{{0}, {2}}));
  EXPECT_THAT(findings[0].reason, HasSubstr("expects f16"));
  EXPECT_TRUE(diagnose(target, std::vector{whole({4}, Dtype::kF32)}).empty());
}

TEST(Plan, I1_AnotherShapeAtASourceIsReportedThoughAnotherSourceWouldDo) {
  const auto findings = diagnose(whole({4, 4}), std::vector{whole({4, 4}), whole({4, 5})});
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kShape);
  EXPECT_EQ(findings[0].tensor, "t");
  EXPECT_EQ(findings[0].box, Box::whole({4, 4}));
  EXPECT_THAT(findings[0].reason, HasSubstr("expected shape [4, 4], found [4, 5]"));
  EXPECT_EQ(diagnose(whole({4, 4}), std::vector{whole({2, 8})})[0].kind, FindingKind::kShape);
}

TEST(Plan, I1_AShapeThatOnlySplitsDimensionsIsTheSameTensor) {
  for (const Dims& other : {Dims{4, 3, 2}, Dims{2, 2, 6}, Dims{4, 1, 6}, Dims{24}}) {
    EXPECT_TRUE(compile(whole({4, 6}), std::vector{whole(other)})) << other.to_string();
    EXPECT_TRUE(compile(whole(other), std::vector{whole({4, 6})})) << other.to_string();
  }
  for (const Dims& other : {Dims{6, 4}, Dims{8, 3}, Dims{2, 12}, Dims{4, 4, 2}, Dims{4, 6, 2}}) {
    EXPECT_EQ(diagnose(whole({4, 6}), std::vector{whole(other)})[0].kind, FindingKind::kShape)
        << other.to_string();
  }
}

TEST(Plan, I1_SourcesThatSplitADimensionEachInItsOwnWayAreRefused) {
  const std::vector<Layout> sources{whole({4, 3, 2}), whole({4, 2, 3})};
  const auto findings = diagnose(whole({4, 6}), sources);
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kShape);
  EXPECT_THAT(findings[0].reason, HasSubstr("expected shape [4, 6], found [4, "));
}

TEST(Plan, I1_AGapInASplitShapeIsReportedInTheTargetsOwn) {
  const Layout odd = layout_of({{.shape = {4, 3, 2}, .box = {{0, 0, 1}, {4, 3, 1}}}});
  const auto findings = diagnose(whole({4, 6}), std::vector{odd});
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kGap);
  EXPECT_EQ(findings[0].box, (Box{{0, 0}, {4, 5}}));
  EXPECT_THAT(findings[0].reason, HasSubstr("elements [0:4, 0:3, 0:1] of tensor \"t\" [4, 3, 2]"));
}

TEST(Plan, I1_ANameThatNoSourceKnowsIsReportedAsThat) {
  const Layout other = layout_of({{.tensor = "u", .shape = {4}, .box = {{0}, {4}}}});
  const auto findings = diagnose(whole({4}), std::vector{other});
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_EQ(findings[0].kind, FindingKind::kUnknownTensor);
  EXPECT_EQ(findings[0].tensor, "t");
  EXPECT_EQ(findings[0].box, Box::whole({4}));
}

// A vocabulary that does not divide: the last rank holds fewer rows and a fill, never the rest of
// the axis.
TEST(Plan, I1_LastRankKeepsItsOwnExtent) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {10, 3}});
  const uint32_t parameter = builder.parameter({"p", Dtype::kBF16, 12});
  builder.tile(tensor, {{8, 0}, {2, 3}}, parameter, 0);
  builder.fill(parameter, 6, {2, 3}, {3, 1});
  const Layout target = builder.build().value();
  const std::vector<Layout> sources = row_shards({10, 3}, 3);
  const auto plan = compile(target, sources);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_EQ(plan->size_bytes(), 12u);
  EXPECT_TRUE(judge(*plan, Oracle(target, sources)).empty());
}

TEST(Plan, I1_NoMoreThanLimitFindingsAreCollected) {
  std::vector<Part> parts;
  for (int i = 0; i < 40; ++i) {
    const std::string name = "t" + std::to_string(i);
    parts.push_back({.tensor = name, .shape = {4}, .box = {{0}, {4}}, .parameter = name});
  }
  const Layout target = layout_of(parts);
  EXPECT_EQ(diagnose(target, {}, 7).size(), 7u);
  EXPECT_EQ(diagnose(target, {}).size(), 40u);
  const auto plan = compile(target, {});
  ASSERT_FALSE(plan);
  EXPECT_THAT(plan.error().message, HasSubstr("40 findings"));
}

// One process groups its memory in one parameter, the other in many, named otherwise and in another
// order.
TEST(Plan, I2_ProcessesThatGroupMemoryDifferentlyAreMatchedByName) {
  LayoutBuilder builder;
  const uint32_t arena = builder.parameter({"arena", Dtype::kBF16, 24});
  int64_t offset = 24;
  for (const char* name : {"a", "b", "c", "d"}) {
    offset -= 6;
    builder.tile(builder.tensor({name, Dtype::kBF16, {2, 3}}), Box::whole({2, 3}), arena, offset);
  }
  std::vector<Part> parts;
  for (const auto& [tensor, parameter] :
       std::map<std::string, std::string>{{"a", "z"}, {"b", "y"}, {"c", "x"}, {"d", "w"}}) {
    parts.push_back(
        {.tensor = tensor, .shape = {2, 3}, .box = Box::whole({2, 3}), .parameter = parameter});
  }
  const Layout target = layout_of(parts);
  const std::vector<Layout> sources{builder.build().value()};
  const auto plan = compile(target, sources);
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_TRUE(judge(*plan, Oracle(target, sources)).empty());
}

TEST(Plan, EqualLayoutsAreOneHolder) {
  const std::vector<Layout> sources{whole({4, 4}), rows({4, 4}, 0, 4), whole({4, 4})};
  const auto plan = compile(whole({4, 4}), sources);
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->source_layouts().size(), 1u);
  EXPECT_EQ(plan->holders().size(), 1u);
}

TEST(Plan, SourcesAreSortedByDigestWhateverTheirOrder) {
  std::vector<Layout> sources = row_shards({12, 4}, 4);
  const auto one = compile(whole({12, 4}), sources);
  std::reverse(sources.begin(), sources.end());
  sources.push_back(sources[1]);
  const auto two = compile(whole({12, 4}), sources);
  ASSERT_TRUE(one && two);
  EXPECT_EQ(one->key(), two->key());
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(one->source_layouts()[i].digest(), two->source_layouts()[i].digest());
    if (i > 0) {
      EXPECT_LT(one->source_layouts()[i - 1].digest(), one->source_layouts()[i].digest());
    }
  }
}

TEST(Plan, KeyIsKnownWithoutCompilingAndChangesWithTheOptions) {
  const Layout target = whole({4, 4});
  const std::vector<Layout> sources = row_shards({4, 4}, 2);
  const std::vector<Digest> digests{sources[1].digest(), sources[0].digest(), sources[1].digest()};
  const auto plan = compile(target, sources, {.chunk_bytes = 64});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->key(), plan_key(target.digest(), digests, {.chunk_bytes = 64}));
  EXPECT_NE(plan->key(), plan_key(target.digest(), digests, {.chunk_bytes = 65}));
  EXPECT_NE(plan->key(), plan_key(sources[0].digest(), digests, {.chunk_bytes = 64}));
}

TEST(Plan, NothingToMoveIsAPlanWithoutChunks) {
  const auto plan = compile(Layout(), std::vector{whole({4})});
  ASSERT_TRUE(plan);
  EXPECT_TRUE(plan->chunks().empty());
  EXPECT_EQ(plan->size_bytes(), 0u);
}

TEST(Plan, AChunkOfNoBytesIsRefused) {
  const auto plan = compile(whole({4}), std::vector{whole({4})}, {.chunk_bytes = 0});
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kInvalidArgument);
}

// Of every chunk: bytes, and the elements of the target that it writes.
std::vector<std::pair<uint64_t, std::vector<int64_t>>> boundaries(const Plan& plan) {
  std::vector<std::pair<uint64_t, std::vector<int64_t>>> out;
  for (const Chunk& chunk : plan.chunks()) {
    std::vector<int64_t> places;
    for (const transfuse::Run& run : plan.runs().subspan(chunk.first_run, chunk.run_count)) {
      const Strides3& s = plan.pattern(run.target_pattern);
      for (int64_t a = 0; a < run.count[0]; ++a) {
        for (int64_t b = 0; b < run.count[1]; ++b) {
          for (int64_t c = 0; c < run.count[2]; ++c) {
            places.push_back(run.target_offset + a * s.level[0] + b * s.level[1] + c * s.level[2]);
          }
        }
      }
    }
    std::sort(places.begin(), places.end());
    out.emplace_back(chunk.size_bytes, std::move(places));
  }
  return out;
}

TEST(Chunks, StayTheSameWhoeverServes) {
  const Layout target = whole({40, 24});
  const PlanOptions options{.chunk_bytes = 200};
  const auto one = compile(target, std::vector{whole({40, 24})}, options);
  ASSERT_TRUE(one);
  ASSERT_GT(one->chunks().size(), 5u);
  for (const int64_t shards : {2, 3, 7, 40}) {
    const auto other = compile(target, row_shards({40, 24}, shards), options);
    ASSERT_TRUE(other);
    EXPECT_EQ(boundaries(*one), boundaries(*other)) << shards << " sources";
  }
}

TEST(Chunks, OfOneLargeTensorAreNearEqual) {
  const auto plan =
      compile(whole({1000, 64}), std::vector{whole({1000, 64})}, {.chunk_bytes = 128 * 300});
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->chunks().size(), 4u);
  for (const Chunk& chunk : plan->chunks()) EXPECT_EQ(chunk.size_bytes, 128u * 250u);
}

TEST(Chunks, CutARowOnlyWhereItAloneIsTooLong) {
  const auto plan = compile(whole({2, 1000}), std::vector{whole({2, 1000})}, {.chunk_bytes = 700});
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->chunks().size(), 6u);  // 3 parts of 333 or 334 elements in each row
  for (const Chunk& chunk : plan->chunks()) {
    EXPECT_EQ(chunk.run_count, 1u);
    EXPECT_GE(chunk.size_bytes, 666u);
    EXPECT_LE(chunk.size_bytes, 668u);
  }
}

TEST(Chunks, GroupSmallTensorsUpToTheirSize) {
  std::vector<Part> parts;
  for (int i = 100; i < 200; ++i) {
    const std::string name = "t" + std::to_string(i);
    parts.push_back({.tensor = name, .shape = {10}, .box = {{0}, {10}}, .parameter = name});
  }
  const Layout layout = layout_of(parts);
  const auto plan = compile(layout, std::vector{layout}, {.chunk_bytes = 205});
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->chunks().size(), 10u);
  for (const Chunk& chunk : plan->chunks()) EXPECT_EQ(chunk.size_bytes, 200u);
}

TEST(Plan, T10_ARunIsAtMost64Bytes) { EXPECT_LE(sizeof(transfuse::Run), 64u); }

// Row-parallel experts of a 30B mixture at TP 4: 262,144 rows in one layer.
TEST(Plan, T10_ARowParallelTensorIsNeverAnEntryPerRow) {
  LayoutBuilder source;
  LayoutBuilder target;
  const uint32_t stack = target.parameter({"w2", Dtype::kBF16, int64_t{128} * 2048 * 192});
  for (int64_t e = 0; e < 128; ++e) {
    const TensorSpec spec{"down." + std::to_string(e), Dtype::kBF16, {2048, 768}};
    source.tile(source.tensor(spec), Box::whole(spec.shape),
                source.parameter({spec.name, Dtype::kBF16, 2048 * 768}), 0);
    target.tile(target.tensor(spec), {{0, 192}, {2048, 192}}, stack, e * 2048 * 192);
  }
  const auto plan = compile(target.build().value(), std::vector{source.build().value()});
  ASSERT_TRUE(plan);
  EXPECT_EQ(plan->runs().size(), 128u);
  EXPECT_LT(plan->memory_bytes(), 128u * 160u);
  const transfuse::Run& run = plan->runs()[5];
  EXPECT_EQ(run.count[1], 2048u);
  EXPECT_EQ(run.count[2], 192u);
  EXPECT_EQ(plan->pattern(plan->holders_of(run)[0].source_pattern).level[1], 768);
}

TEST(Plan, CountsBeyond32BitsAreCut) {
  const Dims shape{3, int64_t{1} << 33};
  LayoutBuilder builder;
  builder.tile(builder.tensor({"t", Dtype::kU8, shape}), Box::whole(shape),
               builder.parameter({"p", Dtype::kU8, shape.product()}), 0);
  const Layout layout = builder.build().value();
  const auto plan = compile(layout, std::vector{layout}, {.chunk_bytes = uint64_t{1} << 40});
  ASSERT_TRUE(plan);
  int64_t elements = 0;
  for (const transfuse::Run& run : plan->runs()) elements += run.element_count();
  EXPECT_EQ(elements, shape.product());
  EXPECT_EQ(plan->size_bytes(), static_cast<uint64_t>(shape.product()));
}

TEST(Plan, BoxOfARunIsWhatItWrites) {
  const std::vector<Layout> sources = row_shards({8, 6, 4}, 2);
  const auto plan = compile(whole({8, 6, 4}), sources, {.chunk_bytes = 6 * 4 * 2 * 2});
  ASSERT_TRUE(plan);
  ASSERT_EQ(plan->runs().size(), 4u);
  EXPECT_EQ(plan->box_of(plan->runs()[1]), (Box{{2, 0, 0}, {2, 6, 4}}));
}

}  // namespace
}  // namespace transfuse

// explain(): the sums are right, the busiest link is named, and each form says what was summed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "plan/explain_format.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

// Rows [low, high) of a [64, 256] tensor.
Layout rows(int64_t low, int64_t high, Dtype dtype) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {64, 256}});
  const uint32_t parameter = builder.parameter({"p", dtype, (high - low) * 256});
  builder.tile(tensor, {{low, 0}, {high - low, 256}}, parameter, 0);
  return builder.build().value();
}

Layout columns(int64_t low, int64_t high, Dtype dtype) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {64, 256}});
  const uint32_t parameter = builder.parameter({"p", dtype, (high - low) * 64});
  builder.tile(tensor, {{0, low}, {64, high - low}}, parameter, 0);
  return builder.build().value();
}

// `source_count` row shards into `target_count` column shards.
class Exchange {
 public:
  Exchange(int64_t source_count, int64_t target_count, Dtype source_dtype = Dtype::kBF16) {
    for (int64_t s = 0; s < source_count; ++s) {
      layouts_.push_back(rows(s * 64 / source_count, (s + 1) * 64 / source_count, source_dtype));
      names_.push_back("trainer." + std::to_string(s));
      digests_.push_back(layouts_.back().digest());
    }
    for (int64_t t = 0; t < target_count; ++t) {
      plans_.push_back(
          compile(columns(t * 256 / target_count, (t + 1) * 256 / target_count, Dtype::kBF16),
                  layouts_)
              .value());
      target_names_.push_back("engine." + std::to_string(t));
    }
  }

  Result<Explanation> explain() const {
    std::vector<ExplainInput> inputs;
    for (size_t t = 0; t < plans_.size(); ++t) inputs.push_back({target_names_[t], &plans_[t]});
    return transfuse::explain(inputs, names_, digests_);
  }

 private:
  std::vector<Layout> layouts_;
  std::vector<std::string> names_;
  std::vector<Digest> digests_;
  std::vector<Plan> plans_;
  std::vector<std::string> target_names_;
};

TEST(Explain, SumsBytesReadPerPairInTheDtypeOfTheSource) {
  const auto explanation = Exchange(2, 4, Dtype::kF32).explain();
  ASSERT_TRUE(explanation) << explanation.error().message;
  ASSERT_EQ(explanation->pairs.size(), 8u);
  for (const PairTraffic& pair : explanation->pairs) EXPECT_EQ(pair.size_bytes, 32u * 64u * 4u);
  EXPECT_EQ(explanation->total_bytes, 64u * 256u * 4u);
  EXPECT_EQ(explanation->busiest_source_bytes, 64u * 256u * 4u / 2);
  EXPECT_EQ(explanation->busiest_target_bytes, 64u * 256u * 4u / 4);
  EXPECT_EQ(explanation->busiest_link, "source trainer.0");
}

TEST(Explain, RunLengthsAreContiguousBytesAtTheSource) {
  const auto explanation = Exchange(1, 2).explain();
  ASSERT_TRUE(explanation);
  ASSERT_EQ(explanation->run_lengths.size(), 1u);
  EXPECT_EQ(explanation->run_lengths[0].min_bytes, 256u);  // half a row of 256 bf16
  EXPECT_EQ(explanation->run_lengths[0].piece_count, 128u);
  EXPECT_EQ(explanation->run_lengths[0].size_bytes, 64u * 256u * 2u);
}

TEST(Explain, ReplicasShareTheReading) {
  const Layout whole = rows(0, 64, Dtype::kBF16);
  const auto plan = compile(whole, std::vector{whole}, {.chunk_bytes = 1024});
  ASSERT_TRUE(plan);
  const std::vector<std::string> names{"a", "b", "c", "d"};
  const std::vector<Digest> digests(4, whole.digest());
  const auto explanation = explain(std::vector<ExplainInput>{{"engine", &*plan}}, names, digests);
  ASSERT_TRUE(explanation);
  ASSERT_EQ(explanation->pairs.size(), 4u);
  for (const PairTraffic& pair : explanation->pairs) EXPECT_EQ(pair.size_bytes, 8192u);
  EXPECT_EQ(explanation->busiest_link, "target engine");
}

TEST(Explain, ASourceThatIsMissingIsAnErrorThatNamesTheTensor) {
  const Layout whole = rows(0, 64, Dtype::kBF16);
  const auto plan = compile(whole, std::vector{whole});
  const auto explanation = explain(std::vector<ExplainInput>{{"engine", &*plan}}, {}, {});
  ASSERT_FALSE(explanation);
  EXPECT_EQ(explanation.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(explanation.error().message, HasSubstr("\"t\""));
}

TEST(Explain, TextHoldsTheMatrixAndTheBound) {
  const std::string text = Exchange(2, 2).explain()->to_text();
  EXPECT_THAT(text, HasSubstr("2 sources -> 2 targets: 32.8 kB read, 4 pairs"));
  EXPECT_THAT(text, HasSubstr("trainer.1    8.19 kB    8.19 kB    16.4 kB"));
  EXPECT_THAT(text, HasSubstr("from    256 B"));
  EXPECT_THAT(text,
              HasSubstr("bound: one refit cannot be faster than 16.4 kB through the link of"));
}

TEST(Explain, JsonParsesBackToTheSums) {
  const auto explanation = Exchange(3, 2).explain();
  const auto json = nlohmann::json::parse(explanation->to_json());
  EXPECT_EQ(json["total_bytes"], 32768);
  EXPECT_EQ(json["pairs"].size(), 6u);
  EXPECT_EQ(json["bound"]["link"], explanation->busiest_link);
  uint64_t sum = 0;
  for (const auto& bucket : json["run_lengths"]) sum += bucket["size_bytes"].get<uint64_t>();
  EXPECT_EQ(sum, 32768u);
}

size_t occurrences(const std::string& text, const std::string& word) {
  size_t count = 0;
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++count;
  return count;
}

TEST(Explain, AFewRanksAreDrawnAsOneRibbonForEachPair) {
  const std::string svg = Exchange(3, 2).explain()->to_svg();
  EXPECT_EQ(occurrences(svg, "<path "), 6u);
  EXPECT_THAT(svg, HasSubstr("busiest link"));
  EXPECT_EQ(svg.rfind("</svg>\n"), svg.size() - 7);
}

TEST(Explain, ManyRanksAreDrawnAsAMatrixWithOneCellForEachPair) {
  const std::string svg = Exchange(64, 32).explain()->to_svg();
  EXPECT_THAT(svg, Not(HasSubstr("<path ")));
  EXPECT_EQ(occurrences(svg, "\u2192 engine."), 64u * 32u);
}

TEST(Explain, NamesCannotBreakThePicture) {
  EXPECT_EQ(escape_xml("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
}

TEST(Explain, NumbersAreSpelledForPeople) {
  EXPECT_EQ(spell_bytes(999), "999 B");
  EXPECT_EQ(spell_bytes(1240), "1.24 kB");
  EXPECT_EQ(spell_bytes(16090000000), "16.1 GB");
  EXPECT_EQ(spell_bytes(999600), "1.00 MB");
  EXPECT_EQ(spell_length(65536), "64 KiB");
  EXPECT_EQ(spell_length(2), "2 B");
  EXPECT_EQ(spell_count(12700000), "12,700,000");
  EXPECT_EQ(spell_count(398), "398");
}

}  // namespace
}  // namespace transfuse

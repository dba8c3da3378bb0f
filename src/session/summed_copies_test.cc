// Every byte is copied once, and every sum is that of its run, whatever the layouts.
#include "session/summed_copies.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "copy/copy.h"
#include "plan/copies.h"
#include "session/refit_world.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

using testing::layouts;
using testing::Parameters;
using testing::value_or_fail;

struct Outcome {
  uint64_t summed_bytes = 0;
  size_t sums = 0;
  size_t held = 0;  // runs
  uint64_t bytes = 0;
};

CopyTable table_of(const Layout& target, const std::vector<Layout>& sources) {
  return CopyTable(
      value_or_fail(compile(target, sources, PlanOptions{.chunk_bytes = 2048}), "plan"));
}

// Copies source `own` for readers with these layouts, and compares with the slow truth.
Outcome copy_and_check(const std::vector<Layout>& sources, size_t own,
                       const std::vector<Layout>& targets) {
  Parameters weights(sources[own]);
  Parameters slot(sources[own]);
  weights.write(3);
  slot.poison(std::byte{0xEE});
  std::vector<CopyTable> tables;
  for (const Layout& target : targets) tables.push_back(table_of(target, sources));
  std::vector<HeldRuns> held;
  for (const CopyTable& table : tables) {
    const auto of_own =
        std::ranges::find(table.plan().source_layouts(), sources[own].digest(), &Layout::digest);
    held.push_back({.copies = &table,
                    .own = static_cast<uint32_t>(of_own - table.plan().source_layouts().begin())});
  }
  const SummedCopies made = summed_copies(
      sources[own], held, [&](uint32_t i) { return weights.buffers()[i].data(); },
      [&](uint32_t i) { return slot.buffers()[i].data(); });
  Outcome outcome;
  outcome.bytes = sources[own].parameter_bytes();
  uint64_t copied_bytes = 0;
  std::vector<uint64_t> sums;
  for (const StridedCopy& copy : made.copies) {
    sums.push_back(run_copy(copy, reinterpret_cast<const std::byte*>(copy.source_offset_bytes)));
    copied_bytes += copy.target_bytes();
    if (copy.fingerprint) outcome.summed_bytes += copy.target_bytes();
  }
  for (const auto& [copy, number, index] : made.sums) {
    EXPECT_TRUE(made.copies[copy].fingerprint);
    const CopyTable& table = tables[number];
    const uint32_t run_number = table.held_runs(held[number].own)[index];
    const Run& run = table.plan().runs()[run_number];
    const Holder& holder =
        *std::ranges::find(table.plan().holders_of(run), held[number].own, &Holder::source_layout);
    EXPECT_EQ(sums[copy], table.sum(run, holder, [&](uint32_t parameter) {
      return weights.buffers()[parameter].data();
    }));
  }
  outcome.sums = made.sums.size();
  for (const HeldRuns& table : held) outcome.held += table.copies->held_runs(table.own).size();
  // As many bytes as there are, and all of them right: each once.
  EXPECT_EQ(copied_bytes, outcome.bytes);
  for (size_t i = 0; i < weights.buffers().size(); ++i) {
    EXPECT_TRUE(std::ranges::equal(weights.buffers()[i], slot.buffers()[i]))
        << sources[own].parameters()[i].name;
  }
  return outcome;
}

TEST(SummedCopies, OfEveryPairOfLayoutsCopyEachByteOnceAndSumWhatTheyCopy) {
  const std::vector<std::string> specs = {
      "hf",        "fsdp:dp=1", "fsdp:dp=3",   "megatron:tp=2",      "vllm:tp=1",
      "vllm:tp=2", "vllm:tp=4", "sglang:tp=2", "fsdp:dp=2,dtype=f32"};
  for (const std::string& source : specs) {
    const auto sources = layouts(source);
    for (const std::string& target : specs) {
      SCOPED_TRACE(source + " -> " + target);
      const auto targets = layouts(target);
      for (size_t own = 0; own < sources.size(); ++own) {
        copy_and_check(sources, own, targets);
        copy_and_check(sources, own, {targets.back()});
      }
    }
    const auto both = layouts("vllm:tp=2");
    copy_and_check(sources, 0, {both[1], layouts("hf")[0], both[0]});
    copy_and_check(sources, 0, {});
  }
}

TEST(SummedCopies, WhereRanksShareOutTheParametersNothingIsLeftToBeSummed) {
  for (const char* const target : {"hf", "vllm:tp=2", "megatron:tp=2"}) {
    const Outcome outcome = copy_and_check(layouts("hf"), 0, layouts(target));
    EXPECT_EQ(outcome.summed_bytes, outcome.bytes) << target;
    EXPECT_EQ(outcome.sums, outcome.held) << target;
  }
}

TEST(SummedCopies, OneRankOfTwoLeavesThePlainRestAndCastsAreNotSummed) {
  const Outcome half = copy_and_check(layouts("hf"), 0, {layouts("vllm:tp=2")[0]});
  EXPECT_GT(half.summed_bytes, half.bytes / 3);
  EXPECT_LT(half.summed_bytes, half.bytes);
  const Outcome cast = copy_and_check(layouts("fsdp:dp=1,dtype=f32"), 0, layouts("hf"));
  EXPECT_EQ(cast.summed_bytes, 0U);
}

}  // namespace
}  // namespace transfuse

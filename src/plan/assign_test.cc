// assign(): who serves, how evenly, and that a warm call allocates nothing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace {
std::atomic<int64_t> allocations{0};
}  // namespace

// The plain and the nothrow pair: what the standard library and the code under test may call.
[[gnu::noinline]] void* operator new(size_t size, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size);
}
[[gnu::noinline]] void* operator new(size_t size) {
  void* memory = operator new(size, std::nothrow);
  if (memory == nullptr) std::abort();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}

namespace transfuse {
namespace {

using ::testing::HasSubstr;

// Rows [low, high) of [64, 16]; `parameter` makes layouts with equal tiles distinct.
Layout rows(int64_t low, int64_t high, const std::string& parameter = "p") {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {64, 16}});
  builder.tile(tensor, {{low, 0}, {high - low, 16}},
               builder.parameter({parameter, Dtype::kBF16, (high - low) * 16}), 0);
  return builder.build().value();
}

Plan plan_of(const std::vector<Layout>& sources) {
  return compile(rows(0, 64), sources, {.chunk_bytes = 64}).value();  // 32 chunks of two rows
}

uint32_t index_of(const Plan& plan, const Layout& layout) {
  for (uint32_t i = 0; i < plan.source_layouts().size(); ++i) {
    if (plan.source_layouts()[i].digest() == layout.digest()) return i;
  }
  ADD_FAILURE() << "no such source";
  return 0;
}

TEST(Assign, SpreadsOverTheMembersOfOneLayout) {
  const Plan plan = plan_of({rows(0, 64)});
  Assignment assignment;
  ASSERT_TRUE(assign(plan, std::vector<uint32_t>{4}, 0, assignment));
  EXPECT_EQ(assignment.load_bytes, std::vector<uint64_t>(4, 512));
}

TEST(Assign, SpreadsOverLayoutsThatHoldTheSame) {
  const Plan plan = plan_of({rows(0, 64, "a"), rows(0, 64, "b")});
  Assignment assignment;
  ASSERT_TRUE(assign(plan, std::vector<uint32_t>{1, 3}, 0, assignment));
  EXPECT_EQ(assignment.load_bytes, std::vector<uint64_t>(4, 512));
}

// The half that only one source holds goes to it first; the free half makes up for it.
TEST(Assign, FreeChoicesMakeUpForForcedOnes) {
  const Layout all = rows(0, 64);
  const Layout first_half = rows(0, 32);
  const Plan plan = plan_of({all, first_half});
  Assignment assignment;
  ASSERT_TRUE(assign(plan, std::vector<uint32_t>{1, 1}, 0, assignment));
  EXPECT_EQ(assignment.load_bytes, std::vector<uint64_t>(2, 1024));
  for (size_t r = 0; r < plan.runs().size(); ++r) {
    const Holder& holder = plan.holders()[assignment.holder[r]];
    EXPECT_EQ(holder.source_layout, assignment.choice[r]);
    const bool second_half = plan.box_of(plan.runs()[r]).offset[0] >= 32;
    EXPECT_EQ(holder.source_layout, index_of(plan, second_half ? all : first_half));
  }
}

TEST(Assign, TargetsStartAtDifferentReplicas) {
  const Plan plan = plan_of({rows(0, 64)});
  std::set<uint32_t> first;
  Assignment assignment;
  for (uint64_t rank = 0; rank < 4; ++rank) {
    ASSERT_TRUE(assign(plan, std::vector<uint32_t>{4}, rank, assignment));
    first.insert(assignment.choice[0]);
  }
  EXPECT_EQ(first.size(), 4u);
}

TEST(Assign, ALayoutWithoutMembersServesNothing) {
  const Layout gone = rows(0, 64, "gone");
  const Plan plan = plan_of({rows(0, 64), gone});
  std::vector<uint32_t> members{2, 2};
  members[index_of(plan, gone)] = 0;
  Assignment assignment;
  ASSERT_TRUE(assign(plan, members, 1, assignment));
  EXPECT_EQ(assignment.load_bytes, std::vector<uint64_t>(2, 1024));
  for (const uint32_t holder : assignment.holder) {
    EXPECT_NE(plan.holders()[holder].source_layout, index_of(plan, gone));
  }
}

TEST(Assign, NobodyLeftIsUnavailableAndNamesTensorAndBox) {
  const Layout top = rows(0, 32);
  const Layout bottom = rows(32, 64);
  const Plan plan = plan_of({top, bottom});
  std::vector<uint32_t> members{1, 1};
  members[index_of(plan, bottom)] = 0;
  Assignment assignment;
  const auto outcome = assign(plan, members, 0, assignment);
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().code, ErrorCode::kUnavailable);
  EXPECT_THAT(outcome.error().message, HasSubstr("[32:34, 0:16]"));
  EXPECT_THAT(outcome.error().message, HasSubstr("\"t\""));
}

TEST(Assign, MembersForOtherLayoutsAreRefused) {
  const Plan plan = plan_of({rows(0, 64)});
  Assignment assignment;
  const auto outcome = assign(plan, std::vector<uint32_t>{1, 1}, 0, assignment);
  ASSERT_FALSE(outcome);
  EXPECT_EQ(outcome.error().code, ErrorCode::kInvalidArgument);
}

TEST(Assign, I5_AWarmCallAllocatesNothing) {
  const Plan plan = plan_of({rows(0, 64, "a"), rows(0, 64, "b"), rows(0, 10)});
  const std::vector<uint32_t> members{2, 3, 1};
  Assignment assignment;
  ASSERT_TRUE(assign(plan, members, 0, assignment));
  const int64_t before = allocations.load();
  EXPECT_GT(before, 0);
  ASSERT_TRUE(assign(plan, members, 1, assignment));
  EXPECT_EQ(allocations.load(), before);
}

}  // namespace
}  // namespace transfuse

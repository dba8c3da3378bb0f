// Sources and targets that know one tensor in shapes of which one splits the other, against the
// element-by-element oracle; worlds drawn from a printed seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/random.h"
#include "plan/oracle.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

// One tensor, in ever finer shapes, cut into boxes of whichever shape a rank knows.
class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    Dims coarse;
    Dims finer;
    Dims finest;
    const uint64_t rank = 1 + random_.below(2);
    for (uint64_t d = 0; d < rank; ++d) {
      const int64_t a = 1 + index_below(4);
      const int64_t b = 1 + index_below(3);
      const int64_t c = 1 + index_below(3);
      coarse.push_back(a * b * c);
      for (const int64_t part : {a, b * c}) finer.push_back(part);
      for (const int64_t part : {a, b, c}) finest.push_back(part);
    }
    shapes_ = {coarse, finer, finest};
  }

  // Ranks that hold everything, each in a shape of its own.
  std::vector<Layout> group(bool source) {
    std::vector<Layout> layouts;
    std::vector<bool> held(static_cast<size_t>(shapes_[0].product()));
    while (std::ranges::find(held, false) != held.end()) layouts.push_back(rank(held, source));
    return layouts;
  }
  uint64_t below(uint64_t limit) { return random_.below(limit); }

 private:
  int64_t index_below(int64_t limit) {
    return static_cast<int64_t>(random_.below(static_cast<uint64_t>(limit)));
  }

  // A box around the first element that nobody holds yet. A target has nothing twice.
  Layout rank(std::vector<bool>& held, bool source) {
    const Dims& shape = shapes_[random_.below(shapes_.size())];
    const auto first = std::ranges::find(held, false) - held.begin();
    Box box;
    const Dims strides = row_major_strides(shape);
    for (int d = 0; d < shape.rank(); ++d) {
      const int64_t at = first / strides[d] % shape[d];
      const int64_t begin = source ? at - index_below(at + 1) : at;
      box.offset.push_back(begin);
      box.length.push_back(at - begin + 1 + index_below(shape[d] - at));
    }
    mark(held, shape, box);
    LayoutBuilder builder;
    const auto tensor = builder.tensor({"t", Dtype::kBF16, shape});
    const auto parameter = builder.parameter({"p", Dtype::kBF16, box.element_count()});
    if (random_.chance(0.5)) {
      builder.tile(tensor, box, parameter, 0);
    } else {  // column-major
      Dims reversed = box.length;
      int64_t stride = 1;
      for (int d = 0; d < shape.rank(); ++d) {
        reversed[d] = stride;
        stride *= box.length[d];
      }
      builder.tile(tensor, box, parameter, 0, reversed);
    }
    return builder.build().value();
  }

  static void mark(std::vector<bool>& held, const Dims& shape, const Box& box) {
    const Dims strides = row_major_strides(shape);
    for (int64_t n = 0; n < box.element_count(); ++n) {
      int64_t rest = n;
      int64_t linear = 0;
      for (int d = shape.rank() - 1; d >= 0; --d) {
        linear += (box.offset[d] + rest % box.length[d]) * strides[d];
        rest /= box.length[d];
      }
      held[static_cast<size_t>(linear)] = true;
    }
  }

  Random random_;
  std::vector<Dims> shapes_;  // each splits those before it
};

uint64_t base_seed() {
  const char* given = std::getenv("TRANSFUSE_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 20261121;
}

TEST(SplitShapesProperty, RefitsAreByteExactWhicheverShapeARankKnows) {
  const uint64_t seed = base_seed();
  std::printf("TRANSFUSE_SEED=%llu\n", static_cast<unsigned long long>(seed));
  for (uint64_t i = 0; i < 400; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    World world(seed + i);
    const std::vector<Layout> sources = world.group(true);
    for (const Layout& target : world.group(false)) {
      const Oracle oracle(target, sources);
      ASSERT_TRUE(oracle.consistent());
      const auto plan = compile(target, sources, {.chunk_bytes = 1 + world.below(60)});
      ASSERT_TRUE(plan) << plan.error().message;
      const auto failures = judge(*plan, oracle);
      ASSERT_TRUE(failures.empty()) << failures[0];
    }
  }
}

TEST(SplitShapesProperty, APlanExistsIfAndOnlyIfTheOracleHasEveryElement) {
  const uint64_t seed = base_seed() + 1000000;
  int refused = 0;
  for (uint64_t i = 0; i < 200; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed + i));
    World world(seed + i);
    std::vector<Layout> sources = world.group(true);
    sources.erase(sources.begin() + static_cast<std::ptrdiff_t>(world.below(sources.size())));
    for (const Layout& target : world.group(false)) {
      const bool complete = Oracle(target, sources).consistent();
      ASSERT_EQ(compile(target, sources).has_value(), complete);
      ASSERT_EQ(diagnose(target, sources).empty(), complete);
      refused += complete ? 0 : 1;
    }
  }
  EXPECT_GT(refused, 50);
}

}  // namespace
}  // namespace transfuse

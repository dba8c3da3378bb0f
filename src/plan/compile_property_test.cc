// compile() and diagnose() against the element-by-element oracle: every small world, and large ones
// drawn from a printed seed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "plan/oracle.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

std::string joined(const std::vector<std::string>& failures) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(failures.size(), 5); ++i) text += failures[i] + "\n";
  return text + std::to_string(failures.size()) + " failures";
}

// All ways to cut `length` into at most `most` non-empty parts, as boundaries 0 = b0 < ... =
// length.
std::vector<std::vector<int64_t>> cuts(int64_t length, int most) {
  std::vector<std::vector<int64_t>> done;
  std::vector<std::vector<int64_t>> open{{0}};
  for (int part = 0; part < most; ++part) {
    std::vector<std::vector<int64_t>> next;
    for (const auto& prefix : open) {
      for (int64_t end = prefix.back() + 1; end <= length; ++end) {
        auto longer = prefix;
        longer.push_back(end);
        (end == length ? done : next).push_back(longer);
      }
    }
    open = next;
  }
  return done;
}

// How a shard lies in its parameter.
enum class Shape { kRowMajor, kTransposed, kEverySecond };

Layout shard(const Box& box, Shape shape, const std::string& parameter_name) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kBF16, {4, 6}});
  const int64_t rows = box.length[0];
  const int64_t columns = box.length[1];
  const int64_t step = shape == Shape::kEverySecond ? 2 : 1;
  const uint32_t parameter =
      builder.parameter({parameter_name, Dtype::kBF16, rows * columns * step});
  if (shape == Shape::kTransposed) {
    builder.tile(tensor, box, parameter, 0, {1, rows});
  } else {
    builder.tile(tensor, box, parameter, 0, {columns * step, step});
  }
  if (shape == Shape::kEverySecond) builder.fill(parameter, 1, {rows * columns}, {2});
  return builder.build().value();
}

using Grid = std::pair<std::vector<int64_t>, std::vector<int64_t>>;

std::vector<Layout> shards(const Grid& grid, Shape shape) {
  std::vector<Layout> layouts;
  for (size_t r = 0; r + 1 < grid.first.size(); ++r) {
    for (size_t c = 0; c + 1 < grid.second.size(); ++c) {
      const Box box{{grid.first[r], grid.second[c]},
                    {grid.first[r + 1] - grid.first[r], grid.second[c + 1] - grid.second[c]}};
      layouts.push_back(shard(box, shape, "p"));
    }
  }
  return layouts;
}

std::vector<Grid> all_grids() {
  std::vector<Grid> grids;
  for (const auto& rows : cuts(4, 3)) {
    for (const auto& columns : cuts(6, 3)) grids.emplace_back(rows, columns);
  }
  return grids;
}

void expect_right(const Layout& target, std::span<const Layout> sources, uint64_t chunk_bytes) {
  const Oracle oracle(target, sources);
  const auto plan = compile(target, sources, {.chunk_bytes = chunk_bytes});
  const auto findings = diagnose(target, sources, 100000);
  ASSERT_EQ(plan.has_value(), oracle.consistent())
      << (plan ? "a plan exists" : plan.error().message);
  ASSERT_EQ(findings.empty(), oracle.consistent());
  const auto failures = plan ? judge(*plan, oracle) : judge(findings, target, oracle);
  ASSERT_TRUE(failures.empty()) << joined(failures);
}

TEST(CompileProperty, EverySplitOfAFourBySixTensorIsRefitByteExactly) {
  const std::vector<Grid> grids = all_grids();
  ASSERT_EQ(grids.size(), 7u * 16u);
  const Shape shapes[] = {Shape::kRowMajor, Shape::kTransposed, Shape::kEverySecond};
  const uint64_t sizes[] = {1, 6, 10, 16, 1000};
  size_t turn = 0;
  for (size_t s = 0; s < grids.size(); ++s) {
    // Source orientation, target orientation and chunk size take turns: each pair of splits meets
    // one of 45 combinations, all combinations meet hundreds of pairs.
    for (size_t t = 0; t < grids.size(); ++t) {
      ++turn;
      const std::vector<Layout> sources = shards(grids[s], shapes[turn % 3]);
      const std::vector<Layout> targets = shards(grids[t], shapes[turn / 3 % 3]);
      const Layout& target = targets[turn % targets.size()];
      ASSERT_NO_FATAL_FAILURE(expect_right(target, sources, sizes[turn % 5]))
          << "source grid " << s << ", target grid " << t << ", turn " << turn;
    }
  }
}

TEST(CompileProperty, ReplicasWithOtherSplitsAreAllListedAsHolders) {
  const std::vector<Grid> grids = all_grids();
  for (size_t s = 0; s < grids.size(); s += 3) {
    const size_t other = (s * 37 + 11) % grids.size();
    std::vector<Layout> sources = shards(grids[s], Shape::kRowMajor);
    for (const Layout& more : shards(grids[other], Shape::kTransposed)) sources.push_back(more);
    for (const Layout& again : shards(grids[s], Shape::kRowMajor)) sources.push_back(again);
    for (const Layout& target : shards(grids[(s * 5) % grids.size()], Shape::kRowMajor)) {
      ASSERT_NO_FATAL_FAILURE(expect_right(target, sources, 10)) << s << " with " << other;
    }
  }
}

TEST(CompileProperty, AMissingSourceShardIsReportedElementForElement) {
  const std::vector<Grid> grids = all_grids();
  const Layout target = shard({{0, 0}, {4, 6}}, Shape::kRowMajor, "p");
  for (const Grid& grid : grids) {
    std::vector<Layout> sources = shards(grid, Shape::kRowMajor);
    for (size_t lost = 0; lost < sources.size(); ++lost) {
      std::vector<Layout> left = sources;
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(lost));
      ASSERT_NO_FATAL_FAILURE(expect_right(target, left, 10));
    }
  }
}

// Random worlds: tensors of up to four dimensions, sharded, fused, tied, padded, transposed.
class World {
 public:
  explicit World(uint64_t seed) : random_(seed) {
    const size_t count = 1 + random_.below(6);
    for (size_t i = 0; i < count; ++i) {
      Dims shape;
      const uint64_t rank = random_.below(5);
      for (uint64_t d = 0; d < rank; ++d) {
        shape.push_back(1 + static_cast<int64_t>(random_.below(rank > 2 ? 5 : 9)));
      }
      catalog_.push_back({"tensor." + std::to_string(i), Dtype::kBF16, shape});
      wide_.push_back(random_.chance(0.3));
    }
    casts_ = random_.chance(0.5);
  }

  Random& random() { return random_; }

  // Layouts of a group of ranks that together hold everything.
  std::vector<Layout> group(bool source) {
    const size_t ranks = 1 + random_.below(4);
    std::vector<LayoutBuilder> builders(ranks);
    std::vector<std::vector<std::pair<uint32_t, Box>>> held(ranks);
    for (uint32_t i = 0; i < catalog_.size(); ++i) {
      std::vector<Box> boxes{Box::whole(catalog_[i].shape)};
      const uint64_t splits = random_.below(5);
      for (uint64_t n = 0; n < splits; ++n) split(boxes);
      for (const Box& box : boxes) {
        held[random_.below(ranks)].emplace_back(i, box);
        // A replica, possibly of a part only, on another rank (or tied, on the same).
        if (random_.chance(0.25)) held[random_.below(ranks)].emplace_back(i, part_of(box));
      }
    }
    std::vector<Layout> layouts;
    for (size_t r = 0; r < ranks; ++r) {
      place(builders[r], held[r], source);
      auto layout = builders[r].build();
      EXPECT_TRUE(layout) << layout.error().message;
      layouts.push_back(std::move(layout).value());
    }
    return layouts;
  }

  // Damages a layout: forgets a parameter's tail, drops a tile, shrinks one, or moves one onto
  // another (of a target: two tensors of a source may share memory, and no plan can tell).
  Layout broken(const Layout& layout, bool source) {
    LayoutBuilder builder;
    const size_t victim = layout.tiles().empty() ? 0 : random_.below(layout.tiles().size());
    const uint64_t way = random_.below(source ? 3 : 4);
    for (const TensorSpec& tensor : layout.tensors()) builder.tensor(tensor);
    for (const ParameterSpec& parameter : layout.parameters()) {
      ParameterSpec spec = parameter;
      if (way == 0) spec.element_count += 3;
      builder.parameter(spec);
    }
    for (size_t i = 0; i < layout.tiles().size(); ++i) {
      Tile tile = layout.tiles()[i];
      if (i == victim && way == 1) continue;
      if (i == victim && way == 2) tile.box = part_of(tile.box);
      if (i == victim && way == 3 && tile.element_offset > 0) --tile.element_offset;
      builder.tile(tile.tensor, tile.box, tile.parameter, tile.element_offset,
                   tile.element_strides);
    }
    for (const Fill& fill : layout.fills()) {
      builder.fill(fill.parameter, fill.element_offset, fill.length, fill.element_strides);
    }
    return builder.build().value();
  }

 private:
  void split(std::vector<Box>& boxes) {
    const size_t which = random_.below(boxes.size());
    Box& box = boxes[which];
    if (box.length.rank() == 0) return;
    const int d = static_cast<int>(random_.below(static_cast<uint64_t>(box.length.rank())));
    if (box.length[d] < 2) return;
    const auto at =
        1 + static_cast<int64_t>(random_.below(static_cast<uint64_t>(box.length[d] - 1)));
    Box rest = box;
    rest.offset[d] += at;
    rest.length[d] -= at;
    box.length[d] = at;
    boxes.push_back(rest);
  }

  Box part_of(Box box) {
    for (int d = 0; d < box.length.rank(); ++d) {
      const auto skip = static_cast<int64_t>(random_.below(static_cast<uint64_t>(box.length[d])));
      if (random_.chance(0.6)) continue;
      box.offset[d] += skip;
      box.length[d] -= skip;
    }
    return box;
  }

  // Row-major strides of the box after a random permutation of its dimensions, times `step`.
  Dims strides_of(const Box& box, int64_t step) {
    std::vector<int> order(static_cast<size_t>(box.length.rank()));
    std::iota(order.begin(), order.end(), 0);
    if (random_.chance(0.3)) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_.below(i)]);
    }
    Dims strides = box.length;
    for (size_t i = order.size(); i-- > 0;) {
      strides[order[i]] = step;
      step *= box.length[order[i]];
    }
    return strides;
  }

  Dtype dtype_of(uint32_t tensor, bool source) const {
    if (wide_[tensor]) return Dtype::kI64;
    return casts_ && source ? Dtype::kF32 : Dtype::kBF16;
  }

  void place(LayoutBuilder& builder, const std::vector<std::pair<uint32_t, Box>>& held,
             bool source) {
    for (const TensorSpec& tensor : catalog_) builder.tensor(tensor);
    // Neighbours of one dtype are fused into one parameter now and then.
    for (size_t i = 0; i < held.size();) {
      size_t end = i + 1;
      while (end < held.size() && random_.chance(0.4) &&
             dtype_of(held[end].first, source) == dtype_of(held[i].first, source)) {
        ++end;
      }
      fuse(builder, std::span(held).subspan(i, end - i), "p" + std::to_string(i),
           dtype_of(held[i].first, source));
      i = end;
    }
  }

  void fuse(LayoutBuilder& builder, std::span<const std::pair<uint32_t, Box>> parts,
            const std::string& name, Dtype dtype) {
    const int64_t step = random_.chance(0.2) ? 2 : 1;
    const int64_t padding = random_.chance(0.3) ? 3 : 0;
    int64_t elements = 0;
    for (const auto& part : parts) elements += part.second.element_count() * step;
    const uint32_t parameter = builder.parameter({name, dtype, elements + padding});
    int64_t offset = 0;
    for (const auto& [tensor, box] : parts) {
      const int64_t count = box.element_count();
      builder.tile(tensor, box, parameter, offset, strides_of(box, step));
      if (step == 2) builder.fill(parameter, offset + 1, {count}, {2});
      offset += count * step;
    }
    if (padding > 0) builder.fill(parameter, offset, {padding}, {1});
  }

  Random random_;
  Catalog catalog_;
  std::vector<bool> wide_;
  bool casts_ = false;
};

uint64_t base_seed() {
  const char* given = std::getenv("TRANSFUSE_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 20260901;
}

TEST(CompileProperty, RandomWorldsAreRefitByteExactlyWhoeverServes) {
  const uint64_t seed = base_seed();
  std::printf("TRANSFUSE_SEED=%llu\n", static_cast<unsigned long long>(seed));
  for (uint64_t i = 0; i < 400; ++i) {
    World world(seed + i);
    std::vector<Layout> sources = world.group(true);
    if (world.random().chance(0.5)) {
      for (const Layout& more : world.group(true)) sources.push_back(more);
    }
    const uint64_t chunk_bytes = 1 + world.random().below(200);
    for (const Layout& target : world.group(false)) {
      ASSERT_NO_FATAL_FAILURE(expect_right(target, sources, chunk_bytes)) << "seed " << seed + i;
    }
  }
}

TEST(CompileProperty, RandomDamageIsReportedExactly) {
  const uint64_t seed = base_seed() + 1000000;
  std::printf("TRANSFUSE_SEED=%llu\n", static_cast<unsigned long long>(seed - 1000000));
  int refused = 0;
  for (uint64_t i = 0; i < 400; ++i) {
    World world(seed + i);
    std::vector<Layout> sources = world.group(true);
    Layout target = world.group(false)[0];
    if (world.random().chance(0.5)) {
      target = world.broken(target, false);
    } else {
      Layout& victim = sources[world.random().below(sources.size())];
      victim = world.broken(victim, true);
    }
    ASSERT_NO_FATAL_FAILURE(expect_right(target, sources, 50)) << "seed " << seed + i;
    if (!diagnose(target, sources).empty()) ++refused;
  }
  EXPECT_GT(refused, 100) << "the damage must be real in a good part of the worlds";
}

}  // namespace
}  // namespace transfuse

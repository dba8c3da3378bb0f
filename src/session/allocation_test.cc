// I5: what a warm refit allocates does not depend on how much it moves.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <string>

#include "session/refit_world.h"

namespace {
std::atomic<uint64_t> allocation_count{0};
}

void* operator new(std::size_t size) {
  allocation_count.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;

// The fewest allocations of a warm refit of `engine_layout` from `trainer_layout`, in small chunks.
uint64_t least_allocations(const Layout& trainer_layout, const Layout& engine_layout,
                           uint64_t& runs) {
  auto transport = testing::value_or_fail(open_local_transport(), "transport");
  auto control = open_local_control();
  Trainer trainer(*transport, *control, trainer_layout, "trainer0", 1);
  ReceiverOptions options;
  options.plan.chunk_bytes = 128;
  Engine engine(*transport, *control, engine_layout, "engine0", options);
  uint64_t least = UINT64_MAX;
  for (uint64_t version = 1; version <= 8; ++version) {
    trainer.publish(version);
    const uint64_t before = allocation_count;
    auto report = engine.refit();
    const uint64_t allocated = allocation_count - before;
    EXPECT_TRUE(report) << report.error().to_string();
    if (!report) break;
    runs = report->routes.at(0).run_count;
    // The first cycles plan and grow buffers. Trainer threads sum their tables beside, so the least
    // of the warm ones counts.
    if (version > 2) least = std::min(least, allocated);
  }
  return least;
}

TEST(WarmRefit, I5_AllocatesNothingPerRunOrChunk) {
  uint64_t runs = 0;
  const uint64_t least =
      least_allocations(layouts("fsdp:dp=1,dtype=f32")[0], layouts("vllm:tp=1")[0], runs);
  ASSERT_GT(runs, 300u);
  EXPECT_LT(least, 60u) << "of " << runs << " runs";
}

TEST(WarmRefit, I5_AllocatesNothingPerBlockOfFp8) {
  const Dims shape = {200, 150};
  const Dims scales_shape = {25, 19};
  const auto add = [](LayoutBuilder& builder, const std::string& name, Dtype dtype,
                      const Dims& of) {
    const auto tensor = builder.tensor({name, Dtype::kBF16, of});
    builder.tile(tensor, Box::whole(of), builder.parameter({name, dtype, of.product()}), 0);
    return tensor;
  };
  LayoutBuilder trainer;
  add(trainer, "w", Dtype::kBF16, shape);
  LayoutBuilder engine;
  const auto tensor = add(engine, "w", Dtype::kF8E4M3, shape);
  engine.quantization(tensor, add(engine, "w_scale_inv", Dtype::kF32, scales_shape), 8, 8);
  uint64_t runs = 0;
  const uint64_t least = least_allocations(trainer.build().value(), engine.build().value(), runs);
  ASSERT_GT(runs, 300u);
  EXPECT_LT(least, 60u) << "of " << runs << " runs";
}

}  // namespace
}  // namespace transfuse

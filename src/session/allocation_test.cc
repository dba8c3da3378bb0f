// I5: what a warm refit allocates does not depend on how much it moves.
#include <atomic>
#include <cstdlib>
#include <new>

#include <gtest/gtest.h>
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

TEST(WarmRefit, I5_AllocatesNothingPerRunOrChunk) {
  auto transport = testing::value_or_fail(open_local_transport(), "transport");
  auto control = open_local_control();
  Trainer trainer(*transport, *control, layouts("fsdp:dp=1,dtype=f32")[0], "trainer0", 1);
  ReceiverOptions options;
  options.plan.chunk_bytes = 128;
  Engine engine(*transport, *control, layouts("vllm:tp=1")[0], "engine0", options);
  uint64_t runs = 0;
  uint64_t least = UINT64_MAX;
  for (uint64_t version = 1; version <= 8; ++version) {
    trainer.publish(version);
    const uint64_t before = allocation_count;
    auto report = engine.refit();
    const uint64_t allocated = allocation_count - before;
    ASSERT_TRUE(report) << report.error().to_string();
    runs = report->routes.at(0).run_count;
    // The first cycles plan and grow buffers. Trainer threads sum their tables beside, so the least
    // of the warm ones counts.
    if (version > 2) least = std::min(least, allocated);
  }
  ASSERT_GT(runs, 300u);
  EXPECT_LT(least, 60u) << "of " << runs << " runs";
}

}  // namespace
}  // namespace transfuse

// What is said before anything is allocated.
#include "transfuse/memory_need.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "session/refit_world.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/region.h"

namespace transfuse {
namespace {

using testing::value_or_fail;

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kStagingBytes = 64 * kMiB;
constexpr auto kHost = MemoryPlace::kHost;
constexpr auto kDevice = MemoryPlace::kDevice;

// 128 MiB in bf16: rows [begin, begin + count) of 8,192.
Layout rows(Dtype dtype, int64_t begin, int64_t count) {
  constexpr int64_t kColumns = 8192;
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({.name = "w", .dtype = dtype, .shape = {8192, kColumns}});
  const uint32_t parameter =
      builder.parameter({.name = "w", .dtype = dtype, .element_count = count * kColumns});
  builder.tile(tensor, {.offset = {begin, 0}, .length = {count, kColumns}}, parameter, 0);
  return value_or_fail(builder.build(), "layout");
}

class MemoryNeedTest : public ::testing::Test {
 protected:
  MemoryNeed of_source(const SourceChoice& choice) const {
    return memory_of_source(sources_[0], plans_, choice);
  }
  MemoryNeed of_target(const TargetChoice& choice) const { return memory_of_target(plan_, choice); }

  const std::vector<Layout> sources_ = {rows(Dtype::kF32, 0, 4096), rows(Dtype::kF32, 4096, 4096)};
  const Plan plan_ = value_or_fail(compile(rows(Dtype::kBF16, 0, 8192), sources_, {}), "plan");
  const std::vector<const Plan*> plans_ = {&plan_};
  const uint64_t snapshot_ = snapshot_bytes(sources_[0], 1);
  const uint64_t shadow_ = shadow_bytes(plan_.target());
};

TEST_F(MemoryNeedTest, InTheHostSnapshotsAndTablesAreAllThereIs) {
  for (const uint32_t slots : {0U, 1U, 3U}) {
    for (const SnapshotPlace place : {SnapshotPlace::kWithWeights, SnapshotPlace::kHost}) {
      const MemoryNeed need =
          of_source({.weights = kHost, .snapshot_slots = slots, .snapshot_place = place});
      EXPECT_EQ(need.device_bytes, 0U);
      EXPECT_EQ(need.host_bytes,
                slots * snapshot_ + fingerprint_table_bytes(plan_, sources_[0], slots));
    }
  }
}

TEST_F(MemoryNeedTest, SnapshotsOfAGpuLieThereOrInTheHostBehindPinnedBuffers) {
  const MemoryNeed in_place = of_source({.weights = kDevice});
  EXPECT_GT(in_place.device_bytes, 0U) << "what makes the fingerprints";
  EXPECT_LT(in_place.device_bytes, snapshot_ / 10);
  const MemoryNeed there = of_source({.weights = kDevice, .snapshot_slots = 2});
  EXPECT_GE(there.device_bytes, 2 * snapshot_ + 3 * in_place.device_bytes);
  EXPECT_LT(there.host_bytes, snapshot_ / 10);
  const MemoryNeed in_host =
      of_source({.weights = kDevice, .snapshot_slots = 2, .snapshot_place = SnapshotPlace::kHost});
  EXPECT_EQ(in_host.device_bytes, in_place.device_bytes);
  EXPECT_GE(in_host.host_bytes, 2 * snapshot_ + kStagingBytes);
  EXPECT_LT(in_host.host_bytes, 2 * snapshot_ + kStagingBytes + snapshot_ / 10);
}

TEST_F(MemoryNeedTest, AShadowLiesWithTheParameters) {
  const MemoryNeed host = of_target({.weights = kHost, .into = ReceiveInto::kShadow});
  EXPECT_EQ(host.device_bytes, 0U);
  EXPECT_EQ(host.host_bytes, shadow_);
  const MemoryNeed in_place = of_target({.weights = kDevice, .sources = kDevice});
  const MemoryNeed device =
      of_target({.weights = kDevice, .sources = kDevice, .into = ReceiveInto::kShadow});
  EXPECT_GE(device.device_bytes, shadow_ + in_place.device_bytes);
  EXPECT_EQ(device.host_bytes, in_place.host_bytes);
  const MemoryNeed keeps = of_target({.weights = kDevice,
                                      .sources = kDevice,
                                      .into = ReceiveInto::kShadow,
                                      .keep_previous = true});
  EXPECT_GE(keeps.device_bytes, device.device_bytes + shadow_) << "less than 1 GiB of it is held";
  EXPECT_LT(keeps.device_bytes, device.device_bytes + 2 * shadow_);
}

TEST_F(MemoryNeedTest, WhatGoesFromAGpuToTheHostIsStagedInPinnedBuffersOfTheReader) {
  const MemoryNeed mixed = of_target({.weights = kHost, .sources = kDevice});
  EXPECT_EQ(mixed.host_bytes, kStagingBytes);
  EXPECT_EQ(mixed.device_bytes, 0U) << "nothing of it is a launch over a table";
  EXPECT_EQ(of_target({.weights = kHost, .sources = kHost}).host_bytes, 0U);
}

TEST_F(MemoryNeedTest, WhatGoesFromTheHostToAGpuIsALaunchOrStaged) {
  const MemoryNeed within = of_target({.weights = kDevice, .sources = kDevice});
  const MemoryNeed mixed = of_target({.weights = kDevice, .sources = kHost});
  EXPECT_EQ(mixed.device_bytes, within.device_bytes) << "tables, where its memory is pinned";
  EXPECT_EQ(mixed.host_bytes, within.host_bytes + kStagingBytes) << "buffers, where it is not";
}

TEST_F(MemoryNeedTest, AReceiverOnAGpuPlansInLargeChunks) {
  EXPECT_EQ(plan_options_for(kHost).chunk_bytes, PlanOptions{}.chunk_bytes);
  EXPECT_EQ(plan_options_for(kDevice).chunk_bytes, 64 * kMiB);
  EXPECT_EQ(plan_options_for(kDevice, {.chunk_bytes = 256 * kMiB}).chunk_bytes, 256 * kMiB);
}

}  // namespace
}  // namespace transfuse

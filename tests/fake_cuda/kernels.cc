// Our kernels, lane by lane on one thread: the same code that the threads of a GPU run.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "fake_cuda/state.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/device_stage.h"
#include "transport/cuda/device_table.h"
#include "transport/cuda/pace.h"
#include "transport/cuda/scaled_device.h"
#include "transport/cuda/scaled_kernel.h"

namespace transfuse::fake_cuda {
namespace {

// Kernels on other streams may add to the same.
void add_sum(uint64_t& place, uint64_t sum) {
  std::atomic_ref<uint64_t>(place).fetch_add(sum, std::memory_order_relaxed);
}

template <bool kSums>
uint64_t staged_sum(const ItemView& view, uint32_t lanes, std::byte* stage) {
  for (uint32_t lane = 0; lane < lanes; ++lane) stage_item(view, lane, stage);
  uint64_t sum = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) sum += write_staged_item<kSums>(view, lane, stage);
  return sum;
}

template <bool kSums>
void walk_table(const Task& task) {
  const CopyLaunch& launch = task.copy;
  const bool any = task.kernel == Kernel::kCopyAny || task.kernel == Kernel::kCopyAnyAndSum;
  TRANSFUSE_CHECK(any || launch.ns_per_byte == 0);
  CopyProgress& progress = *launch.progress;
  TRANSFUSE_CHECK(progress.next == 0 && progress.begun_bytes == 0 && progress.start_ns == 0);
  alignas(kVectorBytes) std::array<std::byte, kStageBytes> stage;  // NOLINT: what is not written
  stage.fill(std::byte{0xA5});                                     // is not read
  const auto start = std::chrono::steady_clock::now();
  for (; progress.next < launch.item_count; ++progress.next) {
    const DeviceItem item = launch.items[progress.next];
    const DeviceRun& run = launch.runs[item.run];
    const ItemView view = view_of(
        run, item, reinterpret_cast<const std::byte*>(launch.bases[run.source]), task.threads);
    if (launch.ns_per_byte > 0) {
      std::this_thread::sleep_until(
          start + std::chrono::nanoseconds(due_after_ns(progress.begun_bytes, launch.ns_per_byte)));
      progress.begun_bytes += item_bytes(run, item);
    }
    uint64_t sum = 0;
    if (uses_stage(run.walk)) {
      TRANSFUSE_CHECK(any && task.shared_bytes >= kStageBytes);
      sum = staged_sum<kSums>(view, task.threads, stage.data());
    } else {
      for (uint32_t lane = 0; lane < task.threads; ++lane) sum += copy_item<kSums>(view, lane);
    }
    if (kSums && view.fingerprint) add_sum(launch.sums[view.sum], sum);
  }
}

// Lanes come one after another here, and none can wait for what the others find.
uint32_t held_magnitude(const ScaledView& view, uint32_t lane) {
  uint64_t none = 0;
  uint32_t found = 0;
  const auto keep = [&](uint32_t magnitude) {
    found = magnitude;
    return kF32Nan;  // under which nothing moves
  };
  (void)move_held(view, lane, keep, none);
  return found;
}

}  // namespace

void run_copy_kernel(const Task& task) {
  const bool sums = task.kernel == Kernel::kCopyAndSum || task.kernel == Kernel::kCopyAnyAndSum;
  sums ? walk_table<true>(task) : walk_table<false>(task);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void run_scaled_kernel(const Task& task) {
  const ScaledLaunch& launch = task.scaled;
  TRANSFUSE_CHECK((task.kernel == Kernel::kScaledCopyPaced) == (launch.ns_per_byte > 0));
  CopyProgress& progress = *launch.progress;
  TRANSFUSE_CHECK(progress.next == 0 && progress.begun_bytes == 0 && progress.start_ns == 0);
  alignas(kVectorBytes) std::array<std::byte, kScaledStageBytes> stage{};
  const auto start = std::chrono::steady_clock::now();
  for (; progress.next < launch.item_count; ++progress.next) {
    const ScaledItem item = launch.items[progress.next];
    const ScaledView view = view_of(launch.runs[item.run], item, launch.bases, task.threads);
    if (launch.ns_per_byte > 0) {
      std::this_thread::sleep_until(
          start + std::chrono::nanoseconds(due_after_ns(progress.begun_bytes, launch.ns_per_byte)));
      progress.begun_bytes += view.size_bytes();
    }
    const bool writes = quantizes_of(view.op);
    uint32_t largest = 0;
    for (uint32_t lane = 0; writes && lane < task.threads; ++lane) {
      largest = std::max(largest, view.held ? held_magnitude(view, lane)
                                            : scaled_magnitude(view, lane, stage.data()));
    }
    const uint32_t scale = writes ? scale_bits_of_block(largest) : read_scale(view);
    uint64_t sum = writes ? write_scale(view, scale) : 0;
    for (uint32_t lane = 0; lane < task.threads; ++lane) {
      uint64_t own = 0;
      const auto known = [&](uint32_t) { return scale; };
      if (!view.held || !move_held(view, lane, known, own)) {
        own = scaled_move(view, lane, stage.data(), scale);
      }
      sum += own;
    }
    if (view.fingerprint) add_sum(launch.sums[view.sum], sum);
  }
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

}  // namespace transfuse::fake_cuda

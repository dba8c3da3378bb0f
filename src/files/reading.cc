// Plans over files, and their sums on several threads.
#include "files/reading.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/thread.h"
#include "copy/copy.h"
#include "copy/file_read.h"
#include "files/side.h"
#include "plan/copies.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// The first error of several threads. Safe to use from any thread.
class FirstError {
 public:
  void set(Error error) EXCLUDES(mutex_) {
    const MutexLock lock(mutex_);
    if (outcome_) outcome_ = std::move(error);
    failed_.store(true, std::memory_order_relaxed);
  }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  Result<void> take() EXCLUDES(mutex_) {
    const MutexLock lock(mutex_);
    return outcome_;
  }

 private:
  std::atomic<bool> failed_{false};
  Mutex mutex_;
  Result<void> outcome_ GUARDED_BY(mutex_);
};

}  // namespace

Result<void> for_each_parallel(uint32_t threads, size_t count,
                               const std::function<Result<void>(uint32_t, size_t)>& body,
                               const std::function<void()>& tick) {
  FirstError first;
  std::atomic<size_t> next{0};
  const auto work = [&](uint32_t worker) {
    while (!first.failed()) {
      const size_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) return;
      if (auto done = body(worker, item); !done) first.set(std::move(done).error());
      if (worker == 0 && tick) tick();
    }
  };
  std::vector<std::thread> others;
  for (uint32_t worker = 1; worker < threads && worker < count; ++worker) {
    auto thread = start_thread("conversion", [&work, worker] { work(worker); });
    if (!thread) {
      first.set(std::move(thread).error());
      break;
    }
    others.push_back(std::move(thread).value());
  }
  work(0);
  for (std::thread& thread : others) thread.join();
  return first.take();
}

StridedCopy Reading::copy(uint32_t run) const {
  return copies_.copy(plan().runs()[run], plan().holders()[holder_[run]], 0, nullptr, false);
}

FileSpan Reading::source(uint32_t run) const {
  return side_->span(side_->ranks[rank_[run]].places[plan().holders()[holder_[run]].parameter]);
}

Result<uint64_t> Reading::fingerprint(uint32_t run, std::span<std::byte> scratch) const {
  uint64_t sum = 0;
  TRANSFUSE_RETURN_IF_ERROR(sum_file_copy(source(run), copy(run), scratch, sum));
  return sum;
}

Result<Reading> plan_reading(const Layout& target, const ReadableSide& side, uint64_t chunk_bytes) {
  std::vector<Layout> layouts;
  for (const ReadableRank& rank : side.ranks) layouts.push_back(rank.layout);
  TRANSFUSE_ASSIGN_OR_RETURN(Plan plan, compile(target, layouts, {.chunk_bytes = chunk_bytes}));
  if (!plan.block_scales().empty()) {
    const auto scaled = std::ranges::find_if(plan.runs(), [&plan](const Run& run) {
      return run.scales != 0 || plan.holders_of(run).front().scales != 0;
    });
    return Error{ErrorCode::kUnsupported,
                 fmt::format("tensor {} is fp8 with block scales on one side only: files are "
                             "rewritten in the dtypes that they have, or with a cast; fp8 is made "
                             "and read by a refit",
                             plan.target().tensors()[scaled->tensor].name)};
  }
  // Ranks by layout, in the plan's order of layouts.
  std::vector<uint32_t> counts;
  std::vector<uint32_t> members;
  for (const Layout& layout : plan.source_layouts()) {
    const size_t before = members.size();
    for (uint32_t rank = 0; rank < layouts.size(); ++rank) {
      if (layouts[rank].digest() == layout.digest()) members.push_back(rank);
    }
    counts.push_back(static_cast<uint32_t>(members.size() - before));
  }
  Assignment assignment;
  TRANSFUSE_RETURN_IF_ERROR(assign(plan, counts, 0, assignment));
  for (uint32_t& choice : assignment.choice) choice = members[choice];
  return Reading(CopyTable(std::move(plan)), side, std::move(assignment.holder),
                 std::move(assignment.choice));
}

Result<std::vector<uint64_t>> whole_fingerprints(const Layout& probe, const ReadableSide& side,
                                                 uint32_t threads,
                                                 const std::function<Result<void>()>& go_on) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Reading reading,
                             plan_reading(probe, side, PlanOptions{}.chunk_bytes));
  const Plan& plan = reading.plan();
  std::vector<std::atomic<uint64_t>> sums(probe.parameters().size());
  ThreadScratch scratch(threads);
  const auto sum_up = [&](uint32_t worker, size_t item) -> Result<void> {
    if (go_on) TRANSFUSE_RETURN_IF_ERROR(go_on());
    const Chunk& chunk = plan.chunks()[item];
    for (uint32_t run = chunk.first_run; run < chunk.first_run + chunk.run_count; ++run) {
      TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t sum, reading.fingerprint(run, scratch.of(worker)));
      sums[plan.runs()[run].parameter].fetch_add(sum, std::memory_order_relaxed);
    }
    return {};
  };
  TRANSFUSE_RETURN_IF_ERROR(for_each_parallel(threads, plan.chunks().size(), sum_up));
  return std::vector<uint64_t>(sums.begin(), sums.end());
}

Result<void> compare_fingerprints(const Reading& reading, const ReadableSide& target, size_t rank,
                                  uint32_t threads) {
  const Plan& plan = reading.plan();
  ThreadScratch scratch(threads);
  const auto compare = [&](uint32_t worker, size_t item) -> Result<void> {
    const Chunk& chunk = plan.chunks()[item];
    for (uint32_t number = chunk.first_run; number < chunk.first_run + chunk.run_count; ++number) {
      const Run& run = plan.runs()[number];
      StridedCopy held = reading.copy(number);
      const uint32_t element_bytes = target_element_bytes(held.op);
      held.op = plain_copy(element_bytes);
      std::ranges::copy(held.target_stride, held.source_stride);
      held.source_offset_bytes = static_cast<uint64_t>(run.target_offset) * element_bytes;
      uint64_t found = 0;
      TRANSFUSE_RETURN_IF_ERROR(sum_file_copy(target.span(target.ranks[rank].places[run.parameter]),
                                              held, scratch.of(worker), found));
      TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t expected,
                                 reading.fingerprint(number, scratch.of(worker)));
      if (found == expected) continue;
      return Error{
          ErrorCode::kFingerprintMismatch,
          fmt::format("elements {} of tensor {} in {}: expected fingerprint {:016x}, "
                      "found {:016x}",
                      plan.box_of(run).to_string(), plan.target().tensors()[run.tensor].name,
                      plan.target().parameters()[run.parameter].name, expected, found)};
    }
    return {};
  };
  return for_each_parallel(threads, plan.chunks().size(), compare);
}

}  // namespace transfuse

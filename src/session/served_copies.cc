// How the weights come into a snapshot: by the device, with the sums that readers wait for, or by
// the threads of the host.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "copy/copy.h"
#include "session/device_work.h"
#include "session/served_weights.h"
#include "session/snapshots.h"
#include "session/summed_copies.h"
#include "transfuse/deadline.h"
#include "transfuse/digest.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr int64_t kCancelSliceMs = 20;  // how late a cancelled copy is

}  // namespace

Result<void> ServedWeights::copy_weights(uint32_t slot, CopyProgress& progress) {
  TRANSFUSE_CHECK(slot > 0 && slot < slot_count());
  return on_device(0) ? copy_from_device(slot, progress) : copy_in_host(slot, progress);
}

Result<void> ServedWeights::copy_from_device(uint32_t slot, CopyProgress& progress) {
  std::vector<Table*> tables;
  {
    const MutexLock lock(mutex_);
    for (const auto& table : tables_) {
      if (options_.keep_tables_fresh) tables.push_back(table.get());
    }
    for (Table* table : tables) ++table->sums[slot].in_flight;  // nobody drops it
  }
  SlotCopies& copies = slot_copies(slot, tables);
  CopyLimits limits;
  if (!on_device(slot)) limits.gigabytes_per_second = options_.snapshot_gigabytes_per_second;
  std::span<uint64_t> sums = copies.results;
  if (copies.made.sums.empty()) sums = {};
  auto copied = run_on_device(transport_, copies.made.copies, sums, limits, &progress);
  const MutexLock lock(mutex_);
  for (Table* table : tables) --table->sums[slot].in_flight;
  if (copied) keep_sums(slot, tables, copies);
  changed_.notify_all();
  return copied;
}

ServedWeights::SlotCopies& ServedWeights::slot_copies(uint32_t slot,
                                                      std::span<Table* const> tables) {
  slot_copies_.resize(snapshots_.count());
  SlotCopies& kept = slot_copies_[slot - 1];
  std::vector<Digest> keys;
  for (const Table* table : tables) keys.push_back(table->key);
  if (!kept.made.copies.empty() && keys == kept.keys) return kept;
  std::vector<HeldRuns> held;
  for (const Table* table : tables) held.push_back({.copies = &table->copies, .own = table->own});
  kept.keys = std::move(keys);
  kept.made = summed_copies(
      layout_, held, [&](uint32_t parameter) { return memory_.data(parameter); },
      [&](uint32_t parameter) { return data(slot, parameter); });
  kept.results.assign(kept.made.copies.size(), 0);
  return kept;
}

void ServedWeights::keep_sums(uint32_t slot, std::span<Table* const> tables,
                              const SlotCopies& copies) {
  for (Table* table : tables) {
    Sums& sums = table->sums[slot];
    sums.copied.assign(table->copies.held_runs(table->own).size(), false);
    sums.copied_count = 0;
  }
  for (const auto& [copy, number, held] : copies.made.sums) {
    Table& table = *tables[number];
    store_sum(table, slot, held, copies.results[copy]);
    table.sums[slot].copied[held] = true;
    ++table.sums[slot].copied_count;
  }
}

Result<void> ServedWeights::copy_in_host(uint32_t slot, CopyProgress& progress) {
  const size_t chunk_count = snapshots_.chunks().size();
  const TimePoint start = std::chrono::steady_clock::now();
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(slots_[slot].writing && !copy_work_);
  CopyWork& work = copy_work_.emplace(CopyWork{.slot = slot, .progress = &progress});
  while (work.next_chunk < chunk_count && !progress.cancelled) {
    const TimePoint next_due = make_due(work, start);
    if (copy_a_chunk()) continue;
    if (work.next_chunk == chunk_count) break;
    changed_.wait_until(mutex_, Deadline(next_due).earlier(Deadline::after_ms(kCancelSliceMs)));
  }
  const bool copied = work.next_chunk == chunk_count;
  work.due_chunks = work.next_chunk;  // nobody takes another one
  while (work.in_flight > 0) changed_.wait(mutex_);
  copy_work_.reset();
  if (copied) return {};
  return Error{ErrorCode::kCancelled, "a copy of the weights was cancelled"};
}

// A chunk may begin when the bytes before it are due. The other threads are called only where this
// one is behind.
TimePoint ServedWeights::make_due(CopyWork& work, TimePoint start) {
  const std::span<const SnapshotChunk> chunks = snapshots_.chunks();
  const double bytes_per_second = options_.snapshot_gigabytes_per_second * 1e9;
  const auto due_at = [&](uint64_t bytes) {
    return bytes_per_second > 0
               ? start + std::chrono::duration_cast<Duration>(std::chrono::duration<double>(
                             static_cast<double>(bytes) / bytes_per_second))
               : start;
  };
  const TimePoint now = std::chrono::steady_clock::now();
  const size_t before = work.due_chunks;
  while (work.due_chunks < chunks.size() && due_at(work.due_bytes) <= now) {
    work.due_bytes += chunks[work.due_chunks++].size_bytes;
  }
  if (work.due_chunks > before && work.due_chunks - work.next_chunk > 1) changed_.notify_all();
  return due_at(work.due_bytes);
}

bool ServedWeights::copy_a_chunk() {
  if (!copy_work_ || copy_work_->next_chunk == copy_work_->due_chunks) return false;
  const SnapshotChunk chunk = snapshots_.chunks()[copy_work_->next_chunk++];
  const uint32_t snapshot = copy_work_->slot - 1;
  ++copy_work_->in_flight;
  mutex_.unlock();

  snapshots_.copy(memory_, snapshot, chunk);
  copy_fence();

  mutex_.lock();
  copy_work_->progress->copied_bytes += chunk.size_bytes;
  if (--copy_work_->in_flight == 0) changed_.notify_all();
  return true;
}

}  // namespace transfuse

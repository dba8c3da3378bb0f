// Generation words, table requests, and the threads that sum.
#include "session/served_weights.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/affinity.h"
#include "base/log.h"
#include "base/mutex.h"
#include "base/random.h"
#include "base/seqlock.h"
#include "base/thread.h"
#include "plan/copies.h"
#include "session/descriptor.h"
#include "session/device_work.h"
#include "session/memory.h"
#include "session/snapshots.h"
#include "transfuse/control.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr size_t kMaxTables = 64;
// Readers ask again every kTableRenewalVersions (see source_link.h); four missed renewals end a
// table.
constexpr uint32_t kTableVersions = 64;
// 4 TiB of target in chunks of 1 MiB; a peer that asks for more makes this process compile garbage.
constexpr uint64_t kMaxTableChunks = uint64_t{1} << 22;
constexpr int64_t kLayoutsMs = 5000;   // for the layouts of a plan to come
constexpr int64_t kEventSliceMs = 50;  // how late stop_serving() is seen

std::atomic_ref<uint64_t> word(uint64_t& value) { return std::atomic_ref<uint64_t>(value); }

}  // namespace

uint64_t fingerprint_table_bytes(const Plan& plan, const Layout& source, uint32_t slots) {
  const auto is_held = [&](const Run& run) {
    return std::ranges::any_of(plan.holders_of(run), [&](const Holder& holder) {
      return plan.source_layouts()[holder.source_layout].digest() == source.digest();
    });
  };
  const auto held_count = std::ranges::count_if(plan.runs(), is_held);
  return (1 + uint64_t{slots}) * table_bytes(static_cast<size_t>(held_count));
}

bool ServedWeights::Table::busy() const {
  return std::ranges::any_of(sums, [](const Sums& of_slot) { return of_slot.in_flight > 0; });
}

std::byte* ServedWeights::Table::bytes(uint32_t slot) const {
  return region->bytes().data() + slot * table_bytes(copies.held_runs(own).size());
}

TableHeader* ServedWeights::Table::header(uint32_t slot) const {
  return reinterpret_cast<TableHeader*>(bytes(slot));
}

ServedWeights::ServedWeights(Transport& transport, Control& control, const Layout& layout,
                             BoundMemory memory, const ServedWeightsOptions& options)
    : transport_(transport),
      control_(control),
      layout_(layout),
      memory_(std::move(memory)),
      options_(options),
      incarnation_(random_identity()) {}

Result<std::unique_ptr<ServedWeights>> ServedWeights::open(Transport& transport, Control& control,
                                                           const Layout& layout, BoundMemory memory,
                                                           const ServedWeightsOptions& options) {
  std::unique_ptr<ServedWeights> weights(
      new ServedWeights(transport, control, layout, std::move(memory), options));
  TRANSFUSE_ASSIGN_OR_RETURN(
      weights->snapshots_,
      Snapshots::open(transport, layout,
                      options.snapshot_place == SnapshotPlace::kHost ? MemoryPlace::kHost
                                                                     : weights->memory_.place(),
                      options.snapshot_slots));
  const uint32_t slot_count = weights->slot_count();
  TRANSFUSE_ASSIGN_OR_RETURN(weights->control_region_,
                             transport.allocate(slot_count * kGenerationStrideBytes));
  for (uint32_t slot = 0; slot < slot_count; ++slot) {
    weights->words(slot).incarnation = weights->incarnation_;
    begin_generation(weights->words(slot));
  }
  const MutexLock lock(weights->mutex_);
  weights->slots_.resize(slot_count);
  return weights;
}

ServedWeights::~ServedWeights() {
  stop_serving();
  // Odd for good: a peer that still has the words mapped never takes what it reads for a version.
  if (!control_region_) return;
  for (uint32_t slot = 0; slot < slot_count(); ++slot) begin_write(slot);
}

GenerationWords& ServedWeights::words(uint32_t slot) const {
  return *reinterpret_cast<GenerationWords*>(control_region_->bytes().data() +
                                             slot * kGenerationStrideBytes);
}

std::byte* ServedWeights::data(uint32_t slot, uint32_t parameter) const {
  return slot == 0 ? memory_.data(parameter) : snapshots_.data(slot - 1, parameter);
}

Result<std::string> ServedWeights::descriptor(const std::string& token) {
  MemberDescriptor descriptor;
  descriptor.transport = transport_.endpoint_kind();
  TRANSFUSE_ASSIGN_OR_RETURN(descriptor.endpoint, transport_.endpoint());
  descriptor.token = token;
  descriptor.control = control_region_->descriptor();
  descriptor.regions.assign(memory_.regions().begin(), memory_.regions().end());
  descriptor.slots.push_back(memory_.binding());
  for (uint32_t i = 0; i < snapshots_.count(); ++i) {
    Binding binding{.layout = layout_.digest(), .places = {}};
    for (uint32_t parameter = 0; parameter < layout_.parameters().size(); ++parameter) {
      binding.places.push_back({.region = descriptor.regions.size(),
                                .offset_bytes = snapshots_.offset_bytes(parameter)});
    }
    descriptor.regions.push_back(snapshots_.region(i));
    descriptor.slots.push_back(std::move(binding));
  }
  return encode(descriptor);
}

Result<void> ServedWeights::serve(MemberId member) {
  TRANSFUSE_CHECK(!event_thread_.joinable());
  stopping_ = false;
  const uint32_t count =
      options_.fingerprint_threads > 0 ? options_.fingerprint_threads : usable_core_count();
  auto events = start_thread("table request", [this, member] { event_loop(member); });
  if (!events) return Unexpected{std::move(events).error()};
  event_thread_ = std::move(*events);
  for (uint32_t i = 0; i < count; ++i) {
    auto worker = start_thread("fingerprint", [this] { work_loop(); });
    if (!worker) {
      stop_serving();
      return Unexpected{std::move(worker).error()};
    }
    work_threads_.push_back(std::move(*worker));
  }
  return {};
}

void ServedWeights::stop_serving() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (event_thread_.joinable()) event_thread_.join();
  for (std::thread& thread : work_threads_) thread.join();
  work_threads_.clear();
}

void ServedWeights::begin_write(uint32_t slot) {
  const MutexLock lock(mutex_);
  slots_[slot].writing = true;
  for (const auto& table : tables_) {
    table->sums[slot].wanted = false;
    word(table->header(slot)->counter).store(0, std::memory_order_release);
  }
  begin_generation(words(slot));
  while (slots_[slot].sums_in_flight > 0) changed_.wait(mutex_);
  for (const auto& table : tables_) {
    table->sums[slot].copied.clear();
    table->sums[slot].copied_count = 0;
  }
}

Generation ServedWeights::end_write(uint32_t slot) {
  const MutexLock lock(mutex_);
  Slot& written = slots_[slot];
  TRANSFUSE_CHECK(written.writing);
  written.writing = false;
  written.counter = end_generation(words(slot));
  written.written_as = ++write_count_;
  drop_stale_tables();
  if (options_.keep_tables_fresh) {
    for (const auto& table : tables_) want(*table, slot);
  }
  changed_.notify_all();
  return {.incarnation = incarnation_, .counter = written.counter};
}

void ServedWeights::drop_stale_tables() {
  std::erase_if(tables_, [](const std::unique_ptr<Table>& table) {
    const bool stale = !table->busy() && --table->versions_left == 0;
    if (stale) mark_dropped(*table);
    return stale;
  });
}

// A reader keeps what it has mapped: it learns here that nobody sums this table any more.
void ServedWeights::mark_dropped(const Table& table) {
  for (uint32_t slot = 0; slot < table.sums.size(); ++slot) {
    word(table.header(slot)->incarnation).store(0, std::memory_order_release);
  }
}

// Of plans that come and go, the one that was asked for longest ago makes room.
void ServedWeights::make_room_for_table() {
  if (tables_.size() < kMaxTables) return;
  auto oldest = tables_.end();
  for (auto at = tables_.begin(); at != tables_.end(); ++at) {
    if ((*at)->busy()) continue;
    if (oldest == tables_.end() || (*at)->versions_left < (*oldest)->versions_left) oldest = at;
  }
  if (oldest == tables_.end()) return;
  mark_dropped(**oldest);
  tables_.erase(oldest);
}

void ServedWeights::want(Table& table, uint32_t slot) {
  table.sums[slot].wanted = true;
  table.sums[slot].next_chunk = 0;
  TableHeader* header = table.header(slot);
  word(header->counter).store(0, std::memory_order_release);
  word(header->progress).store(0, std::memory_order_relaxed);
  const Sums& sums = table.sums[slot];
  if (sums.copied.empty() || sums.copied_count < sums.copied.size()) return;
  table.sums[slot].wanted = false;  // the copy has made them all
  word(header->counter).store(slots_[slot].counter, std::memory_order_release);
}

void ServedWeights::event_loop(MemberId member) {
  bool told = false;
  while (!stopping_) {
    auto event = control_.next_event(member, Deadline::after_ms(kEventSliceMs));
    if (!event) {
      // The control front end repeats registrations by itself; here the loop only must not spin.
      if (!told) {
        log_event(LogLevel::kWarn, "table_events_unavailable",
                  {{"reason", event.error().to_string()}});
      }
      told = true;
      const MutexLock lock(mutex_);
      if (!stopping_) changed_.wait_until(mutex_, Deadline::after_ms(kEventSliceMs));
      continue;
    }
    told = false;
    if (!event->has_value()) continue;
    if ((*event)->kind == MemberEvent::Kind::kEpoch) announce_tables(member);
    if ((*event)->kind != MemberEvent::Kind::kTableRequest) continue;
    if (auto added = add_table(member, (*event)->table); !added) {
      // The reader that asked gets no table and reports that by its own deadline.
      log_event(
          LogLevel::kError, "table_refused",
          {{"plan", (*event)->table.plan_key.to_string()}, {"reason", added.error().to_string()}});
    }
  }
}

// To a coordinator that has restarted.
void ServedWeights::announce_tables(MemberId member) {
  std::vector<std::pair<Digest, std::string>> live;
  {
    const MutexLock lock(mutex_);
    for (const auto& table : tables_)
      live.emplace_back(table->key, encode(table->region->descriptor()));
  }
  for (const auto& [key, descriptor] : live) {
    // Who needs one that could not be announced asks for it again.
    if (auto put = control_.put_table(member, key, descriptor); !put) {
      log_event(LogLevel::kWarn, "table_not_announced",
                {{"plan", key.to_string()}, {"reason", put.error().to_string()}});
      return;
    }
  }
}

std::string ServedWeights::known_table(const TableRequest& request) {
  const MutexLock lock(mutex_);
  const auto found =
      std::ranges::find(tables_, request.plan_key, [](const auto& table) { return table->key; });
  if (found == tables_.end()) return {};
  Table* const table = found->get();
  table->versions_left = kTableVersions;
  for (uint32_t slot = 0; slot < slots_.size() && !options_.keep_tables_fresh; ++slot) {
    if (slots_[slot].writing) continue;
    // Sums under way may have begun before the request: they do not count for it.
    table->sums[slot].wanted = false;
    while (table->sums[slot].in_flight > 0) changed_.wait(mutex_);
    if (!slots_[slot].writing) want(*table, slot);
    changed_.notify_all();
  }
  return encode(table->region->descriptor());
}

Result<void> ServedWeights::add_table(MemberId member, const TableRequest& request) {
  std::string announced = known_table(request);
  if (!announced.empty()) return control_.put_table(member, request.plan_key, announced);
  TRANSFUSE_ASSIGN_OR_RETURN(std::unique_ptr<Table> table, make_table(request));
  announced = encode(table->region->descriptor());
  {
    const MutexLock lock(mutex_);
    make_room_for_table();
    for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
      if (!slots_[slot].writing) want(*table, slot);
    }
    tables_.push_back(std::move(table));
    changed_.notify_all();
  }
  return control_.put_table(member, request.plan_key, announced);
}

Result<std::unique_ptr<ServedWeights::Table>> ServedWeights::make_table(
    const TableRequest& request) {
  const Deadline within = Deadline::after_ms(kLayoutsMs);
  TRANSFUSE_ASSIGN_OR_RETURN(Layout target, control_.get_layout(request.target, within));
  if (request.chunk_bytes == 0 ||
      target.parameter_bytes() / request.chunk_bytes > kMaxTableChunks) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("a table was asked for {} bytes in chunks of {}, at most {} chunks are "
                    "possible",
                    target.parameter_bytes(), request.chunk_bytes, kMaxTableChunks)};
  }
  std::vector<Layout> sources;
  for (const Digest& digest : request.sources) {
    if (digest == layout_.digest()) {
      sources.push_back(layout_);
    } else {
      TRANSFUSE_ASSIGN_OR_RETURN(Layout source, control_.get_layout(digest, within));
      sources.push_back(std::move(source));
    }
  }
  TRANSFUSE_ASSIGN_OR_RETURN(
      Plan plan, compile(target, sources, PlanOptions{.chunk_bytes = request.chunk_bytes}));
  if (plan.key() != request.plan_key) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("a table for plan {} was asked for, the layouts "
                             "named give plan {}",
                             request.plan_key.to_string(), plan.key().to_string())};
  }
  const auto own = std::ranges::find(plan.source_layouts(), layout_.digest(), &Layout::digest);
  if (own == plan.source_layouts().end()) {
    return Error{ErrorCode::kInvalidArgument, "a table was asked for a plan without this source"};
  }
  const auto own_index = static_cast<uint32_t>(own - plan.source_layouts().begin());
  CopyTable copies(std::move(plan));
  const uint64_t run_count = copies.held_runs(own_index).size();
  TRANSFUSE_ASSIGN_OR_RETURN(auto region,
                             transport_.allocate(slot_count() * table_bytes(run_count)));
  auto table = std::make_unique<Table>(Table{.key = request.plan_key,
                                             .copies = std::move(copies),
                                             .own = own_index,
                                             .region = std::move(region),
                                             .sums = std::vector<Sums>(slot_count()),
                                             .versions_left = kTableVersions});
  for (uint32_t slot = 0; slot < slot_count(); ++slot) {
    table->header(slot)->incarnation = incarnation_;
    table->header(slot)->run_count = run_count;
  }
  return table;
}

void ServedWeights::work_loop() {
  const MutexLock lock(mutex_);
  while (!stopping_) {
    // A trainer waits for copies, and readers alone for sums.
    if (!copy_a_chunk() && !sum_a_chunk()) changed_.wait(mutex_);
  }
}

// The table that is due in the slot that was written first: what readers of an older version wait
// for is not put off by every new one.
ServedWeights::Table* ServedWeights::next_table(uint32_t& slot) {
  Table* first = nullptr;
  for (const auto& table : tables_) {
    const size_t chunk_count = table->copies.plan().chunks().size();
    for (uint32_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].writing || !table->sums[i].wanted) continue;
      if (table->sums[i].next_chunk == chunk_count) continue;
      if (first != nullptr && slots_[i].written_as >= slots_[slot].written_as) continue;
      first = table.get();
      slot = i;
    }
  }
  return first;
}

bool ServedWeights::sum_a_chunk() {
  uint32_t slot = 0;
  Table* const table = next_table(slot);
  if (table == nullptr) return false;
  Sums& sums = table->sums[slot];
  const std::span<const Chunk> chunks = chunks_at(*table, slot, sums.next_chunk);
  sums.next_chunk += static_cast<uint32_t>(chunks.size());
  ++sums.in_flight;
  ++slots_[slot].sums_in_flight;
  mutex_.unlock();

  const auto summed = sum_chunks(*table, slot, chunks);

  mutex_.lock();
  --slots_[slot].sums_in_flight;
  --sums.in_flight;
  if (!summed && sums.wanted) {
    // Who waits for them sees no progress, and says so.
    sums.wanted = false;
    log_event(LogLevel::kError, "fingerprints_failed", {{"reason", summed.error().to_string()}});
  }
  // Tables are summed one after another: who waits for a later one sees that this one moves.
  const uint32_t run_count =
      chunks.back().first_run + chunks.back().run_count - chunks[0].first_run;
  for (const auto& due : tables_) {
    for (uint32_t i = 0; i < slots_.size(); ++i) {
      if (!due->sums[i].wanted) continue;
      word(due->header(i)->progress).fetch_add(run_count, std::memory_order_relaxed);
    }
  }
  const size_t chunk_count = table->copies.plan().chunks().size();
  if (sums.wanted && sums.next_chunk == chunk_count && sums.in_flight == 0) {
    sums.wanted = false;
    word(table->header(slot)->counter).store(slots_[slot].counter, std::memory_order_release);
  }
  if (sums.in_flight == 0) changed_.notify_all();
  return true;
}

// Threads take turns at chunks; a device sums a table in one launch.
std::span<const Chunk> ServedWeights::chunks_at(const Table& table, uint32_t slot,
                                                uint32_t first) const {
  const std::span<const Chunk> chunks = table.copies.plan().chunks();
  return chunks.subspan(first, on_device(slot) ? chunks.size() - first : 1);
}

Result<void> ServedWeights::sum_chunks(const Table& table, uint32_t slot,
                                       std::span<const Chunk> chunks) const {
  const Plan& plan = table.copies.plan();
  const std::span<const uint32_t> held = table.copies.held_runs(table.own);
  const uint32_t end = chunks.back().first_run + chunks.back().run_count;
  const auto first = std::ranges::lower_bound(held, chunks.front().first_run);
  const std::vector<bool>& copied = table.sums[slot].copied;  // changes while nobody sums
  std::vector<StridedCopy> on_device_copies;
  std::vector<size_t> summed;       // held runs
  std::vector<BlockScales> scales;  // of those of them that have some, in their order
  for (auto at = first; at != held.end() && *at < end; ++at) {
    const auto number = static_cast<size_t>(at - held.begin());
    if (!copied.empty() && copied[number]) continue;
    const Run& run = plan.runs()[*at];
    const Holder& holder =
        *std::ranges::find(plan.holders_of(run), table.own, &Holder::source_layout);
    const auto of = [&](uint32_t parameter) { return data(slot, parameter); };
    if (!on_device(slot)) {
      store_sum(table, slot, number, table.copies.sum(run, holder, of));
      continue;
    }
    StridedCopy copy = table.copies.copy(run, holder, 0, nullptr, true);
    copy.source_offset_bytes += reinterpret_cast<uintptr_t>(of(holder.parameter));
    if (const ScaleRun* const read = table.copies.scale_run(run, holder)) {
      const uint64_t at_scales =
          run.scales != 0 ? 0 : reinterpret_cast<uintptr_t>(of(read->parameter));
      scales.push_back(table.copies.block_scales(run, holder, nullptr, at_scales));
    }
    on_device_copies.push_back(copy);
    summed.push_back(number);
  }
  auto next_scales = scales.begin();
  for (StridedCopy& copy : on_device_copies) {
    if (is_scaled(copy.op)) copy.scales = &*next_scales++;
  }
  // An engine that sleeps can be asked all the same; a kernel that meets a hole loses the context.
  const bool weights = slot == 0 && !on_device_copies.empty();
  if (weights) TRANSFUSE_RETURN_IF_ERROR(memory_.refresh());
  std::vector<uint64_t> results(summed.size());
  TRANSFUSE_RETURN_IF_ERROR(run_on_device(transport_, on_device_copies, results));
  for (size_t i = 0; i < summed.size(); ++i) store_sum(table, slot, summed[i], results[i]);
  return {};
}

void ServedWeights::store_sum(const Table& table, uint32_t slot, size_t held_run, uint64_t sum) {
  auto* const sums = reinterpret_cast<uint64_t*>(table.bytes(slot) + kTableHeaderBytes);
  word(sums[held_run]).store(sum, std::memory_order_relaxed);
}

}  // namespace transfuse

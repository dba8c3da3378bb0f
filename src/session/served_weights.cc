// Generation words, table requests, and the threads that sum.
#include "session/served_weights.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/affinity.h"
#include "base/log.h"
#include "base/mutex.h"
#include "base/random.h"
#include "base/seqlock.h"
#include "copy/copy.h"
#include "session/copies.h"
#include "session/descriptor.h"
#include "session/memory.h"
#include "transfuse/control.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
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

TableHeader* header_of(const LocalRegion& region) {
  return reinterpret_cast<TableHeader*>(region.bytes().data());
}

std::atomic_ref<uint64_t> word(uint64_t& value) { return std::atomic_ref<uint64_t>(value); }

// A reader keeps what it has mapped: it learns here that nobody sums this table any more.
void mark_dropped(const LocalRegion& region) {
  word(header_of(region)->incarnation).store(0, std::memory_order_release);
}

}  // namespace

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
  TRANSFUSE_ASSIGN_OR_RETURN(weights->control_region_, transport.allocate(sizeof(GenerationWords)));
  weights->words().incarnation = weights->incarnation_;
  begin_generation(weights->words());
  return weights;
}

ServedWeights::~ServedWeights() {
  stop_serving();
  // Odd for good: a peer that still has the words mapped never takes what it reads for a version.
  if (control_region_) begin_write();
}

GenerationWords& ServedWeights::words() const {
  return *reinterpret_cast<GenerationWords*>(control_region_->bytes().data());
}

Result<std::string> ServedWeights::descriptor(const std::string& token) {
  MemberDescriptor descriptor;
  descriptor.transport = transport_.kind();
  TRANSFUSE_ASSIGN_OR_RETURN(descriptor.endpoint, transport_.endpoint());
  descriptor.token = token;
  descriptor.control = control_region_->descriptor();
  descriptor.regions.assign(memory_.regions().begin(), memory_.regions().end());
  descriptor.binding = memory_.binding();
  return encode(descriptor);
}

void ServedWeights::serve(MemberId member) {
  TRANSFUSE_CHECK(!event_thread_.joinable());
  stopping_ = false;
  event_thread_ = std::thread([this, member] { event_loop(member); });
  const uint32_t count =
      options_.fingerprint_threads > 0 ? options_.fingerprint_threads : usable_core_count();
  for (uint32_t i = 0; i < count; ++i) sum_threads_.emplace_back([this] { sum_loop(); });
}

void ServedWeights::stop_serving() {
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (event_thread_.joinable()) event_thread_.join();
  for (std::thread& thread : sum_threads_) thread.join();
  sum_threads_.clear();
}

void ServedWeights::begin_write() {
  const MutexLock lock(mutex_);
  writing_ = true;
  for (const auto& table : tables_) {
    table->wanted = false;
    word(header_of(*table->region)->counter).store(0, std::memory_order_release);
  }
  begin_generation(words());
  while (chunks_in_flight_ > 0) changed_.wait(mutex_);
}

Generation ServedWeights::end_write() {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(writing_);
  writing_ = false;
  counter_ = end_generation(words());
  drop_stale_tables();
  if (options_.keep_tables_fresh) {
    for (const auto& table : tables_) want(*table);
  }
  changed_.notify_all();
  return {.incarnation = incarnation_, .counter = counter_};
}

void ServedWeights::drop_stale_tables() {
  std::erase_if(tables_, [](const std::unique_ptr<Table>& table) {
    const bool stale = table->chunks_in_flight == 0 && --table->versions_left == 0;
    if (stale) mark_dropped(*table->region);
    return stale;
  });
}

// Of plans that come and go, the one that was asked for longest ago makes room.
void ServedWeights::make_room_for_table() {
  if (tables_.size() < kMaxTables) return;
  auto oldest = tables_.end();
  for (auto at = tables_.begin(); at != tables_.end(); ++at) {
    if ((*at)->chunks_in_flight > 0) continue;
    if (oldest == tables_.end() || (*at)->versions_left < (*oldest)->versions_left) oldest = at;
  }
  if (oldest == tables_.end()) return;
  mark_dropped(*(*oldest)->region);
  tables_.erase(oldest);
}

void ServedWeights::want(Table& table) {
  table.wanted = true;
  table.next_chunk = 0;
  TableHeader* header = header_of(*table.region);
  word(header->counter).store(0, std::memory_order_release);
  word(header->progress).store(0, std::memory_order_relaxed);
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
  if (!options_.keep_tables_fresh && !writing_) {
    // Sums under way may have begun before the request: they do not count for it.
    table->wanted = false;
    while (table->chunks_in_flight > 0) changed_.wait(mutex_);
    if (!writing_) want(*table);
    changed_.notify_all();
  }
  return encode(table->region->descriptor());
}

Result<void> ServedWeights::add_table(MemberId member, const TableRequest& request) {
  std::string announced = known_table(request);
  if (!announced.empty()) return control_.put_table(member, request.plan_key, announced);
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
  TRANSFUSE_ASSIGN_OR_RETURN(auto region, transport_.allocate(table_bytes(run_count)));
  header_of(*region)->incarnation = incarnation_;
  header_of(*region)->run_count = run_count;
  announced = encode(region->descriptor());
  auto table = std::make_unique<Table>(Table{.key = request.plan_key,
                                             .copies = std::move(copies),
                                             .own = own_index,
                                             .region = std::move(region),
                                             .versions_left = kTableVersions});
  {
    const MutexLock lock(mutex_);
    make_room_for_table();
    if (!writing_) want(*table);
    tables_.push_back(std::move(table));
    changed_.notify_all();
  }
  return control_.put_table(member, request.plan_key, announced);
}

ServedWeights::Table* ServedWeights::next_table() {
  if (writing_) return nullptr;
  for (const auto& table : tables_) {
    if (table->wanted && table->next_chunk < table->copies.plan().chunks().size()) {
      return table.get();
    }
  }
  return nullptr;
}

void ServedWeights::sum_loop() {
  mutex_.lock();
  while (!stopping_) {
    Table* const table = next_table();
    if (table == nullptr) {
      changed_.wait(mutex_);
      continue;
    }
    const std::span<const Chunk> chunks = table->copies.plan().chunks();
    const Chunk chunk = chunks[table->next_chunk++];
    ++table->chunks_in_flight;
    ++chunks_in_flight_;
    mutex_.unlock();

    sum_chunk(*table, chunk);

    mutex_.lock();
    --chunks_in_flight_;
    --table->chunks_in_flight;
    // Tables are summed one after another: who waits for a later one sees that this one moves.
    for (const auto& due : tables_) {
      if (!due->wanted) continue;
      word(header_of(*due->region)->progress).fetch_add(chunk.run_count, std::memory_order_relaxed);
    }
    if (table->wanted && table->next_chunk == chunks.size() && table->chunks_in_flight == 0) {
      table->wanted = false;
      word(header_of(*table->region)->counter).store(counter_, std::memory_order_release);
    }
    if (table->chunks_in_flight == 0) changed_.notify_all();
  }
  mutex_.unlock();
}

void ServedWeights::sum_chunk(const Table& table, const Chunk& chunk) const {
  const Plan& plan = table.copies.plan();
  auto* const sums = reinterpret_cast<uint64_t*>(table.region->bytes().data() + kTableHeaderBytes);
  const std::span<const uint32_t> held = table.copies.held_runs(table.own);
  auto at = std::ranges::lower_bound(held, chunk.first_run);
  for (; at != held.end() && *at < chunk.first_run + chunk.run_count; ++at) {
    const Run& run = plan.runs()[*at];
    const Holder& holder =
        *std::ranges::find(plan.holders_of(run), table.own, &Holder::source_layout);
    const StridedCopy copy = table.copies.copy(run, holder, 0, nullptr, true);
    sums[at - held.begin()] =
        sum_copy(copy, memory_.data(holder.parameter) + copy.source_offset_bytes);
  }
}

}  // namespace transfuse

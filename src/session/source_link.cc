// Connecting, and the few words that are read besides weights.
#include "session/source_link.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#include "session/descriptor.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

#include <fmt/format.h>

namespace transfuse {
namespace {

constexpr size_t kMaxTables = 8;  // of one link: plans that this reader has used lately
constexpr auto kFirstPause = std::chrono::microseconds(50);
constexpr auto kLongestPause = std::chrono::milliseconds(2);
constexpr auto kAnnouncementPause = std::chrono::milliseconds(10);
// A source compiles the plan before it announces a table: for a large model, on busy cores, that
// takes longer than a read may stand still.
constexpr int64_t kAnnouncementFactor = 5;

// Where this process sees the words, in their order: a read through the transport would cost the
// wake of a thread, several times a refit. False where it does not see all of them.
bool load_words(std::span<const std::byte> mapped, uint64_t offset_bytes,
                std::span<uint64_t> words) {
  const bool inside = offset_bytes <= mapped.size() &&
                      words.size_bytes() <= mapped.size() - offset_bytes &&
                      offset_bytes % sizeof(uint64_t) == 0;
  if (!inside) return false;
  const auto* at = reinterpret_cast<const uint64_t*>(mapped.data() + offset_bytes);
  for (uint64_t& word : words) word = __atomic_load_n(at++, __ATOMIC_ACQUIRE);
  return true;
}

}  // namespace

MemberLink::MemberLink(Transport& transport, Control& control, MemberInfo info,
                       MemberDescriptor descriptor, MemoryPlace target)
    : SourceLink(std::move(info)),
      transport_(transport),
      control_(control),
      target_(target),
      descriptor_(std::move(descriptor)) {
  regions_.resize(descriptor_.regions.size());
}

MemberLink::~MemberLink() { close(); }

Result<std::unique_ptr<MemberLink>> MemberLink::open(Transport& transport, Control& control,
                                                     const MemberInfo& info, const Layout& layout,
                                                     MemoryPlace target, Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string bytes,
                             control.describe(info.id, info.incarnation, deadline));
  TRANSFUSE_ASSIGN_OR_RETURN(MemberDescriptor descriptor, decode_member_descriptor(bytes, layout));
  if (descriptor.transport != transport.endpoint_kind()) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("source '{}' is served over '{}', this receiver reads over '{}'",
                             info.name, descriptor.transport, transport.endpoint_kind())};
  }
  std::unique_ptr<MemberLink> link(
      new MemberLink(transport, control, info, std::move(descriptor), target));
  TRANSFUSE_ASSIGN_OR_RETURN(link->peer_, transport.connect(link->descriptor_.endpoint,
                                                            link->descriptor_.token, deadline));
  TRANSFUSE_ASSIGN_OR_RETURN(link->generation_region_,
                             link->peer_->open_region(link->descriptor_.control, deadline));
  return link;
}

void MemberLink::close() {
  tables_.clear();
  regions_.clear();
  generation_region_.reset();
  peer_.reset();
}

Error MemberLink::gone(std::string what) const {
  return Error{ErrorCode::kUnavailable,
               fmt::format("source '{}' is gone: {}", info_.name, std::move(what))};
}

// What the coordinator says of a source need not agree with what the source says of itself (I13).
Result<void> MemberLink::check_slot(uint32_t slot) const {
  if (slot < descriptor_.slots.size()) return {};
  return Error{ErrorCode::kCorrupt, fmt::format("source '{}' has {} slots, a version in slot {} "
                                                "was offered",
                                                info_.name, descriptor_.slots.size(), slot)};
}

Result<SourceLink::Where> MemberLink::where(uint32_t parameter, uint32_t slot, Deadline deadline) {
  if (peer_ == nullptr) return gone("its connection was closed");
  TRANSFUSE_RETURN_IF_ERROR(check_slot(slot));
  const Place& place = descriptor_.slots[slot].places[parameter];
  std::unique_ptr<RemoteRegion>& region = regions_[place.region];
  if (region == nullptr) {
    const RegionDescriptor& descriptor = descriptor_.regions[place.region];
    if (descriptor.place == MemoryPlace::kDevice && !transport_.own_memory()) {
      return Error{
          ErrorCode::kUnsupported,
          fmt::format("the weights of source '{}' lie on a device: open the session of this "
                      "process with a device to read them through",
                      info_.name)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(region, peer_->open_region(descriptor, deadline));
    region->expect_reads(target_);
  }
  return Where{.region = region.get(), .offset_bytes = place.offset_bytes};
}

Result<void> MemberLink::read_words(const RemoteRegion& region, uint64_t offset_bytes,
                                    std::span<uint64_t> words, Deadline deadline) {
  if (peer_ == nullptr) return gone("its connection was closed");
  if (load_words(region.mapped(), offset_bytes, words)) return {};
  if (staged_words_.size() < words.size()) staged_words_.resize(words.size());
  word_copy_ = {};
  word_copy_.source_offset_bytes = offset_bytes;
  word_copy_.target = reinterpret_cast<std::byte*>(staged_words_.data());
  word_copy_.op = ElementOp::kCopy8;
  word_copy_.count[2] = static_cast<uint32_t>(words.size());
  word_copy_.source_stride[2] = word_copy_.target_stride[2] = 1;
  TRANSFUSE_ASSIGN_OR_RETURN(
      const TicketId ticket,
      transport_.submit({.region = &region, .copies = {&word_copy_, 1}, .fingerprints = {}}));
  if (!transport_.wait_any({&ticket, 1}, deadline)) {
    transport_.cancel(ticket);
    close();  // ends the ticket: no later write of the staged words is possible
    (void)transport_.finish(ticket);  // cancelled, or landed too late: both are this error
    return Error{
        ErrorCode::kDeadlineExceeded,
        fmt::format("a read of the control words of source '{}' did not end in time", info_.name)};
  }
  TRANSFUSE_RETURN_IF_ERROR(transport_.finish(ticket));
  std::memcpy(words.data(), staged_words_.data(), words.size_bytes());
  return {};
}

Result<Generation> MemberLink::read_generation(uint32_t slot, Deadline deadline) {
  if (generation_region_ == nullptr) return gone("its connection was closed");
  TRANSFUSE_RETURN_IF_ERROR(check_slot(slot));
  std::array<uint64_t, 2> words{};
  TRANSFUSE_RETURN_IF_ERROR(
      read_words(*generation_region_, slot * kGenerationStrideBytes, words, deadline));
  // No read of weights is under way here, and a source says that its memory was mapped anew before
  // it offers the next generation: such regions are opened again when they are used.
  for (auto& region : regions_) {
    if (region != nullptr && !region->current()) region.reset();
  }
  return Generation{.incarnation = words[0], .counter = words[1]};
}

Result<void> MemberLink::request_table(MemberId reader, const TableRequest& request,
                                       Deadline deadline) {
  const auto known = std::ranges::find(tables_, request.plan_key, &Table::key);
  if (known != tables_.end() && known->refits_until_renewal > 1) {
    --known->refits_until_renewal;
    return {};
  }
  TRANSFUSE_RETURN_IF_ERROR(control_.request_table(reader, info_.id, request, deadline));
  if (known != tables_.end()) {
    known->refits_until_renewal = kTableRenewalVersions;
    return {};
  }
  if (tables_.size() == kMaxTables) tables_.erase(tables_.begin());
  tables_.push_back({.key = request.plan_key, .region = nullptr});
  return {};
}

Result<MemberLink::Table*> MemberLink::open_table(MemberId reader, const TableRequest& request,
                                                  size_t run_count, Deadline deadline) {
  const auto table = std::ranges::find(tables_, request.plan_key, &Table::key);
  TRANSFUSE_CHECK(table != tables_.end());
  if (table->region == nullptr) {
    auto region = open_table_region(reader, request, run_count, deadline);
    if (!region) {
      table->refits_until_renewal = 1;  // the request may be what was lost
      return Unexpected{std::move(region).error()};
    }
    table->region = std::move(*region);
  }
  return &*table;
}

Result<std::unique_ptr<RemoteRegion>> MemberLink::open_table_region(MemberId reader,
                                                                    const TableRequest& request,
                                                                    size_t run_count,
                                                                    Deadline deadline) {
  while (true) {
    const auto bytes = control_.get_table(info_.id, request.plan_key, deadline);
    if (!bytes && bytes.error().code == ErrorCode::kNotFound && !deadline.passed()) {
      // The coordinator restarted since it was asked for.
      TRANSFUSE_RETURN_IF_ERROR(control_.request_table(reader, info_.id, request, deadline));
      continue;
    }
    if (!bytes) return bytes.error();
    TRANSFUSE_ASSIGN_OR_RETURN(const RegionDescriptor descriptor, decode_region_descriptor(*bytes));
    const uint64_t needed = descriptor_.slots.size() * table_bytes(run_count);
    if (descriptor.size_bytes < needed) {
      return Error{
          ErrorCode::kCorrupt,
          fmt::format("source '{}' announced fingerprint tables of {} bytes, {} runs in {} "
                      "slots need {}",
                      info_.name, descriptor.size_bytes, run_count, descriptor_.slots.size(),
                      needed)};
    }
    if (peer_ == nullptr) return gone("its connection was closed");
    auto region = peer_->open_region(descriptor, deadline);
    if (region || region.error().code != ErrorCode::kNotFound || deadline.passed()) return region;
    // The table that was announced is dropped already; the next one is on its way.
    std::this_thread::sleep_for(kAnnouncementPause);
  }
}

// A source drops tables that nobody asked for in many versions, and says so in their headers.
Result<MemberLink::Table*> MemberLink::reopen_table(MemberId reader, const TableRequest& request,
                                                    size_t run_count, Deadline deadline) {
  std::erase_if(tables_, [&](const Table& table) { return table.key == request.plan_key; });
  TRANSFUSE_RETURN_IF_ERROR(request_table(reader, request, deadline));
  return open_table(reader, request, run_count, deadline);
}

Result<TableHeader> MemberLink::read_header(const Table& table, uint64_t offset_bytes,
                                            Deadline deadline) {
  std::array<uint64_t, 4> words{};
  TRANSFUSE_RETURN_IF_ERROR(read_words(*table.region, offset_bytes, words, deadline));
  return TableHeader{
      .incarnation = words[0], .counter = words[1], .progress = words[2], .run_count = words[3]};
}

Result<std::unique_ptr<SourceLink>> MemberDirectory::open(const MemberInfo& info,
                                                          const Layout& layout, Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(
      std::unique_ptr<SourceLink> link,
      MemberLink::open(transport_, control_, info, layout, target_, deadline));
  return link;
}

Result<void> MemberLink::read_table(const SumQuery& query, std::span<uint64_t> sums,
                                    Deadline deadline, int64_t no_progress_ms,
                                    const std::atomic<bool>& cancelled) {
  const MemberId reader = query.reader;
  const TableRequest& request = query.request;
  TRANSFUSE_RETURN_IF_ERROR(check_slot(query.slot));
  const Generation& generation = query.generation;
  const uint64_t offset_bytes = query.slot * table_bytes(sums.size());
  const auto next_limit = [&] { return deadline.earlier(Deadline::after_ms(no_progress_ms)); };
  const Deadline announced_by =
      deadline.earlier(Deadline::after_ms(kAnnouncementFactor * no_progress_ms));
  TRANSFUSE_RETURN_IF_ERROR(request_table(reader, request, announced_by));
  TRANSFUSE_ASSIGN_OR_RETURN(Table * table, open_table(reader, request, sums.size(), announced_by));
  Duration pause = kFirstPause;
  Deadline limit = next_limit();
  uint64_t progress = 0;
  while (true) {
    TRANSFUSE_ASSIGN_OR_RETURN(const TableHeader before,
                               read_header(*table, offset_bytes, next_limit()));
    if (before.counter == generation.counter && before.incarnation == generation.incarnation) {
      TRANSFUSE_RETURN_IF_ERROR(
          read_words(*table->region, offset_bytes + kTableHeaderBytes, sums, next_limit()));
      TRANSFUSE_ASSIGN_OR_RETURN(const TableHeader after,
                                 read_header(*table, offset_bytes, next_limit()));
      if (after.counter == before.counter && after.incarnation == before.incarnation) return {};
    }
    if (cancelled) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
    if (!alive()) return gone("it ended before its fingerprints were complete");
    TRANSFUSE_ASSIGN_OR_RETURN(const Generation now, read_generation(query.slot, next_limit()));
    if (now != generation) {
      return Error{ErrorCode::kTornRead,
                   fmt::format("source '{}' left generation {} for {} before its fingerprints were "
                               "complete",
                               info_.name, generation.counter, now.counter)};
    }
    if (before.progress != progress) {
      progress = before.progress;
      limit = next_limit();
    }
    if (limit.passed()) {
      return Error{ErrorCode::kDeadlineExceeded,
                   fmt::format("source '{}' made no progress with its fingerprints for {} ms",
                               info_.name, no_progress_ms)};
    }
    std::this_thread::sleep_for(pause);
    pause = std::min<Duration>(pause * 2, kLongestPause);
    if (before.incarnation == 0) {
      TRANSFUSE_ASSIGN_OR_RETURN(table, reopen_table(reader, request, sums.size(), announced_by));
      limit = next_limit();
    }
  }
}

}  // namespace transfuse

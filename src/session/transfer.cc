// The window of tickets.
#include "session/transfer.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>
#include <utility>
#include "plan/copies.h"
#include "session/source_link.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

#include <fmt/format.h>

namespace transfuse {
namespace {

constexpr size_t kSlots = 32;
constexpr size_t kCopiesPerTicket = 512;
// Of a request that joins regions: large enough that its beginning and end do not count, and never
// so large that it shows no progress for long.
constexpr uint64_t kJoinedBytes = uint64_t{8} << 30;
constexpr double kJoinedSeconds = 0.25;  // under a bandwidth cap
constexpr auto kWaitSlice = std::chrono::milliseconds(50);
constexpr auto kCancelGrace = std::chrono::milliseconds(200);
constexpr auto kBurst = std::chrono::milliseconds(5);        // what a capped transfer may catch up
constexpr auto kCancelPause = std::chrono::milliseconds(1);  // of polling what was cancelled

}  // namespace

Transfer::Transfer(Transport& transport) : transport_(transport) {
  slots_.resize(kSlots);
  for (Slot& slot : slots_) {
    slot.copies.reserve(kCopiesPerTicket);
    slot.sums.reserve(kCopiesPerTicket);
    slot.runs.reserve(kCopiesPerTicket);
  }
  waiting_.reserve(kSlots);
}

bool Transfer::failed(uint32_t link) const {
  return std::ranges::find(failures_, link, &LinkFailure::link) != failures_.end();
}

void Transfer::fail_link(uint32_t link, Error error) {
  if (!failed(link)) failures_.push_back({link, std::move(error)});
}

Result<Transfer::Place> Transfer::place_of(const TransferOrder& order, uint32_t number,
                                           Deadline limit) const {
  const CopyTable& copies = *order.copies;
  const Run& run = copies.plan().runs()[number];
  const Holder& holder = copies.plan().holders()[order.holder[number]];
  const uint32_t link = order.link_of[number];
  const auto where = [&](uint32_t parameter) {
    return order.links[link]->where(parameter, order.slots[link], limit);
  };
  Place place;
  TRANSFUSE_ASSIGN_OR_RETURN(place.numbers, where(holder.parameter));
  const ScaleRun* const scales = copies.scale_run(run, holder);
  if (scales != nullptr && run.scales == 0) {
    TRANSFUSE_ASSIGN_OR_RETURN(place.scales, where(scales->parameter));
  }
  return place;
}

void Transfer::add(const TransferOrder& order, Slot& slot, uint32_t number,
                   const Place& place) const {
  const CopyTable& copies = *order.copies;
  const Run& run = copies.plan().runs()[number];
  const Holder& holder = copies.plan().holders()[order.holder[number]];
  if (const ScaleRun* const scales = copies.scale_run(run, holder)) {
    slot.scales.push_back(copies.block_scales(
        run, holder, run.scales != 0 ? order.target[scales->parameter] : nullptr,
        place.scales.offset_bytes));
  }
  slot.copies.push_back(copies.copy(run, holder, place.numbers.offset_bytes,
                                    order.target[run.parameter], order.fingerprint));
  slot.runs.push_back(number);
  slot.bytes += copies.target_bytes(run);
}

// All runs of the slot's link from next_ on that join, up to a request's worth.
void Transfer::gather(const TransferOrder& order, Slot& slot, Deadline limit) {
  uint64_t most = kJoinedBytes;
  if (order.limits.gigabytes_per_second > 0) {
    const double paced = order.limits.gigabytes_per_second * 1e9 * kJoinedSeconds;
    if (paced < static_cast<double>(most)) most = static_cast<uint64_t>(paced);
  }
  size_t at = next_;
  for (; at < order.runs.size() && slot.bytes < most; ++at) {
    const uint32_t run = order.runs[at];
    if (order.link_of[run] != slot.link) continue;
    const auto place = place_of(order, run, limit);
    if (!place) {
      fail_link(slot.link, place.error());
      break;
    }
    if (!place->joins()) continue;
    add(order, slot, run, *place);
    slot.regions.push_back(place->numbers.region);
    slot.scale_regions.push_back(place->scales.region);
  }
  gathered_to_[slot.link] = at;
}

// Gathers runs that read one region, or regions that join, until a ticket's worth of bytes is
// there. False when no run is left.
bool Transfer::fill(const TransferOrder& order, Slot& slot) {
  const Plan& plan = order.copies->plan();
  const uint64_t ticket_bytes = plan.options().chunk_bytes;
  slot.copies.clear();
  slot.scales.clear();
  slot.runs.clear();
  slot.regions.clear();
  slot.scale_regions.clear();
  slot.scale_region = nullptr;
  slot.bytes = 0;
  const RemoteRegion* region = nullptr;
  // A region that is not open yet is asked for: a source that does not answer is a stalled one.
  const Deadline limit = order.deadline.earlier(Deadline::after_ms(order.no_progress_ms));
  while (next_ < order.runs.size() && slot.copies.size() < kCopiesPerTicket &&
         slot.bytes < ticket_bytes) {
    const uint32_t number = order.runs[next_];
    const uint32_t link = order.link_of[number];
    if (region != nullptr && link != slot.link) break;
    if (failed(link)) {
      ++next_;
      continue;
    }
    const auto place = place_of(order, number, limit);
    if (!place) {
      fail_link(link, place.error());
      continue;
    }
    const RemoteRegion* const numbers = place->numbers.region;
    if (place->joins()) {
      if (next_ < gathered_to_[link]) {
        ++next_;
        continue;
      }
      if (region != nullptr) break;
      region = numbers;
      slot.link = link;
      gather(order, slot, limit);
      break;
    }
    if (region != nullptr && numbers != region) break;
    const RemoteRegion* const scales = place->scales.region;
    if (scales != nullptr && slot.scale_region != nullptr && scales != slot.scale_region) break;
    const uint64_t bytes = order.copies->target_bytes(plan.runs()[number]);
    // A run that would make the ticket half as large again goes to the next one.
    if (slot.bytes > 0 && slot.bytes + bytes > ticket_bytes + ticket_bytes / 2) break;
    add(order, slot, number, *place);
    if (scales != nullptr) slot.scale_region = scales;
    region = numbers;
    slot.link = link;
    ++next_;
  }
  if (region == nullptr) return false;
  slot.sums.assign(order.fingerprint ? slot.copies.size() : 0, 0);
  submit(order, slot, *region);
  if (order.limits.gigabytes_per_second > 0) {
    const TimePoint now = std::chrono::steady_clock::now();
    next_submit_at_ =
        std::max(next_submit_at_, now - kBurst) +
        Duration(static_cast<int64_t>(static_cast<double>(slot.bytes) /
                                      order.limits.gigabytes_per_second));  // bytes per nanosecond
  }
  return true;
}

void Transfer::submit(const TransferOrder& order, Slot& slot, const RemoteRegion& region) {
  auto scales = slot.scales.begin();  // they do not move any more
  for (StridedCopy& copy : slot.copies) {
    if (is_scaled(copy.op)) copy.scales = &*scales++;
  }
  auto ticket = transport_.submit({.region = &region,
                                   .copies = slot.copies,
                                   .fingerprints = slot.sums,
                                   .regions = slot.regions,
                                   .scale_region = slot.scale_region,
                                   .scale_regions = slot.scale_regions,
                                   .limits = order.limits});
  if (!ticket) {
    fail_link(slot.link, std::move(ticket).error());
    return;
  }
  slot.ticket = *ticket;
  slot.busy = true;
  slot.progress = 0;
  slot.submitted_at = std::chrono::steady_clock::now();
  slot.cancelled_at = {};
}

// The bytes that were asked for already take the link longer than until now.
bool Transfer::held_back(const TransferOrder& order) const {
  return order.limits.gigabytes_per_second > 0 &&
         std::chrono::steady_clock::now() < next_submit_at_;
}

// True if the slot's ticket has ended.
bool Transfer::reap(const TransferOrder& order, Slot& slot, std::span<uint8_t> landed,
                    std::span<uint64_t> sums) {
  const TicketState state = transport_.poll(slot.ticket);
  if (state == TicketState::kPending || state == TicketState::kPoisoned) return false;
  auto outcome = transport_.finish(slot.ticket);
  slot.busy = false;
  if (outcome) {
    progress_at_[slot.link] = std::chrono::steady_clock::now();
    for (size_t i = 0; i < slot.runs.size(); ++i) {
      landed[slot.runs[i]] = 1;
      if (!slot.sums.empty()) sums[slot.runs[i]] = slot.sums[i];
    }
    landed_bytes_ += slot.bytes;
    // A run that is read again has landed before: what others see does not fall for it.
    if (landed_bytes_ > order.landed_bytes->load()) order.landed_bytes->store(landed_bytes_);
  } else if (outcome.error().code != ErrorCode::kCancelled) {
    fail_link(slot.link, std::move(outcome).error());
  }
  return true;
}

// A source of which no read moved for the limit is stalled: missing progress finds it, whatever the
// transport says (I11). Reads may queue behind one another, so the source counts, not the ticket.
void Transfer::watch_progress(const TransferOrder& order) {
  const TimePoint now = std::chrono::steady_clock::now();
  const auto limit = std::chrono::milliseconds(order.no_progress_ms);
  for (Slot& slot : slots_) {
    if (!slot.busy) continue;
    const uint64_t progress = transport_.progress_bytes(slot.ticket);
    if (progress == slot.progress) continue;
    slot.progress = progress;
    progress_at_[slot.link] = now;
  }
  for (const Slot& slot : slots_) {
    if (!slot.busy || failed(slot.link)) continue;
    if (now - std::max(progress_at_[slot.link], slot.submitted_at) < limit) continue;
    fail_link(slot.link,
              Error{ErrorCode::kDeadlineExceeded,
                    fmt::format("source '{}' moved nothing for {} ms ({} of {} bytes of a read)",
                                order.links[slot.link]->info().name, order.no_progress_ms,
                                slot.progress, slot.bytes)});
  }
}

// Cancels what is still pending on failed links. A link whose read does not end soon after is
// closed: then no late write of it is possible.
void Transfer::abandon(const TransferOrder& order) {
  const TimePoint now = std::chrono::steady_clock::now();
  for (Slot& slot : slots_) {
    if (!slot.busy || !failed(slot.link)) continue;
    if (slot.cancelled_at == TimePoint{}) {
      transport_.cancel(slot.ticket);
      slot.cancelled_at = now;
    } else if (now - slot.cancelled_at > kCancelGrace &&
               transport_.poll(slot.ticket) == TicketState::kPoisoned) {
      order.links[slot.link]->close();
    }
  }
}

Result<void> Transfer::run(const TransferOrder& order, std::span<uint8_t> landed,
                           std::span<uint64_t> sums) {
  next_ = 0;
  failures_.clear();
  landed_bytes_ = order.landed_before;
  progress_at_.assign(order.links.size(), TimePoint{});
  gathered_to_.assign(order.links.size(), 0);
  Result<void> outcome;
  bool stopping = false;
  while (true) {
    waiting_.clear();
    bool busy = false;
    for (Slot& slot : slots_) {
      while (!slot.busy && !stopping && next_ < order.runs.size() && !held_back(order)) {
        if (!fill(order, slot)) break;
      }
      busy = busy || slot.busy;
      // A cancelled one is not pending any more, so that waiting for it would be no wait.
      if (slot.busy && slot.cancelled_at == TimePoint{}) waiting_.push_back(slot.ticket);
    }
    const bool more = !stopping && next_ < order.runs.size();
    if (!busy && !more) return outcome;
    Deadline slice = Deadline::after(kWaitSlice);
    if (more && held_back(order)) slice = slice.earlier(Deadline(next_submit_at_));
    if (!stopping) slice = slice.earlier(order.deadline);
    if (!waiting_.empty()) {
      transport_.wait_any(waiting_, slice);
    } else if (busy) {
      std::this_thread::sleep_for(kCancelPause);
    } else {
      std::this_thread::sleep_for(slice.remaining());
    }
    for (Slot& slot : slots_) {
      if (slot.busy) (void)reap(order, slot, landed, sums);
    }
    watch_progress(order);
    if (!stopping && (order.cancelled->load() || order.deadline.passed())) {
      stopping = true;
      outcome = order.cancelled->load()
                    ? Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"}
                    : Error{ErrorCode::kDeadlineExceeded,
                            "the refit's deadline passed while bytes "
                            "were moving"};
      for (Slot& slot : slots_) {
        if (slot.busy) fail_link(slot.link, outcome.error());
      }
    }
    if (!failures_.empty()) abandon(order);
  }
}

}  // namespace transfuse

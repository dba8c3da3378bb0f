// One request over the region that is this process' own memory.
#include "session/device_work.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

// Far beyond what any copy within a device takes: only a device that hangs reaches it.
constexpr int64_t kLongestMs = 60000;
constexpr int64_t kSliceMs = 20;  // how late a cancellation is seen
constexpr int64_t kGraceMs = 10000;
constexpr uint64_t kPieceBytes = uint64_t{1} << 30;  // counts are of 32 bits

// What is staged ends soon, and reads the request until then; a launch does not read it.
Result<void> give_up(Transport& transport, TicketId ticket, Error reason) {
  transport.cancel(ticket);
  const Deadline grace = Deadline::after_ms(kGraceMs);
  while (transport.poll(ticket) == TicketState::kPoisoned && !grace.passed()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (transport.poll(ticket) == TicketState::kPoisoned) {
    return Error{ErrorCode::kDeadlineExceeded,
                 reason.message + ", and it has not ended since: the device may still write"};
  }
  (void)transport.finish(ticket);
  return reason;
}

}  // namespace

Result<void> run_on_device(Transport& transport, std::span<const StridedCopy> copies,
                           std::span<uint64_t> sums, const CopyLimits& limits,
                           CopyProgress* progress) {
  if (copies.empty()) return {};
  TRANSFUSE_ASSIGN_OR_RETURN(const RemoteRegion* own, transport.own_memory());
  TRANSFUSE_ASSIGN_OR_RETURN(
      const TicketId ticket,
      transport.submit({.region = own, .copies = copies, .fingerprints = sums, .limits = limits}));
  uint64_t moved = 0;
  Deadline limit = Deadline::after_ms(kLongestMs);
  while (!transport.wait_any({&ticket, 1}, limit.earlier(Deadline::after_ms(kSliceMs)))) {
    const uint64_t now = transport.progress_bytes(ticket);
    if (now != moved) limit = Deadline::after_ms(kLongestMs);
    moved = now;
    if (progress != nullptr) progress->copied_bytes = now;
    if (progress != nullptr && progress->cancelled) {
      return give_up(transport, ticket,
                     {ErrorCode::kCancelled, "a copy of the device was cancelled"});
    }
    if (!limit.passed()) continue;
    return give_up(transport, ticket,
                   {ErrorCode::kDeadlineExceeded,
                    "a copy of the device has not moved for a minute: the device hangs"});
  }
  if (progress != nullptr) progress->copied_bytes = transport.progress_bytes(ticket);
  return transport.finish(ticket);
}

void add_plain(std::vector<StridedCopy>& copies, std::byte* target, const std::byte* source,
               uint64_t size_bytes) {
  for (uint64_t done = 0; done < size_bytes; done += kPieceBytes) {
    StridedCopy copy;
    copy.source_offset_bytes = reinterpret_cast<uintptr_t>(source) + done;
    copy.target = target + done;
    copy.op = ElementOp::kCopy1;
    copy.count[2] = static_cast<uint32_t>(std::min(kPieceBytes, size_bytes - done));
    copy.source_stride[2] = copy.target_stride[2] = 1;
    copies.push_back(copy);
  }
}

}  // namespace transfuse

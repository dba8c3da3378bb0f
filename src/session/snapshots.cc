// Room for snapshots, and their copies.
#include "session/snapshots.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/memory_room.h"
#include "copy/copy.h"
#include "session/memory.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kAlignmentBytes = 64;             // a cache line, and the widest vector
constexpr uint64_t kChunkBytes = uint64_t{1} << 20;  // 100 us of copying: threads end together

uint64_t aligned(uint64_t size_bytes) {
  return (size_bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

uint64_t one_snapshot_bytes(const Layout& layout) {
  uint64_t sum = 0;
  for (const ParameterSpec& parameter : layout.parameters()) {
    sum += aligned(parameter_size_bytes(parameter));
  }
  return std::max(sum, kAlignmentBytes);  // no transport has regions without bytes
}

Result<void> check_room(const Layout& layout, uint32_t count) {
  const MemoryRoom room = memory_room();
  const uint64_t one = one_snapshot_bytes(layout);
  if (count == 0 || one <= room.size_bytes / count) return {};
  const uint64_t fit = room.size_bytes / one;
  return Error{
      ErrorCode::kResourceExhausted,
      fmt::format("{} snapshots of {} bytes need {} bytes, {} leaves {}: choose {}retention "
                  "in_place, which needs none",
                  count, one, snapshot_bytes(layout, count), room.limit, room.size_bytes,
                  fit > 0 ? fmt::format("{} snapshot slots or ", fit) : "")};
}

}  // namespace

uint64_t snapshot_bytes(const Layout& layout, uint32_t slots) {
  return one_snapshot_bytes(layout) * slots;
}

Result<Snapshots> Snapshots::open(Transport& transport, const Layout& layout, MemoryPlace place,
                                  uint32_t count) {
  Snapshots snapshots;
  snapshots.place_ = place;
  if (count == 0) return snapshots;
  const bool on_device = place == MemoryPlace::kDevice;
  if (!on_device) TRANSFUSE_RETURN_IF_ERROR(check_room(layout, count));
  uint64_t begin = 0;
  for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
    const uint64_t size_bytes = parameter_size_bytes(layout.parameters()[i]);
    snapshots.offsets_.push_back(begin);
    begin += aligned(size_bytes);
    for (uint64_t at = 0; at < size_bytes; at += kChunkBytes) {
      snapshots.chunks_.push_back(
          {.parameter = i,
           .offset_bytes = at,
           .size_bytes = static_cast<uint32_t>(std::min(kChunkBytes, size_bytes - at))});
    }
  }
  for (uint32_t i = 0; i < count; ++i) {
    const uint64_t size_bytes = one_snapshot_bytes(layout);
    TRANSFUSE_ASSIGN_OR_RETURN(auto region, on_device ? transport.allocate_on_device(size_bytes)
                                                      : transport.allocate(size_bytes));
    snapshots.regions_.push_back(std::move(region));
  }
  return snapshots;
}

void Snapshots::copy(const BoundMemory& from, uint32_t snapshot, const SnapshotChunk& chunk) const {
  StridedCopy copy;
  copy.target = data(snapshot, chunk.parameter) + chunk.offset_bytes;
  copy.op = ElementOp::kCopy1;
  copy.count[2] = chunk.size_bytes;
  copy.source_stride[2] = copy.target_stride[2] = 1;
  run_copy(copy, from.data(chunk.parameter) + chunk.offset_bytes);
}

}  // namespace transfuse

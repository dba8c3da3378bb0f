// The table that one kernel launch walks: every strided copy of a plan, cut into pieces of equal
// work. Built once on the host; only source addresses change from cycle to cycle.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/host_device.h"
#include "copy/element_size.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// How the kernel walks a run.
enum class RunWalk : uint8_t {
  kVectors,   // both sides contiguous and aligned: kVectorBytes at a time on the narrower side
  kElements,  // one element at a time, for any strides and alignments
  // Through the stage, memory that a block shares: strips of contiguous source bytes are read into
  // it in vectors, and target rows are put together from it in vectors, heads and tails by element.
  kShifted,     // rows contiguous on both sides, aligned anyhow; a strip is a row
  kTransposed,  // rows contiguous at the target, columns at the source; a strip is a column
  kFill,        // rows contiguous at the target; one source element, repeated in the stage
};
inline constexpr uint32_t kVectorBytes = 16;
TRANSFUSE_HOST_DEVICE constexpr bool uses_stage(RunWalk walk) {
  return walk != RunWalk::kVectors && walk != RunWalk::kElements;
}
// Two blocks of a multiprocessor have room for it on every GPU since sm_80.
inline constexpr uint32_t kStageBytes = 40u << 10;
// At its end: words are read in pairs where a row ends inside of one.
inline constexpr uint32_t kStageSlackBytes = kVectorBytes;
// Vectors of the stage that a strip needs, wherever in one it begins.
TRANSFUSE_HOST_DEVICE constexpr uint32_t strip_vectors(uint32_t bytes) {
  return (bytes + 2 * (kVectorBytes - 1)) / kVectorBytes;
}
// So many bytes are left free in the stage after the strips of every target vector: eight rows of
// four target vectors, which a warp makes at once, then lie in different banks.
TRANSFUSE_HOST_DEVICE constexpr uint32_t strip_skew(uint32_t source_element_bytes) {
  const uint32_t rows = 8 * source_element_bytes;
  return rows > kVectorBytes ? rows : kVectorBytes;
}

// One strided copy. Rows are the outer two levels flattened: row r is (r / inner_rows, r %
// inner_rows). A unit is unit_elements() elements of a row.
struct DeviceRun {
  uint64_t source_offset = 0;        // bytes from the source's base
  uint64_t target = 0;               // device address
  uint64_t linear_index = 0;         // of the first element
  uint64_t key = 0;                  // of the tensor, for the fingerprint
  int64_t source_pitch[2] = {0, 0};  // bytes from row to row: outer, inner
  int64_t target_pitch[2] = {0, 0};  // bytes
  int64_t index_pitch[2] = {0, 0};   // elements
  int64_t source_step = 0;           // bytes from element to element
  int64_t target_step = 0;           // bytes
  int64_t index_step = 0;            // elements
  uint32_t inner_rows = 1;
  uint32_t source = 0;  // whose base
  ElementOp op = ElementOp::kCopy1;
  RunWalk walk = RunWalk::kElements;
  bool fingerprint = false;
  uint8_t reserved = 0;
  uint32_t sum = 0;  // which sum its elements add to
};
static_assert(sizeof(DeviceRun) == 120);

// A block's work: a rectangle of one run, in rows of one outer level.
struct DeviceItem {
  uint32_t run = 0;
  uint32_t first_row = 0;
  uint32_t rows = 0;
  uint32_t first_unit = 0;
  uint32_t units = 0;  // in each row
};
static_assert(sizeof(DeviceItem) == 20);

// Elements of a unit: vectors have kVectorBytes on the narrower side.
TRANSFUSE_HOST_DEVICE constexpr uint32_t unit_elements(RunWalk walk, ElementOp op) {
  if (walk != RunWalk::kVectors) return 1;
  const uint32_t source = source_bytes_of(op);
  const uint32_t target = target_bytes_of(op);
  return kVectorBytes / (source < target ? source : target);
}

// Of the wider side: what a pace counts.
TRANSFUSE_HOST_DEVICE constexpr uint64_t item_bytes(const DeviceRun& run, const DeviceItem& item) {
  const uint32_t source = source_bytes_of(run.op);
  const uint32_t target = target_bytes_of(run.op);
  return uint64_t{item.rows} * item.units * unit_elements(run.walk, run.op) *
         (source > target ? source : target);
}

struct DeviceTable {
  std::vector<DeviceRun> runs;
  std::vector<DeviceItem> items;
  uint64_t target_bytes = 0;
  uint64_t source_bytes = 0;

  // `later` comes after what is here. kResourceExhausted beyond 2^32 - 1 runs or items.
  Result<void> append(const DeviceTable& later);
  uint64_t size_bytes() const {
    return runs.size() * sizeof(DeviceRun) + items.size() * sizeof(DeviceItem);
  }
};

struct DeviceTableOptions {
  // Target bytes of an item: large enough to hide what a block does once an item, small enough to
  // end evenly. 64 KiB is 2 % faster without fingerprints, 128 KiB 15 % with them (docs/decisions).
  uint64_t item_bytes = uint64_t{128} << 10;
  // What divides every source base; an allocation's is at least 256.
  uint64_t base_alignment = 256;
};

// Collects copies source by source. Used from one thread.
class DeviceTableBuilder {
 public:
  explicit DeviceTableBuilder(const DeviceTableOptions& options = {}) : options_(options) {}

  // Copy of the region whose base is bases[source]; its elements add to sums[sum] if
  // copy.fingerprint. kResourceExhausted beyond 2^32 - 1 runs or items. The copy's bounds are
  // checked already (check_copy), and it has no scales (add_scaled()).
  Result<void> add(const StridedCopy& copy, uint32_t source, uint32_t sum);
  // Items of different sources take turns, each in proportion to its bytes, so that no source's
  // link waits for another's; `spread` rotates where each begins, so that several targets do not
  // read one source at the same place.
  DeviceTable build(uint64_t spread);

 private:
  // What one item takes of a run with long enough rows.
  struct Piece {
    uint32_t rows;
    uint32_t units;
  };
  RunWalk walk_of(const DeviceRun& run, uint32_t row_elements) const;
  Piece piece_of(const DeviceRun& run, uint32_t units) const;
  Result<void> cut(const DeviceRun& run, uint32_t rows, uint32_t row_elements);

  const DeviceTableOptions options_;
  DeviceTable table_;
};

}  // namespace transfuse

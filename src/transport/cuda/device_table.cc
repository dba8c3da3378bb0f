// Cuts copies into rectangles of units.
#include "transport/cuda/device_table.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "copy/element_size.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// A tile of a transpose: the cache lines of its columns are still there for its next rows.
constexpr uint32_t kTileElements = 128;

struct Level {
  uint32_t count = 1;
  int64_t source = 0;  // bytes
  int64_t target = 0;  // bytes
  int64_t index = 0;   // elements
};

// `outer` and `inner` are one level where its end meets the next one's beginning on both sides, and
// in the catalog tensor.
bool merges(const Level& outer, const Level& inner) {
  const auto count = static_cast<int64_t>(inner.count);
  return outer.source == inner.source * count && outer.target == inner.target * count &&
         outer.index == inner.index * count &&
         uint64_t{outer.count} * inner.count <= std::numeric_limits<uint32_t>::max();
}

// Levels that count, outermost first, at least one; neighbours merged. A level that is contiguous
// at the target goes last where none is contiguous on both sides, and before it one that is
// contiguous at the source.
std::vector<Level> levels_of(const StridedCopy& copy) {
  const auto source_bytes = static_cast<int64_t>(source_bytes_of(copy.op));
  const auto target_bytes = static_cast<int64_t>(target_bytes_of(copy.op));
  std::vector<Level> levels;
  for (int i = 0; i < 3; ++i) {
    if (copy.count[i] == 1) continue;
    const Level level{.count = copy.count[i],
                      .source = copy.source_stride[i] * source_bytes,
                      .target = copy.target_stride[i] * target_bytes,
                      .index = copy.index_stride[i]};
    if (!levels.empty() && merges(levels.back(), level)) {
      const uint32_t count = levels.back().count * level.count;
      levels.back() = level;
      levels.back().count = count;
    } else {
      levels.push_back(level);
    }
  }
  if (levels.empty()) {
    levels.push_back({.count = 1, .source = source_bytes, .target = target_bytes, .index = 1});
  }
  const auto last_if = [&](auto contiguous) {
    const auto found = std::ranges::find_if(levels, contiguous);
    if (found == levels.end()) return false;
    std::rotate(found, found + 1, levels.end());
    return true;
  };
  if (!last_if(
          [&](const Level& l) { return l.source == source_bytes && l.target == target_bytes; })) {
    const bool found = last_if([&](const Level& l) { return l.target == target_bytes; });
    if (found && levels.size() == 3 && levels[0].source == source_bytes) {
      std::swap(levels[0], levels[1]);
    }
  }
  return levels;
}

// Every row of `run` begins at a multiple of `bytes` on both sides.
bool aligned(const DeviceRun& run, uint32_t bytes) {
  const auto by = static_cast<int64_t>(bytes);
  return run.source_offset % bytes == 0 && run.target % bytes == 0 &&
         run.source_pitch[0] % by == 0 && run.source_pitch[1] % by == 0 &&
         run.target_pitch[0] % by == 0 && run.target_pitch[1] % by == 0;
}

// Where nobody asks which element is which, rows of `elements` small ones are rows of fewer large
// ones. Returns how many.
uint32_t widen(DeviceRun& run, uint32_t elements) {
  const uint64_t row_bytes = uint64_t{elements} * source_bytes_of(run.op);
  for (const ElementOp op : {ElementOp::kCopy8, ElementOp::kCopy4, ElementOp::kCopy2}) {
    const uint32_t bytes = source_bytes_of(op);
    if (bytes <= source_bytes_of(run.op)) break;
    if (row_bytes % bytes != 0 || !aligned(run, bytes)) continue;
    run.op = op;
    run.source_step = run.target_step = bytes;
    return static_cast<uint32_t>(row_bytes / bytes);
  }
  return elements;
}

// The other way round for rows that the stage can shift where their elements lie across the
// target's: bytes.
uint32_t split(DeviceRun& run, uint32_t elements) {
  const uint64_t row_bytes = uint64_t{elements} * source_bytes_of(run.op);
  const bool lie_across = run.target % target_bytes_of(run.op) != 0;
  if (!lie_across || row_bytes > std::numeric_limits<uint32_t>::max()) return elements;
  run.op = ElementOp::kCopy1;
  run.source_step = run.target_step = 1;
  return static_cast<uint32_t>(row_bytes);
}

// Shorter rows and columns are not worth the stage.
constexpr uint64_t kStagedRowBytes = 64;
// A stage that is larger than the wish of DeviceTableOptions, so that tiles have sense.
constexpr uint64_t kSmallestStageBytes = 1024;

constexpr uint64_t kMaxCount = std::numeric_limits<uint32_t>::max();

Error too_many() {
  return {ErrorCode::kResourceExhausted, "more than 2^32 - 1 runs or pieces in one table"};
}

}  // namespace

Result<void> DeviceTable::append(const DeviceTable& later) {
  if (runs.size() + later.runs.size() > kMaxCount ||
      items.size() + later.items.size() > kMaxCount) {
    return too_many();
  }
  const auto first = static_cast<uint32_t>(runs.size());
  runs.insert(runs.end(), later.runs.begin(), later.runs.end());
  items.reserve(items.size() + later.items.size());
  for (DeviceItem item : later.items) {
    item.run += first;
    items.push_back(item);
  }
  target_bytes += later.target_bytes;
  source_bytes += later.source_bytes;
  return {};
}

Result<void> DeviceTableBuilder::add(const StridedCopy& copy, uint32_t source, uint32_t sum) {
  if (copy.element_count() == 0 || (copy.target == nullptr && !copy.fingerprint)) return {};
  const std::vector<Level> levels = levels_of(copy);
  const Level& inner = levels.back();
  DeviceRun run{.source_offset = copy.source_offset_bytes,
                .target = reinterpret_cast<uint64_t>(copy.target),
                .linear_index = copy.linear_index,
                .key = copy.fingerprint_key,
                .source_step = inner.source,
                .target_step = inner.target,
                .index_step = inner.index,
                .source = source,
                .op = copy.op,
                .fingerprint = copy.fingerprint,
                .sum = sum};
  uint32_t rows = 1;
  for (size_t i = 0; i + 1 < levels.size(); ++i) {
    const size_t place = i + 3 - levels.size();  // the inner one if there is one only
    run.source_pitch[place] = levels[i].source;
    run.target_pitch[place] = levels[i].target;
    run.index_pitch[place] = levels[i].index;
    if (uint64_t{rows} * levels[i].count > std::numeric_limits<uint32_t>::max()) {
      return Error{ErrorCode::kResourceExhausted, "a strided copy of more than 2^32 - 1 rows"};
    }
    rows *= levels[i].count;
    run.inner_rows = levels[i].count;
  }
  table_.target_bytes += copy.target_bytes();
  table_.source_bytes += copy.element_count() * source_bytes_of(copy.op);
  uint32_t row_elements = inner.count;
  const bool contiguous =
      inner.source == source_bytes_of(run.op) && inner.target == target_bytes_of(run.op);
  if (contiguous && !run.fingerprint && source_bytes_of(run.op) == target_bytes_of(run.op)) {
    row_elements = widen(run, row_elements);
    row_elements = split(run, row_elements);
  }
  run.walk = walk_of(run, row_elements);
  return cut(run, rows, row_elements);
}

RunWalk DeviceTableBuilder::walk_of(const DeviceRun& run, uint32_t row_elements) const {
  const uint32_t source_bytes = source_bytes_of(run.op);
  const uint32_t target_bytes = target_bytes_of(run.op);
  const bool contiguous = run.source_step == source_bytes && run.target_step == target_bytes;
  if (contiguous && aligned(run, kVectorBytes) && options_.base_alignment % kVectorBytes == 0 &&
      row_elements % unit_elements(RunWalk::kVectors, run.op) == 0) {
    return RunWalk::kVectors;
  }
  const bool staged =
      run.target != 0 && run.target_step == target_bytes && run.target % target_bytes == 0 &&
      uint64_t{row_elements} * std::min(source_bytes, target_bytes) >= kStagedRowBytes;
  if (!staged) return RunWalk::kElements;
  if (contiguous) return RunWalk::kShifted;
  if (run.source_step == 0 && run.source_pitch[0] == 0 && run.source_pitch[1] == 0) {
    return RunWalk::kFill;
  }
  const bool columns = run.source_pitch[1] == source_bytes &&
                       uint64_t{run.inner_rows} * source_bytes >= kStagedRowBytes;
  return columns && run.source_offset % source_bytes == 0 &&
                 options_.base_alignment % source_bytes == 0
             ? RunWalk::kTransposed
             : RunWalk::kElements;
}

// Whole rows while they are short, else pieces of one row; tiles where an element's neighbours lie
// apart at the source. What passes through the stage is what has room in it.
DeviceTableBuilder::Piece DeviceTableBuilder::piece_of(const DeviceRun& run, uint32_t units) const {
  const uint64_t bytes = source_bytes_of(run.op);
  const uint64_t stage =
      std::clamp<uint64_t>(options_.item_bytes, kSmallestStageBytes, kStageBytes) -
      kStageSlackBytes;
  const auto strip_bytes = [&](uint64_t elements) {
    return uint64_t{kVectorBytes} * strip_vectors(static_cast<uint32_t>(elements * bytes));
  };
  constexpr uint64_t kStripSlack = 2 * (kVectorBytes - 1);
  constexpr uint64_t kRound = 64;  // bytes, of what pieces of a longer row or column have
  uint64_t row_units = units;
  uint64_t rows = 0;
  if (run.walk == RunWalk::kShifted) {
    row_units = std::min(row_units, (stage - kStripSlack) / (kRound * bytes) * kRound);
    rows = stage / strip_bytes(row_units);
  } else if (run.walk == RunWalk::kTransposed) {
    const uint64_t skew =
        strip_skew(source_bytes_of(run.op)) / unit_elements(RunWalk::kVectors, run.op);  // a strip
    const uint64_t strips = std::min({row_units, uint64_t{kTileElements}, stage / kTileElements});
    const uint64_t room = stage / strips - kStripSlack - skew;
    rows = std::min<uint64_t>(run.inner_rows, room / kRound * kRound / bytes);
    // Columns that are short leave room for more of them.
    const uint64_t columns = stage / (strip_bytes(rows) + skew);
    row_units = columns < row_units ? std::max(columns / kRound * kRound, strips) : row_units;
  } else {
    const uint64_t elements = unit_elements(run.walk, run.op);
    const uint64_t unit_bytes = elements * target_bytes_of(run.op);
    const uint64_t item_units = std::max<uint64_t>(options_.item_bytes / unit_bytes, 1);
    const bool apart = run.walk == RunWalk::kElements && run.source_step != source_bytes_of(run.op);
    row_units = std::min(row_units, apart ? uint64_t{kTileElements} : item_units);
    rows = apart ? uint64_t{kTileElements} : item_units / row_units;
  }
  return {.rows = static_cast<uint32_t>(std::clamp<uint64_t>(rows, 1, run.inner_rows)),
          .units = static_cast<uint32_t>(row_units)};
}

Result<void> DeviceTableBuilder::cut(const DeviceRun& run, uint32_t rows, uint32_t row_elements) {
  const uint32_t units = row_elements / unit_elements(run.walk, run.op);
  const auto [rows_at_once, units_at_once] = piece_of(run, units);
  const auto pieces = [](uint64_t whole, uint64_t piece) { return (whole + piece - 1) / piece; };
  const uint64_t count =
      rows / run.inner_rows * pieces(run.inner_rows, rows_at_once) * pieces(units, units_at_once);
  if (table_.runs.size() >= kMaxCount || table_.items.size() + count > kMaxCount) {
    return too_many();
  }
  const auto number = static_cast<uint32_t>(table_.runs.size());
  table_.runs.push_back(run);
  for (uint32_t outer = 0; outer < rows / run.inner_rows; ++outer) {
    for (uint32_t row = 0; row < run.inner_rows;
         row += std::min(rows_at_once, run.inner_rows - row)) {
      for (uint32_t unit = 0; unit < units; unit += std::min(units_at_once, units - unit)) {
        table_.items.push_back({.run = number,
                                .first_row = outer * run.inner_rows + row,
                                .rows = std::min(rows_at_once, run.inner_rows - row),
                                .first_unit = unit,
                                .units = std::min(units_at_once, units - unit)});
      }
    }
  }
  return {};
}

DeviceTable DeviceTableBuilder::build(uint64_t spread) {
  std::map<uint32_t, std::vector<DeviceItem>> by_source;
  for (const DeviceItem& item : table_.items)
    by_source[table_.runs[item.run].source].push_back(item);
  const size_t total = table_.items.size();
  // (place in the order of its own source, from 0 to `total`; source): a merge, where no two places
  // are alike.
  std::vector<std::pair<size_t, DeviceItem>> order;
  order.reserve(total);
  size_t rank = 0;
  for (auto& [source, items] : by_source) {
    // Golden-ratio steps put any number of targets apart.
    const double turn = static_cast<double>(spread) * 0.6180339887498949;
    const auto begin =
        static_cast<size_t>((turn - static_cast<double>(static_cast<uint64_t>(turn))) *
                            static_cast<double>(items.size()));
    std::ranges::rotate(items, items.begin() + static_cast<ptrdiff_t>(begin));
    for (size_t i = 0; i < items.size(); ++i) {
      order.emplace_back((2 * i + 1) * total / (2 * items.size()) * by_source.size() + rank,
                         items[i]);
    }
    ++rank;
  }
  std::ranges::sort(order, {}, &std::pair<size_t, DeviceItem>::first);
  for (size_t i = 0; i < total; ++i) table_.items[i] = order[i].second;
  return std::exchange(table_, {});
}

}  // namespace transfuse

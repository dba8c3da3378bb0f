// Boxes become strided runs: at most three levels each, merged wherever they touch.
#include "plan/lower.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include "plan/bounds.h"
#include "plan/intersect.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

constexpr int kLevels = 3;
// Position of level k (0: innermost) in Run::count and Strides3::level (outermost first).
constexpr int at(int level) { return kLevels - 1 - level; }

size_t hash_of(const Strides3& strides) {
  uint64_t hash = 0;
  for (const int64_t stride : strides.level) {
    hash = (hash ^ static_cast<uint64_t>(stride)) * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
    hash ^= hash >> 29;
  }
  return static_cast<size_t>(hash);
}

int used_levels(const Run& run) {
  int used = kLevels;
  while (used > 0 && run.count[at(used - 1)] == 1) --used;
  return used;
}

// Two runs, `first` then `second`, one after the other at `level`: do they have one stride there
// that carries the first into the second? `result` receives the strides of both as one.
struct Concatenation {
  int level = 0;
  int64_t first_count = 1;
  int64_t second_count = 1;

  bool apply(const Strides3& first, const Strides3& second, int64_t distance,
             Strides3& result) const {
    for (int k = 0; k < level; ++k) {
      if (first.level[at(k)] != second.level[at(k)]) return false;
    }
    int64_t stride = distance;
    if (first_count > 1) {
      stride = first.level[at(level)];
      if (second_count > 1 && second.level[at(level)] != stride) return false;
    } else if (second_count > 1) {
      stride = second.level[at(level)];
    }
    if (stride <= 0 || distance != first_count * stride) return false;
    result = first;
    result.level[at(level)] = stride;
    return true;
  }
};

}  // namespace

PatternTable::PatternTable() : slots_(64) {}

uint32_t PatternTable::intern(const Strides3& strides) {
  const size_t mask = slots_.size() - 1;
  for (size_t i = hash_of(strides) & mask; slots_[i] != 0; i = (i + 1) & mask) {
    if (patterns_[slots_[i] - 1] == strides) return slots_[i] - 1;
  }
  const auto index = static_cast<uint32_t>(patterns_.size());
  patterns_.push_back(strides);
  if (patterns_.size() * 2 > slots_.size()) {
    slots_.assign(slots_.size() * 2, 0);
    for (uint32_t i = 0; i < index; ++i) insert_slot(i);
  }
  insert_slot(index);
  return index;
}

void PatternTable::insert_slot(uint32_t index) {
  const size_t mask = slots_.size() - 1;
  size_t i = hash_of(patterns_[index]) & mask;
  while (slots_[i] != 0) i = (i + 1) & mask;
  slots_[i] = index + 1;
}

void Lowering::reserve(size_t runs, size_t holders) {
  runs_.reserve(runs);
  holders_.reserve(holders);
}

void Lowering::begin_tile(const Tile& target, const Dims& tensor_shape) {
  tile_ = &target;
  rank_ = tensor_shape.rank();
  int64_t stride = 1;
  for (int d = rank_ - 1; d >= 0; --d) {
    index_strides_[d] = stride;
    stride *= tensor_shape[d];
  }
}

void Lowering::add(const Bounds& piece, std::span<const HolderTile> holders) {
  if (holder_strides_.size() < holders.size() * kMaxRank) {
    holder_strides_.resize(holders.size() * kMaxRank);
  }
  piece_holders_.resize(holders.size());
  Run run;
  locate(piece, holders, run);
  fold(piece, holders);
  order_levels();
  set_patterns(run);
  if (level_count_ <= kLevels) {
    emit(run);
  } else {
    enumerate_outer(run);
  }
}

void Lowering::locate(const Bounds& piece, std::span<const HolderTile> holders, Run& run) {
  run.tensor = tile_->tensor;
  run.parameter = tile_->parameter;
  run.holder_count = static_cast<uint32_t>(holders.size());
  run.target_offset = tile_->element_offset;
  for (int d = 0; d < rank_; ++d) {
    run.target_offset += (piece.low[d] - tile_->box.offset[d]) * tile_->element_strides[d];
    run.linear_index += piece.low[d] * index_strides_[d];
  }
  for (size_t h = 0; h < holders.size(); ++h) {
    const Tile& tile = *holders[h].tile;
    int64_t offset = tile.element_offset;
    for (int d = 0; d < rank_; ++d) {
      offset += (piece.low[d] - tile.box.offset[d]) * tile.element_strides[d];
    }
    piece_holders_[h] = {offset, holders[h].source, tile.parameter, 0, 0};
  }
}

// Levels from the dimensions longer than 1, innermost first; a dimension that goes on where the one
// inside it ends, at the target, in the index and at every holder, is folded into it.
void Lowering::fold(const Bounds& piece, std::span<const HolderTile> holders) {
  level_count_ = 0;
  for (int d = rank_ - 1; d >= 0; --d) {
    const int64_t length = piece.high[d] - piece.low[d];
    if (length == 1) continue;
    const int64_t target_stride = tile_->element_strides[d];
    if (level_count_ > 0 &&
        fold_into(levels_[level_count_ - 1], d, target_stride, index_strides_[d], holders)) {
      levels_[level_count_ - 1].count *= length;
      continue;
    }
    for (size_t h = 0; h < holders.size(); ++h) {
      holder_strides_[h * kMaxRank + static_cast<size_t>(level_count_)] =
          holders[h].tile->element_strides[d];
    }
    levels_[level_count_] = {length, target_stride, index_strides_[d], level_count_};
    ++level_count_;
  }
}

bool Lowering::fold_into(Level& inner, int dimension, int64_t target_stride, int64_t index_stride,
                         std::span<const HolderTile> holders) {
  if (target_stride != inner.count * inner.target_stride ||
      index_stride != inner.count * inner.index_stride) {
    return false;
  }
  for (size_t h = 0; h < holders.size(); ++h) {
    const int64_t stride = holder_strides_[h * kMaxRank + static_cast<size_t>(inner.slot)];
    if (holders[h].tile->element_strides[dimension] != inner.count * stride) return false;
  }
  return true;
}

// Innermost is what lies closest together at the target: writes are what must stream. Beyond three
// levels the shortest are enumerated, so that there are as few runs as possible.
void Lowering::order_levels() {
  const auto closer = [](const Level& a, const Level& b) {
    return a.target_stride < b.target_stride ||
           (a.target_stride == b.target_stride && a.slot < b.slot);
  };
  Level* end = levels_ + level_count_;
  if (!std::is_sorted(levels_, end, closer)) std::sort(levels_, end, closer);
  if (level_count_ <= kLevels) return;
  std::sort(levels_ + 1, end, [](const Level& a, const Level& b) {
    return a.count > b.count || (a.count == b.count && a.slot < b.slot);
  });
  std::sort(levels_ + 1, levels_ + kLevels, closer);
}

void Lowering::set_patterns(Run& run) {
  const int inner = std::min(level_count_, kLevels);
  Strides3 target;
  Strides3 index;
  for (int k = 0; k < inner; ++k) {
    run.count[at(k)] = static_cast<uint32_t>(levels_[k].count);
    target.level[at(k)] = levels_[k].target_stride;
    index.level[at(k)] = levels_[k].index_stride;
  }
  run.target_pattern = patterns_.intern(target);
  run.index_pattern = patterns_.intern(index);
  for (size_t h = 0; h < piece_holders_.size(); ++h) {
    Strides3 source;
    for (int k = 0; k < inner; ++k) {
      source.level[at(k)] = holder_strides_[h * kMaxRank + static_cast<size_t>(levels_[k].slot)];
    }
    piece_holders_[h].source_pattern = patterns_.intern(source);
  }
}

// One run for every index of the levels beyond the third.
void Lowering::enumerate_outer(Run run) {
  int64_t position[kMaxRank] = {};
  const auto step = [&](const Level& level, int64_t by) {
    run.target_offset += by * level.target_stride;
    run.linear_index += by * level.index_stride;
    for (size_t h = 0; h < piece_holders_.size(); ++h) {
      piece_holders_[h].source_offset +=
          by * holder_strides_[h * kMaxRank + static_cast<size_t>(level.slot)];
    }
  };
  while (true) {
    emit(run);
    int k = kLevels;
    for (; k < level_count_; ++k) {
      step(levels_[k], 1);
      if (++position[k] < levels_[k].count) break;
      step(levels_[k], -position[k]);
      position[k] = 0;
    }
    if (k == level_count_) return;
  }
}

void Lowering::emit(const Run& run) {
  if (runs_.size() > chunk_first_run_ && merge_into_last(run)) return;
  append(run);
}

void Lowering::append(const Run& run) {
  runs_.push_back(run);
  runs_.back().first_holder = static_cast<uint32_t>(holders_.size());
  holders_.insert(holders_.end(), piece_holders_.begin(), piece_holders_.end());
}

// True if `added` (with piece_holders_) is the continuation of the last run.
bool Lowering::merge_into_last(const Run& added) {
  Run& last = runs_.back();
  if (last.tensor != added.tensor || last.parameter != added.parameter ||
      last.holder_count != added.holder_count || last.scales != 0) {
    return false;
  }
  for (uint32_t h = 0; h < added.holder_count; ++h) {
    const Holder& mine = holders_[last.first_holder + h];
    if (mine.source_layout != piece_holders_[h].source_layout || mine.scales != 0 ||
        mine.parameter != piece_holders_[h].parameter) {
      return false;
    }
  }
  const int used = std::max(used_levels(last), used_levels(added));
  if (used > 0 && join(last, added, used - 1)) return true;
  return used < kLevels && join(last, added, used);
}

bool Lowering::join(Run& last, const Run& added, int level) {
  for (int k = 0; k < level; ++k) {
    if (last.count[at(k)] != added.count[at(k)]) return false;
  }
  const Concatenation both{level, last.count[at(level)], added.count[at(level)]};
  if (both.first_count + both.second_count > UINT32_MAX) return false;

  Strides3 target;
  Strides3 index;
  Strides3 source;
  if (!both.apply(patterns_[last.target_pattern], patterns_[added.target_pattern],
                  added.target_offset - last.target_offset, target) ||
      !both.apply(patterns_[last.index_pattern], patterns_[added.index_pattern],
                  added.linear_index - last.linear_index, index)) {
    return false;
  }
  joined_patterns_.clear();
  for (uint32_t h = 0; h < added.holder_count; ++h) {
    const Holder& mine = holders_[last.first_holder + h];
    if (!both.apply(patterns_[mine.source_pattern], patterns_[piece_holders_[h].source_pattern],
                    piece_holders_[h].source_offset - mine.source_offset, source)) {
      return false;
    }
    joined_patterns_.push_back(patterns_.intern(source));
  }
  last.count[at(level)] += added.count[at(level)];
  last.target_pattern = patterns_.intern(target);
  last.index_pattern = patterns_.intern(index);
  for (uint32_t h = 0; h < added.holder_count; ++h) {
    holders_[last.first_holder + h].source_pattern = joined_patterns_[h];
  }
  return true;
}

}  // namespace transfuse

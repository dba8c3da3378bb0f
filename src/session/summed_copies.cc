// Which runs tile a parameter, and what is left between them.
#include "session/summed_copies.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "session/device_work.h"
#include "session/memory.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

// Rows of `size_bytes`, `pitch_bytes` apart; one row: they are contiguous.
struct Rows {
  uint64_t begin_bytes = 0;
  uint64_t size_bytes = 0;
  uint64_t count = 1;
  uint64_t pitch_bytes = 0;
};
// A parameter is a matrix of rows of one pitch; a candidate covers rectangles of it.
struct Rectangle {
  uint64_t first_row = 0;
  uint64_t end_row = 0;
  uint64_t begin_bytes = 0;  // in each of its rows
  uint64_t end_bytes = 0;
  uint32_t candidate = 0;
};
struct Candidate {
  StridedCopy copy;
  std::vector<SummedCopies::Sum> sums;
  Rows rows;
  bool taken = true;
};

// Copies of one parameter with equal keys have one sum.
auto key_of(const StridedCopy& copy) {
  const auto levels = [](const auto& of) { return std::tuple(of[0], of[1], of[2]); };
  return std::tuple(copy.source_offset_bytes, copy.linear_index, copy.fingerprint_key, copy.op,
                    levels(copy.count), levels(copy.source_stride), levels(copy.index_stride));
}

// What `copy` reads; nullopt where that is no rows of bytes.
std::optional<Rows> rows_of(const StridedCopy& copy) {
  const uint64_t element_bytes = source_element_bytes(copy.op);
  Rows rows{.begin_bytes = copy.source_offset_bytes, .size_bytes = element_bytes};
  bool in_row = true;
  for (int level = 2; level >= 0; --level) {
    if (copy.count[level] == 1) continue;
    const uint64_t stride = static_cast<uint64_t>(copy.source_stride[level]) * element_bytes;
    if (in_row && stride == rows.size_bytes) {
      rows.size_bytes *= copy.count[level];
    } else if (stride > rows.size_bytes && (in_row || stride == rows.pitch_bytes * rows.count)) {
      if (in_row) rows.pitch_bytes = stride;
      in_row = false;
      rows.count *= copy.count[level];
    } else {
      return std::nullopt;
    }
  }
  return rows;
}

class Tiling {
 public:
  Tiling(uint64_t size_bytes, std::vector<Candidate>& candidates)
      : size_bytes_(size_bytes), pitch_bytes_(size_bytes), candidates_(candidates) {
    for (const Candidate& candidate : candidates) {
      const uint64_t pitch = candidate.rows.pitch_bytes;
      if (candidate.rows.count == 1 || size_bytes % pitch != 0) continue;
      pitch_bytes_ = pitch;
      break;
    }
    for (uint32_t i = 0; i < candidates.size(); ++i) add(i);
    bounds_ = {0, size_bytes_ / pitch_bytes_};
    for (const Rectangle& one : rectangles_) {
      bounds_.push_back(one.first_row);
      bounds_.push_back(one.end_row);
    }
    std::ranges::sort(bounds_);
    bounds_.erase(std::ranges::unique(bounds_).begin(), bounds_.end());
    std::ranges::sort(rectangles_, {}, [](const Rectangle& one) {
      return std::tuple(one.first_row, one.begin_bytes, one.candidate);
    });
  }

  // Of two that overlap the later one is not taken.
  void drop_overlaps() {
    for_each_band([&](uint64_t /*row*/, uint64_t /*count*/, std::span<const Rectangle> in_band) {
      const Rectangle* last = nullptr;
      for (const Rectangle& one : in_band) {
        if (last != nullptr && one.begin_bytes < last->end_bytes) {
          const bool keep_last = last->candidate < one.candidate;
          candidates_[keep_last ? one.candidate : last->candidate].taken = false;
          if (keep_last) continue;
        }
        last = &one;
      }
    });
  }

  // Calls add(rows) for what no candidate that is taken covers.
  void for_each_gap(const std::function<void(const Rows&)>& add) {
    const auto gap = [&](uint64_t row, uint64_t count, uint64_t begin, uint64_t end) {
      if (begin >= end) return;
      Rows rows{.begin_bytes = row * pitch_bytes_ + begin, .size_bytes = end - begin};
      if (rows.size_bytes == pitch_bytes_) {
        rows.size_bytes *= count;
      } else {
        rows.count = count;
        rows.pitch_bytes = pitch_bytes_;
      }
      add(rows);
    };
    for_each_band([&](uint64_t row, uint64_t count, std::span<const Rectangle> in_band) {
      uint64_t done = 0;
      for (const Rectangle& one : in_band) {
        gap(row, count, done, one.begin_bytes);
        done = one.end_bytes;
      }
      gap(row, count, done, pitch_bytes_);
    });
  }

 private:
  void add(uint32_t number) {
    Candidate& candidate = candidates_[number];
    const Rows& rows = candidate.rows;
    const uint64_t row = rows.begin_bytes / pitch_bytes_;
    const uint64_t column = rows.begin_bytes % pitch_bytes_;
    if (rows.count > 1) {
      candidate.taken =
          rows.pitch_bytes == pitch_bytes_ && column + rows.size_bytes <= pitch_bytes_;
      if (candidate.taken) {
        rectangles_.push_back({row, row + rows.count, column, column + rows.size_bytes, number});
      }
      return;
    }
    // Contiguous: the end of a row, whole rows, the beginning of a row.
    uint64_t left = rows.size_bytes;
    uint64_t at = row;
    if (column > 0) {
      const uint64_t size = std::min(left, pitch_bytes_ - column);
      rectangles_.push_back({at, at + 1, column, column + size, number});
      left -= size;
      ++at;
    }
    if (const uint64_t whole = left / pitch_bytes_; whole > 0) {
      rectangles_.push_back({at, at + whole, 0, pitch_bytes_, number});
      left -= whole * pitch_bytes_;
      at += whole;
    }
    if (left > 0) rectangles_.push_back({at, at + 1, 0, left, number});
  }

  // Rows between two bounds are all covered alike: visit(first row, count, rectangles by column).
  template <typename Visit>
  void for_each_band(Visit visit) {
    std::vector<Rectangle> in_band;
    size_t next = 0;
    for (size_t i = 0; i + 1 < bounds_.size(); ++i) {
      const uint64_t row = bounds_[i];
      std::erase_if(in_band, [&](const Rectangle& one) { return one.end_row <= row; });
      for (; next < rectangles_.size() && rectangles_[next].first_row == row; ++next) {
        in_band.push_back(rectangles_[next]);
      }
      std::erase_if(in_band,
                    [&](const Rectangle& one) { return !candidates_[one.candidate].taken; });
      std::ranges::sort(in_band, {}, [](const Rectangle& one) {
        return std::tuple(one.begin_bytes, one.candidate);
      });
      visit(row, bounds_[i + 1] - row, std::span<const Rectangle>(in_band));
    }
  }

  const uint64_t size_bytes_;
  uint64_t pitch_bytes_;
  std::vector<Candidate>& candidates_;
  std::vector<Rectangle> rectangles_;
  std::vector<uint64_t> bounds_;  // rows where one begins or ends
};

void add_rows(std::vector<StridedCopy>& copies, std::byte* target, const std::byte* source,
              const Rows& rows) {
  constexpr uint64_t kMost = std::numeric_limits<uint32_t>::max();
  if (rows.count == 1 || rows.size_bytes > kMost || rows.count > kMost) {
    for (uint64_t row = 0; row < rows.count; ++row) {
      const uint64_t at = rows.begin_bytes + row * rows.pitch_bytes;
      add_plain(copies, target + at, source + at, rows.size_bytes);
    }
    return;
  }
  StridedCopy copy;
  copy.source_offset_bytes = reinterpret_cast<uintptr_t>(source) + rows.begin_bytes;
  copy.target = target + rows.begin_bytes;
  copy.op = ElementOp::kCopy1;
  copy.count[1] = static_cast<uint32_t>(rows.count);
  copy.count[2] = static_cast<uint32_t>(rows.size_bytes);
  copy.source_stride[1] = copy.target_stride[1] = static_cast<int64_t>(rows.pitch_bytes);
  copy.source_stride[2] = copy.target_stride[2] = 1;
  copies.push_back(copy);
}

std::vector<std::vector<Candidate>> candidates_of(const Layout& layout,
                                                  std::span<const HeldRuns> tables) {
  std::vector<std::vector<Candidate>> candidates(layout.parameters().size());
  using Key = decltype(key_of(StridedCopy{}));
  std::map<std::pair<uint32_t, Key>, size_t> known;  // by parameter: index into its candidates
  for (uint32_t table = 0; table < tables.size(); ++table) {
    const auto& [copies, own] = tables[table];
    const std::span<const uint32_t> held = copies->held_runs(own);
    for (uint32_t i = 0; i < held.size(); ++i) {
      const Run& run = copies->plan().runs()[held[i]];
      const Holder& holder =
          *std::ranges::find(copies->plan().holders_of(run), own, &Holder::source_layout);
      const StridedCopy copy = copies->copy(run, holder, 0, nullptr, true);
      if (copy.op > ElementOp::kCopy8) continue;  // the slot holds what is not cast
      const auto rows = rows_of(copy);
      if (!rows) continue;
      auto& of_parameter = candidates[holder.parameter];
      const auto [same, is_new] =
          known.try_emplace({holder.parameter, key_of(copy)}, of_parameter.size());
      if (is_new) of_parameter.push_back({.copy = copy, .sums = {}, .rows = *rows});
      of_parameter[same->second].sums.push_back({.copy = 0, .table = table, .held = i});
    }
  }
  return candidates;
}

}  // namespace

SummedCopies summed_copies(const Layout& layout, std::span<const HeldRuns> tables,
                           const std::function<const std::byte*(uint32_t)>& source,
                           const std::function<std::byte*(uint32_t)>& target) {
  SummedCopies made;
  std::vector<StridedCopy> rest;
  auto candidates = candidates_of(layout, tables);
  for (uint32_t parameter = 0; parameter < candidates.size(); ++parameter) {
    const std::byte* const from = source(parameter);
    std::byte* const to = target(parameter);
    const uint64_t size_bytes = parameter_size_bytes(layout.parameters()[parameter]);
    if (size_bytes == 0) continue;
    Tiling tiling(size_bytes, candidates[parameter]);
    tiling.drop_overlaps();
    tiling.for_each_gap([&](const Rows& rows) { add_rows(rest, to, from, rows); });
    for (Candidate& candidate : candidates[parameter]) {
      if (!candidate.taken) continue;
      StridedCopy& copy = candidate.copy;
      copy.target = to + copy.source_offset_bytes;
      copy.source_offset_bytes += reinterpret_cast<uintptr_t>(from);
      std::ranges::copy(copy.source_stride, copy.target_stride);
      for (SummedCopies::Sum& sum : candidate.sums) {
        sum.copy = static_cast<uint32_t>(made.copies.size());
        made.sums.push_back(sum);
      }
      made.copies.push_back(copy);
    }
  }
  made.copies.insert(made.copies.end(), rest.begin(), rest.end());
  return made;
}

}  // namespace transfuse

// The exact and slow answer: one bit per element of the part of a parameter that is in question.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plan/coverage.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

constexpr int64_t kMaxCounted = int64_t{1} << 30;  // elements: a bitmap of 128 MiB

class Bitmap {
 public:
  explicit Bitmap(int64_t size) : words_(static_cast<size_t>((size + 63) / 64)), size_(size) {}

  // Sets [begin, end); calls again(i) for every bit that was set before.
  template <typename Again>
  void set(int64_t begin, int64_t end, Again&& again) {
    while (begin < end) {
      const int64_t base = begin & ~int64_t{63};
      const int64_t stop = std::min(end, base + 64);
      uint64_t mask = ~uint64_t{0} << (begin - base);
      if (stop - base < 64) mask &= (uint64_t{1} << (stop - base)) - 1;
      uint64_t& word = words_[static_cast<size_t>(base / 64)];
      for (uint64_t old = word & mask; old != 0; old &= old - 1) {
        again(base + std::countr_zero(old));
      }
      word |= mask;
      begin = stop;
    }
  }

  // First bit >= from that is `value`, or size.
  int64_t find(int64_t from, bool value) const {
    while (from < size_) {
      const uint64_t word = words_[static_cast<size_t>(from / 64)];
      const uint64_t left = (value ? word : ~word) >> (from % 64);
      if (left != 0) return std::min(size_, from + std::countr_zero(left));
      from = (from | 63) + 1;
    }
    return size_;
  }

 private:
  std::vector<uint64_t> words_;
  int64_t size_;
};

// Calls visit(place, index, row_length) for every row of a footprint along its unit-stride
// dimension (or every element if it has none); `index` is the position of the row's first element.
template <typename Visit>
int for_each_row(const Footprint& f, Visit&& visit) {
  const Dims& lengths = f.lengths();
  const Dims& strides = f.strides();
  const int rank = lengths.rank();
  int row = -1;
  for (int d = 0; d < rank; ++d) {
    if (strides[d] == 1 && lengths[d] > 1) row = d;
  }
  int64_t index[kMaxRank] = {};
  int64_t place = f.offset();
  while (true) {
    visit(place, index, row < 0 ? 1 : lengths[row], row);
    int d = rank - 1;
    for (; d >= 0; --d) {
      if (d == row) continue;
      place += strides[d];
      if (++index[d] < lengths[d]) break;
      place -= strides[d] * lengths[d];
      index[d] = 0;
    }
    if (d < 0) return row;
  }
}

bool contains(const Footprint& f, int64_t place) {
  bool found = false;
  for_each_row(f, [&](int64_t first, const int64_t*, int64_t length, int) {
    found = found || (place >= first && place < first + length);
  });
  return found;
}

std::string describe(const Footprint& f, std::span<const TensorSpec> tensors) {
  if (f.fill != nullptr) return "a fill at element " + std::to_string(f.fill->element_offset);
  return "tile " + f.tile->box.to_string() + " of \"" + tensors[f.tile->tensor].name + "\"";
}

// What of a footprint was written before it, as a bounding box of positions in the footprint.
struct Overlap {
  int64_t low[kMaxRank];
  int64_t high[kMaxRank];
  int64_t first_place = -1;
  int64_t last_place = -1;
  int64_t element_count = 0;

  void add(const int64_t* index, int rank, int row, int64_t in_row, int64_t place) {
    for (int d = 0; d < rank; ++d) {
      const int64_t at = d == row ? in_row : index[d];
      low[d] = element_count == 0 ? at : std::min(low[d], at);
      high[d] = element_count == 0 ? at + 1 : std::max(high[d], at + 1);
    }
    first_place = element_count == 0 ? place : std::min(first_place, place);
    last_place = std::max(last_place, place);
    ++element_count;
  }
};

Finding overlap_finding(const ParameterSpec& parameter, std::span<const TensorSpec> tensors,
                        std::span<const Footprint> before, const Footprint& f,
                        const Overlap& overlap) {
  Finding finding;
  finding.kind = FindingKind::kOverlap;
  finding.parameter = parameter.name;
  if (f.tile != nullptr) {
    finding.tensor = tensors[f.tile->tensor].name;
    for (int d = 0; d < f.lengths().rank(); ++d) {
      finding.box.offset.push_back(f.tile->box.offset[d] + overlap.low[d]);
      finding.box.length.push_back(overlap.high[d] - overlap.low[d]);
    }
  } else {
    finding.box = {Dims{overlap.first_place}, Dims{overlap.last_place + 1 - overlap.first_place}};
  }
  std::string other = "itself";
  for (const Footprint& earlier : before) {
    if (contains(earlier, overlap.first_place)) {
      other = describe(earlier, tensors);
      break;
    }
  }
  finding.reason = describe(f, tensors) + " writes " + std::to_string(overlap.element_count) +
                   " elements of parameter \"" + parameter.name + "\" between " +
                   std::to_string(overlap.first_place) + " and " +
                   std::to_string(overlap.last_place) + " that are also written by " + other +
                   ": expected one writer";
  return finding;
}

}  // namespace

void count_elements(const ParameterSpec& parameter, std::span<const TensorSpec> tensors,
                    std::span<const Footprint> cluster, size_t limit,
                    std::vector<Finding>& findings) {
  const int64_t origin = cluster[0].min;
  int64_t end = 0;
  int64_t writes = 0;  // far more than places where a tile overlaps itself
  bool countable = true;
  for (const Footprint& f : cluster) {
    end = std::max(end, f.max + 1);
    countable = countable && !__builtin_add_overflow(writes, f.element_count, &writes);
  }
  if (!countable || writes > 2 * kMaxCounted || end - origin > kMaxCounted) {
    Finding finding = uncovered(parameter, origin, end);
    finding.kind = FindingKind::kOverlap;
    finding.reason = "elements " + finding.box.to_string() + " of parameter \"" + parameter.name +
                     "\": " + std::to_string(cluster.size()) +
                     " tiles and fills interleave there, and are not proved to cover each element "
                     "exactly once; describe them by fewer, regular tiles";
    findings.push_back(std::move(finding));
    return;
  }
  Bitmap written(end - origin);
  for (size_t i = 0; i < cluster.size() && findings.size() < limit; ++i) {
    const Footprint& f = cluster[i];
    Overlap overlap;
    for_each_row(f, [&](int64_t place, const int64_t* index, int64_t length, int row) {
      written.set(place - origin, place - origin + length, [&](int64_t bit) {
        overlap.add(index, f.lengths().rank(), row, bit + origin - place, bit + origin);
      });
    });
    if (overlap.element_count > 0) {
      findings.push_back(overlap_finding(parameter, tensors, cluster.first(i), f, overlap));
    }
  }
  for (int64_t low = written.find(0, false); low < end - origin && findings.size() < limit;) {
    const int64_t high = written.find(low, true);
    findings.push_back(uncovered(parameter, origin + low, origin + high));
    low = written.find(high, false);
  }
}

}  // namespace transfuse

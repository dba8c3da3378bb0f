// The proof that tiles and fills cover every element of every target parameter exactly once (I1).
#include "plan/coverage.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

void measure(Footprint& f) {
  const Dims& lengths = f.lengths();
  const Dims& strides = f.strides();
  f.element_count = lengths.product();
  f.min = f.max = f.offset();
  bool row_major = true;
  int64_t expected = 1;
  for (int d = lengths.rank() - 1; d >= 0; --d) {
    if (lengths[d] == 1) continue;
    f.max += (lengths[d] - 1) * strides[d];
    row_major = row_major && strides[d] == expected;
    expected *= lengths[d];
  }
  f.dense = row_major;
  if (row_major) return;
  // Dense in another order of dimensions: each stride is the product of the lengths inside it.
  expected = 1;
  for (int64_t next = 1; next != 0;) {
    next = 0;
    for (int d = 0; d < lengths.rank(); ++d) {
      if (lengths[d] > 1 && strides[d] == expected) next = lengths[d];
    }
    if (next != 0) expected *= next;
  }
  f.dense = expected == f.element_count;
}

// All footprints, those of one parameter together.
class FootprintsByParameter {
 public:
  explicit FootprintsByParameter(const Layout& target)
      : first_(target.parameters().size() + 1),
        footprints_(target.tiles().size() + target.fills().size()) {
    for (const Tile& tile : target.tiles()) ++first_[tile.parameter];
    for (const Fill& fill : target.fills()) ++first_[fill.parameter];
    uint32_t sum = 0;
    for (uint32_t& entry : first_) sum += std::exchange(entry, sum);
    for (const Tile& tile : target.tiles()) {
      footprints_[first_[tile.parameter]++] = footprint_of(tile);
    }
    for (const Fill& fill : target.fills()) {
      footprints_[first_[fill.parameter]++] = footprint_of(fill);
    }
    for (size_t i = first_.size() - 1; i > 0; --i) first_[i] = first_[i - 1];
    first_[0] = 0;
  }
  std::span<Footprint> of(uint32_t parameter) {
    return std::span(footprints_)
        .subspan(first_[parameter], first_[parameter + 1] - first_[parameter]);
  }

 private:
  std::vector<uint32_t> first_;
  std::vector<Footprint> footprints_;
};

// `footprints` sorted by min. True if they are dense and follow each other without a gap to the
// end.
bool tiles_the_line(std::span<const Footprint> footprints, int64_t element_count) {
  int64_t expected = 0;
  for (const Footprint& f : footprints) {
    if (!f.dense || f.min != expected) return false;
    expected = f.max + 1;
  }
  return expected == element_count;
}

void check_parameter(const ParameterSpec& parameter, std::span<const TensorSpec> tensors,
                     std::span<Footprint> footprints, size_t limit,
                     std::vector<Finding>& findings) {
  // Tiles before fills, each in the layout's order, where they begin at one element.
  const auto by_min = [](const Footprint& a, const Footprint& b) {
    if (a.min != b.min) return a.min < b.min;
    if ((a.tile == nullptr) != (b.tile == nullptr)) return a.tile != nullptr;
    return a.tile != nullptr ? a.tile < b.tile : a.fill < b.fill;
  };
  if (!std::is_sorted(footprints.begin(), footprints.end(), by_min)) {
    std::sort(footprints.begin(), footprints.end(), by_min);
  }
  if (tiles_the_line(footprints, parameter.element_count)) return;

  int64_t expected = 0;
  for (size_t begin = 0; begin < footprints.size() && findings.size() < limit;) {
    // A cluster: footprints whose spans overlap, one after the other.
    size_t end = begin + 1;
    int64_t last = footprints[begin].max;
    for (; end < footprints.size() && footprints[end].min <= last; ++end) {
      last = std::max(last, footprints[end].max);
    }
    if (footprints[begin].min > expected) {
      findings.push_back(uncovered(parameter, expected, footprints[begin].min));
    }
    const auto cluster = footprints.subspan(begin, end - begin);
    const bool trivial = cluster.size() == 1 && cluster[0].dense;
    if (!trivial && !proved_exact_as_boxes(cluster)) {
      count_elements(parameter, tensors, cluster, limit, findings);
    }
    expected = last + 1;
    begin = end;
  }
  if (expected < parameter.element_count && findings.size() < limit) {
    findings.push_back(uncovered(parameter, expected, parameter.element_count));
  }
}

}  // namespace

Footprint footprint_of(const Tile& tile) {
  Footprint f;
  f.tile = &tile;
  measure(f);
  return f;
}

Footprint footprint_of(const Fill& fill) {
  Footprint f;
  f.fill = &fill;
  measure(f);
  return f;
}

Finding uncovered(const ParameterSpec& parameter, int64_t low, int64_t high) {
  Finding finding;
  finding.kind = FindingKind::kUncovered;
  finding.parameter = parameter.name;
  finding.box = {Dims{low}, Dims{high - low}};
  finding.reason = "elements " + finding.box.to_string() + " of parameter \"" + parameter.name +
                   "\" (" + std::to_string(parameter.element_count) +
                   " elements): expected one tile or fill, found none";
  return finding;
}

void check_coverage(const Layout& target, size_t limit, std::vector<Finding>& findings) {
  FootprintsByParameter footprints(target);
  const std::span<const ParameterSpec> parameters = target.parameters();
  for (uint32_t p = 0; p < parameters.size() && findings.size() < limit; ++p) {
    check_parameter(parameters[p], target.tensors(), footprints.of(p), limit, findings);
  }
}

}  // namespace transfuse

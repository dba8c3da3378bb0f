// Everything that is wrong between a target and its sources, as data.
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include "plan/compare.h"
#include "plan/intersect.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {

std::string_view finding_kind_name(FindingKind kind) {
  switch (kind) {
    case FindingKind::kGap:
      return "gap";
    case FindingKind::kUncovered:
      return "uncovered";
    case FindingKind::kOverlap:
      return "overlap";
    case FindingKind::kDtype:
      return "dtype";
    case FindingKind::kShape:
      return "shape";
    case FindingKind::kUnknownTensor:
      return "unknown tensor";
    case FindingKind::kBlock:
      return "block";
  }
  check_failed(__FILE__, __LINE__, "a FindingKind outside the enum");
}

std::vector<Finding> diagnose(const Layout& target, std::span<const Layout> sources, size_t limit) {
  const std::vector<Layout> distinct = distinct_sources(sources);
  return Comparison(target, distinct, limit).run([](const ComparedTile&) {});
}

}  // namespace transfuse

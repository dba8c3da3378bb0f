// Demands against what sources say of themselves, of the version and of their tensors.
#include "session/admission.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/plan.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr size_t kMostFindings = 64;  // looked at; the first that a refused source explains is told

Claim claim_of(const MemberInfo& source) {
  return {.kind = source.kind,
          .source = source.metadata,
          .version = source.version_metadata,
          .revision = source.revision};
}

// Whether `layout` holds some of what is missing.
bool holds(const Layout& layout, const Finding& finding) {
  const auto tensor = layout.find_tensor(finding.tensor);
  if (!tensor) return false;
  if (finding.kind == FindingKind::kUnknownTensor) return !layout.tiles_of(*tensor).empty();
  if (finding.kind != FindingKind::kGap && finding.kind != FindingKind::kBlock) return false;
  return std::ranges::any_of(layout.tiles_of(*tensor), [&](const Tile& tile) {
    return tile.box.length.rank() == finding.box.length.rank() &&
           intersect(tile.box, finding.box).has_value();
  });
}

// What all say alike.
Metadata common_words(std::span<const MemberInfo> sources) {
  std::optional<Metadata> common;
  for (const MemberInfo& source : sources) {
    Metadata words = source.version_metadata;
    words.insert(source.metadata.begin(), source.metadata.end());
    if (!common) {
      common = std::move(words);
      continue;
    }
    std::erase_if(*common, [&](const auto& entry) {
      const auto found = words.find(entry.first);
      return found == words.end() || found->second != entry.second;
    });
  }
  return common.value_or(Metadata{});
}

}  // namespace

Result<void> Admission::set_demand(std::string_view whose, Demand demand) {
  if (demand == demand_) return {};
  TRANSFUSE_RETURN_IF_ERROR(check_demand(whose, demand));
  demand_ = std::move(demand);
  verdicts_.clear();
  return {};
}

bool Admission::needs_layouts() const {
  return !demand_.kinds.empty() ||
         std::ranges::any_of(demand_.require,
                             [](const Requirement& each) { return !each.tensors.empty(); });
}

Result<void> Admission::judge_layouts(const Lease& lease, const GetLayout& get_layout) {
  const std::vector<Verdict> known = std::exchange(verdicts_, {});
  for (const MemberInfo& source : lease.sources) {
    if (std::ranges::find(verdicts_, source.layout, &Verdict::layout) != verdicts_.end()) continue;
    const auto before = std::ranges::find(known, source.layout, &Verdict::layout);
    if (before != known.end()) {
      verdicts_.push_back(*before);
      continue;
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, get_layout(source.layout));
    verdicts_.push_back({.layout = source.layout, .misfit = misfit(demand_, layout)});
  }
  return {};
}

Result<void> Admission::admit(const Lease& lease, const GetLayout& get_layout,
                              RefitReport& report) {
  admitted_.clear();
  refused_ = lease.refused;
  const bool by_layout = needs_layouts();
  if (by_layout) TRANSFUSE_RETURN_IF_ERROR(judge_layouts(lease, get_layout));
  for (const MemberInfo& source : lease.sources) {
    std::optional<std::string> reason;
    if (!demand_.empty()) reason = misfit(demand_, claim_of(source));
    if (!reason && by_layout) {
      reason = std::ranges::find(verdicts_, source.layout, &Verdict::layout)->misfit;
    }
    if (!reason) {
      admitted_.push_back(source);
      continue;
    }
    refused_.push_back({.member = source.id,
                        .source = source.name,
                        .layout = source.layout,
                        .reason = std::move(*reason)});
  }
  tell(lease, report);
  return compare_revisions(lease);
}

void Admission::tell(const Lease& lease, RefitReport& report) const {
  for (const Refusal& refusal : refused_) {
    std::string what = fmt::format("version {}: {}: not chosen", lease.version, refusal.reason);
    const bool told = std::ranges::any_of(report.steps, [&](const RefitStep& step) {
      return step.source == refusal.source && step.what == what;
    });
    if (told) continue;
    report.steps.push_back({ErrorCode::kNoFittingSource, refusal.source, std::move(what)});
  }
  report.metadata = common_words(admitted_);
  const auto stated = std::ranges::find_if(
      admitted_, [](const MemberInfo& source) { return source.revision != Digest{}; });
  report.revision = stated == admitted_.end() ? Digest{} : stated->revision;
}

Result<void> Admission::compare_revisions(const Lease& lease) const {
  const MemberInfo* first = nullptr;
  for (const MemberInfo& source : admitted_) {
    if (source.revision == Digest{}) continue;
    if (first == nullptr) first = &source;
    if (source.revision == first->revision) continue;
    return Error{ErrorCode::kFingerprintMismatch,
                 fmt::format("sources of version {} hold different bytes: '{}' states revision {}, "
                             "'{}' {}",
                             lease.version, first->name, first->revision.to_string(), source.name,
                             source.revision.to_string())};
  }
  return {};
}

Error Admission::explain(Error error, const Layout& target, std::span<const Layout> sources,
                         const GetLayout& get_layout) const {
  if (error.code != ErrorCode::kLayoutMismatch || refused_.empty()) return error;
  const std::vector<Finding> findings = diagnose(target, sources, kMostFindings);
  for (const Refusal& refusal : refused_) {
    const auto layout = get_layout(refusal.layout);
    if (!layout) continue;  // `error` still says what lacks
    for (const Finding& finding : findings) {
      if (finding.tensor.empty() || !holds(*layout, finding)) continue;
      return Error{
          ErrorCode::kNoFittingSource,
          fmt::format("tensor '{}'{} is held by no source that fits; source '{}' holds it, "
                      "but {}",
                      finding.tensor,
                      finding.box.length.rank() == 0 ? "" : " " + finding.box.to_string(),
                      refusal.source, refusal.reason)};
    }
  }
  return error;
}

}  // namespace transfuse

// Which replica serves each run in one cycle: whoever has least to do, ties rotated.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Error nobody_left(const Plan& plan, const Run& run) {
  return {ErrorCode::kUnavailable,
          "elements " + plan.box_of(run).to_string() + " of tensor \"" +
              plan.target().tensors()[run.tensor].name + "\": expected a live source out of " +
              std::to_string(run.holder_count) + " layouts that hold them, found none"};
}

}  // namespace

Result<void> assign(const Plan& plan, std::span<const uint32_t> member_counts, uint64_t spread,
                    Assignment& out) {
  const std::span<const Run> runs = plan.runs();
  const std::span<const Holder> holders = plan.holders();
  if (member_counts.size() != plan.source_layouts().size()) {
    return Error{ErrorCode::kInvalidArgument, "member_counts: expected one for each of " +
                                                  std::to_string(plan.source_layouts().size()) +
                                                  " source layouts, found " +
                                                  std::to_string(member_counts.size())};
  }
  out.first_member.resize(member_counts.size());
  uint32_t member_count = 0;
  for (size_t i = 0; i < member_counts.size(); ++i) {
    out.first_member[i] = member_count;
    member_count += member_counts[i];
  }
  out.load_bytes.assign(member_count, 0);
  out.choice.resize(runs.size());
  out.holder.resize(runs.size());

  // First what only one member can serve, so that the free choices can make up for it.
  constexpr uint32_t kOpen = UINT32_MAX;
  for (size_t r = 0; r < runs.size(); ++r) {
    uint32_t candidates = 0;
    out.choice[r] = kOpen;
    for (uint32_t h = runs[r].first_holder; h < runs[r].first_holder + runs[r].holder_count; ++h) {
      const uint32_t layout = holders[h].source_layout;
      if (member_counts[layout] == 0) continue;
      candidates += member_counts[layout];
      if (candidates > 1) break;
      out.choice[r] = out.first_member[layout];
      out.holder[r] = h;
    }
    if (candidates == 0) return nobody_left(plan, runs[r]);
    if (candidates == 1) {
      out.load_bytes[out.choice[r]] += plan.target_bytes(runs[r]);
    } else {
      out.choice[r] = kOpen;
    }
  }
  for (size_t r = 0; r < runs.size(); ++r) {
    if (out.choice[r] != kOpen) continue;
    const Run& run = runs[r];
    uint64_t least = UINT64_MAX;
    for (uint32_t i = 0; i < run.holder_count; ++i) {
      const uint32_t h = run.first_holder + static_cast<uint32_t>((i + spread) % run.holder_count);
      const uint32_t layout = holders[h].source_layout;
      const uint32_t count = member_counts[layout];
      for (uint32_t m = 0; m < count; ++m) {
        const uint32_t member =
            out.first_member[layout] + static_cast<uint32_t>((m + spread) % count);
        if (out.load_bytes[member] >= least) continue;
        least = out.load_bytes[member];
        out.choice[r] = member;
        out.holder[r] = h;
      }
    }
    out.load_bytes[out.choice[r]] += plan.target_bytes(run);
  }
  return {};
}

}  // namespace transfuse

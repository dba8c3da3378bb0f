// A probe layout names every box that a target holds; both sides sum it like any other plan's.
#include "transfuse/verify.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <vector>
#include "base/random.h"
#include "plan/copies.h"
#include "session/source_link.h"
#include "session/whole_layout.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr int64_t kNoProgressMs = 5000;

// One parameter per distinct box of `layout`, whole and row-major, in the dtype that the target
// holds it in.
Result<Layout> probe_layout(const Layout& layout) {
  LayoutBuilder builder;
  std::vector<std::string> seen;
  for (const Tile& tile : layout.tiles()) {
    const TensorSpec& tensor = layout.tensors()[tile.tensor];
    std::string name = tensor.name + tile.box.to_string();
    // Tiles are sorted by tensor and box: equal boxes (replicated heads) are neighbours.
    if (!seen.empty() && seen.back() == name) continue;
    const uint32_t parameter =
        builder.parameter({.name = name,
                           .dtype = layout.parameters()[tile.parameter].dtype,
                           .element_count = tile.box.element_count()});
    builder.tile(builder.tensor(tensor), tile.box, parameter, 0);
    seen.push_back(std::move(name));
  }
  for (const Quantization& q : layout.quantizations()) {
    if (layout.tiles_of(q.tensor).empty() || layout.tiles_of(q.scales).empty()) continue;
    builder.quantization(builder.tensor(layout.tensors()[q.tensor]),
                         builder.tensor(layout.tensors()[q.scales]), q.block_rows, q.block_columns);
  }
  return builder.build();
}

// Where a source computes the scales of fp8 tensors, their sums are in those of the tensors: such a
// pair is compared as one, by the sum of both at the tensor's first box.
void join_scales(const Layout& probe, std::vector<uint64_t>& sums) {
  for (const Quantization& q : probe.quantizations()) {
    const uint32_t first = probe.tiles_of(q.tensor).front().parameter;
    for (const uint32_t tensor : {q.tensor, q.scales}) {
      for (const Tile& tile : probe.tiles_of(tensor)) {
        const uint64_t sum = std::exchange(sums[tile.parameter], 0);
        sums[first] += sum;
      }
    }
  }
}

class Verification {
 public:
  Verification(Transport& transport, Control& control, MemberId member, Deadline deadline)
      : transport_(transport), control_(control), member_(member), deadline_(deadline) {}

  Result<void> compare(const MemberInfo& target, TargetVerdict& verdict);
  Result<VersionRevision> revision(const VersionRequest& request);

 private:
  // The fingerprint of every parameter of `probe`, from `members` (each read at
  // MemberInfo::generation, or at whatever even generation it has if that is zero).
  Result<std::vector<uint64_t>> fingerprints(const Layout& probe, std::vector<MemberInfo> members);
  Result<Digest> content_of(const std::vector<MemberInfo>& sources);

  Transport& transport_;
  Control& control_;
  const MemberId member_;
  const Deadline deadline_;
};

Result<std::vector<uint64_t>> Verification::fingerprints(const Layout& probe,
                                                         std::vector<MemberInfo> members) {
  TableRequest request{.plan_key = {}, .target = probe.digest(), .sources = {}, .chunk_bytes = 0};
  std::vector<Layout> layouts;
  std::ranges::sort(members, {}, &MemberInfo::layout);
  for (const MemberInfo& member : members) {
    if (!layouts.empty() && layouts.back().digest() == member.layout) continue;
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, control_.get_layout(member.layout, deadline_));
    layouts.push_back(std::move(layout));
    request.sources.push_back(member.layout);
  }
  const PlanOptions options;
  TRANSFUSE_ASSIGN_OR_RETURN(Plan compiled, compile(probe, layouts, options));
  const CopyTable copies(std::move(compiled));
  const Plan& plan = copies.plan();
  request.plan_key = plan.key();
  request.chunk_bytes = options.chunk_bytes;
  std::vector<uint32_t> counts(layouts.size(), 0);
  for (const MemberInfo& member : members) {
    ++counts[static_cast<size_t>(std::ranges::find(layouts, member.layout, &Layout::digest) -
                                 layouts.begin())];
  }
  Assignment assignment;
  TRANSFUSE_RETURN_IF_ERROR(assign(plan, counts, 0, assignment));

  std::vector<uint64_t> result(probe.parameters().size(), 0);
  std::vector<uint64_t> sums;
  const std::atomic<bool> cancelled{false};
  for (uint32_t i = 0; i < members.size(); ++i) {
    if (std::ranges::find(assignment.choice, i) == assignment.choice.end()) continue;
    const auto layout = std::ranges::find(layouts, members[i].layout, &Layout::digest);
    const auto held = copies.held_runs(static_cast<uint32_t>(layout - layouts.begin()));
    sums.resize(held.size());
    TRANSFUSE_ASSIGN_OR_RETURN(auto link, MemberLink::open(transport_, control_, members[i],
                                                           *layout, MemoryPlace::kHost, deadline_));
    Generation generation = members[i].generation;
    if (generation.incarnation == 0) {
      TRANSFUSE_ASSIGN_OR_RETURN(generation, link->read_generation(members[i].slot, deadline_));
    }
    if (generation.counter % 2 != 0) {
      return Error{ErrorCode::kTornRead, fmt::format("'{}' is being written", members[i].name)};
    }
    const SumQuery query{.reader = member_,
                         .request = request,
                         .copies = &copies,
                         .source_layout = static_cast<uint32_t>(layout - layouts.begin()),
                         .slot = members[i].slot,
                         .generation = generation};
    TRANSFUSE_RETURN_IF_ERROR(link->read_table(query, sums, deadline_, kNoProgressMs, cancelled));
    for (size_t at = 0; at < held.size(); ++at) {
      const uint32_t run = held[at];
      if (assignment.choice[run] == i) result[plan.runs()[run].parameter] += sums[at];
    }
  }
  return result;
}

Result<void> Verification::compare(const MemberInfo& target, TargetVerdict& verdict) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, control_.get_layout(target.layout, deadline_));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout probe, probe_layout(layout));
  TRANSFUSE_RETURN_IF_ERROR(control_.put_layout(probe));
  TRANSFUSE_ASSIGN_OR_RETURN(
      const Lease lease,
      control_.acquire(member_, {.kind = VersionRequest::Kind::kExactly, .version = target.version},
                       deadline_));
  auto expected = fingerprints(probe, lease.sources);
  auto released = control_.release(lease.id, {}, deadline_);
  if (!expected) return Unexpected{std::move(expected).error()};
  TRANSFUSE_RETURN_IF_ERROR(std::move(released));

  MemberInfo now = target;
  now.generation = {};
  TRANSFUSE_ASSIGN_OR_RETURN(auto held, fingerprints(probe, {now}));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto members, control_.members(target.model));
  const auto still = std::ranges::find(members, target.id, &MemberInfo::id);
  if (still == members.end() || still->version != target.version) {
    return Error{ErrorCode::kTornRead, fmt::format("'{}' left version {} while it was compared",
                                                   target.name, target.version)};
  }
  join_scales(probe, *expected);
  join_scales(probe, held);
  for (uint32_t i = 0; i < probe.parameters().size(); ++i) {
    ++verdict.box_count;
    verdict.size_bytes += static_cast<uint64_t>(probe.parameters()[i].element_count) *
                          dtype_size_bytes(probe.parameters()[i].dtype);
  }
  for (const Tile& tile : probe.tiles()) {
    const uint32_t parameter = tile.parameter;
    if ((*expected)[parameter] == held[parameter]) continue;
    verdict.mismatches.push_back({.tensor = probe.tensors()[tile.tensor].name,
                                  .box = tile.box,
                                  .source_fingerprint = (*expected)[parameter],
                                  .target_fingerprint = held[parameter]});
  }
  return {};
}

Result<VersionRevision> Verification::revision(const VersionRequest& request) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Lease lease, control_.acquire(member_, request, deadline_));
  auto computed = content_of(lease.sources);
  auto released = control_.release(lease.id, {}, deadline_);
  if (!computed) return Unexpected{std::move(computed).error()};
  TRANSFUSE_RETURN_IF_ERROR(std::move(released));
  VersionRevision out{.version = lease.version, .computed = *computed, .stated = {}};
  out.stated = lease.sources.front().revision;
  const auto alike = [&](const MemberInfo& source) { return source.revision == out.stated; };
  if (!std::ranges::all_of(lease.sources, alike)) out.stated = {};
  return out;
}

Result<Digest> Verification::content_of(const std::vector<MemberInfo>& sources) {
  std::vector<Layout> layouts;
  for (const MemberInfo& source : sources) {
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, control_.get_layout(source.layout, deadline_));
    layouts.push_back(std::move(layout));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout whole, whole_layout(layouts));
  TRANSFUSE_RETURN_IF_ERROR(control_.put_layout(whole));
  // A parameter has the name of its tensor: their orders are one.
  TRANSFUSE_ASSIGN_OR_RETURN(const auto sums, fingerprints(whole, sources));
  return content_revision(whole.tensors(), sums);
}

// A member without parameters, which may hold leases and ask for sums.
Result<MemberId> join_as_verifier(Control& control, std::string_view model, const Layout& nothing) {
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(nothing));
  Registration registration;
  registration.role = MemberRole::kTarget;
  registration.model = model;
  registration.incarnation = random_identity();
  registration.name = fmt::format("verify-{:016x}", registration.incarnation);
  registration.layout = nothing.digest();
  return control.join(registration);
}

}  // namespace

bool VerifyReport::matches() const {
  return !targets.empty() && std::ranges::all_of(targets, &TargetVerdict::matches);
}

Result<VerifyReport> verify_model(Transport& transport, Control& control, std::string_view model,
                                  Deadline deadline) {
  VerifyReport report;
  report.model = model;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto members, control.members(model));
  const Layout nothing;
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId self, join_as_verifier(control, model, nothing));
  for (const MemberInfo& member : members) {
    // Another verification holds no parameters.
    if (member.role != MemberRole::kTarget || member.layout == nothing.digest()) continue;
    TargetVerdict& verdict = report.targets.emplace_back();
    verdict.target = member.name;
    verdict.version = member.version;
    if (member.version == 0) {
      verdict.not_compared = "it holds no version";
      continue;
    }
    auto compared = Verification(transport, control, self, deadline).compare(member, verdict);
    if (!compared) verdict.not_compared = compared.error().to_string();
  }
  TRANSFUSE_RETURN_IF_ERROR(control.leave(self));
  return report;
}

Result<VersionRevision> version_revision(Transport& transport, Control& control,
                                         std::string_view model, uint64_t version,
                                         Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId self, join_as_verifier(control, model, Layout()));
  VersionRequest request;
  if (version != 0) request = {.kind = VersionRequest::Kind::kExactly, .version = version};
  auto revision = Verification(transport, control, self, deadline).revision(request);
  auto left = control.leave(self);
  if (revision && !left) return Unexpected{std::move(left).error()};
  return revision;
}

std::string VerifyReport::to_json() const {
  nlohmann::json list = nlohmann::json::array();
  for (const TargetVerdict& verdict : targets) {
    nlohmann::json mismatches = nlohmann::json::array();
    for (const BoxMismatch& mismatch : verdict.mismatches) {
      mismatches.push_back(
          {{"tensor", mismatch.tensor},
           {"box", mismatch.box.to_string()},
           {"source_fingerprint", fmt::format("{:016x}", mismatch.source_fingerprint)},
           {"target_fingerprint", fmt::format("{:016x}", mismatch.target_fingerprint)}});
    }
    list.push_back({{"target", verdict.target},
                    {"version", verdict.version},
                    {"matches", verdict.matches()},
                    {"box_count", verdict.box_count},
                    {"size_bytes", verdict.size_bytes},
                    {"not_compared", verdict.not_compared},
                    {"mismatches", mismatches}});
  }
  return nlohmann::json{{"model", model}, {"matches", matches()}, {"targets", list}}.dump();
}

std::string VerifyReport::to_text() const {
  std::string text;
  for (const TargetVerdict& verdict : targets) {
    if (!verdict.not_compared.empty()) {
      text += fmt::format("{}: not compared: {}\n", verdict.target, verdict.not_compared);
      continue;
    }
    text += fmt::format("{}: version {}, {} boxes, {} bytes: {}\n", verdict.target, verdict.version,
                        verdict.box_count, verdict.size_bytes,
                        verdict.mismatches.empty()
                            ? "equal"
                            : fmt::format("{} boxes differ", verdict.mismatches.size()));
    for (const BoxMismatch& mismatch : verdict.mismatches) {
      text += fmt::format("  {} {}: trainer {:016x}, engine {:016x}\n", mismatch.tensor,
                          mismatch.box.to_string(), mismatch.source_fingerprint,
                          mismatch.target_fingerprint);
    }
  }
  if (targets.empty()) text = fmt::format("model '{}' has no engine\n", model);
  return text;
}

}  // namespace transfuse

// What a set of plans costs: bytes per pair, run lengths, and the link that bounds a refit.
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// The longest stretch that a run reads without a gap, in elements, in one of its dimensions' order.
int64_t contiguous_elements(const Run& run, const Strides3& source) {
  int64_t elements = 1;
  for (bool grew = true; grew;) {
    grew = false;
    for (int k = 0; k < 3; ++k) {
      if (run.count[k] > 1 && source.level[k] == elements) {
        elements *= run.count[k];
        grew = true;
      }
    }
  }
  return elements;
}

// Collects pair by pair. Used from one thread.
class Traffic {
 public:
  Traffic(size_t source_count, size_t target_count)
      : targets_(target_count), pairs_(source_count * target_count) {}

  void add(uint32_t source, uint32_t target, uint64_t bytes, uint64_t piece_bytes) {
    PairTraffic& pair = pairs_[source * targets_ + target];
    pair.source = source;
    pair.target = target;
    pair.size_bytes += bytes;
    ++pair.run_count;
    RunLengthBucket& bucket = buckets_[std::bit_floor(piece_bytes)];
    bucket.min_bytes = std::bit_floor(piece_bytes);
    bucket.piece_count += bytes / piece_bytes;
    bucket.size_bytes += bytes;
  }

  void finish(Explanation& out) const {
    std::vector<uint64_t> sent(out.sources.size());
    std::vector<uint64_t> received(out.targets.size());
    for (const PairTraffic& pair : pairs_) {
      if (pair.run_count == 0) continue;
      out.pairs.push_back(pair);
      sent[pair.source] += pair.size_bytes;
      received[pair.target] += pair.size_bytes;
      out.total_bytes += pair.size_bytes;
    }
    for (const auto& [bytes, bucket] : buckets_) out.run_lengths.push_back(bucket);
    if (out.total_bytes == 0) return;
    const auto source = std::max_element(sent.begin(), sent.end());
    const auto target = std::max_element(received.begin(), received.end());
    out.busiest_source_bytes = *source;
    out.busiest_target_bytes = *target;
    out.busiest_link =
        *source > *target ? "source " + out.sources[static_cast<size_t>(source - sent.begin())]
                          : "target " + out.targets[static_cast<size_t>(target - received.begin())];
  }

 private:
  size_t targets_;
  std::vector<PairTraffic> pairs_;  // source-major, all of them
  std::map<uint64_t, RunLengthBucket> buckets_;
};

// The sources of each layout of `plan`: how many, and which, flattened in order.
void find_members(const Plan& plan, std::span<const Digest> digests, std::vector<uint32_t>& counts,
                  std::vector<uint32_t>& members) {
  counts.clear();
  members.clear();
  for (const Layout& layout : plan.source_layouts()) {
    const size_t before = members.size();
    for (uint32_t s = 0; s < digests.size(); ++s) {
      if (digests[s] == layout.digest()) members.push_back(s);
    }
    counts.push_back(static_cast<uint32_t>(members.size() - before));
  }
}

}  // namespace

Result<Explanation> explain(std::span<const ExplainInput> targets,
                            std::span<const std::string> source_names,
                            std::span<const Digest> source_layout_digests) {
  if (source_names.size() != source_layout_digests.size()) {
    return Error{ErrorCode::kInvalidArgument, "explain: expected one layout digest for each of " +
                                                  std::to_string(source_names.size()) +
                                                  " sources, found " +
                                                  std::to_string(source_layout_digests.size())};
  }
  Explanation out;
  out.sources.assign(source_names.begin(), source_names.end());
  for (const ExplainInput& input : targets) out.targets.push_back(input.target_name);
  Traffic traffic(out.sources.size(), out.targets.size());
  Assignment assignment;
  std::vector<uint32_t> counts;
  std::vector<uint32_t> members;
  for (uint32_t t = 0; t < targets.size(); ++t) {
    if (targets[t].plan == nullptr) {
      return Error{ErrorCode::kInvalidArgument,
                   "explain: target \"" + targets[t].target_name + "\" has no plan"};
    }
    const Plan& plan = *targets[t].plan;
    find_members(plan, source_layout_digests, counts, members);
    TRANSFUSE_RETURN_IF_ERROR(assign(plan, counts, t, assignment));
    for (size_t r = 0; r < plan.runs().size(); ++r) {
      const Run& run = plan.runs()[r];
      const Holder& holder = plan.holders()[assignment.holder[r]];
      const Layout& source = plan.source_layouts()[holder.source_layout];
      const uint64_t element = dtype_size_bytes(source.parameters()[holder.parameter].dtype);
      const int64_t piece = contiguous_elements(run, plan.pattern(holder.source_pattern));
      traffic.add(members[assignment.choice[r]], t,
                  static_cast<uint64_t>(run.element_count()) * element,
                  static_cast<uint64_t>(piece) * element);
    }
  }
  traffic.finish(out);
  return out;
}

}  // namespace transfuse

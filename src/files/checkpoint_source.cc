// What a refit needs of a checkpoint besides its bytes: its version, its identity, its sums.
#include "files/checkpoint_source.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <xxhash.h>

#include "base/file_identity.h"
#include "copy/file_read.h"
#include "files/reading.h"
#include "files/safetensors.h"
#include "files/side.h"
#include "files/stored_file.h"
#include "plan/copies.h"
#include "transfuse/checkpoint.h"
#include "transfuse/copy.h"
#include "transfuse/metadata.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr size_t kRunsAtATime = 16;

Result<uint64_t> agreed_version(const Checkpoint& checkpoint, uint64_t recorded) {
  if (checkpoint.version == 0 && recorded == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("checkpoint {}: expected the number of its version, given or recorded "
                             "in its files, found neither",
                             checkpoint.path)};
  }
  if (checkpoint.version != 0 && recorded != 0 && checkpoint.version != recorded) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("checkpoint {}: expected version {}, its files record version {}",
                             checkpoint.path, checkpoint.version, recorded)};
  }
  return std::max(checkpoint.version, recorded);
}

Result<std::string> agreed_kind(const Checkpoint& checkpoint, const std::string& recorded) {
  if (!checkpoint.kind.empty() && !recorded.empty() && checkpoint.kind != recorded) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("checkpoint {}: expected kind '{}', its files record '{}'",
                             checkpoint.path, checkpoint.kind, recorded)};
  }
  if (!checkpoint.kind.empty()) return checkpoint.kind;
  if (!recorded.empty()) return recorded;
  const std::string_view spec = checkpoint.spec;
  return std::string(spec.substr(0, spec.find(':')) == "hf" ? kKindHfRaw : "");
}

Result<Metadata> agreed_words(const Checkpoint& checkpoint, Metadata recorded) {
  for (const auto& [key, value] : checkpoint.metadata) {
    const auto [found, added] = recorded.emplace(key, value);
    if (added || found->second == value) continue;
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("checkpoint {}: expected '{}' to be '{}', its files record '{}'",
                             checkpoint.path, key, value, found->second)};
  }
  TRANSFUSE_RETURN_IF_ERROR(check_metadata("checkpoint " + checkpoint.path, recorded));
  return recorded;
}

std::vector<IdentifiedFile> identified(const ReadableSide& side) {
  std::vector<IdentifiedFile> files;
  for (const OpenFile& file : side.files) files.push_back(file.identified());
  return files;
}

}  // namespace

CheckpointSource::CheckpointSource(std::string path, ReadableSide side, Recorded words)
    : path_(std::move(path)), side_(std::move(side)), words_(std::move(words)) {
  const std::string text = endpoint();
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  identity_ = {.high = hash.high64, .low = hash.low64};
}

Result<std::unique_ptr<CheckpointSource>> CheckpointSource::open(const Checkpoint& checkpoint) {
  if (checkpoint.path.empty()) {
    return Error{ErrorCode::kInvalidArgument, "checkpoint: expected a path, found an empty one"};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const FoundModel found,
                             find_model(checkpoint.config_json, checkpoint.spec, checkpoint.path));
  TRANSFUSE_ASSIGN_OR_RETURN(ReadableSide side,
                             open_side(found.model, checkpoint.spec, checkpoint.path));
  TRANSFUSE_ASSIGN_OR_RETURN(Recorded words, side.recorded());
  TRANSFUSE_ASSIGN_OR_RETURN(words.version, agreed_version(checkpoint, words.version));
  TRANSFUSE_ASSIGN_OR_RETURN(words.kind, agreed_kind(checkpoint, words.kind));
  TRANSFUSE_ASSIGN_OR_RETURN(words.words, agreed_words(checkpoint, std::move(words.words)));
  for (ReadableRank& rank : side.ranks) {
    TRANSFUSE_ASSIGN_OR_RETURN(rank.layout, rank.layout.with_kind(words.kind));
  }
  // Files that were replaced one after another while they were opened are no checkpoint.
  TRANSFUSE_RETURN_IF_ERROR(side.check_unchanged());
  return std::unique_ptr<CheckpointSource>(
      new CheckpointSource(checkpoint.path, std::move(side), std::move(words)));
}

std::string CheckpointSource::endpoint() const { return file_endpoint(identified(side_)); }

Result<void> CheckpointSource::sum_runs(const CopyTable& copies, uint32_t source_layout,
                                        size_t rank, std::span<uint64_t> sums, uint32_t threads,
                                        const std::function<Result<void>()>& go_on) const {
  const Plan& plan = copies.plan();
  const std::span<const uint32_t> held = copies.held_runs(source_layout);
  TRANSFUSE_CHECK(held.size() == sums.size());
  ThreadScratch scratch(threads);
  const auto sum_up = [&](uint32_t worker, size_t item) -> Result<void> {
    TRANSFUSE_RETURN_IF_ERROR(go_on());
    const size_t end = std::min(held.size(), (item + 1) * kRunsAtATime);
    for (size_t i = item * kRunsAtATime; i < end; ++i) {
      const Run& run = plan.runs()[held[i]];
      const auto holders = plan.holders_of(run);
      const auto own = std::ranges::find(holders, source_layout, &Holder::source_layout);
      const std::vector<StoredPlace>& places = side_.ranks[rank].places;
      StridedCopy copy = copies.copy(run, *own, 0, nullptr, true);
      BlockScales scales;
      std::optional<FileSpan> scale_file;
      if (const ScaleRun* const at = copies.scale_run(run, *own)) {
        scales = copies.block_scales(run, *own, nullptr, 0);
        copy.scales = &scales;
        if (run.scales == 0) scale_file = side_.span(places[at->parameter]);
      }
      sums[i] = 0;
      TRANSFUSE_RETURN_IF_ERROR(sum_file_copy(side_.span(places[own->parameter]), copy,
                                              scratch.of(worker), sums[i],
                                              scale_file ? &*scale_file : nullptr));
    }
    return {};
  };
  return for_each_parallel(threads, (held.size() + kRunsAtATime - 1) / kRunsAtATime, sum_up);
}

}  // namespace transfuse

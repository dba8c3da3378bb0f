// Links to files, and a lease that nobody has to give.
#include "session/checkpoint_fallback.h"

#include <fmt/format.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "files/checkpoint_source.h"
#include "files/reading.h"
#include "files/side.h"
#include "session/memory.h"
#include "session/refit_attempt.h"
#include "session/source_link.h"
#include "session/whole_layout.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

Generation generation_of(const CheckpointSource& source) {
  return {.incarnation = source.identity().high, .counter = source.identity().low & ~uint64_t{1}};
}

// While it is only summed.
Result<void> go_on(const std::string& name, Deadline deadline, const std::atomic<bool>& cancelled) {
  if (cancelled) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
  if (!deadline.passed()) return {};
  return Error{ErrorCode::kDeadlineExceeded,
               fmt::format("the refit's deadline passed while {} was summed", name)};
}

// A rank of a checkpoint. Outlived by the transport and the checkpoint.
class CheckpointLink final : public SourceLink {
 public:
  CheckpointLink(const CheckpointSource& source, size_t rank, MemberInfo info,
                 std::unique_ptr<Peer> peer)
      : SourceLink(std::move(info)), source_(source), rank_(rank), peer_(std::move(peer)) {
    regions_.resize(source_.side().files.size());
  }

  bool alive() const override { return peer_ != nullptr; }

  Result<Where> where(uint32_t parameter, uint32_t /*slot*/, Deadline deadline) override {
    if (peer_ == nullptr) return closed();
    const StoredPlace& place = source_.side().ranks[rank_].places[parameter];
    std::unique_ptr<RemoteRegion>& region = regions_[place.file];
    if (region == nullptr) {
      const RegionDescriptor descriptor{
          .id = RegionId{uint64_t{place.file} + 1},
          .size_bytes = source_.side().files[place.file].size_bytes()};
      TRANSFUSE_ASSIGN_OR_RETURN(region, peer_->open_region(descriptor, deadline));
    }
    return Where{.region = region.get(), .offset_bytes = place.offset_bytes};
  }

  // The identity of the files is their generation (I8).
  Result<Generation> read_generation(uint32_t /*slot*/, Deadline /*deadline*/) override {
    if (peer_ == nullptr) return closed();
    TRANSFUSE_RETURN_IF_ERROR(source_.check_unchanged());
    return generation_of(source_);
  }

  Result<void> request_table(MemberId /*reader*/, const TableRequest& /*request*/,
                             Deadline /*deadline*/) override {
    return {};  // nobody but this process sums
  }

  // Nobody else knows what the files hold: they are read a second time.
  Result<void> read_table(const SumQuery& query, std::span<uint64_t> sums, Deadline deadline,
                          int64_t /*no_progress_ms*/, const std::atomic<bool>& cancelled) override {
    TRANSFUSE_RETURN_IF_ERROR(
        source_.sum_runs(*query.copies, query.source_layout, rank_, sums, usable_core_count(),
                         [&] { return go_on(info_.name, deadline, cancelled); }));
    return source_.check_unchanged();
  }

  void close() override {
    regions_.clear();
    regions_.resize(source_.side().files.size());
    peer_.reset();
  }

 private:
  Error closed() const {
    return Error{ErrorCode::kUnavailable, fmt::format("{}: its files were closed", info_.name)};
  }

  const CheckpointSource& source_;
  const size_t rank_;
  std::unique_ptr<Peer> peer_;
  std::vector<std::unique_ptr<RemoteRegion>> regions_;  // by file; null until used
};

// Ranks with equal layouts hold the same: one of them is enough.
Lease lease_of(const CheckpointSource& source, const Digest& revision) {
  Lease lease;
  lease.version = source.version();
  std::set<Digest> known;
  const auto& ranks = source.side().ranks;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!known.insert(ranks[rank].layout.digest()).second) continue;
    MemberInfo& info = lease.sources.emplace_back();
    info.id = rank + 1;
    info.name = ranks.size() == 1 ? fmt::format("checkpoint {}", source.path())
                                  : fmt::format("checkpoint {} rank {}", source.path(), rank);
    info.incarnation = source.identity().high;
    info.layout = ranks[rank].layout.digest();
    info.version = source.version();
    info.generation = generation_of(source);
    info.kind = source.kind();
    info.version_metadata = source.metadata();
    info.revision = revision;
  }
  return lease;
}

}  // namespace

CheckpointFallback::CheckpointFallback(Transport& transport, const Layout& target,
                                       const TargetMemory& memory, const ReceiverOptions& options,
                                       MemberId member, AttemptProgress& progress)
    : options_(options),
      // Its threads start with the first read.
      transport_(transport.reading_through(open_file_transport().value())),
      attempt_(std::make_unique<RefitAttempt>(*transport_, static_cast<SourceDirectory&>(*this),
                                              target, memory, options_, member, progress)) {}

void CheckpointFallback::abandon_in_forked_child() {
  attempt_->abandon_in_forked_child();
  (void)attempt_.release();
  (void)source_.release();
  (void)transport_.release();
}

Result<void> CheckpointFallback::open() {
  if (source_ != nullptr && source_->check_unchanged()) return {};
  attempt_->close();
  source_.reset();
  revision_ = {};
  TRANSFUSE_ASSIGN_OR_RETURN(source_, CheckpointSource::open(checkpoint()));
  return {};
}

Result<uint64_t> CheckpointFallback::choose(const VersionRequest& request, uint64_t held,
                                            Deadline deadline, const std::atomic<bool>& cancelled) {
  TRANSFUSE_RETURN_IF_ERROR(open());
  const uint64_t version = source_->version();
  const auto unfit = [&](const std::string& why) {
    return Error{ErrorCode::kNotFound, fmt::format("it holds version {}, {}", version, why)};
  };
  if (!options_.group.empty() && held != 0) {
    return unfit(
        fmt::format("and the ranks of group '{}' change version {} only together, for one "
                    "that a coordinator has",
                    options_.group, held));
  }
  switch (request.kind) {
    case VersionRequest::Kind::kExactly:
      if (version != request.version) {
        return unfit(fmt::format("exactly {} was asked for", request.version));
      }
      break;
    case VersionRequest::Kind::kAtLeast:
      if (version < request.version) {
        return unfit(fmt::format("at least {} was asked for", request.version));
      }
      break;
    case VersionRequest::Kind::kNewest:
      break;
  }
  if (version < held && request.kind != VersionRequest::Kind::kExactly) {
    return unfit(fmt::format("the target holds {} already", held));
  }
  TRANSFUSE_RETURN_IF_ERROR(check_demand(request.demand, deadline, cancelled));
  return version;
}

// Before anything is planned: a checkpoint that does not fit keeps nobody from waiting for a peer.
Result<void> CheckpointFallback::check_demand(const Demand& demand, Deadline deadline,
                                              const std::atomic<bool>& cancelled) {
  const Metadata nothing;
  const auto unfit = [&](const std::string& reason) {
    return Error{ErrorCode::kNoFittingSource,
                 fmt::format("it holds version {}: {}", source_->version(), reason)};
  };
  const auto claim = [&] {
    return Claim{.kind = source_->kind(),
                 .source = nothing,
                 .version = source_->metadata(),
                 .revision = revision_};
  };
  Demand of_words = demand;
  of_words.revision = {};
  if (const auto reason = misfit(of_words, claim())) return unfit(*reason);
  for (const ReadableRank& rank : source_->side().ranks) {
    if (const auto reason = misfit(of_words, rank.layout)) return unfit(*reason);
  }
  if (demand.revision == Digest{}) return {};
  if (revision_ == Digest{}) {
    TRANSFUSE_ASSIGN_OR_RETURN(revision_, compute_revision(deadline, cancelled));
  }
  if (const auto reason = misfit(demand, claim())) return unfit(*reason);
  return {};
}

Result<Digest> CheckpointFallback::compute_revision(Deadline deadline,
                                                    const std::atomic<bool>& cancelled) const {
  std::vector<Layout> layouts;
  for (const ReadableRank& rank : source_->side().ranks) layouts.push_back(rank.layout);
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout whole, whole_layout(layouts));
  // A parameter has the name of its tensor: their orders are one.
  TRANSFUSE_ASSIGN_OR_RETURN(const auto sums,
                             whole_fingerprints(whole, source_->side(), usable_core_count(), [&] {
                               return go_on(source_->path(), deadline, cancelled);
                             }));
  TRANSFUSE_RETURN_IF_ERROR(source_->check_unchanged());
  return content_revision(whole.tensors(), sums);
}

Result<void> CheckpointFallback::prepare(Deadline deadline, RefitReport& report) {
  return attempt_->prepare(lease_of(*source_, revision_), deadline, report);
}

Result<void> CheckpointFallback::transfer(Deadline deadline, const std::atomic<bool>& cancelled,
                                          RefitReport& report) {
  return attempt_->transfer(deadline, cancelled, report);
}

Result<Layout> CheckpointFallback::layout(const Digest& digest, Deadline /*deadline*/) {
  for (const ReadableRank& rank : source_->side().ranks) {
    if (rank.layout.digest() == digest) return rank.layout;
  }
  return Error{ErrorCode::kNotFound,
               fmt::format("checkpoint {} has no layout {}", source_->path(), digest.to_string())};
}

Result<std::unique_ptr<SourceLink>> CheckpointFallback::open(const MemberInfo& info,
                                                             const Layout& /*layout*/,
                                                             Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto peer, transport_->connect(source_->endpoint(), "", deadline));
  return std::unique_ptr<SourceLink>(
      std::make_unique<CheckpointLink>(*source_, info.id - 1, info, std::move(peer)));
}

}  // namespace transfuse

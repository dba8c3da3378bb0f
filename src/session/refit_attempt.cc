// Sources are excluded one by one until the bytes are proved or nobody is left.
#include "session/refit_attempt.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>
#include "session/memory.h"
#include "session/padding.h"
#include "session/source_link.h"
#include "session/stopwatch.h"
#include "session/transfer.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

#include <fmt/format.h>

namespace transfuse {
namespace {

// A source that stalls, or whose bytes do not match, is tried once more before another one is asked
// (I12).
constexpr uint32_t kTriesPerSource = 2;

}  // namespace

RefitAttempt::RefitAttempt(Transport& transport, SourceDirectory& sources, const Layout& target,
                           const TargetMemory& memory, const ReceiverOptions& options,
                           MemberId member, AttemptProgress& progress)
    : transport_(transport),
      sources_(sources),
      target_(target),
      options_(options),
      member_(member),
      target_data_(memory.data.begin(), memory.data.end()),
      place_(memory.place),
      transfer_(transport),
      progress_(progress),
      admission_(options.demand) {
  TRANSFUSE_CHECK(target_data_.size() == target_.parameters().size());
}

void RefitAttempt::close() {
  candidates_.clear();
  links_.clear();
}

void RefitAttempt::abandon_in_forked_child() {
  for (auto& link : links_) (void)link.release();
}

TableRequest RefitAttempt::table_request() const {
  return {.plan_key = copies_->plan().key(),
          .target = target_.digest(),
          .sources = source_digests_,
          .chunk_bytes = options_.plan.chunk_bytes};
}

Result<Layout> RefitAttempt::layout_of(const Digest& digest, Deadline deadline) {
  const auto known = std::ranges::find(layouts_, digest, &Layout::digest);
  if (known != layouts_.end()) return *known;
  TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, sources_.layout(digest, deadline));
  if (layout.digest() != digest) {
    return Error{ErrorCode::kCorrupt, fmt::format("layout {} was asked for, {} came",
                                                  digest.to_string(), layout.digest().to_string())};
  }
  layouts_.push_back(layout);
  return layout;
}

// Compiles only when the set of source layouts changed.
Result<void> RefitAttempt::plan_for(const Lease& lease, Deadline deadline, RefitReport& report) {
  std::vector<Digest> digests;
  digests.reserve(candidates_.size());
  for (const Candidate& source : candidates_) digests.push_back(source.info.layout);
  std::ranges::sort(digests);
  digests.erase(std::ranges::unique(digests).begin(), digests.end());
  if (copies_ && digests == source_digests_) return {};

  std::vector<Layout> sources;
  for (const Digest& digest : digests) {
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, layout_of(digest, deadline));
    sources.push_back(std::move(layout));
  }
  if (copies_) {
    report.steps.push_back(
        {ErrorCode::kLayoutMismatch, "",
         fmt::format("the sources' layouts changed (version {}): replan", lease.version)});
  }
  auto compiled = compile(target_, sources, options_.plan);
  if (!compiled) {
    return admission_.explain(std::move(compiled).error(), target_, sources,
                              [&](const Digest& digest) { return layout_of(digest, deadline); });
  }
  Plan plan = std::move(*compiled);
  report.planned = true;
  layouts_ = std::move(sources);  // forget layouts that nobody has any more
  source_digests_ = std::move(digests);
  const size_t run_count = plan.runs().size();
  holder_of_.assign(run_count, 0);
  candidate_of_.assign(run_count, 0);
  landed_.assign(run_count, 0);
  proved_.assign(run_count, 0);
  sums_.assign(run_count, 0);
  expected_.assign(run_count, 0);
  table_.reserve(run_count);
  missing_.reserve(run_count);
  copies_.emplace(std::move(plan));
  return {};
}

// Bytes of a source that can no longer be proved are missing again.
void RefitAttempt::forget_unproved(uint32_t candidate) {
  for (uint32_t run = 0; run < landed_.size(); ++run) {
    if (candidate_of_[run] == candidate && !proved_[run]) landed_[run] = 0;
  }
  candidates_[candidate].proof_due = false;
}

void RefitAttempt::exclude(uint32_t candidate, Error error, RefitReport& report) {
  Candidate& out = candidates_[candidate];
  report.steps.push_back({error.code, out.info.name, error.message + ": next source"});
  out.excluded = std::move(error);
  // A source that has only moved on is read again under the next lease: what is open stays so.
  const bool moved_on = out.excluded->code == ErrorCode::kTornRead;
  if (out.link != nullptr && !moved_on) out.link->close();
  forget_unproved(candidate);
}

void RefitAttempt::retry_or_exclude(uint32_t candidate, Error error, uint32_t& count,
                                    RefitReport& report) {
  if (++count >= kTriesPerSource) {
    exclude(candidate, std::move(error), report);
    return;
  }
  Candidate& source = candidates_[candidate];
  report.steps.push_back({error.code, source.info.name, error.message + ": retry"});
  if (source.link != nullptr && source.link->alive()) return;
  // Its connection had to be closed to end a read: the retry opens another.
  source.link = nullptr;
  source.generation_checked = false;
  forget_unproved(candidate);
}

// Spreads the missing runs over the sources that are left. Runs that are in place keep theirs.
Result<void> RefitAttempt::choose_sources() {
  const Plan& plan = copies_->plan();
  member_counts_.assign(plan.source_layouts().size(), 0);
  members_.clear();
  for (size_t layout = 0; layout < plan.source_layouts().size(); ++layout) {
    for (uint32_t i = 0; i < candidates_.size(); ++i) {
      if (candidates_[i].excluded ||
          candidates_[i].info.layout != plan.source_layouts()[layout].digest()) {
        continue;
      }
      ++member_counts_[layout];
      members_.push_back(i);
    }
  }
  if (auto assigned = assign(plan, member_counts_, options_.spread, assignment_); !assigned) {
    return no_source_left(assigned.error());
  }
  for (const uint32_t run : missing_) {
    holder_of_[run] = assignment_.holder[run];
    candidate_of_[run] = members_[assignment_.choice[run]];
  }
  return {};
}

// The reason why the last source was given up says what the caller may do; without one, it is the
// plan's.
Error RefitAttempt::no_source_left(const Error& assign_error) const {
  const auto cause = std::ranges::find_if(
      candidates_, [](const Candidate& candidate) { return candidate.excluded.has_value(); });
  if (cause == candidates_.end()) return assign_error;
  return Error{cause->excluded->code,
               fmt::format("{}; source '{}' was given up: {}", assign_error.message,
                           cause->info.name, cause->excluded->message)};
}

Result<void> RefitAttempt::ready_source(Candidate& candidate, Deadline deadline) {
  const Deadline limit = deadline.earlier(Deadline::after_ms(options_.no_progress_ms));
  if (candidate.link == nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, layout_of(candidate.info.layout, limit));
    TRANSFUSE_ASSIGN_OR_RETURN(auto link, sources_.open(candidate.info, layout, limit));
    candidate.link = link.get();
    links_.push_back(std::move(link));
  }
  if (options_.verify == Verify::kFull) {
    TRANSFUSE_RETURN_IF_ERROR(candidate.link->request_table(member_, table_request(), limit));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const Generation now,
                             candidate.link->read_generation(candidate.info.slot, limit));
  if (now != candidate.info.generation) {
    return Error{
        ErrorCode::kTornRead,
        fmt::format("source '{}' is at generation {}/{}, version {} was published as {}/{}",
                    candidate.info.name, now.incarnation, now.counter, version_,
                    candidate.info.generation.incarnation, candidate.info.generation.counter)};
  }
  candidate.generation_checked = true;
  return {};
}

// Connects to the sources that the missing runs need and checks their generations, choosing others
// for those that fail.
Result<void> RefitAttempt::ready_sources(Deadline deadline, RefitReport& report) {
  while (true) {
    TRANSFUSE_RETURN_IF_ERROR(choose_sources());
    index_runs(candidate_of_);
    bool all_ready = true;
    for (uint32_t i = 0; i < candidates_.size(); ++i) {
      Candidate& candidate = candidates_[i];
      if (candidate.excluded || candidate.generation_checked || runs_of(i).empty()) continue;
      if (deadline.passed()) {
        return Error{ErrorCode::kDeadlineExceeded,
                     fmt::format("the refit's deadline passed before source '{}' was asked",
                                 candidate.info.name)};
      }
      if (auto ready = ready_source(candidate, deadline); !ready) {
        exclude(i, std::move(ready).error(), report);
        all_ready = false;
      }
    }
    candidate_links_.clear();
    candidate_slots_.clear();
    for (const Candidate& candidate : candidates_) {
      candidate_links_.push_back(candidate.link);
      candidate_slots_.push_back(candidate.info.slot);
    }
    if (all_ready) return {};
  }
}

// The candidates: sources of the lease that fit what is demanded.
Result<void> RefitAttempt::admit(const Lease& lease, Deadline deadline, RefitReport& report) {
  TRANSFUSE_RETURN_IF_ERROR(admission_.admit(
      lease, [&](const Digest& digest) { return sources_.layout(digest, deadline); }, report));
  candidates_.clear();
  for (const MemberInfo& source : admission_.admitted()) {
    Candidate& candidate = candidates_.emplace_back();
    candidate.info = source;
    for (const auto& link : links_) {
      if (link->info().id == source.id && link->info().incarnation == source.incarnation) {
        candidate.link = link.get();
      }
    }
  }
  return {};
}

Result<void> RefitAttempt::prepare(const Lease& lease, Deadline deadline, RefitReport& report) {
  const TimePoint start = std::chrono::steady_clock::now();
  version_ = lease.version;
  if (progress_.version.exchange(version_) != version_) progress_.landed_bytes = 0;
  // Connections to incarnations that no version refers to any more, or that broke, end here (I3).
  std::erase_if(links_, [&](const std::unique_ptr<SourceLink>& link) {
    const bool listed = std::ranges::any_of(lease.sources, [&](const MemberInfo& source) {
      return source.id == link->info().id && source.incarnation == link->info().incarnation;
    });
    return !listed || !link->alive();
  });
  candidates_.clear();  // their links may be gone
  TRANSFUSE_RETURN_IF_ERROR(admit(lease, deadline, report));
  TRANSFUSE_RETURN_IF_ERROR(plan_for(lease, deadline, report));
  first_run_of_.clear();
  std::ranges::fill(landed_, uint8_t{0});
  std::ranges::fill(proved_, uint8_t{0});
  count_missing();
  TRANSFUSE_RETURN_IF_ERROR(ready_sources(deadline, report));
  report.phases.discover_us += microseconds_since(start);
  return {};
}

// Groups runs by a candidate each: a counting sort.
void RefitAttempt::index_runs(std::span<const uint32_t> candidate_of) {
  first_run_of_.assign(candidates_.size() + 1, 0);
  for (const uint32_t candidate : candidate_of) ++first_run_of_[candidate + 1];
  for (size_t i = 1; i < first_run_of_.size(); ++i) first_run_of_[i] += first_run_of_[i - 1];
  runs_by_candidate_.resize(candidate_of.size());
  next_place_.assign(first_run_of_.begin(), first_run_of_.end());
  for (uint32_t run = 0; run < candidate_of.size(); ++run) {
    runs_by_candidate_[next_place_[candidate_of[run]]++] = run;
  }
}

std::span<const uint32_t> RefitAttempt::runs_of(uint32_t candidate) const {
  if (first_run_of_.size() != candidates_.size() + 1) return {};  // before sources were chosen
  const uint32_t first = first_run_of_[candidate];
  return {runs_by_candidate_.data() + first, first_run_of_[candidate + 1] - first};
}

void RefitAttempt::count_missing() {
  missing_.clear();
  for (uint32_t run = 0; run < landed_.size(); ++run) {
    if (!landed_[run]) missing_.push_back(run);
  }
}

Result<void> RefitAttempt::move(Deadline deadline, const std::atomic<bool>& cancelled,
                                RefitReport& report) {
  uint64_t missing_bytes = 0;
  for (const uint32_t run : missing_) {
    missing_bytes += copies_->target_bytes(copies_->plan().runs()[run]);
  }
  const TransferOrder order{.copies = &*copies_,
                            .runs = missing_,
                            .holder = holder_of_,
                            .link_of = candidate_of_,
                            .links = candidate_links_,
                            .slots = candidate_slots_,
                            .target = target_data_,
                            .fingerprint = options_.verify == Verify::kFull,
                            .no_progress_ms = options_.no_progress_ms,
                            .limits = limits_,
                            .landed_before = copies_->plan().size_bytes() - missing_bytes,
                            .landed_bytes = &progress_.landed_bytes,
                            .deadline = deadline,
                            .cancelled = &cancelled};
  auto outcome = transfer_.run(order, landed_, sums_);
  const Plan& plan = copies_->plan();
  for (const uint32_t run : missing_) {
    if (!landed_[run]) continue;
    candidates_[candidate_of_[run]].proof_due = true;
    report.source_bytes += copies_->source_bytes(plan.runs()[run], plan.holders()[holder_of_[run]]);
  }
  if (!outcome) return outcome;
  for (const LinkFailure& failure : transfer_.failures()) {
    Candidate& candidate = candidates_[failure.link];
    if (failure.error.code == ErrorCode::kPoisoned) return failure.error;
    if (failure.error.code == ErrorCode::kDeadlineExceeded) {
      retry_or_exclude(failure.link, failure.error, candidate.stalls, report);
    } else {
      // What it delivered before can still be proved while its generation can be read.
      if (candidate.proof_due && candidate.link->alive()) prove_landed(deadline, report);
      if (!candidate.excluded) exclude(failure.link, failure.error, report);
    }
  }
  return {};
}

// The second generation read, after every data read of the source has completed (I8).
void RefitAttempt::prove_landed(Deadline deadline, RefitReport& report) {
  for (uint32_t i = 0; i < candidates_.size(); ++i) {
    Candidate& candidate = candidates_[i];
    if (!candidate.proof_due || candidate.excluded) continue;
    const Deadline limit = deadline.earlier(Deadline::after_ms(options_.no_progress_ms));
    auto now = candidate.link->read_generation(candidate.info.slot, limit);
    if (!now) {
      exclude(i, std::move(now).error(), report);
      continue;
    }
    if (*now != candidate.info.generation) {
      exclude(i,
              Error{ErrorCode::kTornRead,
                    fmt::format("source '{}' went from generation {} to {} while version {} was "
                                "read",
                                candidate.info.name, candidate.info.generation.counter,
                                now->counter, version_)},
              report);
      continue;
    }
    candidate.proof_due = false;
    for (const uint32_t run : runs_of(i)) proved_[run] = landed_[run];
  }
}

// `expected` are the sums of `candidate`, which vouches for its runs_of(). Runs that differ are
// missing again; the candidate is blamed only for what it delivered itself (I12).
void RefitAttempt::compare_sums(uint32_t candidate, std::span<const uint64_t> expected,
                                RefitReport& report) {
  const Plan& plan = copies_->plan();
  std::optional<Error> own;
  uint64_t mismatched = 0;
  for (const uint32_t run : runs_of(candidate)) {
    if (sums_[run] == expected[run]) {
      report.verified_bytes += copies_->target_bytes(plan.runs()[run]);
      continue;
    }
    landed_[run] = proved_[run] = 0;
    const bool delivered_it = candidate_of_[run] == candidate;
    mismatched += delivered_it;
    if (!delivered_it || own) continue;
    own = Error{
        ErrorCode::kFingerprintMismatch,
        fmt::format("tensor '{}' box {} from source '{}': fingerprint {:016x} expected, {:016x} "
                    "arrived",
                    plan.target().tensors()[plan.runs()[run].tensor].name,
                    plan.box_of(plan.runs()[run]).to_string(), candidates_[candidate].info.name,
                    expected[run], sums_[run])};
  }
  if (!own) return;
  if (mismatched > 1) own->message += fmt::format(" (and {} more runs)", mismatched - 1);
  retry_or_exclude(candidate, std::move(*own), candidates_[candidate].mismatches, report);
}

// Says which candidate's table each run is compared with: that of its source or, if the source was
// given up after it delivered, that of another holder.
Result<void> RefitAttempt::choose_vouchers() {
  voucher_of_ = candidate_of_;
  const bool orphans = std::ranges::any_of(
      candidates_, [](const Candidate& candidate) { return candidate.excluded.has_value(); });
  if (orphans) {
    TRANSFUSE_RETURN_IF_ERROR(choose_sources());
    for (uint32_t run = 0; run < voucher_of_.size(); ++run) {
      if (candidates_[candidate_of_[run]].excluded) {
        voucher_of_[run] = members_[assignment_.choice[run]];
      }
    }
  }
  index_runs(voucher_of_);
  return {};
}

// Reads the table of a source into expected_, at the runs that it holds.
Result<void> RefitAttempt::expect_sums(Candidate& candidate, Deadline deadline,
                                       const std::atomic<bool>& cancelled) {
  const std::span<const Layout> layouts = copies_->plan().source_layouts();
  const auto own = std::ranges::find(layouts, candidate.info.layout, &Layout::digest);
  TRANSFUSE_CHECK(own != layouts.end());
  const SumQuery query{.reader = member_,
                       .request = table_request(),
                       .copies = &*copies_,
                       .source_layout = static_cast<uint32_t>(own - layouts.begin()),
                       .slot = candidate.info.slot,
                       .generation = candidate.info.generation};
  const auto held = copies_->held_runs(query.source_layout);
  table_.resize(held.size());
  TRANSFUSE_RETURN_IF_ERROR(
      candidate.link->read_table(query, table_, deadline, options_.no_progress_ms, cancelled));
  for (size_t i = 0; i < held.size(); ++i) expected_[held[i]] = table_[i];
  return {};
}

// Compares what arrived with what the sources say they hold. Runs that differ are missing again.
Result<void> RefitAttempt::verify(Deadline deadline, const std::atomic<bool>& cancelled,
                                  RefitReport& report) {
  report.verified_bytes = 0;
  TRANSFUSE_RETURN_IF_ERROR(choose_vouchers());
  for (uint32_t i = 0; i < candidates_.size(); ++i) {
    Candidate& candidate = candidates_[i];
    if (runs_of(i).empty()) continue;
    Result<void> table;
    if (!candidate.generation_checked) table = ready_source(candidate, deadline);
    if (table) table = expect_sums(candidate, deadline, cancelled);
    if (!table && table.error().code == ErrorCode::kCancelled) return table;
    if (table) {
      compare_sums(i, expected_, report);
      continue;
    }
    // Bytes that cannot be verified are not those of the version: they are read again elsewhere.
    for (const uint32_t run : runs_of(i)) landed_[run] = proved_[run] = 0;
    if (table.error().code == ErrorCode::kDeadlineExceeded) {
      retry_or_exclude(i, std::move(table).error(), candidate.stalls, report);
    } else {
      exclude(i, std::move(table).error(), report);
    }
  }
  if (deadline.passed()) {
    return Error{ErrorCode::kDeadlineExceeded,
                 "the refit's deadline passed while fingerprints were compared"};
  }
  return {};
}

Result<void> RefitAttempt::transfer(Deadline deadline, const std::atomic<bool>& cancelled,
                                    RefitReport& report) {
  const Plan& plan = copies_->plan();
  if (!padding_filled_) {
    TRANSFUSE_RETURN_IF_ERROR(fill_padding(transport_, target_, {target_data_, place_}));
  }
  padding_filled_ = true;
  report.chunk_count = static_cast<uint32_t>(plan.chunks().size());
  report.source_bytes = 0;
  bool first_round = true;
  while (true) {
    const TimePoint start = std::chrono::steady_clock::now();
    if (!first_round) TRANSFUSE_RETURN_IF_ERROR(ready_sources(deadline, report));
    first_round = false;
    auto moved = move(deadline, cancelled, report);
    if (moved) prove_landed(deadline, report);
    report.phases.transfer_us += microseconds_since(start);
    if (!moved) return moved;
    count_missing();
    if (missing_.empty() && options_.verify == Verify::kFull && !landed_.empty()) {
      const TimePoint verify_start = std::chrono::steady_clock::now();
      auto verified = verify(deadline, cancelled, report);
      report.phases.verify_us += microseconds_since(verify_start);
      TRANSFUSE_RETURN_IF_ERROR(std::move(verified));
      count_missing();
    }
    if (missing_.empty()) break;
    for (const uint32_t run : missing_) {
      report.reread_bytes += copies_->target_bytes(plan.runs()[run]);
    }
    if (cancelled) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
    if (deadline.passed()) {
      return Error{ErrorCode::kDeadlineExceeded,
                   fmt::format("the refit's deadline passed with {} of {} runs not proved",
                               missing_.size(), plan.runs().size())};
    }
  }
  // What follows is a success: nothing may reach it unproved.
  TRANSFUSE_CHECK(std::ranges::find(proved_, uint8_t{0}) == proved_.end());
  TRANSFUSE_CHECK(options_.verify == Verify::kOff || report.verified_bytes == plan.size_bytes());
  report.size_bytes = plan.size_bytes();
  report.gigabytes_per_second =
      static_cast<double>(report.size_bytes) /
      (1e3 * static_cast<double>(std::max<int64_t>(1, report.phases.transfer_us)));
  report_routes(report);
  return {};
}

void RefitAttempt::report_routes(RefitReport& report) const {
  const Plan& plan = copies_->plan();
  report.routes.clear();
  std::vector<size_t> route_of(candidates_.size(), SIZE_MAX);
  for (uint32_t run = 0; run < landed_.size(); ++run) {
    const uint32_t candidate = candidate_of_[run];
    if (route_of[candidate] == SIZE_MAX) {
      route_of[candidate] = report.routes.size();
      const uint32_t parameter = plan.holders()[holder_of_[run]].parameter;
      // Null: it was given up after it delivered, when it could not be reached again.
      SourceLink* const link = candidates_[candidate].link;
      std::string route = "closed";
      if (link != nullptr) {
        const auto where =
            link->where(parameter, candidates_[candidate].info.slot, Deadline::after_ms(0));
        if (where) route = where->region->route();
      }
      report.routes.push_back({.source = candidates_[candidate].info.name,
                               .transport = std::string(transport_.kind()),
                               .route = std::move(route),
                               .size_bytes = 0,
                               .run_count = 0});
    }
    RefitRoute& route = report.routes[route_of[candidate]];
    route.size_bytes += copies_->target_bytes(plan.runs()[run]);
    ++route.run_count;
  }
}

}  // namespace transfuse

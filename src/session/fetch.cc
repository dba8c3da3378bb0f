// The loop over leases.
#include "session/fetch.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "session/checkpoint_fallback.h"
#include "session/memory.h"
#include "session/stopwatch.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr int64_t kAcquireSliceMs = 250;  // how late a cancel() is seen while no version fits
// After the deadline of a refit, for the answer that ends it.
constexpr auto kReleaseGrace = std::chrono::milliseconds(100);
constexpr auto kRetryPause = std::chrono::milliseconds(20);

// Another attempt under a new lease may succeed: the source moved on, died or stalled. Everything
// else would fail again.
bool another_lease_may_help(ErrorCode code) {
  switch (code) {
    case ErrorCode::kTornRead:
    case ErrorCode::kUnavailable:
    case ErrorCode::kVersionGone:
    case ErrorCode::kDeadlineExceeded:
    case ErrorCode::kNotFound:
      return true;
    default:
      return false;
  }
}

// It is no fault of the peers alone, or nothing may be written now.
bool checkpoint_may_help(ErrorCode code) {
  switch (code) {
    case ErrorCode::kInvalidArgument:
    case ErrorCode::kResourceExhausted:
    case ErrorCode::kPoisoned:
    case ErrorCode::kCancelled:
    case ErrorCode::kGroupBroken:
      return false;
    default:
      return true;
  }
}

// Another version may be published that fits, unless exactly this one was asked for.
bool may_still_come(ErrorCode code, const VersionRequest& request) {
  return code == ErrorCode::kDeadlineExceeded ||
         (code == ErrorCode::kNoFittingSource && request.kind != VersionRequest::Kind::kExactly);
}

// Where no version came that fits, that of the checkpoint is named, too.
Error with_reason(Error error, bool awaited, const std::string& unfit) {
  if (unfit.empty() || (!awaited && error.code != ErrorCode::kNoFittingSource)) return error;
  return {ErrorCode::kNoFittingSource, fmt::format("{}; {}", error.message, unfit)};
}

Deadline with_grace(Deadline deadline) {
  return Deadline(std::max(deadline.at(), std::chrono::steady_clock::now() + kReleaseGrace));
}

}  // namespace

Fetch::Fetch(Transport& transport, Control& control, const Layout& target,
             const TargetMemory& target_memory, FetchMemory& memory, const ReceiverOptions& options,
             MemberId member)
    : control_(control),
      memory_(memory),
      options_(options),
      member_(member),
      members_(transport, control, target_memory.place),
      attempt_(transport, members_, target, target_memory, options, member, progress_) {
  if (options_.checkpoint) {
    fallback_ = std::make_unique<CheckpointFallback>(transport, target, target_memory, options_,
                                                     member_, progress_);
  }
}

void Fetch::clear_progress() {
  progress_.version = 0;
  progress_.landed_bytes = 0;
}

void Fetch::forget_padding() {
  attempt_.forget_padding();
  if (fallback_ != nullptr) fallback_->forget_padding();
}

void Fetch::close() {
  attempt_.close();
  if (fallback_ != nullptr) fallback_->close();
}

void Fetch::abandon_in_forked_child() {
  attempt_.abandon_in_forked_child();
  if (fallback_ != nullptr) fallback_->abandon_in_forked_child();
}

Result<Fetched> Fetch::run(const FetchOrder& order, const std::atomic<bool>& cancelled,
                           RefitReport& report) {
  started_at_ = std::chrono::steady_clock::now();
  attempt_.set_limits(order.limits);
  if (fallback_ != nullptr) fallback_->set_limits(order.limits);
  const Demand demand = both(options_.demand, order.request.demand);
  TRANSFUSE_RETURN_IF_ERROR(attempt_.set_demand(demand));
  if (fallback_ != nullptr) TRANSFUSE_RETURN_IF_ERROR(fallback_->set_demand(demand));
  FetchOrder demanding = order;
  demanding.request.demand = demand;
  Fetched fetched;
  auto outcome = attempt_all(demanding, cancelled, report, fetched);
  const Stopwatch watch;
  const Deadline vote_by = with_grace(order.deadline);
  if (!outcome) {
    Error error = std::move(outcome).error();
    give_up_round(fetched, error, vote_by, report);
    return error;
  }
  if (fetched.round == 0) return fetched;
  auto vote = control_.vote(member_, fetched.round, true, "", vote_by);
  fetched.voted = vote.has_value();
  if (!vote) {
    report.steps.push_back(
        {vote.error().code, "", "the vote did not arrive: " + vote.error().message});
  }
  report.phases.decide_us += watch.elapsed_us();
  return fetched;
}

// A round that is over already, or a coordinator that is gone, needs no vote.
void Fetch::give_up_round(Fetched& fetched, const Error& error, Deadline deadline,
                          RefitReport& report) {
  const uint64_t round = std::exchange(fetched.round, 0);
  if (round == 0) return;
  if (auto given_up = control_.vote(member_, round, false, error.message, deadline); !given_up) {
    report.steps.push_back({given_up.error().code, "",
                            "the round could not be given up: " + given_up.error().message});
  }
}

Result<Lease> Fetch::acquire(const FetchOrder& order, const std::atomic<bool>& cancelled) {
  VersionRequest request = order.request;
  request.round_ms = options_.round_ms;
  Deadline deadline = order.deadline;
  if (version_wait_ms_ > 0) deadline = deadline.earlier(Deadline::after_ms(version_wait_ms_));
  std::optional<Error> unfit;
  while (true) {
    const Deadline slice = deadline.earlier(Deadline::after_ms(kAcquireSliceMs));
    auto lease = control_.acquire(member_, request, slice);
    if (!lease && lease.error().code == ErrorCode::kNoFittingSource) unfit = lease.error();
    const bool in_vain = !lease && may_still_come(lease.error().code, request);
    version_awaited_ = in_vain && deadline.passed();
    if (!in_vain || version_awaited_) {
      // That something is there which does not fit says more than that the time is over.
      if (!lease && lease.error().code == ErrorCode::kDeadlineExceeded && unfit) return *unfit;
      return lease;
    }
    if (cancelled) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
  }
}

Result<void> Fetch::attempt_peers(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                  RefitReport& report, Fetched& fetched) {
  uint32_t attempts = 0;
  while (true) {
    ++attempts;
    ++report.attempts;
    auto outcome = attempt_once(order, cancelled, report, fetched);
    if (outcome) return {};
    Error error = std::move(outcome).error();
    const bool again = another_lease_may_help(error.code) && !cancelled && !version_awaited_ &&
                       !order.deadline.passed() && attempts < options_.max_attempts &&
                       !(error.code == ErrorCode::kVersionGone &&
                         order.request.kind == VersionRequest::Kind::kExactly);
    if (!again) return error;
    report.steps.push_back({error.code, "", error.message + ": retry with a new lease"});
    std::this_thread::sleep_for(
        std::min<Duration>(kRetryPause * attempts, order.deadline.remaining()));
  }
}

// The order of fallback (I12): peers, of which an attempt asks one after another; the checkpoint.
Result<void> Fetch::attempt_all(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                RefitReport& report, Fetched& fetched) {
  FetchOrder peers = order;
  bool consider = fallback_ != nullptr;
  std::string unfit;  // why the checkpoint is not what is demanded
  while (true) {
    if (consider) peers.deadline = Deadline::after(order.deadline.remaining() / 2);
    version_wait_ms_ = consider ? std::max<int64_t>(1, options_.checkpoint_wait_ms) : 0;
    auto outcome = attempt_peers(peers, cancelled, report, fetched);
    if (outcome) return {};
    Error error = with_reason(std::move(outcome).error(), version_awaited_, unfit);
    if (!consider || !checkpoint_may_help(error.code) || cancelled || order.deadline.passed()) {
      report.steps.push_back({error.code, "", error.message + ": give up"});
      return error;
    }
    const auto version =
        fallback_->choose(order.request, memory_.held(), order.deadline, cancelled);
    const std::string& path = fallback_->checkpoint().path;
    if (version) {
      report.steps.push_back(
          {error.code, "",
           fmt::format("{}: next: checkpoint {} (version {})", error.message, path, *version)});
      give_up_round(fetched, error, with_grace(order.deadline), report);
      return attempt_checkpoint(order, cancelled, report, fetched);
    }
    // Peers have been given up for its sake too early, perhaps.
    const bool again = error.code == ErrorCode::kDeadlineExceeded ||
                       (error.code == ErrorCode::kNoFittingSource && version_awaited_);
    report.steps.push_back({error.code, "", error.message + (again ? ": retry" : ": give up")});
    report.steps.push_back({version.error().code, fmt::format("checkpoint {}", path),
                            "not used: " + version.error().message});
    if (version.error().code == ErrorCode::kNoFittingSource) {
      unfit = fmt::format("checkpoint {}: {}", path, version.error().message);
    }
    if (!again) return with_reason(std::move(error), version_awaited_, unfit);
    consider = false;
    peers = order;
  }
}

Result<void> Fetch::attempt_checkpoint(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                       RefitReport& report, Fetched& fetched) {
  for (uint32_t attempts = 1;; ++attempts) {
    ++report.attempts;
    // Between two attempts the files may have become those of another version.
    TRANSFUSE_ASSIGN_OR_RETURN(
        const uint64_t version,
        fallback_->choose(order.request, memory_.held(), order.deadline, cancelled));
    auto outcome = fallback_->prepare(order.deadline, report);
    if (outcome) {
      memory_.begin_write();
      outcome = fallback_->transfer(order.deadline, cancelled, report);
      tell(memory_.end_write(outcome ? version : 0), version, order.deadline, report);
    }
    if (outcome) {
      report.version = version;
      report.checkpoint = fallback_->checkpoint().path;
      fetched = {.version = version, .round = 0, .voted = false, .from_checkpoint = true};
      return {};
    }
    Error error = std::move(outcome).error();
    const bool again = error.code == ErrorCode::kTornRead && attempts < options_.max_attempts &&
                       !cancelled && !order.deadline.passed();
    report.steps.push_back(
        {error.code, "", error.message + (again ? ": open the checkpoint again" : ": give up")});
    if (!again) return error;
    std::this_thread::sleep_for(
        std::min<Duration>(kRetryPause * attempts, order.deadline.remaining()));
  }
}

// There is no lease whose end would say it.
void Fetch::tell(LeaseEnd end, uint64_t version, Deadline deadline, RefitReport& report) {
  if (end == LeaseEnd::kUnchanged) return;
  const uint64_t held = end == LeaseEnd::kLanded ? version : 0;
  if (auto told = control_.hold(member_, held, with_grace(deadline)); !told) {
    report.steps.push_back({told.error().code, "",
                            "the coordinator does not know what is held: " + told.error().message});
  }
}

Result<void> Fetch::attempt_once(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                 RefitReport& report, Fetched& fetched) {
  const Stopwatch lease_watch;
  auto lease = acquire(order, cancelled);
  report.phases.lease_us += lease_watch.elapsed_us();
  if (!lease) return Unexpected{std::move(lease).error()};
  fetched.version = lease->version;
  fetched.round = lease->round;  // maybe another one than before
  auto outcome = attempt_.prepare(*lease, order.deadline, report);
  LeaseOutcome end;
  const bool writing = outcome.has_value();
  if (writing) {
    memory_.begin_write();
    outcome = attempt_.transfer(order.deadline, cancelled, report);
  }
  const Stopwatch commit_watch;
  if (outcome) {
    end.end = memory_.end_write(lease->version);
    report.version = lease->version;
    end.summary = {.version = lease->version,
                   .total_us = microseconds_since(started_at_),
                   .transfer_us = report.phases.transfer_us,
                   .size_bytes = report.size_bytes,
                   .attempts = report.attempts};
  } else if (writing) {
    end.end = memory_.end_write(0);
  }
  if (auto released = control_.release(lease->id, end, with_grace(order.deadline)); !released) {
    // The bytes are proved; the lease ends by its time to live.
    report.steps.push_back({released.error().code, "",
                            "the lease could not be returned: " + released.error().message});
  }
  report.phases.commit_us += commit_watch.elapsed_us();
  return outcome;
}

}  // namespace transfuse

// The loop over leases.
#include "session/fetch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <thread>
#include <utility>

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

// Another version may be published that fits, unless exactly this one was asked for.
bool may_still_come(ErrorCode code, const VersionRequest& request) {
  return code == ErrorCode::kDeadlineExceeded ||
         (code == ErrorCode::kNoFittingSource && request.kind != VersionRequest::Kind::kExactly);
}

Deadline with_grace(Deadline deadline) {
  return Deadline(std::max(deadline.at(), std::chrono::steady_clock::now() + kReleaseGrace));
}

}  // namespace

Fetch::Fetch(Transport& transport, Control& control, const Layout& target,
             std::span<std::byte* const> target_data, FetchMemory& memory,
             const ReceiverOptions& options, MemberId member)
    : control_(control),
      memory_(memory),
      options_(options),
      member_(member),
      attempt_(transport, control, target, target_data, options, member) {}

void Fetch::clear_progress() {
  attempt_.progress().version = 0;
  attempt_.progress().landed_bytes = 0;
}

Result<Fetched> Fetch::run(const FetchOrder& order, const std::atomic<bool>& cancelled,
                           RefitReport& report) {
  started_at_ = std::chrono::steady_clock::now();
  attempt_.set_pace(order.gigabytes_per_second);
  const Demand demand = both(options_.demand, order.request.demand);
  TRANSFUSE_RETURN_IF_ERROR(attempt_.set_demand(demand));
  Fetched fetched;
  FetchOrder demanding = order;
  demanding.request.demand = demand;
  auto outcome = attempt_until(demanding, cancelled, report, fetched);
  if (fetched.round == 0) {
    if (!outcome) return Unexpected{std::move(outcome).error()};
    return fetched;
  }
  const Stopwatch watch;
  const Deadline vote_by = with_grace(order.deadline);
  if (!outcome) {
    Error error = std::move(outcome).error();
    // A round that is over already, or a coordinator that is gone, needs no vote.
    if (auto given_up = control_.vote(member_, fetched.round, false, error.message, vote_by);
        !given_up) {
      report.steps.push_back({given_up.error().code, "",
                              "the round could not be given up: " + given_up.error().message});
    }
    return error;
  }
  auto vote = control_.vote(member_, fetched.round, true, "", vote_by);
  fetched.voted = vote.has_value();
  if (!vote) {
    report.steps.push_back(
        {vote.error().code, "", "the vote did not arrive: " + vote.error().message});
  }
  report.phases.decide_us += watch.elapsed_us();
  return fetched;
}

Result<Lease> Fetch::acquire(const FetchOrder& order, const std::atomic<bool>& cancelled) {
  VersionRequest request = order.request;
  request.round_ms = options_.round_ms;
  std::optional<Error> unfit;
  while (true) {
    const Deadline slice = order.deadline.earlier(Deadline::after_ms(kAcquireSliceMs));
    auto lease = control_.acquire(member_, request, slice);
    if (!lease && lease.error().code == ErrorCode::kNoFittingSource) unfit = lease.error();
    if (lease || !may_still_come(lease.error().code, request) || order.deadline.passed()) {
      // That something is there which does not fit says more than that the time is over.
      if (!lease && lease.error().code == ErrorCode::kDeadlineExceeded && unfit) return *unfit;
      return lease;
    }
    if (cancelled) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
  }
}

Result<void> Fetch::attempt_until(const FetchOrder& order, const std::atomic<bool>& cancelled,
                                  RefitReport& report, Fetched& fetched) {
  uint32_t attempts = 0;
  while (true) {
    ++attempts;
    ++report.attempts;
    auto outcome = attempt_once(order, cancelled, report, fetched);
    if (outcome) return {};
    Error error = std::move(outcome).error();
    const bool again = another_lease_may_help(error.code) && !cancelled &&
                       !order.deadline.passed() && attempts < options_.max_attempts &&
                       !(error.code == ErrorCode::kVersionGone &&
                         order.request.kind == VersionRequest::Kind::kExactly);
    report.steps.push_back(
        {error.code, "", error.message + (again ? ": retry with a new lease" : ": give up")});
    if (!again) return error;
    std::this_thread::sleep_for(
        std::min<Duration>(kRetryPause * attempts, order.deadline.remaining()));
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

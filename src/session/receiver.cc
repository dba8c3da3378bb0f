// Opening a receiver; a refit as attempts under leases.
#include "transfuse/receiver.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/log.h"
#include "session/memory.h"
#include "session/refit_attempt.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr int64_t kAcquireSliceMs = 250;  // how late a cancel() is seen while no version fits
constexpr auto kReleaseGrace = std::chrono::milliseconds(100);  // after the deadline of a refit
constexpr auto kRetryPause = std::chrono::milliseconds(20);

int64_t microseconds_since(TimePoint start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() -
                                                               start)
      .count();
}

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

class InPlaceReceiver final : public Receiver {
 public:
  InPlaceReceiver(Transport& transport, Control& control, Layout layout, ReceiverOptions options,
                  std::unique_ptr<ServedWeights> weights, MemberId member)
      : control_(control),
        layout_(std::move(layout)),
        options_(std::move(options)),
        weights_(std::move(weights)),
        member_(member),
        owner_pid_(getpid()),
        attempt_(transport, control, layout_, weights_->memory(), options_, member) {
    weights_->serve(member_);
  }

  ~InPlaceReceiver() override {
    if (getpid() != owner_pid_) {
      attempt_.abandon_in_forked_child();
      (void)weights_.release();  // its threads do not exist here
      return;
    }
    if (auto closed = close(); !closed) {
      log_event(LogLevel::kWarn, "receiver_close_failed",
                {{"name", options_.name}, {"reason", closed.error().to_string()}});
    }
  }

  Result<RefitReport> refit(const VersionRequest& request, Deadline deadline) override {
    report_ = {};
    report_.attempts = 0;
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    cancelled_ = false;
    const TimePoint start = std::chrono::steady_clock::now();
    auto outcome = attempt_until(request, deadline);
    report_.phases.total_us = microseconds_since(start);
    if (!outcome) return Unexpected{std::move(outcome).error()};
    return report_;
  }

  const RefitReport& last_report() const override { return report_; }
  uint64_t version() const override { return version_; }
  void cancel() override { cancelled_ = true; }

  Result<void> close() override {
    if (closed_ || getpid() != owner_pid_) return {};
    closed_ = true;
    weights_->stop_serving();
    attempt_.close();
    return control_.leave(member_);
  }

 private:
  Result<void> check_usable() const {
    if (getpid() != owner_pid_) {
      return Error{
          ErrorCode::kUnavailable,
          fmt::format("receiver '{}' belongs to process {}; in the forked process {} it is "
                      "inert",
                      options_.name, owner_pid_, getpid())};
    }
    if (closed_) {
      return Error{ErrorCode::kUnavailable, fmt::format("receiver '{}' is closed", options_.name)};
    }
    return {};
  }

  Result<Lease> acquire(const VersionRequest& request, Deadline deadline) {
    while (true) {
      auto lease =
          control_.acquire(member_, request, deadline.earlier(Deadline::after_ms(kAcquireSliceMs)));
      if (lease || lease.error().code != ErrorCode::kDeadlineExceeded || deadline.passed()) {
        return lease;
      }
      if (cancelled_) return Error{ErrorCode::kCancelled, "the refit was cancelled by the caller"};
    }
  }

  Result<void> attempt_until(const VersionRequest& request, Deadline deadline) {
    while (true) {
      ++report_.attempts;
      auto outcome = attempt_once(request, deadline);
      if (outcome) return {};
      Error error = std::move(outcome).error();
      const bool again = another_lease_may_help(error.code) && !cancelled_ && !deadline.passed() &&
                         report_.attempts < options_.max_attempts &&
                         !(error.code == ErrorCode::kVersionGone &&
                           request.kind == VersionRequest::Kind::kExactly);
      report_.steps.push_back(
          {error.code, "", error.message + (again ? ": retry with a new lease" : ": give up")});
      if (!again) return error;
      std::this_thread::sleep_for(
          std::min<Duration>(kRetryPause * report_.attempts, deadline.remaining()));
    }
  }

  Result<void> attempt_once(const VersionRequest& request, Deadline deadline) {
    const TimePoint start = std::chrono::steady_clock::now();
    auto lease = acquire(request, deadline);
    report_.phases.lease_us += microseconds_since(start);
    if (!lease) return Unexpected{std::move(lease).error()};
    auto outcome = attempt_.prepare(*lease, deadline, report_);
    LeaseEnd end = LeaseEnd::kUnchanged;
    if (outcome) {
      end = LeaseEnd::kLost;
      // From the first byte on the parameters hold no version, and peers that verify them see it.
      version_ = 0;
      weights_->begin_write();
      outcome = attempt_.transfer(deadline, cancelled_, report_);
    }
    const TimePoint commit_start = std::chrono::steady_clock::now();
    if (outcome) {
      weights_->end_write();
      end = LeaseEnd::kLanded;
      version_ = lease->version;
      report_.version = lease->version;
    }
    const Deadline release_by(std::max(deadline.at(), commit_start + kReleaseGrace));
    if (auto released = control_.release(lease->id, end, release_by); !released) {
      // The bytes are proved; the lease ends by its time to live.
      report_.steps.push_back({released.error().code, "",
                               "the lease could not be returned: " + released.error().message});
    }
    report_.phases.commit_us += microseconds_since(commit_start);
    return outcome;
  }

  Control& control_;
  const Layout layout_;
  const ReceiverOptions options_;
  std::unique_ptr<ServedWeights> weights_;
  const MemberId member_;
  const pid_t owner_pid_;
  RefitAttempt attempt_;
  RefitReport report_;
  uint64_t version_ = 0;
  bool closed_ = false;
  std::atomic<bool> cancelled_{false};
};

}  // namespace

Result<std::unique_ptr<Receiver>> Receiver::open(Transport& transport, Control& control,
                                                 const Layout& layout,
                                                 std::vector<ParameterMemory> memory,
                                                 const ReceiverOptions& options) {
  if (options.name.empty() || options.model.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a receiver needs a model and a name; found model '{}', name '{}'",
                             options.model, options.name)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(BoundMemory bound,
                             BoundMemory::open(transport, layout, memory, options.arenas));
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto weights, ServedWeights::open(transport, control, layout, std::move(bound),
                                        {.fingerprint_threads = 0, .keep_tables_fresh = false}));
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.role = MemberRole::kTarget;
  registration.model = options.model;
  registration.name = options.name;
  registration.incarnation = weights->incarnation();
  registration.layout = layout.digest();
  TRANSFUSE_ASSIGN_OR_RETURN(registration.descriptor, weights->descriptor(options.token));
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId member, control.join(registration));
  return std::unique_ptr<Receiver>(
      new InPlaceReceiver(transport, control, layout, options, std::move(weights), member));
}

}  // namespace transfuse

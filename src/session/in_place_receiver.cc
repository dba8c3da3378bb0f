// Refits straight into the parameters.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "base/log.h"
#include "session/fetch.h"
#include "session/receivers.h"
#include "session/stopwatch.h"
#include "session/target_member.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr auto kRoundPause = std::chrono::milliseconds(20);

// Used from one thread; cancel() and version() from any.
class InPlaceReceiver final : public Receiver, private FetchMemory {
 public:
  InPlaceReceiver(Transport& transport, Control& control, std::unique_ptr<TargetMember> member)
      : member_(std::move(member)),
        fetch_(transport, control, member_->layout(), member_->weights().memory().target(), *this,
               member_->options(), member_->id()) {}

  ~InPlaceReceiver() override {
    if (member_->in_forked_child()) {
      fetch_.abandon_in_forked_child();
      member_->abandon_in_forked_child();
      return;
    }
    if (auto closed = close(); !closed) {
      log_event(LogLevel::kWarn, "receiver_close_failed",
                {{"name", member_->options().name}, {"reason", closed.error().to_string()}});
    }
  }

  Result<RefitReport> refit(const VersionRequest& request, Deadline deadline) override {
    report_ = {};
    report_.attempts = 0;
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    TRANSFUSE_RETURN_IF_ERROR(member_->weights().memory().refresh());
    cancelled_ = false;
    const Stopwatch watch;
    auto outcome = refit_until(request, deadline);
    report_.phases.total_us = watch.elapsed_us();
    log_refit(member_->options(), report_, outcome);
    if (!outcome) return Unexpected{std::move(outcome).error()};
    return report_;
  }

  const RefitReport& last_report() const override { return report_; }
  uint64_t version() const override { return version_; }
  void cancel() override { cancelled_ = true; }

  Result<void> stage(const VersionRequest& /*request*/, Deadline /*deadline*/,
                     const StageOptions& /*options*/) override {
    return no_shadow();
  }
  StageProgress staged() const override { return {}; }
  Result<StageProgress> wait_staged(Deadline /*deadline*/) override { return no_shadow(); }
  Result<RefitReport> commit(Deadline /*deadline*/) override { return no_shadow(); }
  Result<uint64_t> rollback(Deadline /*deadline*/) override { return no_shadow(); }

  Result<GroupInfo> check_group() override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    return member_->check_group(version_);
  }

  Result<void> close() override {
    if (member_->in_forked_child()) return {};
    auto closed = member_->close();
    fetch_.close();
    return closed;
  }

 private:
  Error no_shadow() const {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("receiver '{}' receives in place; a version can be staged, committed "
                             "and rolled back where it receives into a shadow",
                             member_->options().name)};
  }

  // From the first byte on the parameters hold no version, and peers that verify them see it.
  void begin_write() override {
    version_ = 0;
    member_->weights().begin_write();
  }
  LeaseEnd end_write(uint64_t version) override {
    // A rank of a group holds the version when the group has decided that it does.
    if (version == 0 || member_->in_group()) return LeaseEnd::kLost;
    hold(version);
    return LeaseEnd::kLanded;
  }
  uint64_t held() const override { return version_; }
  void hold(uint64_t version) {
    member_->weights().end_write();
    version_ = version;
  }

  Result<void> refit_until(const VersionRequest& request, Deadline deadline) {
    const FetchOrder order{.request = request, .deadline = deadline};
    for (uint32_t rounds = 1;; ++rounds) {
      TRANSFUSE_ASSIGN_OR_RETURN(const Fetched fetched, fetch_.run(order, cancelled_, report_));
      if (fetched.from_checkpoint && member_->in_group()) {
        hold(fetched.version);
        return member_->hold_all(fetched.version, deadline, cancelled_);
      }
      if (fetched.round == 0) return {};
      const Stopwatch watch;
      auto decision = member_->decide(fetched, deadline, cancelled_);
      report_.phases.decide_us += watch.elapsed_us();
      if (!decision) return Unexpected{std::move(decision).error()};
      if (decision->commit) {
        hold(fetched.version);
        return member_->applied(fetched, deadline, cancelled_);
      }
      const bool again =
          !cancelled_ && !deadline.passed() && rounds < member_->options().max_attempts;
      Error error = aborted(fetched, *decision, deadline);
      report_.version = 0;
      report_.steps.push_back(
          {error.code, "", error.message + (again ? ": retry in a new round" : ": give up")});
      if (!again) return error;
      std::this_thread::sleep_for(std::min<Duration>(kRoundPause * rounds, deadline.remaining()));
    }
  }

  Error aborted(const Fetched& fetched, const Decision& decision, Deadline deadline) {
    Error error{ErrorCode::kCancelled,
                fmt::format("group '{}' gave up version {} ({}); it was received in place, so "
                            "that the parameters of '{}' hold no version",
                            member_->options().group, fetched.version, decision.reason,
                            member_->options().name)};
    // The end of the lease said so already; this is for the case that it got lost.
    if (auto held = member_->hold(0, deadline); !held) {
      report_.steps.push_back(
          {held.error().code, "", "that they hold none was not said: " + held.error().message});
    }
    return error;
  }

  std::unique_ptr<TargetMember> member_;
  Fetch fetch_;
  RefitReport report_;
  std::atomic<uint64_t> version_{0};
  std::atomic<bool> cancelled_{false};
};

}  // namespace

std::unique_ptr<Receiver> make_in_place_receiver(Transport& transport, Control& control,
                                                 std::unique_ptr<TargetMember> member) {
  return std::make_unique<InPlaceReceiver>(transport, control, std::move(member));
}

}  // namespace transfuse

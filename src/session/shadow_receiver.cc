// Versions arrive in a shadow while the engine serves; a commit brings them into the parameters.
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
#include <vector>

#include "base/log.h"
#include "session/fetch.h"
#include "session/receivers.h"
#include "session/shadow.h"
#include "session/stage.h"
#include "session/stopwatch.h"
#include "session/target_member.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr auto kRoundPause = std::chrono::milliseconds(20);
// A stage ends by its own deadline and says why; this is for the end itself.
constexpr auto kStageGrace = std::chrono::seconds(2);
constexpr int64_t kHoldGraceMs = 100;  // after the deadline, to say what is held

// Bytes that runs write.
uint64_t staged_bytes(const Layout& layout) {
  uint64_t sum = layout.parameter_bytes();
  for (const Fill& fill : layout.fills()) {
    sum -= static_cast<uint64_t>(fill.length.product()) *
           dtype_size_bytes(layout.parameters()[fill.parameter].dtype);
  }
  return sum;
}

// Used from one thread; cancel(), staged() and version() from any.
class ShadowReceiver final : public Receiver, private FetchMemory {
 public:
  ShadowReceiver(Transport& transport, Control& control, std::unique_ptr<TargetMember> member,
                 std::unique_ptr<Shadow> shadow)
      : member_(std::move(member)),
        shadow_(std::move(shadow)),
        fetch_(std::make_unique<Fetch>(transport, control, member_->layout(), shadow_->memory(),
                                       static_cast<FetchMemory&>(*this), member_->options(),
                                       member_->id())),
        stage_(std::make_unique<Stage>(*fetch_, staged_bytes(member_->layout()), cancelled_)) {}

  ~ShadowReceiver() override {
    if (member_->in_forked_child()) {
      // Their threads do not exist here.
      (void)stage_.release();
      (void)fetch_.release();
      (void)shadow_.release();
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
    if (!stage_->moving()) cancelled_ = false;
    const Stopwatch watch;
    auto outcome = refit_until({.request = request, .deadline = deadline});
    report_.phases.total_us = watch.elapsed_us();
    log_refit(member_->options(), report_, outcome);
    if (!outcome) return Unexpected{std::move(outcome).error()};
    return report_;
  }

  const RefitReport& last_report() const override { return report_; }
  uint64_t version() const override { return version_; }
  void cancel() override { cancelled_ = true; }

  Result<void> stage(const VersionRequest& request, Deadline deadline,
                     const StageOptions& options) override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    if (!stage_->moving()) cancelled_ = false;
    return begin_stage({.request = request,
                        .deadline = deadline,
                        .limits = {.gigabytes_per_second = options.max_gigabytes_per_second,
                                   .multiprocessors = options.max_multiprocessors}});
  }

  StageProgress staged() const override {
    if (!member_->check_usable()) return {};
    return stage_->progress();
  }

  Result<StageProgress> wait_staged(Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    auto progress = stage_->wait(deadline);
    if (!stage_->moving()) report_ = stage_->report();
    return progress;
  }

  Result<RefitReport> commit(Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    if (!stage_->moving()) cancelled_ = false;
    const Stopwatch watch;
    auto outcome = commit_staged(deadline, {.others = deadline});
    log_refit(member_->options(), report_, outcome);
    if (!outcome) return Unexpected{std::move(outcome).error()};
    report_.phases.total_us += watch.elapsed_us();
    return report_;
  }

  Result<uint64_t> rollback(Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    if (previous_ == 0) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("receiver '{}' has no version before {} to go back to: {}",
                               member_->options().name, version_.load(),
                               member_->options().keep_previous
                                   ? "the shadow was used since, or there was none"
                                   : "keep_previous is not set")};
    }
    TRANSFUSE_RETURN_IF_ERROR(member_->weights().memory().refresh());
    TRANSFUSE_RETURN_IF_ERROR(write_parameters(previous_));
    previous_ = 0;
    if (auto held = hold(deadline); !held) {
      Error error = std::move(held).error();
      error.message = fmt::format(
          "the parameters hold version {} again, but the coordinator does "
          "not know: {}",
          version_.load(), error.message);
      return error;
    }
    return version_.load();
  }

  Result<GroupInfo> check_group() override {
    TRANSFUSE_RETURN_IF_ERROR(member_->check_usable());
    return member_->check_group(version_);
  }

  Result<void> close() override {
    if (member_->in_forked_child()) return {};
    cancelled_ = true;
    stage_->stop();
    auto closed = member_->close();
    fetch_->close();
    return closed;
  }

 private:
  // The shadow is nobody's but the receiver's: whatever becomes of it, the parameters hold what
  // they held.
  void begin_write() override {}
  LeaseEnd end_write(uint64_t /*version*/) override { return LeaseEnd::kUnchanged; }
  uint64_t held() const override { return version_; }

  Result<void> begin_stage(const FetchOrder& order) {
    if (const auto ready = stage_->ready(); ready && ready->round != 0) {
      const auto given_up = member_->give_up(*ready, "it stages another version");
      // A round that nobody knows any more is no hindrance.
      if (!given_up && given_up.error().code == ErrorCode::kAlreadyExists) return given_up;
    }
    if (!stage_->moving() && previous_held_) {
      fetch_->forget_padding();
      previous_held_ = false;
    }
    auto begun = stage_->begin(order);
    if (begun) previous_ = 0;
    return begun;
  }

  Result<void> refit_until(const FetchOrder& order) {
    std::vector<RefitStep> steps;  // of rounds that were given up
    uint32_t attempts = 0;
    for (uint32_t rounds = 1;; ++rounds) {
      bool aborted = false;
      auto begun = begin_stage(order);
      if (!begun && begun.error().code == ErrorCode::kAlreadyExists && !stage_->moving()) {
        // What lies in the shadow was decided without this rank having applied it. Whether the
        // others are still there is for the new round to find out: one that took the place of
        // another never applies the old one.
        const auto applied = commit_staged(order.deadline, {.others = Deadline::after_ms(0)});
        if (!applied && applied.error().code != ErrorCode::kGroupBroken) return applied;
        begun = begin_stage(order);
      }
      TRANSFUSE_RETURN_IF_ERROR(begun);
      auto staged = stage_->wait(Deadline(order.deadline.at() + kStageGrace));
      if (!staged && staged.error().code == ErrorCode::kDeadlineExceeded) cancelled_ = true;
      if (!stage_->moving()) report_ = stage_->report();
      Result<void> outcome;
      if (staged) {
        outcome = commit_staged(order.deadline, {.others = order.deadline, .aborted = &aborted});
      } else {
        outcome = std::move(staged).error();
      }
      report_.attempts += attempts;
      report_.steps.insert(report_.steps.begin(), steps.begin(), steps.end());
      if (outcome) return {};
      const bool again = aborted && !cancelled_ && !order.deadline.passed() &&
                         rounds < member_->options().max_attempts;
      if (!again) return outcome;
      report_.steps.push_back(
          {outcome.error().code, "", outcome.error().message + ": retry in a new round"});
      steps = report_.steps;
      attempts = report_.attempts;
      std::this_thread::sleep_for(
          std::min<Duration>(kRoundPause * rounds, order.deadline.remaining()));
    }
  }

  struct GroupCommit {
    Deadline others;          // until when ranks are waited for that have yet to apply it
    bool* aborted = nullptr;  // set if the group has decided to give the version up
  };
  Result<void> commit_staged(Deadline deadline, const GroupCommit& group) {
    // Before the group decides: an engine that sleeps could not apply what is decided.
    TRANSFUSE_RETURN_IF_ERROR(member_->weights().memory().refresh());
    TRANSFUSE_ASSIGN_OR_RETURN(const Fetched ready, stage_->ready());
    report_ = stage_->report();
    if (ready.round != 0) {
      const Stopwatch decide_watch;
      auto decision = member_->decide(ready, deadline, cancelled_);
      report_.phases.decide_us += decide_watch.elapsed_us();
      // Undecided: the stage is kept, and a later commit() asks again.
      if (!decision) return Unexpected{std::move(decision).error()};
      if (!decision->commit) {
        Error error{ErrorCode::kCancelled,
                    fmt::format("group '{}' gave up version {} ({}); version {} stays",
                                member_->options().group, ready.version, decision->reason,
                                version_.load())};
        stage_->drop(error);
        if (group.aborted != nullptr) *group.aborted = true;
        return error;
      }
    }
    const Stopwatch commit_watch;
    const uint64_t before = version_;
    TRANSFUSE_RETURN_IF_ERROR(write_parameters(ready.version));
    report_.phases.commit_us = commit_watch.elapsed_us();
    previous_ = member_->options().keep_previous ? before : 0;
    stage_->drop({});
    if (ready.round != 0) return member_->applied(ready, group.others, cancelled_);
    if (member_->in_group()) return member_->hold_all(version_, deadline, cancelled_);
    if (auto held = hold(deadline); !held) {
      // The parameters hold it, and the next one tells.
      report_.steps.push_back(
          {held.error().code, "", "the coordinator does not know yet: " + held.error().message});
    }
    return {};
  }

  // Peers that verify the parameters see them change only here. After an error they hold no
  // version.
  Result<void> write_parameters(uint64_t version) {
    version_ = 0;
    member_->weights().begin_write();
    if (member_->options().keep_previous) {
      previous_held_ = true;
      TRANSFUSE_RETURN_IF_ERROR(shadow_->exchange());
    } else {
      TRANSFUSE_RETURN_IF_ERROR(shadow_->copy_to_parameters());
    }
    member_->weights().end_write();
    version_ = version;
    return {};
  }

  Result<void> hold(Deadline deadline) {
    return member_->hold(version_,
                         Deadline(std::max(deadline.at(), Deadline::after_ms(kHoldGraceMs).at())));
  }

  std::unique_ptr<TargetMember> member_;
  std::atomic<bool> cancelled_{false};
  std::unique_ptr<Shadow> shadow_;
  std::unique_ptr<Fetch> fetch_;
  std::unique_ptr<Stage> stage_;
  RefitReport report_;
  std::atomic<uint64_t> version_{0};
  uint64_t previous_ = 0;       // in the shadow, to go back to; 0: none
  bool previous_held_ = false;  // the shadow holds what was in the parameters, padding included
};

}  // namespace

std::unique_ptr<Receiver> make_shadow_receiver(Transport& transport, Control& control,
                                               std::unique_ptr<TargetMember> member,
                                               std::unique_ptr<Shadow> shadow) {
  return std::make_unique<ShadowReceiver>(transport, control, std::move(member), std::move(shadow));
}

}  // namespace transfuse

// The publishing side of a version's life: in place, or into a slot that nobody reads.
#include "transfuse/publisher.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/affinity.h"
#include "base/log.h"
#include "session/background_publish.h"
#include "session/descriptor.h"
#include "session/device_work.h"
#include "session/memory.h"
#include "session/revision.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint32_t kInPlaceSlot = 0;
constexpr auto kOtherSourcesPause = std::chrono::milliseconds(1);
constexpr int64_t kCancelMs = 60000;  // beyond all that a cancelled copy waits for

int64_t microseconds_since(TimePoint start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() -
                                                               start)
      .count();
}

class SlotPublisher final : public Publisher {
 public:
  SlotPublisher(Transport& transport, Control& control, PublisherOptions options,
                std::unique_ptr<ServedWeights> weights, std::unique_ptr<RevisionSum> revision,
                std::unique_ptr<BackgroundPublish> background, MemberId member)
      : transport_(transport),
        control_(control),
        revision_(std::move(revision)),
        options_(std::move(options)),
        weights_(std::move(weights)),
        background_(std::move(background)),
        member_(member),
        owner_pid_(getpid()),
        retention_(options_.retention),
        offered_(weights_->slot_count(), 0) {}

  ~SlotPublisher() override {
    if (getpid() != owner_pid_) {
      // A forked child: their threads do not exist, their handles are inert.
      (void)background_.release();
      (void)weights_.release();
      return;
    }
    if (state_ == State::kCopying) background_->cancel();
    if (auto closed = close(); !closed) {
      log_event(LogLevel::kWarn, "publisher_close_failed",
                {{"name", options_.name}, {"reason", closed.error().to_string()}});
    }
  }

  Result<WriteTiming> begin_write(uint64_t version) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    const TimePoint start = std::chrono::steady_clock::now();
    const bool copying = state_ == State::kCopying;
    TRANSFUSE_RETURN_IF_ERROR(end_copy(drain_deadline()));
    const int64_t copy_waited_us = copying ? microseconds_since(start) : 0;
    if (state_ != State::kIdle) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("begin_write({}) while version {} is being written: publish or "
                               "abort it first",
                               version, version_)};
    }
    if (version == 0) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("publisher '{}': versions begin at 1", options_.name)};
    }
    if (version <= published_) {
      return Error{ErrorCode::kAlreadyExists,
                   fmt::format("publisher '{}' has published version {} already, {} is not above "
                               "it",
                               options_.name, published_, version)};
    }
    WriteTiming timing{.copy_waited_us = copy_waited_us};
    opened_ = false;
    // A snapshot needs no permission before it is taken; only readers of the weights themselves are
    // in the trainer's way.
    const uint64_t in_place = offered_[kInPlaceSlot];
    if (retention_ == Retention::kInPlace || in_place != 0) {
      WriteRequest request{.version = version, .replaces = {}, .when_leased = kDrainInPlace};
      if (in_place != 0) request.replaces.push_back(in_place);
      TRANSFUSE_ASSIGN_OR_RETURN(const DrainOutcome drained, open_version(request));
      timing = {.waited_us = drained.waited_us,
                .revoked = drained.revoked,
                .copy_waited_us = copy_waited_us};
      withdraw(kInPlaceSlot);
    }
    state_ = State::kWriting;
    version_ = version;
    written_ = false;
    copy_us_ = 0;
    tell_revoked(timing.revoked);
    timing_ = {};
    return timing;
  }

  using Publisher::publish;
  Result<PublishTiming> publish(uint64_t version, const VersionWords& words) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    TRANSFUSE_RETURN_IF_ERROR(check_metadata(
        fmt::format("version {} of publisher '{}'", version, options_.name), words.metadata));
    TRANSFUSE_RETURN_IF_ERROR(end_copy(drain_deadline()));
    if (state_ == State::kIdle || version != version_) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("publish({}) without begin_write({}): {}", version, version,
                               state_ == State::kIdle
                                   ? "no version is being written"
                                   : fmt::format("version {} is being written", version_))};
    }
    Result<bool> published = offer(words);
    if (!published && is_skipped(published.error())) published = false;
    if (published) tell_revoked(timing_.revoked);
    if (state_ == State::kCopying) return timing_;
    timing_.copy_us = copy_us_;
    timing_.skipped = published && !*published;
    TRANSFUSE_RETURN_IF_ERROR(settle(published));
    return timing_;
  }

  Result<void> set_retention(Retention retention) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    TRANSFUSE_RETURN_IF_ERROR(end_copy(drain_deadline()));
    if (state_ != State::kIdle) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("set_retention() while version {} is being written", version_)};
    }
    if (retention == Retention::kSnapshot && weights_->slot_count() == 1) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("publisher '{}' was opened without snapshot slots", options_.name)};
    }
    retention_ = retention;
    return {};
  }

  Result<void> abort_write(std::string_view reason) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    if (state_ == State::kIdle) {
      return Error{ErrorCode::kInvalidArgument, "abort_write() while no version is being written"};
    }
    const bool copied = cancel_copy();
    if (state_ == State::kCopying) return still_copying();  // of a device that hangs
    if (state_ == State::kIdle && !copied) return {};       // it had ended for every source
    if (state_ == State::kIdle) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("abort_write() of version {} of publisher '{}', which was published "
                               "before it could be given up",
                               version_, options_.name)};
    }
    if (background_ != nullptr && background_->progress().version == version_) background_->clear();
    return give_up(reason);
  }

  uint64_t version() const override {
    if (state_ == State::kWriting) return 0;
    const bool is_there = state_ == State::kCopying && getpid() == owner_pid_ &&
                          background_->progress().state == SnapshotState::kPublished;
    return is_there ? version_ : *std::ranges::max_element(offered_);
  }

  SnapshotProgress snapshot() const override {
    if (background_ == nullptr || getpid() != owner_pid_) return {};
    return background_->progress();
  }

  Result<SnapshotProgress> wait_published(Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    TRANSFUSE_RETURN_IF_ERROR(end_copy(deadline));
    const SnapshotProgress progress = snapshot();
    if (progress.state == SnapshotState::kFailed) return failure_of(progress.version);
    return progress;
  }

  Result<void> close() override {
    if (closed_ || getpid() != owner_pid_) return {};
    Result<void> copied = end_copy(drain_deadline());
    if (cancel_copy()) copied = {};
    closed_ = true;
    weights_->stop_serving();
    for (uint32_t slot = 0; slot < offered_.size(); ++slot) withdraw(slot);
    Result<void> aborted;
    if (state_ != State::kIdle) aborted = give_up("publisher closed while writing");
    auto left = control_.leave(member_);
    if (!copied) return copied;
    return aborted ? std::move(left) : std::move(aborted);
  }

 private:
  enum class State : uint8_t {
    kIdle,     // no version is being written
    kWriting,  // begun
    kCopying,  // the background has it: all that complete() uses is its own
  };
  // Who trains in place cannot go on before readers of the weights are gone.
  static constexpr WhenLeased kDrainInPlace = WhenLeased::kRevokeAtDeadline;

  Result<void> check_usable() const {
    if (getpid() != owner_pid_) {
      return Error{ErrorCode::kUnavailable,
                   fmt::format("publisher '{}' belongs to process {}; in the forked process {} it "
                               "is inert",
                               options_.name, owner_pid_, getpid())};
    }
    if (closed_) {
      return Error{ErrorCode::kUnavailable, fmt::format("publisher '{}' is closed", options_.name)};
    }
    return {};
  }

  void tell_revoked(uint32_t count) const {
    if (count == 0) return;
    log_event(LogLevel::kWarn, "readers_revoked",
              {{"publisher", options_.name},
               {"for_version", std::to_string(version_)},
               {"count", std::to_string(count)}});
  }

  Result<DrainOutcome> open_version(const WriteRequest& request) {
    auto drained = control_.begin_write(member_, request, Deadline::after_ms(options_.drain_ms));
    opened_ = opened_ || drained.has_value();
    return drained;
  }

  // Nothing of the slot is readable from here on.
  void withdraw(uint32_t slot) {
    weights_->begin_write(slot);
    offered_[slot] = 0;
  }

  Deadline drain_deadline() const { return Deadline::after_ms(options_.drain_ms); }

  // A version that readers never see, as all sources have agreed.
  bool is_skipped(const Error& error) const {
    return error.code == ErrorCode::kVersionGone && retention_ == Retention::kSnapshot &&
           options_.when_leased == WhenLeased::kSkip;
  }

  // Each step that succeeded is not repeated by a later call. In the background: true, and
  // complete() goes on there.
  Result<bool> offer(const VersionWords& words) {
    if (!written_) {
      // Before the version is offered: its readers find what is mapped now.
      TRANSFUSE_RETURN_IF_ERROR(weights_->memory().refresh());
      offer_ = {.version = version_, .generation = {}, .slot = kInPlaceSlot};
      if (retention_ == Retention::kSnapshot) {
        TRANSFUSE_ASSIGN_OR_RETURN(offer_.slot, make_room());
        withdraw(offer_.slot);
      }
    }
    offer_.metadata = words.metadata;
    stated_ = words.revision;
    if (background_ == nullptr || offer_.slot == kInPlaceSlot) {
      CopyProgress nobody_asks;
      return complete(nobody_asks);
    }
    state_ = State::kCopying;
    timing_.copying = true;
    background_->begin(version_, [this](CopyProgress& progress) {
      auto published = complete(progress);
      if (!published) {
        log_event(LogLevel::kWarn, "snapshot_failed",
                  {{"publisher", options_.name},
                   {"version", std::to_string(version_)},
                   {"reason", published.error().to_string()}});
      }
      return published;
    });
    return true;
  }

  // False: the version is skipped. After a failure it may be called again.
  Result<bool> complete(CopyProgress& progress) {
    if (!written_) {
      if (offer_.slot != kInPlaceSlot) {
        const TimePoint start = std::chrono::steady_clock::now();
        TRANSFUSE_RETURN_IF_ERROR(weights_->copy_weights(offer_.slot, progress));
        copy_us_ = microseconds_since(start);
      }
      offer_.generation = weights_->end_write(offer_.slot);
      written_ = true;
    }
    TRANSFUSE_RETURN_IF_ERROR(state_revision());
    if (progress.cancelled) {
      return Error{ErrorCode::kCancelled, "it was given up when it had been copied"};
    }
    const auto published = control_.publish(member_, offer_);
    if (published) return true;
    if (is_skipped(published.error())) return false;
    return published.error();
  }

  // What complete() has done, or why it did not.
  Result<void> settle(const Result<bool>& published) {
    if (!published && published.error().code != ErrorCode::kVersionGone) {
      state_ = State::kWriting;
      return published.error();
    }
    state_ = State::kIdle;
    const bool is_there = published && *published;
    if (!is_there && written_) withdraw(offer_.slot);
    if (!published) return published.error();  // it can never be READY: another source has ended it
    published_ = version_;                     // skipped: the number is used up
    if (is_there) offered_[offer_.slot] = version_;
    log_event(is_there ? LogLevel::kDebug : LogLevel::kInfo,
              is_there ? "published" : "version_skipped",
              {{"publisher", options_.name},
               {"version", std::to_string(version_)},
               {"slot", std::to_string(offer_.slot)},
               {"waited_us", std::to_string(timing_.waited_us)},
               {"copy_us", std::to_string(copy_us_)}});
    return {};
  }

  // Waits for what the background does, and takes its outcome.
  Result<void> end_copy(Deadline deadline) {
    if (state_ != State::kCopying) return {};
    if (!background_->wait(deadline)) return still_copying();
    if (settle(background_->outcome())) return {};
    return failure_of(version_);
  }

  Error still_copying() const {
    const SnapshotProgress progress = background_->progress();
    return {ErrorCode::kDeadlineExceeded,
            fmt::format("version {} of publisher '{}' is still being copied, {} of {} bytes are "
                        "there: call again, or allow a longer wait (drain_ms) or a higher "
                        "snapshot_gigabytes_per_second",
                        version_, options_.name, progress.copied_bytes, progress.size_bytes)};
  }

  // True: what was to be cancelled was published all the same.
  bool cancel_copy() {
    if (state_ != State::kCopying) return false;
    background_->cancel();
    return end_copy(Deadline::after_ms(kCancelMs)).has_value();
  }

  Error failure_of(uint64_t version) const {
    const Error reason = background_->outcome().error();
    return {reason.code,
            fmt::format("version {} of publisher '{}' was not published: {}{}", version,
                        options_.name, reason.message,
                        state_ == State::kIdle ? "" : "; publish it again, or abort_write()")};
  }

  Result<void> state_revision() {
    if (revision_ == nullptr) {
      offer_.revision = stated_;
      return {};
    }
    if (offer_.revision == Digest{}) {
      TRANSFUSE_ASSIGN_OR_RETURN(
          offer_.revision,
          revision_->of(
              [this](uint32_t parameter) { return weights_->data(offer_.slot, parameter); },
              weights_->on_device(offer_.slot) ? &transport_ : nullptr));
    }
    if (stated_ == Digest{} || stated_ == offer_.revision) return {};
    return Error{
        ErrorCode::kFingerprintMismatch,
        fmt::format("version {} of publisher '{}' is stated to be revision {}, its "
                    "weights are {}",
                    version_, options_.name, stated_.to_string(), offer_.revision.to_string())};
  }

  // Of sources that copy at their own pace one may be a step ahead. It must not overwrite the last
  // version, and so end it, while another one still copies that; at the deadline it may.
  Result<void> wait_for_other_sources() {
    if (background_ == nullptr || options_.source_count == 1) return {};
    const TimePoint start = std::chrono::steady_clock::now();
    const Deadline limit = drain_deadline();
    while (!limit.passed()) {
      TRANSFUSE_ASSIGN_OR_RETURN(const auto versions, control_.versions(options_.model));
      const auto last = std::ranges::find(versions, published_, &VersionInfo::version);
      if (last == versions.end() || last->state != VersionState::kOpen) break;
      std::this_thread::sleep_for(kOtherSourcesPause);
    }
    timing_.waited_us += microseconds_since(start);
    return {};
  }

  // A snapshot slot that may be overwritten.
  Result<uint32_t> make_room() {
    std::optional<uint32_t> free;
    WriteRequest request{.version = version_, .replaces = {}, .when_leased = options_.when_leased};
    for (uint32_t slot = 1; slot < offered_.size(); ++slot) {
      if (offered_[slot] == 0 && !free) free = slot;
      if (offered_[slot] != 0) request.replaces.push_back(offered_[slot]);
    }
    if (free) request.replaces.clear();
    if (free && opened_) return *free;
    if (!free) TRANSFUSE_RETURN_IF_ERROR(wait_for_other_sources());
    TRANSFUSE_ASSIGN_OR_RETURN(const DrainOutcome drained, open_version(request));
    timing_.waited_us += drained.waited_us;
    timing_.revoked += drained.revoked;
    if (free) return *free;
    const auto replaced = std::find(offered_.begin() + 1, offered_.end(), drained.replaced);
    if (replaced == offered_.end() || drained.replaced == 0) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("the coordinator replaced version {}, which is in no snapshot of "
                               "publisher '{}'",
                               drained.replaced, options_.name)};
    }
    return static_cast<uint32_t>(replaced - offered_.begin());
  }

  // Ends the version that is being written, for every source.
  Result<void> give_up(std::string_view reason) {
    if (retention_ == Retention::kInPlace) withdraw(kInPlaceSlot);
    if (retention_ == Retention::kSnapshot && written_) withdraw(offer_.slot);
    state_ = State::kIdle;
    if (!opened_) {
      // Others may have published it already, and would wait for this source.
      const auto open = open_version({.version = version_, .replaces = {}, .when_leased = {}});
      if (!open && open.error().code == ErrorCode::kVersionGone) return {};
      if (!open) return open.error();
    }
    return control_.abort_version(member_, version_, reason);
  }

  Transport& transport_;
  Control& control_;
  const std::unique_ptr<RevisionSum> revision_;  // null: publish() computes none
  const PublisherOptions options_;
  std::unique_ptr<ServedWeights> weights_;
  std::unique_ptr<BackgroundPublish> background_;  // null: publish() copies
  const MemberId member_;
  const pid_t owner_pid_;
  Retention retention_;
  std::vector<uint64_t> offered_;  // per slot: the version in it that readers may know of; 0: none
  uint64_t published_ = 0;         // the last one
  State state_ = State::kIdle;
  uint64_t version_ = 0;  // that is being written
  bool opened_ = false;   // it, at the coordinator
  // Of it:
  bool written_ = false;  // its bytes are complete in offer_.slot
  Offer offer_;
  Digest stated_;  // revision
  int64_t copy_us_ = 0;
  PublishTiming timing_;  // of its publish(), over repeated calls
  bool closed_ = false;
};

Result<void> check_options(const PublisherOptions& options) {
  if (options.name.empty() || options.model.empty() || options.source_count == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a publisher needs a model, a name and at least one source; found "
                             "model '{}', name '{}', source_count {}",
                             options.model, options.name, options.source_count)};
  }
  if (options.snapshot_slots >= kMaxSlots) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("publisher '{}': at most {} snapshot slots are possible, found {}",
                             options.name, kMaxSlots - 1, options.snapshot_slots)};
  }
  if (options.retention == Retention::kSnapshot && options.snapshot_slots == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("publisher '{}': retention snapshot needs snapshot_slots of at least "
                             "1, found 0",
                             options.name)};
  }
  if (options.snapshot_async && options.snapshot_slots == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("publisher '{}': snapshot_async needs snapshot_slots of at least 1, "
                             "found 0",
                             options.name)};
  }
  const double rate = options.snapshot_gigabytes_per_second;
  if (!std::isfinite(rate) || rate < 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("publisher '{}': expected snapshot_gigabytes_per_second of 0 or more, "
                             "found {}",
                             options.name, rate)};
  }
  return check_metadata(fmt::format("publisher '{}'", options.name), options.metadata);
}

}  // namespace

Result<std::unique_ptr<Publisher>> Publisher::open(Transport& transport, Control& control,
                                                   const Layout& layout,
                                                   std::vector<ParameterMemory> memory,
                                                   const PublisherOptions& options) {
  TRANSFUSE_RETURN_IF_ERROR(check_options(options));
  std::unique_ptr<RevisionSum> revision;
  if (options.compute_revision) {
    const uint32_t threads =
        options.fingerprint_threads > 0 ? options.fingerprint_threads : usable_core_count();
    TRANSFUSE_ASSIGN_OR_RETURN(revision, RevisionSum::open(layout, threads));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(
      BoundMemory bound,
      BoundMemory::open(transport, layout, memory, options.arenas, BoundMemory::Use::kSource));
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto weights, ServedWeights::open(
                        transport, control, layout, std::move(bound),
                        {.fingerprint_threads = options.fingerprint_threads,
                         .keep_tables_fresh = true,
                         .snapshot_slots = options.snapshot_slots,
                         .snapshot_place = options.snapshot_place,
                         .snapshot_gigabytes_per_second = options.snapshot_gigabytes_per_second}));
  std::unique_ptr<BackgroundPublish> background;
  if (options.snapshot_async) {
    TRANSFUSE_ASSIGN_OR_RETURN(background, BackgroundPublish::open(layout.parameter_bytes()));
  }
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.role = MemberRole::kSource;
  registration.model = options.model;
  registration.name = options.name;
  registration.source_count = options.source_count;
  registration.incarnation = weights->incarnation();
  registration.layout = layout.digest();
  registration.kind = layout.kind();
  registration.metadata = options.metadata;
  TRANSFUSE_ASSIGN_OR_RETURN(registration.descriptor, weights->descriptor(options.token));
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId member, control.join(registration));
  if (auto serving = weights->serve(member); !serving) {
    (void)control.leave(member);  // what matters is why nothing can be served
    return Unexpected{std::move(serving).error()};
  }
  return std::unique_ptr<Publisher>(new SlotPublisher(transport, control, options,
                                                      std::move(weights), std::move(revision),
                                                      std::move(background), member));
}

}  // namespace transfuse

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
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/affinity.h"
#include "base/log.h"
#include "session/descriptor.h"
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

int64_t microseconds_since(TimePoint start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() -
                                                               start)
      .count();
}

class SlotPublisher final : public Publisher {
 public:
  SlotPublisher(Transport& transport, Control& control, PublisherOptions options,
                std::unique_ptr<ServedWeights> weights, std::unique_ptr<RevisionSum> revision,
                MemberId member)
      : transport_(transport),
        control_(control),
        revision_(std::move(revision)),
        options_(std::move(options)),
        weights_(std::move(weights)),
        member_(member),
        owner_pid_(getpid()),
        retention_(options_.retention),
        offered_(weights_->slot_count(), 0) {}

  ~SlotPublisher() override {
    if (getpid() != owner_pid_) {
      (void)weights_.release();  // a forked child: its threads do not exist, its handles are inert
      return;
    }
    if (auto closed = close(); !closed) {
      log_event(LogLevel::kWarn, "publisher_close_failed",
                {{"name", options_.name}, {"reason", closed.error().to_string()}});
    }
  }

  Result<WriteTiming> begin_write(uint64_t version) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
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
    WriteTiming timing;
    opened_ = false;
    // A snapshot needs no permission before it is taken; only readers of the weights themselves are
    // in the trainer's way.
    const uint64_t in_place = offered_[kInPlaceSlot];
    if (retention_ == Retention::kInPlace || in_place != 0) {
      WriteRequest request{.version = version, .replaces = {}, .when_leased = kDrainInPlace};
      if (in_place != 0) request.replaces.push_back(in_place);
      TRANSFUSE_ASSIGN_OR_RETURN(const DrainOutcome drained, open_version(request));
      timing = {.waited_us = drained.waited_us, .revoked = drained.revoked};
      withdraw(kInPlaceSlot);
    }
    state_ = State::kWriting;
    version_ = version;
    tell_revoked(timing.revoked);
    timing_ = {};
    return timing;
  }

  using Publisher::publish;
  Result<PublishTiming> publish(uint64_t version, const VersionWords& words) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    TRANSFUSE_RETURN_IF_ERROR(check_metadata(
        fmt::format("version {} of publisher '{}'", version, options_.name), words.metadata));
    if (state_ == State::kIdle || version != version_) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("publish({}) without begin_write({}): {}", version, version,
                               state_ == State::kIdle
                                   ? "no version is being written"
                                   : fmt::format("version {} is being written", version_))};
    }
    auto timing = offer(words);
    if (!timing && timing.error().code == ErrorCode::kVersionGone) {
      // It can never be READY; another source may have ended it.
      if (state_ == State::kWritten) withdraw(offer_.slot);
      state_ = State::kIdle;
      if (retention_ == Retention::kSnapshot && options_.when_leased == WhenLeased::kSkip) {
        published_ = version;  // the number is used up
        log_event(LogLevel::kInfo, "version_skipped",
                  {{"publisher", options_.name},
                   {"version", std::to_string(version)},
                   {"reason", timing.error().message}});
        return PublishTiming{.waited_us = 0, .revoked = 0, .copy_us = 0, .skipped = true};
      }
    }
    if (timing) {
      tell_revoked(timing->revoked);
      log_event(LogLevel::kDebug, "published",
                {{"publisher", options_.name},
                 {"version", std::to_string(version)},
                 {"slot", std::to_string(offer_.slot)},
                 {"waited_us", std::to_string(timing->waited_us)},
                 {"copy_us", std::to_string(timing->copy_us)}});
    }
    return timing;
  }

  Result<void> set_retention(Retention retention) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
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
    return give_up(reason);
  }

  uint64_t version() const override {
    return state_ == State::kIdle ? *std::ranges::max_element(offered_) : 0;
  }

  Result<void> close() override {
    if (closed_ || getpid() != owner_pid_) return {};
    closed_ = true;
    weights_->stop_serving();
    for (uint32_t slot = 0; slot < offered_.size(); ++slot) withdraw(slot);
    Result<void> aborted;
    if (state_ != State::kIdle) aborted = give_up("publisher closed while writing");
    auto left = control_.leave(member_);
    return aborted ? std::move(left) : std::move(aborted);
  }

 private:
  enum class State : uint8_t {
    kIdle,     // no version is being written
    kWriting,  // begun
    kWritten,  // its bytes are complete in offer_.slot, and not offered yet
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

  // Each step that succeeded is not repeated by a later call.
  Result<PublishTiming> offer(const VersionWords& words) {
    if (state_ == State::kWriting) {
      // Before the version is offered: its readers find what is mapped now.
      TRANSFUSE_RETURN_IF_ERROR(weights_->memory().refresh());
      uint32_t slot = kInPlaceSlot;
      if (retention_ == Retention::kSnapshot) {
        TRANSFUSE_ASSIGN_OR_RETURN(slot, make_room());
        const TimePoint start = std::chrono::steady_clock::now();
        withdraw(slot);
        TRANSFUSE_RETURN_IF_ERROR(weights_->copy_weights(slot));
        timing_.copy_us = microseconds_since(start);
      }
      offer_ = {.version = version_, .generation = weights_->end_write(slot), .slot = slot};
      state_ = State::kWritten;
    }
    // After a failure here the bytes are complete: publish() may be called again.
    TRANSFUSE_RETURN_IF_ERROR(state_revision(words));
    offer_.metadata = words.metadata;
    TRANSFUSE_RETURN_IF_ERROR(control_.publish(member_, offer_));
    offered_[offer_.slot] = version_;
    published_ = version_;
    state_ = State::kIdle;
    return timing_;
  }

  Result<void> state_revision(const VersionWords& words) {
    if (revision_ == nullptr) {
      offer_.revision = words.revision;
      return {};
    }
    if (offer_.revision == Digest{}) {
      TRANSFUSE_ASSIGN_OR_RETURN(
          offer_.revision,
          revision_->of(
              [this](uint32_t parameter) { return weights_->data(offer_.slot, parameter); },
              weights_->on_device(offer_.slot) ? &transport_ : nullptr));
    }
    if (words.revision == Digest{} || words.revision == offer_.revision) return {};
    return Error{ErrorCode::kFingerprintMismatch,
                 fmt::format("version {} of publisher '{}' is stated to be revision {}, its "
                             "weights are {}",
                             version_, options_.name, words.revision.to_string(),
                             offer_.revision.to_string())};
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
    if (retention_ == Retention::kSnapshot && state_ == State::kWritten) withdraw(offer_.slot);
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
  const MemberId member_;
  const pid_t owner_pid_;
  Retention retention_;
  std::vector<uint64_t> offered_;  // per slot: the version in it that readers may know of; 0: none
  uint64_t published_ = 0;         // the last one
  State state_ = State::kIdle;
  uint64_t version_ = 0;  // that is being written
  bool opened_ = false;   // it, at the coordinator
  Offer offer_;           // kWritten
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
      auto weights,
      ServedWeights::open(
          transport, control, layout, std::move(bound),
          {.fingerprint_threads = options.fingerprint_threads,
           .keep_tables_fresh = true,
           .snapshot_slots = options.snapshot_slots,
           .snapshot_place = options.snapshot_place,
           .snapshot_limits = {.gigabytes_per_second = options.snapshot_gigabytes_per_second}}));
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
  return std::unique_ptr<Publisher>(new SlotPublisher(
      transport, control, options, std::move(weights), std::move(revision), member));
}

}  // namespace transfuse

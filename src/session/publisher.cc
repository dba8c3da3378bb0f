// The publishing side of a version's life, in place.
#include "transfuse/publisher.h"

#include <unistd.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/log.h"
#include "session/memory.h"
#include "session/served_weights.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

class InPlacePublisher final : public Publisher {
 public:
  InPlacePublisher(Control& control, PublisherOptions options,
                   std::unique_ptr<ServedWeights> weights, MemberId member)
      : control_(control),
        options_(std::move(options)),
        weights_(std::move(weights)),
        member_(member),
        owner_pid_(getpid()) {
    weights_->serve(member_);
  }

  ~InPlacePublisher() override {
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
    if (state_ == State::kWriting || state_ == State::kWritten) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("begin_write({}) while version {} is being written: publish or "
                               "abort it first",
                               version, version_)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(
        const DrainOutcome drained,
        control_.begin_write(member_, version, Deadline::after_ms(options_.drain_ms)));
    weights_->begin_write();
    state_ = State::kWriting;
    version_ = version;
    return WriteTiming{.waited_us = drained.waited_us, .revoked = drained.revoked};
  }

  Result<void> publish(uint64_t version) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    if ((state_ != State::kWriting && state_ != State::kWritten) || version != version_) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("publish({}) without begin_write({}): {}", version, version,
                               state_ == State::kIdle || state_ == State::kPublished
                                   ? "no version is being written"
                                   : fmt::format("version {} is being written", version_))};
    }
    if (state_ == State::kWriting) {
      generation_ = weights_->end_write();
      state_ = State::kWritten;
    }
    // After a failure here the bytes are complete: publish() may be called again.
    TRANSFUSE_RETURN_IF_ERROR(control_.publish(member_, version, generation_));
    state_ = State::kPublished;
    return {};
  }

  Result<void> abort_write(std::string_view reason) override {
    TRANSFUSE_RETURN_IF_ERROR(check_usable());
    if (state_ != State::kWriting && state_ != State::kWritten) {
      return Error{ErrorCode::kInvalidArgument, "abort_write() while no version is being written"};
    }
    weights_
        ->begin_write();  // stays odd, or becomes odd again: nothing of this version is readable
    state_ = State::kIdle;
    return control_.abort_version(member_, version_, reason);
  }

  uint64_t version() const override { return state_ == State::kPublished ? version_ : 0; }

  Result<void> close() override {
    if (closed_ || getpid() != owner_pid_) return {};
    closed_ = true;
    weights_->stop_serving();
    weights_->begin_write();
    if (state_ == State::kWriting || state_ == State::kWritten) {
      auto aborted = control_.abort_version(member_, version_, "publisher closed while writing");
      auto left = control_.leave(member_);
      return aborted ? std::move(left) : std::move(aborted);
    }
    return control_.leave(member_);
  }

 private:
  enum class State { kIdle, kWriting, kWritten, kPublished };

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

  Control& control_;
  const PublisherOptions options_;
  std::unique_ptr<ServedWeights> weights_;
  const MemberId member_;
  const pid_t owner_pid_;
  State state_ = State::kIdle;
  uint64_t version_ = 0;
  Generation generation_;
  bool closed_ = false;
};

}  // namespace

Result<std::unique_ptr<Publisher>> Publisher::open(Transport& transport, Control& control,
                                                   const Layout& layout,
                                                   std::vector<ParameterMemory> memory,
                                                   const PublisherOptions& options) {
  if (options.name.empty() || options.model.empty() || options.source_count == 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a publisher needs a model, a name and at least one source; found "
                             "model '{}', name '{}', source_count {}",
                             options.model, options.name, options.source_count)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(BoundMemory bound,
                             BoundMemory::open(transport, layout, memory, options.arenas));
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto weights, ServedWeights::open(transport, control, layout, std::move(bound),
                                        {.fingerprint_threads = options.fingerprint_threads,
                                         .keep_tables_fresh = true}));
  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.role = MemberRole::kSource;
  registration.model = options.model;
  registration.name = options.name;
  registration.source_count = options.source_count;
  registration.incarnation = weights->incarnation();
  registration.layout = layout.digest();
  TRANSFUSE_ASSIGN_OR_RETURN(registration.descriptor, weights->descriptor(options.token));
  TRANSFUSE_ASSIGN_OR_RETURN(const MemberId member, control.join(registration));
  return std::unique_ptr<Publisher>(
      new InPlacePublisher(control, options, std::move(weights), member));
}

}  // namespace transfuse

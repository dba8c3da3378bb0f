// Control over gRPC: every call of the interface as one call of the service, what was sent once
// kept here.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "control/lease_table.h"
#include "rpc/connection.h"
#include "rpc/convert.h"
#include "rpc/lease_reply.h"
#include "rpc/rpc.h"
#include "rpc/version_stream.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

// Who leaves is missed by its silence too: a coordinator that is stuck holds up no destructor.
constexpr int64_t kLongestLeaveMs = 1000;
constexpr size_t kMaxCachedLayouts = 4096;
constexpr uint64_t kMaxCachedDescriptorBytes = uint64_t{64} << 20;

// A wait ends at the coordinator a little before the deadline, so that its answer, which says what
// was waited for, is here in time.
int64_t wait_us(Deadline deadline) {
  constexpr Duration kMargin = std::chrono::milliseconds(100);
  const Duration left = deadline.remaining();
  return (left - std::min(left / 10, kMargin)) / std::chrono::microseconds(1);
}

// The sources of a model as of one roster of one life of the coordinator.
struct Roster {
  uint64_t epoch = 0;
  uint64_t number = 0;
  std::map<uint64_t, MemberInfo> sources;
};

// Safe to call from any thread.
class RpcControl final : public Control {
 public:
  explicit RpcControl(std::shared_ptr<Connection> connection)
      : connection_(std::move(connection)) {}
  ~RpcControl() override {
    if (connection_->in_owner_process()) {
      connection_->close();
    } else {
      // Deliberately leaked: gRPC's threads do not exist in a forked child, nothing may wait for
      // them.
      new std::shared_ptr<Connection>(std::move(connection_));
    }
  }

  Result<void> put_layout(const Layout& layout) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    remember(layout);
    std::string bytes;
    // A large layout travels only where it is not known.
    if (encode(layout).size() <= kSmallLayoutBytes) bytes = encode(layout);
    const auto put = [&](wire::PutLayoutReply* reply) {
      return connection_->call(
          "put_layout", &Stub::PutLayout, std::nullopt, connection_->default_deadline(),
          [&](wire::PutLayoutRequest& request, const Link&, bool) {
            to_wire(layout.digest(), request.mutable_digest());
            request.set_layout(bytes);
          },
          reply);
    };
    wire::PutLayoutReply reply;
    TRANSFUSE_RETURN_IF_ERROR(put(&reply));
    if (reply.known() || !bytes.empty()) return {};
    bytes = encode(layout);
    return put(&reply);
  }

  Result<Layout> get_layout(const Digest& digest, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    if (auto known = find_layout(digest)) return *known;
    wire::GetLayoutReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "get_layout", &Stub::GetLayout, std::nullopt, deadline,
        [&](wire::GetLayoutRequest& request, const Link&, bool) {
          to_wire(digest, request.mutable_digest());
        },
        &reply));
    const std::string& bytes = reply.layout();
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout,
                               decode_layout(std::as_bytes(std::span(bytes.data(), bytes.size()))));
    if (layout.digest() != digest) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("layout {} was asked for, {} came", digest.to_string(),
                               layout.digest().to_string())};
    }
    remember(layout);
    return layout;
  }

  Result<MemberId> join(const Registration& registration) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_new(registration));
    uint64_t epoch = 0;
    const JoinRequest join = connection_->join_request(registration);
    wire::JoinReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "join", &Stub::Join, std::nullopt, connection_->default_deadline(),
        [&](wire::JoinRequest& request, const Link& link, bool again) {
          epoch = link.epoch;
          to_wire(join, &request);
          if (again) request.mutable_resume();  // the answer may be what was lost, not the request
        },
        &reply));
    return connection_->add_member(LocalMember{.registration = registration,
                                               .layout = find_layout(registration.layout),
                                               .state = {.id = reply.member()},
                                               .epoch = epoch,
                                               .refused = std::nullopt,
                                               .events = {}});
  }

  Result<void> leave(MemberId member) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    const auto removed = connection_->remove_member(member);
    if (!removed) {
      return Error{ErrorCode::kNotFound, fmt::format("this control handle has no member {}",
                                                     static_cast<uint64_t>(member))};
    }
    wire::Done done;
    auto left = connection_->call(
        "leave", &Stub::Leave, std::nullopt,
        connection_->default_deadline().earlier(Deadline::after_ms(kLongestLeaveMs)),
        [&](wire::LeaveRequest& request, const Link&, bool) {
          request.set_member(removed->state.id);
        },
        &done);
    // Gone already: its time ran out, or its coordinator died.
    if (!left && left.error().code == ErrorCode::kNotFound) return {};
    return left;
  }

  Result<std::string> describe(uint64_t member, uint64_t incarnation, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    {
      const MutexLock lock(mutex_);
      const auto known = descriptors_.find({member, incarnation});
      if (known != descriptors_.end()) return known->second;
    }
    wire::DescribeReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "describe", &Stub::Describe, std::nullopt, deadline,
        [&](wire::DescribeRequest& request, const Link&, bool) {
          request.set_member(member);
          request.set_incarnation(incarnation);
        },
        &reply));
    const MutexLock lock(mutex_);
    if (descriptor_bytes_ + reply.description().size() > kMaxCachedDescriptorBytes) {
      descriptors_.clear();  // asked for again where still needed
      descriptor_bytes_ = 0;
    }
    descriptor_bytes_ += reply.description().size();
    descriptors_[{member, incarnation}] = reply.description();
    return reply.description();
  }

  Result<std::vector<MemberInfo>> members(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::MembersReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "members", &Stub::Members, std::nullopt, connection_->default_deadline(),
        [&](wire::ModelRequest& request, const Link&, bool) {
          request.set_model(std::string(model));
        },
        &reply));
    std::vector<MemberInfo> members;
    for (const wire::Member& each : reply.members()) {
      TRANSFUSE_ASSIGN_OR_RETURN(MemberInfo member, from_wire(each));
      members.push_back(std::move(member));
    }
    return members;
  }

  Result<std::vector<VersionInfo>> versions(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::VersionsReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "versions", &Stub::Versions, std::nullopt, connection_->default_deadline(),
        [&](wire::ModelRequest& request, const Link&, bool) {
          request.set_model(std::string(model));
        },
        &reply));
    std::vector<VersionInfo> versions;
    for (const wire::Version& each : reply.versions()) {
      TRANSFUSE_ASSIGN_OR_RETURN(VersionInfo version, from_wire(each));
      versions.push_back(std::move(version));
    }
    return versions;
  }

  Result<std::vector<VersionEvent>> history(std::string_view model, uint64_t version) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::HistoryReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "history", &Stub::History, std::nullopt, connection_->default_deadline(),
        [&](wire::HistoryRequest& request, const Link&, bool) {
          request.set_model(std::string(model));
          request.set_version(version);
        },
        &reply));
    std::vector<VersionEvent> events;
    for (const wire::VersionEvent& each : reply.events()) events.push_back(from_wire(each));
    return events;
  }

  Result<std::vector<GroupInfo>> groups(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::GroupsReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "groups", &Stub::Groups, std::nullopt, connection_->default_deadline(),
        [&](wire::ModelRequest& request, const Link&, bool) {
          request.set_model(std::string(model));
        },
        &reply));
    std::vector<GroupInfo> groups;
    for (const wire::Group& each : reply.groups()) {
      TRANSFUSE_ASSIGN_OR_RETURN(GroupInfo group, from_wire(each));
      groups.push_back(std::move(group));
    }
    return groups;
  }

  Result<DrainOutcome> begin_write(MemberId source, const WriteRequest& wanted,
                                   Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    // The deadline is the readers'. That they were revoked at it is an answer, which needs time.
    const Deadline answer_by(deadline.at() +
                             std::chrono::milliseconds(connection_->control().call_deadline_ms));
    wire::BeginWriteReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "begin_write", &Stub::BeginWrite, source, answer_by,
        [&](wire::BeginWriteRequest& request, const Link&, bool) {
          request.set_source(connection_->coordinator_id(source));
          to_wire(wanted, &request);
          request.set_timeout_us(deadline.remaining() / std::chrono::microseconds(1));
        },
        &reply));
    connection_->change_member(source, [&](LocalMember& member) {
      member.state.writing = wanted.version;
      std::erase_if(member.state.offers,
                    [&](const Offer& offer) { return offer.version == reply.replaced(); });
    });
    return DrainOutcome{
        .revoked = reply.revoked(), .waited_us = reply.waited_us(), .replaced = reply.replaced()};
  }

  Result<void> publish(MemberId source, const Offer& offer) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::Done done;
    auto published = connection_->call(
        "publish", &Stub::Publish, source, connection_->default_deadline(),
        [&](wire::PublishRequest& request, const Link&, bool) {
          request.set_source(connection_->coordinator_id(source));
          to_wire(offer, request.mutable_offer());
        },
        &done);
    bool fresh = false;
    connection_->change_member(
        source, [&](LocalMember& member) { fresh = member.state.last_published < offer.version; });
    // An earlier attempt, or an earlier call, got through, and only its answer was lost.
    const bool landed_before =
        fresh && !published && published.error().code == ErrorCode::kAlreadyExists;
    if (!published && !landed_before) return published;
    connection_->change_member(source, [&](LocalMember& member) {
      member.state.last_published = offer.version;
      std::erase_if(member.state.offers,
                    [&](const Offer& each) { return each.version == offer.version; });
      member.state.offers.push_back(offer);
      member.state.writing = 0;
    });
    return {};
  }

  Result<void> abort_version(MemberId source, uint64_t version, std::string_view reason) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::Done done;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "abort_version", &Stub::AbortVersion, source, connection_->default_deadline(),
        [&](wire::AbortVersionRequest& request, const Link&, bool) {
          request.set_source(connection_->coordinator_id(source));
          request.set_version(version);
          request.set_reason(std::string(reason));
        },
        &done));
    connection_->change_member(source, [](LocalMember& member) { member.state.writing = 0; });
    return {};
  }

  Result<Lease> acquire(MemberId target, const VersionRequest& wanted, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    const std::string model = model_of(target);
    std::shared_ptr<const Roster> known;
    uint64_t epoch = 0;
    wire::AcquireReply reply;
    auto acquired = connection_->call(
        "acquire", &Stub::Acquire, target, deadline,
        [&](wire::AcquireRequest& request, const Link& link, bool) {
          epoch = link.epoch;
          known = find_roster(model, epoch);
          request.set_target(connection_->coordinator_id(target));
          to_wire(wanted, &request);
          request.set_timeout_us(wait_us(deadline));
          request.set_roster(known ? known->number : 0);
        },
        &reply);
    if (!acquired) {
      Error error = std::move(acquired).error();
      // Waiting for a version is waiting for its coordinator, too: one that is started again in
      // time is no failure, one that is not means that the version did not come.
      if (error.code == ErrorCode::kUnavailable && deadline.passed()) {
        error.code = ErrorCode::kDeadlineExceeded;
      }
      return error;
    }
    connection_->add_lease(LeaseId{reply.lease()}, target, reply.version());
    connection_->change_member(target, [&](LocalMember& member) {
      member.state.last_round = reply.round();
      member.round_version = reply.version();
    });
    auto lease = lease_of(reply, model, epoch, std::move(known));
    if (!lease) {
      // The first error is the one to tell.
      (void)release(LeaseId{reply.lease()}, {.end = LeaseEnd::kUnchanged}, deadline);
    }
    return lease;
  }

  Result<void> release(LeaseId lease, const LeaseOutcome& outcome, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    const auto held = connection_->take_lease(lease);
    if (!held) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("lease {:x} was released before, or never granted to this handle",
                               static_cast<uint64_t>(lease))};
    }
    connection_->change_member(held->first, [&](LocalMember& member) {
      if (outcome.end == LeaseEnd::kLanded) member.state.landed = held->second;
      if (outcome.end == LeaseEnd::kLost) member.state.landed = 0;
    });
    wire::Done done;
    auto released = connection_->call(
        "release", &Stub::Release, held->first, deadline,
        [&](wire::ReleaseRequest& request, const Link&, bool) {
          request.set_target(connection_->coordinator_id(held->first));
          request.set_lease(static_cast<uint64_t>(lease));
          request.set_version(held->second);
          to_wire(outcome, &request);
        },
        &done);
    // Revoked, run out, or given by a coordinator that has died: the member was told by an event,
    // and the generation of the source says whether what was read is whole.
    if (!released && released.error().code == ErrorCode::kNotFound) return {};
    return released;
  }

  Result<void> hold(MemberId target, uint64_t version, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    connection_->change_member(target, [&](LocalMember& member) { member.state.landed = version; });
    wire::Done done;
    return connection_->call(
        "hold", &Stub::Hold, target, deadline,
        [&](wire::HoldRequest& request, const Link&, bool) {
          request.set_target(connection_->coordinator_id(target));
          request.set_version(version);
        },
        &done);
  }

  Result<void> vote(MemberId target, uint64_t round, bool ready, std::string_view reason,
                    Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    // Kept before it is sent: a coordinator that dies may have counted it.
    connection_->change_member(target, [&](LocalMember& member) {
      if (!ready || member.state.last_round != round) return;
      member.state.voted_round = round;
      member.state.voted_version = member.round_version;
      member.state.told_commit = false;
      member.state.applied = false;
    });
    wire::Done done;
    return connection_->call(
        "vote", &Stub::Vote, target, deadline,
        [&](wire::VoteRequest& request, const Link&, bool) {
          request.set_target(connection_->coordinator_id(target));
          request.set_round(round);
          request.set_ready(ready);
          request.set_reason(std::string(reason));
        },
        &done);
  }

  Result<Decision> decision(MemberId target, uint64_t round, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    while (true) {
      uint64_t epoch = 0;
      wire::DecideReply reply;
      TRANSFUSE_RETURN_IF_ERROR(connection_->call(
          "decision", &Stub::Decide, target, deadline,
          [&](wire::DecideRequest& request, const Link& link, bool) {
            epoch = link.epoch;
            request.set_target(connection_->coordinator_id(target));
            request.set_round(round);
            request.set_timeout_us(wait_us(deadline));
          },
          &reply));
      // A coordinator that was told, in the meantime, that this rank knows of no commit decides
      // anew; only what is kept here before can be acted on.
      const bool kept = connection_->change_member_of(epoch, target, [&](LocalMember& member) {
        member.state.told_commit = reply.commit();
        if (!reply.commit()) member.state.voted_round = 0;
      });
      if (kept) return Decision{.commit = reply.commit(), .reason = reply.reason()};
    }
  }

  Result<void> applied(MemberId target, uint64_t round, uint64_t version,
                       Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    connection_->change_member(target, [&](LocalMember& member) {
      member.state.landed = version;
      member.state.applied = member.state.voted_round == round;
    });
    wire::Done done;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "applied", &Stub::Applied, target, deadline,
        [&](wire::AppliedRequest& request, const Link&, bool) {
          request.set_target(connection_->coordinator_id(target));
          request.set_round(round);
          request.set_version(version);
          request.set_timeout_us(wait_us(deadline));
        },
        &done));
    connection_->change_member(target, [&](LocalMember& member) {
      if (member.state.voted_round != round) return;
      member.state.voted_round = 0;
      member.state.told_commit = false;
      member.state.applied = false;
    });
    return {};
  }

  Result<std::unique_ptr<Watch>> watch(std::string_view model) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    return open_watch(connection_, model);
  }

  Result<void> request_table(MemberId from, uint64_t holder, const TableRequest& wanted,
                             Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::Done done;
    return connection_->call(
        "request_table", &Stub::RequestTable, from, deadline,
        [&](wire::RequestTableRequest& request, const Link&, bool) {
          request.set_from(connection_->coordinator_id(from));
          request.set_holder(holder);
          to_wire(wanted, request.mutable_table());
        },
        &done);
  }

  Result<void> put_table(MemberId holder, const Digest& plan_key,
                         std::string_view descriptor) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::Done done;
    return connection_->call(
        "put_table", &Stub::PutTable, holder, connection_->default_deadline(),
        [&](wire::PutTableRequest& request, const Link&, bool) {
          request.set_holder(connection_->coordinator_id(holder));
          to_wire(plan_key, request.mutable_plan_key());
          request.set_description(std::string(descriptor));
        },
        &done);
  }

  Result<std::string> get_table(uint64_t holder, const Digest& plan_key,
                                Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    wire::GetTableReply reply;
    TRANSFUSE_RETURN_IF_ERROR(connection_->call(
        "get_table", &Stub::GetTable, std::nullopt, deadline,
        [&](wire::GetTableRequest& request, const Link&, bool) {
          request.set_holder(holder);
          to_wire(plan_key, request.mutable_plan_key());
          request.set_timeout_us(wait_us(deadline));
        },
        &reply));
    return std::move(*reply.mutable_description());
  }

  Result<std::optional<MemberEvent>> next_event(MemberId member, Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    return connection_->next_event(member, deadline);
  }

 private:
  using Stub = wire::Coordinator::Stub;
  static constexpr size_t kSmallLayoutBytes = 4096;

  void remember(const Layout& layout) {
    const MutexLock lock(mutex_);
    if (layouts_.size() >= kMaxCachedLayouts) layouts_.clear();
    layouts_.insert_or_assign(layout.digest(), layout);
  }
  std::optional<Layout> find_layout(const Digest& digest) {
    const MutexLock lock(mutex_);
    const auto found = layouts_.find(digest);
    if (found == layouts_.end()) return std::nullopt;
    return found->second;
  }
  std::string model_of(MemberId member) {
    std::string model;
    connection_->change_member(member,
                               [&](const LocalMember& found) { model = found.registration.model; });
    return model;
  }
  std::shared_ptr<const Roster> find_roster(const std::string& model, uint64_t epoch) {
    const MutexLock lock(mutex_);
    const auto found = rosters_.find(model);
    if (found == rosters_.end() || found->second->epoch != epoch) return nullptr;
    return found->second;
  }

  Result<Lease> lease_of(const wire::AcquireReply& reply, const std::string& model, uint64_t epoch,
                         std::shared_ptr<const Roster> known) {
    if (!known || reply.roster() != known->number) {
      Roster roster{.epoch = epoch, .number = reply.roster(), .sources = {}};
      for (const wire::Member& each : reply.members()) {
        TRANSFUSE_ASSIGN_OR_RETURN(MemberInfo member, from_wire(each));
        roster.sources.emplace(member.id, std::move(member));
      }
      known = std::make_shared<const Roster>(std::move(roster));
      const MutexLock lock(mutex_);
      rosters_[model] = known;
    }
    return lease_from_wire(reply, known->sources, model);
  }

  std::shared_ptr<Connection> connection_;  // shared with watches
  Mutex mutex_;
  // abseil's macro of that name, below gRPC, is taken for the one of base/mutex.h.
  std::map<Digest, Layout> layouts_ GUARDED_BY(mutex_);  // NOLINT(misc-include-cleaner)
  std::map<std::pair<uint64_t, uint64_t>, std::string> descriptors_ GUARDED_BY(mutex_);
  uint64_t descriptor_bytes_ GUARDED_BY(mutex_) = 0;
  // shared: a lease is put together after the roster may have been replaced
  std::map<std::string, std::shared_ptr<const Roster>> rosters_ GUARDED_BY(mutex_);
};

}  // namespace

Result<std::unique_ptr<Control>> connect_control(const ConnectOptions& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto connection, Connection::open(options));
  return std::unique_ptr<Control>(std::make_unique<RpcControl>(std::move(connection)));
}

Result<CoordinatorInfo> find_coordinator(const ConnectOptions& options) {
  return Connection::find(options);
}

}  // namespace transfuse

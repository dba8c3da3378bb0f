// Leases: which version fits, who gets it, when it ends, and what a waiter is told in vain.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

std::string asked_for(const VersionRequest& request) {
  switch (request.kind) {
    case VersionRequest::Kind::kNewest:
      return "the newest version";
    case VersionRequest::Kind::kExactly:
      return fmt::format("version {}", request.version);
    case VersionRequest::Kind::kAtLeast:
      return fmt::format("version {} or later", request.version);
  }
  check_failed(__FILE__, __LINE__, "a VersionRequest::Kind outside the enum");
}

constexpr size_t kMaxReasonsBytes = 2048;  // of all sources together, in one message
constexpr size_t kMaxStoryBytes = 512;     // likewise, in an entry of the story of a version

std::string shortened(std::string text) {
  if (text.size() <= kMaxStoryBytes) return text;
  return text.substr(0, kMaxStoryBytes) + "...";
}

}  // namespace

void LeaseTable::acquire(WaiterId waiter, uint64_t target, const VersionRequest& request,
                         TimePoint deadline, TimePoint now) {
  const auto refuse = [&](Error error) {
    effects_.emplace_back(LeaseReply{.waiter = waiter, .result = std::move(error)});
  };
  const Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return refuse(no_member(target));
  if (request.kind != VersionRequest::Kind::kNewest && request.version == 0) {
    return refuse(Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{} asks for version 0, versions begin at 1", member->registration.name)});
  }
  if (waiters_.size() >= limits_.waiters || member->waiters.size() >= limits_.waiters_per_member) {
    return refuse(
        Error{ErrorCode::kResourceExhausted,
              fmt::format("{} cannot wait: {} calls wait at the coordinator, {} of them "
                          "its own",
                          member->registration.name, waiters_.size(), member->waiters.size())});
  }
  if (auto checked = check_demand(member->registration.name, request.demand); !checked) {
    return refuse(std::move(checked).error());
  }
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kLease,
                        .member = target,
                        .started = now,
                        .deadline = deadline,
                        .request = request});
  const std::string& model = member->registration.model;
  if (!try_grant(id, now)) {
    models_.find(model)->second.waiters.insert(id);
  } else if (!member->registration.group.empty()) {
    serve_waiters(model, now);  // a round may have ended
  }
}

std::optional<uint64_t> LeaseTable::choose(const Model& model,
                                           const VersionRequest& request) const {
  for (auto at = model.versions.rbegin(); at != model.versions.rend(); ++at) {
    if (at->second.state != VersionState::kReady || at->second.closing) continue;
    if (!any_fits(at->second, request.demand)) continue;
    switch (request.kind) {
      case VersionRequest::Kind::kNewest:
        return at->first;
      case VersionRequest::Kind::kAtLeast:
        if (at->first >= request.version) return at->first;
        break;
      case VersionRequest::Kind::kExactly:
        if (at->first == request.version) return at->first;
        break;
    }
  }
  return std::nullopt;
}

// The error, if exactly this version can never come.
std::optional<Error> LeaseTable::never(const std::string& name, const Model& model,
                                       const VersionRequest& request) const {
  if (request.kind != VersionRequest::Kind::kExactly) return std::nullopt;
  const auto gone = [&](std::string_view why) {
    return Error{ErrorCode::kVersionGone, fmt::format("version {} of model {} will not come: {}",
                                                      request.version, name, why)};
  };
  const auto found = model.versions.find(request.version);
  if (found != model.versions.end()) {
    if (found->second.state == VersionState::kReady && !any_fits(found->second, request.demand)) {
      return no_fitting_source(name, request.version, found->second, request.demand);
    }
    if (!finished(found->second.state)) return std::nullopt;
    return gone(fmt::format("it was {} ({})", version_state_name(found->second.state),
                            found->second.reason));
  }
  for (const auto& [number, version] : model.versions) {
    if (number > request.version && version.state != VersionState::kOpen) {
      return gone(
          fmt::format("version {} is {} already", number, version_state_name(version.state)));
    }
  }
  if (request.version <= model.floor) {
    return gone(fmt::format("versions up to {} have ended", model.floor));
  }
  for (const auto& [source, id] : model.sources) {
    const uint64_t published = members_.at(id).last_published;
    if (published > request.version) {
      return gone(fmt::format("source {} has published version {}", source, published));
    }
  }
  return std::nullopt;
}

// Why what a participant offers does not fit; nullopt: it does.
std::optional<std::string> LeaseTable::misfit_of(const Participant& part,
                                                 const Demand& demand) const {
  const Registration& registration = members_.at(part.member).registration;
  return misfit(demand, Claim{.kind = registration.kind,
                              .source = registration.metadata,
                              .version = part.offer.metadata,
                              .revision = part.offer.revision});
}

bool LeaseTable::any_fits(const Version& version, const Demand& demand) const {
  if (demand.empty()) return true;
  return std::ranges::any_of(version.participants, [&](const auto& each) {
    const Participant& part = each.second;
    return part.member != 0 && part.published && !misfit_of(part, demand);
  });
}

Error LeaseTable::no_fitting_source(const std::string& name, uint64_t number,
                                    const Version& version, const Demand& demand) const {
  std::string reasons;
  size_t more = 0;
  for (const auto& [source, part] : version.participants) {
    if (part.member == 0 || !part.published) continue;
    const auto reason = misfit_of(part, demand);
    if (!reason) continue;
    if (reasons.size() > kMaxReasonsBytes) {
      ++more;
      continue;
    }
    reasons += fmt::format("{}source '{}': {}", reasons.empty() ? "" : "; ", source, *reason);
  }
  if (more > 0) reasons += fmt::format("; and {} more", more);
  return Error{ErrorCode::kNoFittingSource,
               fmt::format("version {} of model {} is READY, but no source of it fits: {}", number,
                           name, reasons)};
}

// The error of a wait that has ended, if there is a version that only the demand keeps away.
std::optional<Error> LeaseTable::none_fits(const std::string& name, const Model& model,
                                           const VersionRequest& request) const {
  if (request.demand.empty()) return std::nullopt;
  VersionRequest anything = request;
  anything.demand = {};
  const auto number = choose(model, anything);
  if (!number) return std::nullopt;
  const Version& version = model.versions.at(*number);
  if (any_fits(version, request.demand)) return std::nullopt;  // something else keeps it away
  return no_fitting_source(name, *number, version, request.demand);
}

// Answers the waiter if its version is there, or can never come.
bool LeaseTable::try_grant(uint64_t waiter_id, TimePoint now) {
  const Waiter& waiter = waiters_.at(waiter_id);
  Member& target = members_.at(waiter.member);
  if (Group* const group = group_of(target)) return try_grant_in_group(waiter_id, *group, now);
  const auto at = models_.find(target.registration.model);
  Model& model = at->second;
  const auto number = choose(model, waiter.request);
  if (!number) {
    auto error = never(at->first, model, waiter.request);
    if (error) fail_waiter(waiter_id, *error);
    return error.has_value();
  }
  grant(waiter_id, *number, 0, now);
  return true;
}

// `round`: of the target's group. Always answers the waiter.
void LeaseTable::grant(uint64_t waiter_id, uint64_t number, uint64_t round, TimePoint now) {
  const Waiter waiter = waiters_.at(waiter_id);
  Member& target = members_.at(waiter.member);
  const auto at = models_.find(target.registration.model);
  Model& model = at->second;
  if (target.leases.size() >= limits_.leases_per_member) {
    return fail_waiter(waiter_id,
                       Error{ErrorCode::kResourceExhausted,
                             fmt::format("{} holds {} leases already; release() them first",
                                         target.registration.name, target.leases.size())});
  }
  Version& version = model.versions.at(number);
  const uint64_t id = new_id();
  Lease lease{.id = LeaseId{id},
              .version = number,
              .round = round,
              .ttl_ms = target.lease_ttl / std::chrono::milliseconds(1),
              .sources = {}};
  std::string refused;
  for (const auto& [name, part] : version.participants) {
    if (part.member == 0 || !part.published) continue;
    MemberInfo source = info(members_.at(part.member));
    if (auto reason = misfit_of(part, waiter.request.demand)) {
      refused += fmt::format("; not from {}: {}", name, *reason);
      lease.refused.push_back({.member = source.id,
                               .source = name,
                               .layout = source.layout,
                               .reason = std::move(*reason)});
      continue;
    }
    source.version = number;
    source.version_metadata = part.offer.metadata;
    source.revision = part.offer.revision;
    source.generation = part.offer.generation;
    source.slot = part.offer.slot;
    lease.sources.push_back(std::move(source));
  }
  if (round != 0) target.last_round = round;
  version.leases.insert(id);
  target.leases.insert(id);
  const TimePoint end = now + target.lease_ttl;
  leases_.emplace(id, HeldLease{.holder = target.id,
                                .model = at->first,
                                .version = number,
                                .renewed = now,
                                .timer = end});
  timers_.emplace(end, TimerKind::kLease, id);
  remove_waiter(waiter_id);
  effects_.emplace_back(LeaseReply{.waiter = WaiterId{waiter_id},
                                   .result = std::move(lease),
                                   .target = target.id,
                                   .roster = model.roster});
  note(at->first, number, target.registration.name,
       fmt::format("leased, after {} us{}", (now - waiter.started) / std::chrono::microseconds(1),
                   shortened(refused)),
       now);
}

void LeaseTable::serve_waiters(const std::string& model, TimePoint now) {
  // To serve one rank may end the round that another waits for.
  for (bool served = true; served;) {
    served = false;
    const std::set<uint64_t> waiting = models_.find(model)->second.waiters;
    for (const uint64_t waiter : waiting) served = try_grant(waiter, now) || served;
  }
}

Result<void> LeaseTable::release(uint64_t target, LeaseId lease, uint64_t version,
                                 const LeaseOutcome& outcome, TimePoint now) {
  Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return no_member(target);
  if (outcome.end == LeaseEnd::kLanded) land(*member, version, run_of(*member));
  if (outcome.end == LeaseEnd::kLost) land(*member, 0, 0);
  const std::string& model = member->registration.model;
  if (outcome.summary.version != 0) {
    member->last_refit = outcome.summary;
    note(model, version, member->registration.name,
         fmt::format("{} in {} us ({} bytes in {} us, {} attempts)",
                     outcome.end == LeaseEnd::kLanded ? "landed" : "staged",
                     outcome.summary.total_us, outcome.summary.size_bytes,
                     outcome.summary.transfer_us, outcome.summary.attempts),
         now);
  } else {
    note(model, version, member->registration.name,
         outcome.end == LeaseEnd::kLost ? "gave the lease back; its parameters hold no version"
                                        : "gave the lease back",
         now);
  }
  if (Group* const group = group_of(*member)) settle_group(model, *group, now);
  const auto id = static_cast<uint64_t>(lease);
  if (!member->leases.contains(id)) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("{} holds no lease {:x}: it was released, revoked, or ran out",
                             member->registration.name, id)};
  }
  end_lease(id, now);
  return {};
}

void LeaseTable::land(Member& target, uint64_t version, uint64_t run) {
  target.landed = version;
  target.landed_run = run;
}

uint64_t LeaseTable::run_of(const Member& member) const {
  return models_.find(member.registration.model)->second.run;
}

Result<void> LeaseTable::hold(uint64_t target, uint64_t version, TimePoint now) {
  Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return no_member(target);
  if (member->landed != version) land(*member, version, run_of(*member));
  const std::string& model = member->registration.model;
  if (version != 0) note(model, version, member->registration.name, "holds it", now);
  if (Group* const group = group_of(*member)) settle_group(model, *group, now);
  return {};
}

// For kDeadlineExceeded: what was waited for, and whose turn it was.
std::string LeaseTable::who_is_missing(const std::string& name, const Model& model,
                                       const Member& target, const VersionRequest& request) const {
  const auto group = model.groups.find(target.registration.group);
  if (group != model.groups.end() && group->second.round) {
    const Round& round = *group->second.round;
    if (round.committed) {
      return fmt::format("group {}: version {} is committed, {}", group->first, round.version,
                         who_holds_not(group->second, round.version));
    }
    if (round.recovered) {
      return fmt::format(
          "group {}: what a coordinator that is gone decided about version {} is "
          "not known before every rank is back",
          group->first, round.version);
    }
  }
  std::string out = fmt::format("{} of model {} is not READY: ", asked_for(request), name);
  if (model.sources.empty()) return out + "no source has joined";
  const uint32_t expected = members_.at(model.sources.begin()->second).registration.source_count;
  const Version* open = nullptr;
  for (const auto& [number, version] : model.versions) {
    const bool fits = request.kind == VersionRequest::Kind::kNewest ||
                      (request.kind == VersionRequest::Kind::kExactly ? number == request.version
                                                                      : number >= request.version);
    if (!fits || version.state != VersionState::kOpen) continue;
    open = &version;
    out += fmt::format("version {} is OPEN; ", number);
  }
  std::string missing;
  for (const auto& [source, id] : model.sources) {
    const bool published = open != nullptr && open->participants.contains(source) &&
                           open->participants.at(source).published &&
                           open->participants.at(source).member == id;
    if (published) continue;
    const Member& member = members_.at(id);
    missing += fmt::format("{}{} ({})", missing.empty() ? "" : ", ", source,
                           member.writing != 0 ? fmt::format("writing {}", member.writing)
                           : !member.offers.empty()
                               ? fmt::format("offers {}", member.offers.rbegin()->first)
                               : "idle");
  }
  out += "not published by " + (missing.empty() ? "any source that has yet to join" : missing);
  if (model.sources.size() < expected) {
    out += fmt::format("; {} of {} sources have joined", model.sources.size(), expected);
  }
  return out;
}

}  // namespace transfuse

// The life of a version: opened, published by every source, leased, drained, finished.
#include <fmt/format.h>

#include <algorithm>

#include "control/lease_table.h"

namespace transfuse {

namespace {

constexpr size_t kMaxReasonBytes = 1024;

bool finished(VersionState state) {
  return state == VersionState::kRetired || state == VersionState::kAborted;
}

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

}  // namespace

void LeaseTable::begin_write(WaiterId waiter, uint64_t source, uint64_t version, TimePoint deadline,
                             TimePoint now) {
  Member* member = find_member(source, MemberRole::kSource);
  Result<void> possible =
      member == nullptr ? Result<void>(no_member(source)) : check_begin(*member, version);
  if (!possible) {
    effects_.emplace_back(DrainReply{waiter, std::move(possible).error()});
    return;
  }
  const std::string& model = member->registration.model;
  const std::string& name = member->registration.name;
  if (member->drain) {
    fail_waiter(*member->drain,
                Error{ErrorCode::kCancelled,
                      fmt::format("{} called begin_write({}) before an earlier call had ended",
                                  name, version)});
  }
  if (member->writing != 0 && member->writing != version) {
    finish_version(model, member->writing, VersionState::kAborted,
                   fmt::format("source {} went on to version {}", name, version), now);
    member->writing = 0;
  }
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kDrain,
                        .member = source,
                        .started = now,
                        .deadline = deadline,
                        .request = {VersionRequest::Kind::kExactly, version},
                        .drained = member->readable});
  member->drain = id;

  auto& versions = models_.find(model)->second.versions;
  const auto offered = versions.find(member->readable);
  if (offered == versions.end() || finished(offered->second.state)) {
    finish_begin(id, now);
  } else if (offered->second.state == VersionState::kOpen) {
    finish_version(
        model, offered->first, VersionState::kAborted,
        fmt::format("source {} went on to version {} before all had published", name, version),
        now);
    finish_begin(id, now);
  } else {
    offered->second.closing = true;
    offered->second.drains.insert(id);
    drained_if_empty(model, offered->first, now);
  }
}

Result<void> LeaseTable::check_begin(const Member& source, uint64_t version) const {
  const std::string& name = source.registration.name;
  if (version == 0) {
    return Error{ErrorCode::kInvalidArgument, fmt::format("{}: versions begin at 1", name)};
  }
  if (version <= source.last_published) {
    return Error{ErrorCode::kAlreadyExists,
                 fmt::format("source {} has published version {} already, {} is not above it", name,
                             source.last_published, version)};
  }
  const Model& model = models_.find(source.registration.model)->second;
  const auto found = model.versions.find(version);
  if (found == model.versions.end() || found->second.state == VersionState::kOpen) return {};
  if (found->second.state == VersionState::kReady) {
    return Error{ErrorCode::kAlreadyExists,
                 fmt::format("version {} of model {} is READY already, source {} cannot write it",
                             version, source.registration.model, name)};
  }
  // A job that restarted from a checkpoint counts again from below; those that are gone do not
  // bind it.
  if (!passed_by_live_source(model, version - 1, source.id)) return {};
  return Error{ErrorCode::kVersionGone,
               fmt::format("version {} of model {} was {} ({}), and other sources have published "
                           "it or gone on",
                           version, source.registration.model,
                           version_state_name(found->second.state), found->second.reason)};
}

// True if a live source other than `except` has published a version above `version`.
bool LeaseTable::passed_by_live_source(const Model& model, uint64_t version,
                                       uint64_t except) const {
  return std::any_of(model.sources.begin(), model.sources.end(), [&](const auto& source) {
    return source.second != except && members_.at(source.second).last_published > version;
  });
}

void LeaseTable::open_version(Member& source, uint64_t number) {
  const Registration& registration = source.registration;
  Model& model = models_.find(registration.model)->second;
  auto [at, inserted] = model.versions.try_emplace(number);
  Version& version = at->second;
  const bool opened = inserted || finished(version.state);
  if (opened) {
    version = Version{};
    version.source_count = registration.source_count;
  }
  version.participants[registration.name] =
      Participant{.member = source.id, .incarnation = registration.incarnation, .published = false};
  source.writing = number;
  source.readable = 0;
  if (opened) changed(registration.model, number, version);
}

// The drain of `waiter_id` is over: the new version is open.
void LeaseTable::finish_begin(uint64_t waiter_id, TimePoint now) {
  const Waiter waiter = waiters_.at(waiter_id);
  Member& source = members_.at(waiter.member);
  remove_waiter(waiter_id);
  DrainReply reply{
      .waiter = WaiterId{waiter_id},
      .result = DrainOutcome{.revoked = waiter.revoked,
                             .waited_us = (now - waiter.started) / std::chrono::microseconds(1)}};
  // While this source waited, the version it wants may have ended without it.
  if (auto possible = check_begin(source, waiter.request.version); !possible) {
    source.readable = 0;
    reply.result = std::move(possible).error();
  } else {
    open_version(source, waiter.request.version);
  }
  effects_.emplace_back(std::move(reply));
}

Result<void> LeaseTable::publish(uint64_t source, uint64_t version, const Generation& generation,
                                 TimePoint now) {
  Member* member = find_member(source, MemberRole::kSource);
  if (member == nullptr) return no_member(source);
  const Registration& registration = member->registration;
  if (generation.incarnation == 0 || generation.counter % 2 != 0) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("source {} publishes version {} with generation {:016x}/{}; an "
                    "incarnation other than 0 and an even counter are expected",
                    registration.name, version, generation.incarnation, generation.counter)};
  }
  if (version <= member->last_published) {
    return Error{ErrorCode::kAlreadyExists,
                 fmt::format("source {} publishes version {}, but has published {} before",
                             registration.name, version, member->last_published)};
  }
  if (member->writing != version) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("source {} publishes version {} without begin_write(); it is writing "
                             "{}",
                             registration.name, version,
                             member->writing == 0 ? "nothing" : std::to_string(member->writing))};
  }
  Model& model = models_.find(registration.model)->second;
  const auto found = model.versions.find(version);
  if (found == model.versions.end() || finished(found->second.state)) {
    return Error{ErrorCode::kVersionGone,
                 fmt::format("version {} of model {} was ABORTED before source {} published it: {}",
                             version, registration.model, registration.name,
                             found == model.versions.end() ? "it is no longer remembered"
                                                           : found->second.reason)};
  }
  Participant& participant = found->second.participants[registration.name];
  participant = Participant{.member = source,
                            .incarnation = registration.incarnation,
                            .published = true,
                            .generation = generation};
  member->writing = 0;
  member->last_published = version;
  member->readable = version;
  member->generation = generation;
  maybe_ready(registration.model, version, now);
  return {};
}

void LeaseTable::maybe_ready(const std::string& model, uint64_t number, TimePoint now) {
  Version& version = models_.find(model)->second.versions.at(number);
  if (version.state != VersionState::kOpen) return;
  const auto published =
      std::count_if(version.participants.begin(), version.participants.end(),
                    [](const auto& p) { return p.second.published && p.second.member != 0; });
  if (published < version.source_count) return;
  version.state = VersionState::kReady;
  changed(model, number, version);
  serve_waiters(model, now);
}

Result<void> LeaseTable::abort_version(uint64_t source, uint64_t version, std::string_view reason,
                                       TimePoint now) {
  Member* member = find_member(source, MemberRole::kSource);
  if (member == nullptr) return no_member(source);
  if (member->writing != version || version == 0) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("source {} gives up version {}, but is writing {}", member->registration.name,
                    version, member->writing == 0 ? "nothing" : std::to_string(member->writing))};
  }
  member->writing = 0;
  const std::string model = member->registration.model;
  finish_version(model, version, VersionState::kAborted,
                 fmt::format("source {} gave it up: {}", member->registration.name,
                             reason.substr(0, kMaxReasonBytes)),
                 now);
  return {};
}

// No effect on a version that is finished already.
void LeaseTable::finish_version(const std::string& model_name, uint64_t number, VersionState state,
                                std::string_view reason, TimePoint now) {
  Model& model = models_.find(model_name)->second;
  const auto found = model.versions.find(number);
  if (found == model.versions.end() || finished(found->second.state)) return;
  Version& version = found->second;
  version.state = state;
  version.closing = false;
  version.reason = reason;
  const uint32_t revoked = revoke_leases(version);
  changed(model_name, number, version);

  const std::set<uint64_t> drains = std::exchange(version.drains, {});
  for (const uint64_t drain : drains) {
    waiters_.at(drain).revoked += revoked;
    finish_begin(drain, now);
  }
  size_t count = 0;
  for (const auto& [other, each] : model.versions) count += finished(each.state) ? 1u : 0u;
  for (auto at = model.versions.begin();
       count > limits_.finished_versions && at != model.versions.end();) {
    if (!finished(at->second.state)) {
      ++at;
      continue;
    }
    model.floor = std::max(model.floor, at->first);
    at = model.versions.erase(at);
    --count;
  }
  serve_waiters(model_name, now);
}

uint32_t LeaseTable::revoke_leases(Version& version) {
  const std::set<uint64_t> leases = std::exchange(version.leases, {});
  for (const uint64_t id : leases) {
    const auto found = leases_.find(id);
    Member& holder = members_.at(found->second.holder);
    holder.leases.erase(id);
    timers_.erase({found->second.timer, TimerKind::kLease, id});
    leases_.erase(found);
    effects_.emplace_back(
        MemberNotice{.member = holder.id,
                     .owner = holder.owner,
                     .event = {.kind = MemberEvent::Kind::kRevoked, .table = {}, .epoch = 0}});
  }
  return static_cast<uint32_t>(leases.size());
}

void LeaseTable::end_lease(uint64_t id, TimePoint now) {
  const auto found = leases_.find(id);
  const HeldLease lease = found->second;
  timers_.erase({lease.timer, TimerKind::kLease, id});
  leases_.erase(found);
  members_.at(lease.holder).leases.erase(id);
  models_.find(lease.model)->second.versions.at(lease.version).leases.erase(id);
  drained_if_empty(lease.model, lease.version, now);
}

void LeaseTable::drained_if_empty(const std::string& model, uint64_t number, TimePoint now) {
  const Version& version = models_.find(model)->second.versions.at(number);
  if (!version.closing || !version.leases.empty() || version.drains.empty()) return;
  const Waiter& first = waiters_.at(*version.drains.begin());
  finish_version(model, number, VersionState::kRetired,
                 fmt::format("source {} writes version {}",
                             members_.at(first.member).registration.name, first.request.version),
                 now);
}

// -- sources that come and go --

void LeaseTable::source_gone(const Member& source, std::string_view why, TimePoint now) {
  const Registration& registration = source.registration;
  std::vector<std::pair<uint64_t, VersionState>> ended;
  for (auto& [number, version] : models_.find(registration.model)->second.versions) {
    const auto part = version.participants.find(registration.name);
    if (part == version.participants.end() || part->second.member != source.id) continue;
    part->second.member = 0;
    if (version.state == VersionState::kOpen) {
      ended.emplace_back(number, VersionState::kAborted);
    } else if (version.state == VersionState::kReady &&
               std::none_of(version.participants.begin(), version.participants.end(),
                            [](const auto& p) { return p.second.member != 0; })) {
      ended.emplace_back(number, VersionState::kRetired);
    }
  }
  for (const auto& [number, state] : ended) {
    finish_version(registration.model, number, state,
                   fmt::format("source {} was lost: {}", registration.name, why), now);
    auto& versions = models_.find(registration.model)->second.versions;
    if (const auto at = versions.find(number); at != versions.end() && finished(at->second.state)) {
      at->second.lost = true;
    }
  }
}

// Another process with the name of one that died: what that one wrote is not offered any more, and
// its numbers may come again.
void LeaseTable::drop_versions_of(const Registration& restarted, TimePoint now) {
  const auto found = models_.find(restarted.model);
  if (found == models_.end()) return;
  std::vector<uint64_t> numbers;
  for (const auto& [number, version] : found->second.versions) {
    const auto part = version.participants.find(restarted.name);
    if (part != version.participants.end() && part->second.incarnation != restarted.incarnation) {
      numbers.push_back(number);
    }
  }
  for (const uint64_t number : numbers) {
    auto& versions = found->second.versions;
    const bool ready = versions.at(number).state == VersionState::kReady;
    finish_version(restarted.model, number, ready ? VersionState::kRetired : VersionState::kAborted,
                   fmt::format("source {} has restarted", restarted.name), now);
    const bool bound = passed_by_live_source(found->second, number - 1, 0);
    if (!bound && versions.contains(number) && finished(versions.at(number).state)) {
      versions.erase(number);
    }
  }
  if (!numbers.empty()) found->second.floor = 0;
}

// A version that ended only because this source seemed lost is open again, if nobody has gone on.
bool LeaseTable::revive(const Member& source, uint64_t number) {
  const Registration& registration = source.registration;
  Model& model = models_.find(registration.model)->second;
  for (const auto& [name, id] : model.sources) {
    const Member& other = members_.at(id);
    if (other.last_published > number || other.writing > number) return false;
  }
  const auto at = model.versions.find(number);
  if (at == model.versions.end()) return number > model.floor;
  if (!finished(at->second.state)) return true;
  if (!at->second.lost) return false;
  at->second.state = VersionState::kOpen;
  at->second.lost = false;
  at->second.reason.clear();
  changed(registration.model, number, at->second);
  return true;
}

void LeaseTable::resume_source(Member& source, const Resume& resume, TimePoint now) {
  const Registration& registration = source.registration;
  source.last_published = std::max(resume.last_published, resume.readable);
  if (resume.readable != 0 && resume.generation.counter % 2 == 0 &&
      revive(source, resume.readable)) {
    source.readable = resume.readable;
    source.generation = resume.generation;
    Model& model = models_.find(registration.model)->second;
    auto [at, inserted] = model.versions.try_emplace(resume.readable);
    if (inserted) {
      at->second.source_count = registration.source_count;
      changed(registration.model, resume.readable, at->second);
    }
    at->second.participants[registration.name] =
        Participant{.member = source.id,
                    .incarnation = registration.incarnation,
                    .published = true,
                    .generation = resume.generation};
    maybe_ready(registration.model, resume.readable, now);
  } else if (resume.writing > source.last_published && revive(source, resume.writing)) {
    open_version(source, resume.writing);
  }
}

// -- targets --

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
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kLease,
                        .member = target,
                        .started = now,
                        .deadline = deadline,
                        .request = request});
  if (!try_grant(id, now)) models_.find(member->registration.model)->second.waiters.insert(id);
}

std::optional<uint64_t> LeaseTable::choose(const Model& model,
                                           const VersionRequest& request) const {
  for (auto at = model.versions.rbegin(); at != model.versions.rend(); ++at) {
    if (at->second.state != VersionState::kReady || at->second.closing) continue;
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

// Answers the waiter if its version is there, or can never come.
bool LeaseTable::try_grant(uint64_t waiter_id, TimePoint now) {
  const Waiter& waiter = waiters_.at(waiter_id);
  Member& target = members_.at(waiter.member);
  const auto at = models_.find(target.registration.model);
  Model& model = at->second;
  const auto number = choose(model, waiter.request);
  if (!number) {
    auto error = never(at->first, model, waiter.request);
    if (error) fail_waiter(waiter_id, *error);
    return error.has_value();
  }
  if (target.leases.size() >= limits_.leases_per_member) {
    fail_waiter(waiter_id, Error{ErrorCode::kResourceExhausted,
                                 fmt::format("{} holds {} leases already; release() them first",
                                             target.registration.name, target.leases.size())});
    return true;
  }
  Version& version = model.versions.at(*number);
  const uint64_t id = new_id();
  Lease lease{.id = LeaseId{id},
              .version = *number,
              .ttl_ms = target.lease_ttl / std::chrono::milliseconds(1),
              .sources = {}};
  for (const auto& [name, part] : version.participants) {
    if (part.member == 0 || !part.published) continue;
    MemberInfo source = info(members_.at(part.member));
    source.version = *number;
    source.generation = part.generation;
    lease.sources.push_back(std::move(source));
  }
  version.leases.insert(id);
  target.leases.insert(id);
  const TimePoint end = now + target.lease_ttl;
  leases_.emplace(id, HeldLease{.holder = target.id,
                                .model = at->first,
                                .version = *number,
                                .renewed = now,
                                .timer = end});
  timers_.emplace(end, TimerKind::kLease, id);
  remove_waiter(waiter_id);
  effects_.emplace_back(LeaseReply{
      .waiter = WaiterId{waiter_id}, .result = std::move(lease), .roster = model.roster});
  return true;
}

void LeaseTable::serve_waiters(const std::string& model, TimePoint now) {
  const std::set<uint64_t> waiting = models_.find(model)->second.waiters;
  for (const uint64_t waiter : waiting) try_grant(waiter, now);
}

Result<void> LeaseTable::release(uint64_t target, LeaseId lease, uint64_t version, bool landed,
                                 TimePoint now) {
  Member* member = find_member(target, MemberRole::kTarget);
  if (member == nullptr) return no_member(target);
  if (landed) member->landed = version;
  const auto id = static_cast<uint64_t>(lease);
  if (!member->leases.contains(id)) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("{} holds no lease {:x}: it was released, revoked, or ran out",
                             member->registration.name, id)};
  }
  end_lease(id, now);
  return {};
}

// -- what is told --

VersionInfo LeaseTable::info(const std::string& model, uint64_t number,
                             const Version& version) const {
  return VersionInfo{.model = model,
                     .version = number,
                     .state = version.state,
                     .published = static_cast<uint32_t>(
                         std::count_if(version.participants.begin(), version.participants.end(),
                                       [](const auto& p) { return p.second.published; })),
                     .source_count = version.source_count,
                     .leases = static_cast<uint32_t>(version.leases.size()),
                     .reason = version.reason};
}

void LeaseTable::changed(const std::string& model, uint64_t number, const Version& version) {
  effects_.emplace_back(VersionChanged{info(model, number, version)});
}

// For kDeadlineExceeded: what was waited for, and whose turn it was.
std::string LeaseTable::who_is_missing(const std::string& name, const Model& model,
                                       const VersionRequest& request) const {
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
                           member.writing != 0    ? fmt::format("writing {}", member.writing)
                           : member.readable != 0 ? fmt::format("offers {}", member.readable)
                                                  : "idle");
  }
  out += "not published by " + (missing.empty() ? "any source that has yet to join" : missing);
  if (model.sources.size() < expected) {
    out += fmt::format("; {} of {} sources have joined", model.sources.size(), expected);
  }
  return out;
}

}  // namespace transfuse

// The life of a version: opened, published by every source, leased, drained, finished.
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
#include "transfuse/deadline.h"
#include "transfuse/digest.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

namespace {

constexpr size_t kMaxReasonBytes = 1024;

// For the story of a version.
std::string words_of(const Offer& offer) {
  constexpr size_t kLongest = 256;
  constexpr size_t kLongestValue = 64;
  std::string words;
  if (offer.revision != Digest{}) words += ", revision " + offer.revision.to_string();
  for (const auto& [key, value] : offer.metadata) {
    if (words.size() > kLongest) return words + ", ...";
    words += fmt::format(", {}={}{}", key, value.substr(0, kLongestValue),
                         value.size() > kLongestValue ? "..." : "");
  }
  return words;
}

}  // namespace

void LeaseTable::begin_write(WaiterId waiter, uint64_t source, const WriteRequest& request,
                             TimePoint deadline, TimePoint now) {
  Member* member = find_member(source, MemberRole::kSource);
  Result<void> possible =
      member == nullptr ? Result<void>(no_member(source)) : check_begin(*member, request.version);
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
                                  name, request.version)});
  }
  if (member->writing != 0 && member->writing != request.version) {
    finish_version(model, member->writing, VersionState::kAborted,
                   fmt::format("source {} went on to version {}", name, request.version), now);
    member->writing = 0;
  }
  const uint64_t drained = choose_replaced(*member, request);
  const auto id = static_cast<uint64_t>(waiter);
  add_waiter(id, Waiter{.kind = WaiterKind::kDrain,
                        .member = source,
                        .started = now,
                        .deadline = deadline,
                        .request = {VersionRequest::Kind::kExactly, request.version},
                        .drained = drained,
                        .when_leased = request.when_leased});
  member->drain = id;

  auto& versions = models_.find(model)->second.versions;
  const auto offered = versions.find(drained);
  if (offered == versions.end() || finished(offered->second.state)) return finish_begin(id, now);
  Version& version = offered->second;
  if (version.state == VersionState::kOpen) {
    finish_version(model, drained, VersionState::kAborted,
                   fmt::format("source {} went on to version {} before all had published", name,
                               request.version),
                   now);
    return finish_begin(id, now);
  }
  if (!version.leases.empty() && request.when_leased == WhenLeased::kSkip) {
    remove_waiter(id);
    const auto count = version.leases.size();
    skip_version(*member, request.version, now);
    effects_.emplace_back(DrainReply{
        waiter, Error{ErrorCode::kVersionGone,
                      fmt::format("version {} of model {} is skipped: readers hold every version "
                                  "that source {} could replace (version {}: {} leases)",
                                  request.version, model, name, drained, count)}});
    return;
  }
  version.closing = true;
  version.drains.insert(id);
  if (!version.leases.empty()) {
    note(model, drained, name,
         fmt::format("waits to write version {} until {} readers are done", request.version,
                     version.leases.size()),
         now);
  }
  const bool revokes = !version.leases.empty() && request.when_leased == WhenLeased::kRevoke;
  if (revokes) return expire_waiter(id, now);
  drained_if_empty(model, drained, now);
}

// Which of the versions that a source may overwrite makes room: one that has ended, else the oldest
// that nobody reads (if there is a choice, one that no group has still to bring to all of its
// ranks), else the oldest.
uint64_t LeaseTable::choose_replaced(const Member& source, const WriteRequest& request) const {
  const Model& model = models_.find(source.registration.model)->second;
  std::set<uint64_t> awaited;
  for (const auto& [name, group] : model.groups) {
    if (group.round && !group.round->committed) awaited.insert(group.round->version);
  }
  std::optional<uint64_t> unread;
  std::optional<uint64_t> oldest;
  for (const uint64_t number : request.replaces) {
    const auto version = model.versions.find(number);
    if (!source.offers.contains(number) || version == model.versions.end() ||
        finished(version->second.state)) {
      return number;
    }
    const bool read = !version->second.leases.empty();
    const auto later = [&](uint64_t a, uint64_t b) {
      return std::pair{awaited.contains(a), a} > std::pair{awaited.contains(b), b};
    };
    if (!read && (!unread || later(*unread, number))) unread = number;
    if (!oldest || number < *oldest) oldest = number;
  }
  return unread ? *unread : oldest.value_or(0);
}

// Ends a version for every source before it was complete. Who waits to write it is told at once: it
// must not revoke readers for a version that cannot come.
void LeaseTable::skip_version(const Member& source, uint64_t number, TimePoint now) {
  const Registration& registration = source.registration;
  Model& model = models_.find(registration.model)->second;
  Version& version = model.versions[number];
  if (version.opened == TimePoint{}) version.opened = now;
  version.source_count = registration.source_count;
  version.skipped = true;
  const std::string reason =
      fmt::format("skipped: source {} had no slot that nobody reads", registration.name);
  finish_version(registration.model, number, VersionState::kAborted, reason, now);
  for (const auto& [name, id] : model.sources) {
    const auto drain = members_.at(id).drain;
    if (!drain || waiters_.at(*drain).request.version != number) continue;
    fail_waiter(*drain,
                Error{ErrorCode::kVersionGone, fmt::format("version {} of model {} was {}", number,
                                                           registration.model, reason)});
  }
  serve_waiters(registration.model, now);  // what they drained is open to readers again
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
  if (found->second.skipped) {
    return Error{ErrorCode::kVersionGone,
                 fmt::format("version {} of model {} was {}", version, source.registration.model,
                             found->second.reason)};
  }
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

void LeaseTable::open_version(Member& source, uint64_t number, TimePoint now) {
  const Registration& registration = source.registration;
  Model& model = models_.find(registration.model)->second;
  auto [at, inserted] = model.versions.try_emplace(number);
  Version& version = at->second;
  const bool opened = inserted || finished(version.state);
  if (opened) {
    version = Version{};
    version.source_count = registration.source_count;
    version.opened = now;
  }
  version.participants[registration.name] =
      Participant{.member = source.id, .incarnation = registration.incarnation, .published = false};
  if (std::exchange(source.writing, number) != number) {
    note(registration.model, number, registration.name, "began to write", now);
  }
  if (opened) changed(registration.model, number, version);
}

// The source may write over its part of `number` from here on.
void LeaseTable::withdraw(Member& source, uint64_t number) {
  source.offers.erase(number);
  auto& versions = models_.find(source.registration.model)->second.versions;
  const auto version = versions.find(number);
  if (version == versions.end()) return;
  const auto part = version->second.participants.find(source.registration.name);
  if (part != version->second.participants.end() && part->second.member == source.id) {
    part->second.withdrawn = true;
  }
}

// The drain of `waiter_id` is over: the new version is open.
void LeaseTable::finish_begin(uint64_t waiter_id, TimePoint now) {
  const Waiter waiter = waiters_.at(waiter_id);
  Member& source = members_.at(waiter.member);
  remove_waiter(waiter_id);
  if (waiter.drained != 0) withdraw(source, waiter.drained);
  DrainReply reply{
      .waiter = WaiterId{waiter_id},
      .result = DrainOutcome{.revoked = waiter.revoked,
                             .waited_us = (now - waiter.started) / std::chrono::microseconds(1),
                             .replaced = waiter.drained}};
  // While this source waited, the version it wants may have ended without it.
  if (auto possible = check_begin(source, waiter.request.version); !possible) {
    reply.result = std::move(possible).error();
  } else {
    open_version(source, waiter.request.version, now);
  }
  effects_.emplace_back(std::move(reply));
}

Result<void> LeaseTable::publish(uint64_t source, const Offer& offer, TimePoint now) {
  const uint64_t version = offer.version;
  const Generation& generation = offer.generation;
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
  const std::string whose = fmt::format("version {} of source {}", version, registration.name);
  TRANSFUSE_RETURN_IF_ERROR(check_metadata(whose, offer.metadata));
  Participant& participant = found->second.participants[registration.name];
  participant = Participant{
      .member = source, .incarnation = registration.incarnation, .published = true, .offer = offer};
  member->writing = 0;
  member->last_published = version;
  member->offers[version] = offer;
  note(registration.model, version, registration.name, "published" + words_of(offer), now);
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
  note(model, number, "", "READY", now);
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
  for (const auto& [name, part] : version.participants) {
    if (part.member != 0) members_.at(part.member).offers.erase(number);
  }
  note(model_name, number, "", fmt::format("{}: {}", version_state_name(state), reason), now);
  const uint32_t revoked = revoke_leases(version);
  changed(model_name, number, version);

  const std::set<uint64_t> drains = std::exchange(version.drains, {});
  for (const uint64_t drain : drains) {
    waiters_.at(drain).revoked += revoked;
    finish_begin(drain, now);
  }
  size_t count = 0;
  for (auto& [other, each] : model.versions) {
    count += finished(each.state) ? 1u : 0u;
    if (other != number && finished(each.state) && !each.lost) forget_words(each);
  }
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
               std::none_of(
                   version.participants.begin(), version.participants.end(),
                   [](const auto& p) { return p.second.published && p.second.member != 0; })) {
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
  if (numbers.empty()) return;
  found->second.floor = 0;
  ++found->second.run;
}

// A version that ended only because this source seemed lost is open again, if nobody has gone on.
bool LeaseTable::revive(const Member& source, uint64_t number) {
  const Registration& registration = source.registration;
  Model& model = models_.find(registration.model)->second;
  for (const auto& [name, id] : model.sources) {
    if (id == source.id) continue;  // of a ring of snapshots it offers older ones too
    const Member& other = members_.at(id);
    const bool went_on = other.last_published > number || other.writing > number;
    if (went_on && !other.offers.contains(number)) return false;
  }
  const auto at = model.versions.find(number);
  if (at == model.versions.end()) return number > model.floor;
  if (!finished(at->second.state)) return true;
  if (!at->second.lost) return false;
  at->second.state = VersionState::kOpen;
  at->second.lost = false;
  at->second.reason.clear();
  for (auto& [name, part] : at->second.participants) {
    if (part.withdrawn) part.published = false;
    if (part.published && part.member != 0) members_.at(part.member).offers[number] = part.offer;
  }
  changed(registration.model, number, at->second);
  return true;
}

void LeaseTable::resume_source(Member& source, const Resume& resume, TimePoint now) {
  const Registration& registration = source.registration;
  source.last_published = resume.last_published;
  for (const Offer& offer : resume.offers) {
    source.last_published = std::max(source.last_published, offer.version);
    if (offer.version == 0 || offer.generation.counter % 2 != 0 ||
        !check_metadata(registration.name, offer.metadata) || !revive(source, offer.version)) {
      continue;
    }
    Model& model = models_.find(registration.model)->second;
    auto [at, inserted] = model.versions.try_emplace(offer.version);
    if (inserted) {
      at->second.source_count = registration.source_count;
      at->second.opened = now;
      changed(registration.model, offer.version, at->second);
    }
    source.offers[offer.version] = offer;
    at->second.participants[registration.name] =
        Participant{.member = source.id,
                    .incarnation = registration.incarnation,
                    .published = true,
                    .offer = offer};
    note(registration.model, offer.version, registration.name, "offers it again", now);
    maybe_ready(registration.model, offer.version, now);
  }
  if (resume.writing > source.last_published && revive(source, resume.writing)) {
    open_version(source, resume.writing, now);
  }
}

// -- what is told --

// Of the sources that have published it.
std::pair<Digest, Metadata> LeaseTable::said_alike(const Version& version) {
  if (version.said) return *version.said;
  std::optional<std::pair<Digest, Metadata>> said;
  for (const auto& [name, part] : version.participants) {
    if (!part.published) continue;
    if (!said) {
      said.emplace(part.offer.revision, part.offer.metadata);
      continue;
    }
    if (said->first != part.offer.revision) said->first = {};
    std::erase_if(said->second, [&](const auto& entry) {
      const auto found = part.offer.metadata.find(entry.first);
      return found == part.offer.metadata.end() || found->second != entry.second;
    });
  }
  return said.value_or(std::pair<Digest, Metadata>{});
}

// Of a version that nobody can read any more; what is told of it stays.
void LeaseTable::forget_words(Version& version) {
  if (version.said) return;
  version.said = said_alike(version);
  for (auto& [name, part] : version.participants) part.offer.metadata.clear();
}

VersionInfo LeaseTable::info(const std::string& model, uint64_t number,
                             const Version& version) const {
  auto [revision, metadata] = said_alike(version);
  return VersionInfo{.model = model,
                     .version = number,
                     .state = version.state,
                     .published = static_cast<uint32_t>(
                         std::count_if(version.participants.begin(), version.participants.end(),
                                       [](const auto& p) { return p.second.published; })),
                     .source_count = version.source_count,
                     .leases = static_cast<uint32_t>(version.leases.size()),
                     .reason = version.reason,
                     .revision = revision,
                     .metadata = std::move(metadata)};
}

void LeaseTable::changed(const std::string& model, uint64_t number, const Version& version) {
  effects_.emplace_back(VersionChanged{info(model, number, version)});
}

// The first and the last entries are kept.
void LeaseTable::note(const std::string& model, uint64_t number, std::string_view who,
                      std::string what, TimePoint now) {
  auto& versions = models_.find(model)->second.versions;
  const auto found = versions.find(number);
  if (found == versions.end()) return;
  auto& events = found->second.events;
  if (events.size() >= limits_.version_events) {
    events.erase(events.begin() + static_cast<ptrdiff_t>(limits_.version_events / 2));
  }
  events.push_back({.at_us = (now - found->second.opened) / std::chrono::microseconds(1),
                    .who = std::string(who),
                    .what = std::move(what)});
}

Result<std::vector<VersionEvent>> LeaseTable::history(std::string_view model,
                                                      uint64_t version) const {
  const auto found = models_.find(model);
  if (found == models_.end()) {
    return Error{ErrorCode::kNotFound, fmt::format("no model '{}' is known", model)};
  }
  const auto at = found->second.versions.find(version);
  if (at == found->second.versions.end()) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("version {} of model {} is not known (any more)", version, model)};
  }
  return at->second.events;
}

}  // namespace transfuse

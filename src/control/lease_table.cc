// Membership: who is there, until when, and what ends when somebody goes.
#include "control/lease_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr size_t kMaxNameBytes = 256;
constexpr uint32_t kMaxSourceCount = 65536;
constexpr uint64_t kIdRange = uint64_t{1} << 32;  // of one life of a coordinator
constexpr Duration kMinTtl = std::chrono::milliseconds(10);
constexpr uint32_t kBeatsWithoutLease = 3;  // its grant, or its release, is not under way any more
constexpr Duration kMaxTtl = std::chrono::hours(24);

std::string_view role_name(MemberRole role) {
  return role == MemberRole::kSource ? "source" : "target";
}

Result<void> check_name(std::string_view what, std::string_view name) {
  if (!name.empty() && name.size() <= kMaxNameBytes) return {};
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("the {} name must have 1 to {} bytes, it has {}", what, kMaxNameBytes,
                           name.size())};
}

}  // namespace

std::string_view version_state_name(VersionState state) {
  switch (state) {
    case VersionState::kOpen:
      return "OPEN";
    case VersionState::kReady:
      return "READY";
    case VersionState::kRetired:
      return "RETIRED";
    case VersionState::kAborted:
      return "ABORTED";
  }
  check_failed(__FILE__, __LINE__, "a VersionState outside the enum");
}

LeaseTable::LeaseTable(const TableLimits& limits)
    : limits_(limits), layouts_(limits.layouts), next_id_(limits.first_id) {}

Result<uint64_t> LeaseTable::join(const JoinRequest& request, TimePoint now) {
  TRANSFUSE_RETURN_IF_ERROR(check_join(request));
  const Registration& wanted = request.registration;
  if (const auto live = find_named(wanted)) {
    Member& member = members_.at(*live);
    const bool same = member.registration.incarnation == wanted.incarnation;
    if (same && request.resume) {
      take_over(member, request, now);
      return member.id;
    }
    if (!member.suspect) {
      return Error{
          ErrorCode::kAlreadyExists,
          fmt::format("{} {} of model {} is alive (incarnation {:016x}, last heard of {} "
                      "ms ago); another process with that name (incarnation {:016x}) "
                      "cannot join",
                      role_name(wanted.role), wanted.name, wanted.model,
                      member.registration.incarnation,
                      (now - member.last_beat) / std::chrono::milliseconds(1), wanted.incarnation)};
    }
    // Its connection is broken already: no need to make the restarted process wait for the grace.
    TRANSFUSE_RETURN_IF_ERROR(check_source_join(wanted, member.id));
    TRANSFUSE_RETURN_IF_ERROR(check_group_join(wanted, member.id));
    remove_member(member.id, "its connection broke and a process with its name has joined", now);
  } else {
    TRANSFUSE_RETURN_IF_ERROR(check_source_join(wanted, 0));
    TRANSFUSE_RETURN_IF_ERROR(check_group_join(wanted, 0));
  }
  if (members_.size() >= limits_.members) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("{} {} cannot join: the coordinator has its limit of {} members",
                             role_name(wanted.role), wanted.name, limits_.members)};
  }
  if (descriptor_bytes_ + wanted.descriptor.size() > limits_.all_descriptor_bytes) {
    return Error{
        ErrorCode::kResourceExhausted,
        fmt::format("no room for the descriptor of {} ({} bytes): all descriptors together "
                    "have {} of at most {} bytes",
                    wanted.name, wanted.descriptor.size(), descriptor_bytes_,
                    limits_.all_descriptor_bytes)};
  }
  if (wanted.role == MemberRole::kSource) drop_versions_of(wanted, now);
  return admit(request, now);
}

Result<void> LeaseTable::check_join(const JoinRequest& request) const {
  const Registration& wanted = request.registration;
  TRANSFUSE_RETURN_IF_ERROR(check_name("model", wanted.model));
  TRANSFUSE_RETURN_IF_ERROR(check_name("member", wanted.name));
  if (wanted.incarnation == 0) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("{} has incarnation 0, a random number other than 0 is expected", wanted.name)};
  }
  if (wanted.role == MemberRole::kSource &&
      (wanted.source_count == 0 || wanted.source_count > kMaxSourceCount)) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("source {} expects {} sources, 1 to {} are possible", wanted.name,
                             wanted.source_count, kMaxSourceCount)};
  }
  if (wanted.descriptor.size() > limits_.descriptor_bytes) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("the descriptor of {} has {} bytes, at most {} are accepted",
                             wanted.name, wanted.descriptor.size(), limits_.descriptor_bytes)};
  }
  if (request.ttl < kMinTtl || request.ttl > kMaxTtl || request.lease_ttl < kMinTtl ||
      request.lease_ttl > kMaxTtl) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("times to live of {} must lie between 10 ms and 24 h", wanted.name)};
  }
  const std::string whose = fmt::format("{} {}", role_name(wanted.role), wanted.name);
  TRANSFUSE_RETURN_IF_ERROR(check_kind(whose, wanted.kind));
  TRANSFUSE_RETURN_IF_ERROR(check_metadata(whose, wanted.metadata));
  if (!layouts_.contains(wanted.layout)) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("{} {} joins with layout {}, which was not put first",
                             role_name(wanted.role), wanted.name, wanted.layout.to_string())};
  }
  return {};
}

// Sources whose connection broke do not count: a job that restarts with other ranks need not wait.
Result<void> LeaseTable::check_source_join(const Registration& wanted, uint64_t replaced) const {
  if (wanted.role != MemberRole::kSource) return {};
  const auto model = models_.find(wanted.model);
  if (model == models_.end()) return {};
  std::string names;
  uint32_t count = 0;
  for (const auto& [name, id] : model->second.sources) {
    const Member& other = members_.at(id);
    if (id == replaced || other.suspect) continue;
    if (other.registration.source_count != wanted.source_count) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("source {} of model {} expects {} sources, but live source {} "
                               "expects {}",
                               wanted.name, wanted.model, wanted.source_count, name,
                               other.registration.source_count)};
    }
    ++count;
    names += (names.empty() ? "" : ", ") + name;
  }
  if (count < wanted.source_count) return {};
  return Error{ErrorCode::kAlreadyExists,
               fmt::format("source {} cannot join model {}: its {} sources are there already ({})",
                           wanted.name, wanted.model, wanted.source_count, names)};
}

std::optional<uint64_t> LeaseTable::find_named(const Registration& wanted) const {
  const auto model = models_.find(wanted.model);
  if (model == models_.end()) return std::nullopt;
  const auto& names =
      wanted.role == MemberRole::kSource ? model->second.sources : model->second.targets;
  const auto found = names.find(wanted.name);
  if (found == names.end()) return std::nullopt;
  return found->second;
}

// The same process again, after its connection broke or a reply was lost: nothing of it ends.
void LeaseTable::take_over(Member& member, const JoinRequest& request, TimePoint now) {
  if (member.owner != request.owner) {
    auto& old = owners_[member.owner];
    old.erase(member.id);
    if (old.empty()) owners_.erase(member.owner);
    owners_[request.owner].insert(member.id);
    member.owner = request.owner;
  }
  if (member.registration.layout != request.registration.layout) {
    layouts_.use(request.registration.layout);
    layouts_.unuse(member.registration.layout, now);
    member.registration.layout = request.registration.layout;
    member.registration.kind = request.registration.kind;
    models_.find(member.registration.model)->second.roster = ++rosters_;
  }
  renew(member, now);
}

uint64_t LeaseTable::admit(const JoinRequest& request, TimePoint now) {
  const Registration& wanted = request.registration;
  uint64_t id = 0;
  // The number from before a restart is kept, so that what others have cached stays true.
  const uint64_t before = request.resume ? request.resume->id : 0;
  if (before != 0 && !members_.contains(before) && (!from_this_life(before) || before < next_id_)) {
    id = before;
  } else {
    id = new_id();
  }
  Member& member = members_[id];
  member.id = id;
  member.registration = wanted;
  member.registration.descriptor.clear();
  member.descriptor = std::make_shared<const std::string>(wanted.descriptor);
  descriptor_bytes_ += wanted.descriptor.size();
  member.owner = request.owner;
  member.ttl = request.ttl;
  member.lease_ttl = request.lease_ttl;
  owners_[request.owner].insert(id);
  layouts_.use(wanted.layout);
  member.timer = now;
  timers_.emplace(now, TimerKind::kMember, id);
  renew(member, now);
  set_member_timer(member, member.expires);

  Model& model = models_[wanted.model];
  if (wanted.role == MemberRole::kSource) {
    model.sources[wanted.name] = id;
    model.roster = ++rosters_;
    if (request.resume) resume_source(member, *request.resume, now);
  } else {
    model.targets[wanted.name] = id;
    if (request.resume) {
      land(member, request.resume->landed, model.run);
      member.last_round = request.resume->last_round;
    }
    if (!wanted.group.empty()) join_group(member, request.resume, now);
  }
  effects_.emplace_back(MemberChanged{.member = id,
                                      .role = wanted.role,
                                      .model = wanted.model,
                                      .name = wanted.name,
                                      .joined = true});
  return id;
}

Result<void> LeaseTable::leave(uint64_t member, TimePoint now) {
  if (!members_.contains(member)) return no_member(member);
  remove_member(member, kLeftWord, now);
  return {};
}

void LeaseTable::lose(uint64_t member, std::string_view why, TimePoint now) {
  if (members_.contains(member)) remove_member(member, why, now);
}

void LeaseTable::renew(Member& member, TimePoint now) {
  member.last_beat = now;
  member.expires = now + member.ttl;
  member.suspect = false;
}

// One timer per member; a beat only moves `expires`, and the timer follows when it fires.
void LeaseTable::set_member_timer(Member& member, TimePoint at) {
  timers_.erase({member.timer, TimerKind::kMember, member.id});
  member.timer = at;
  timers_.emplace(at, TimerKind::kMember, member.id);
}

std::vector<uint64_t> LeaseTable::beat(std::span<const uint64_t> members,
                                       std::span<const LeaseId> leases, TimePoint now) {
  std::vector<uint64_t> unknown;
  for (const uint64_t id : members) {
    const auto found = members_.find(id);
    if (found == members_.end()) {
      unknown.push_back(id);
    } else {
      renew(found->second, now);
    }
  }
  for (const LeaseId lease : leases) {
    const auto found = leases_.find(static_cast<uint64_t>(lease));
    if (found == leases_.end()) continue;  // revoked: the member is told by an event
    const bool by_holder =
        std::find(members.begin(), members.end(), found->second.holder) != members.end();
    if (!by_holder) continue;
    found->second.renewed = now;
    found->second.beats_without = 0;
  }
  end_orphaned_leases(members, leases, now);
  return unknown;
}

void LeaseTable::end_orphaned_leases(std::span<const uint64_t> members,
                                     std::span<const LeaseId> named, TimePoint now) {
  for (const uint64_t id : members) {
    const auto member = members_.find(id);
    if (member == members_.end()) continue;
    const std::set<uint64_t> held = member->second.leases;
    for (const uint64_t lease : held) {
      if (std::find(named.begin(), named.end(), LeaseId{lease}) != named.end()) continue;
      if (++leases_.at(lease).beats_without > kBeatsWithoutLease) end_lease(lease, now);
    }
  }
}

void LeaseTable::suspect(uint64_t owner, TimePoint now) {
  const auto owned = owners_.find(owner);
  if (owned == owners_.end()) return;
  for (const uint64_t id : owned->second) {
    Member& member = members_.at(id);
    member.suspect = true;
    member.expires = std::min(member.expires, now + limits_.suspect_grace);
    if (member.expires < member.timer) set_member_timer(member, member.expires);
  }
}

void LeaseTable::forgive(TimePoint now) {
  for (auto& [id, member] : members_) {
    if (!member.suspect) renew(member, now);
  }
  for (auto& [id, lease] : leases_) lease.renewed = now;
}

void LeaseTable::remove_member(uint64_t id, std::string_view why, TimePoint now) {
  const auto found = members_.find(id);
  TRANSFUSE_CHECK(found != members_.end());
  const Registration registration = found->second.registration;
  Model& model = models_.find(registration.model)->second;

  {
    Member& member = found->second;
    const Error gone{ErrorCode::kUnavailable,
                     fmt::format("{} {} of model {} is gone: {}", role_name(registration.role),
                                 registration.name, registration.model, why)};
    const std::set<uint64_t> waiters = member.waiters;
    for (const uint64_t waiter : waiters) fail_waiter(waiter, gone);
    for (auto& [plan, table] : member.tables) {
      for (const uint64_t requester : table.requesters) {
        if (const auto other = members_.find(requester); other != members_.end()) {
          other->second.requested.erase({id, plan});
        }
      }
    }
    forget_requests(member);
    const std::set<uint64_t> leases = member.leases;
    for (const uint64_t lease : leases) end_lease(lease, now);
  }

  // Out of the indexes first: what follows must not count it among the living.
  if (registration.role == MemberRole::kSource) {
    model.sources.erase(registration.name);
    model.roster = ++rosters_;
    source_gone(found->second, why, now);
  } else {
    model.targets.erase(registration.name);
    if (!registration.group.empty()) leave_group(found->second, why, now);
  }
  const Member& member = found->second;
  timers_.erase({member.timer, TimerKind::kMember, id});
  auto owned = owners_.find(member.owner);
  owned->second.erase(id);
  if (owned->second.empty()) owners_.erase(owned);
  descriptor_bytes_ -= member.descriptor->size();
  layouts_.unuse(registration.layout, now);
  members_.erase(found);
  effects_.emplace_back(MemberChanged{.member = id,
                                      .role = registration.role,
                                      .model = registration.model,
                                      .name = registration.name,
                                      .joined = false,
                                      .why = std::string(why)});
  serve_waiters(registration.model, now);  // what this member was closing may be open again
  erase_model_if_empty(registration.model);
}

void LeaseTable::erase_model_if_empty(std::string_view name) {
  const auto found = models_.find(name);
  if (found == models_.end()) return;
  const Model& model = found->second;
  if (model.sources.empty() && model.targets.empty()) models_.erase(found);
}

MemberInfo LeaseTable::info(const Member& member) const {
  const bool source = member.registration.role == MemberRole::kSource;
  const Offer newest = member.offers.empty() ? Offer{} : member.offers.rbegin()->second;
  return MemberInfo{.id = member.id,
                    .role = member.registration.role,
                    .model = member.registration.model,
                    .name = member.registration.name,
                    .incarnation = member.registration.incarnation,
                    .layout = member.registration.layout,
                    .version = source ? newest.version : member.landed,
                    .generation = newest.generation,
                    .slot = newest.slot,
                    .writing = member.writing,
                    .leases = static_cast<uint32_t>(member.leases.size()),
                    .group = member.registration.group,
                    .last_refit = member.last_refit,
                    .kind = member.registration.kind,
                    .metadata = member.registration.metadata,
                    .version_metadata = newest.metadata,
                    .revision = newest.revision};
}

bool LeaseTable::from_this_life(uint64_t id) const { return id - limits_.first_id < kIdRange; }

Error LeaseTable::no_member(uint64_t id) const {
  return Error{ErrorCode::kNotFound,
               fmt::format("no live member has number {:x}: it left, or its time ran out", id)};
}

LeaseTable::Member* LeaseTable::find_member(uint64_t id, MemberRole role) {
  const auto found = members_.find(id);
  if (found == members_.end() || found->second.registration.role != role) return nullptr;
  return &found->second;
}

Result<std::shared_ptr<const std::string>> LeaseTable::describe(uint64_t member,
                                                                uint64_t incarnation) const {
  const auto found = members_.find(member);
  if (found == members_.end()) return no_member(member);
  const Registration& registration = found->second.registration;
  if (registration.incarnation != incarnation) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("{} has restarted: incarnation {:016x} was asked for, it is {:016x}",
                             registration.name, incarnation, registration.incarnation)};
  }
  return found->second.descriptor;
}

std::vector<MemberInfo> LeaseTable::members(std::string_view model) const {
  std::vector<MemberInfo> out;
  const auto add = [&](const Model& of) {
    for (const auto& [name, id] : of.sources) out.push_back(info(members_.at(id)));
    for (const auto& [name, id] : of.targets) out.push_back(info(members_.at(id)));
  };
  if (model.empty()) {
    for (const auto& [name, each] : models_) add(each);
  } else if (const auto found = models_.find(model); found != models_.end()) {
    add(found->second);
  }
  return out;
}

std::vector<VersionInfo> LeaseTable::versions(std::string_view model) const {
  std::vector<VersionInfo> out;
  const auto add = [&](const std::string& name, const Model& of) {
    for (const auto& [number, version] : of.versions) out.push_back(info(name, number, version));
  };
  if (model.empty()) {
    for (const auto& [name, each] : models_) add(name, each);
  } else if (const auto found = models_.find(model); found != models_.end()) {
    add(found->first, found->second);
  }
  return out;
}

uint64_t LeaseTable::roster(std::string_view model) const {
  const auto found = models_.find(model);
  return found == models_.end() ? 0 : found->second.roster;
}

void LeaseTable::tick(TimePoint now) {
  while (!timers_.empty() && std::get<TimePoint>(*timers_.begin()) <= now) {
    const auto [at, kind, id] = *timers_.begin();
    switch (kind) {
      case TimerKind::kMember: {
        Member& member = members_.at(id);
        if (member.expires > now) {
          set_member_timer(member, member.expires);
        } else if (member.suspect) {
          remove_member(id, "its connection broke and it did not come back", now);
        } else {
          remove_member(id,
                        fmt::format("no heartbeat for {} ms",
                                    (now - member.last_beat) / std::chrono::milliseconds(1)),
                        now);
        }
        break;
      }
      case TimerKind::kLease: {
        HeldLease& lease = leases_.at(id);
        const TimePoint end = lease.renewed + members_.at(lease.holder).lease_ttl;
        if (end > now) {
          timers_.erase(timers_.begin());
          lease.timer = end;
          timers_.emplace(end, TimerKind::kLease, id);
        } else {
          end_lease(id, now);
        }
        break;
      }
      case TimerKind::kWaiter:
        expire_waiter(id, now);
        break;
      case TimerKind::kRound:
        expire_round(id, now);
        break;
    }
  }
  layouts_.drop_unused(now);
}

std::optional<TimePoint> LeaseTable::next_deadline() const {
  if (timers_.empty()) return std::nullopt;
  return std::get<TimePoint>(*timers_.begin());
}

std::vector<Effect> LeaseTable::take_effects() { return std::exchange(effects_, {}); }

TableStats LeaseTable::stats() const {
  TableStats stats{.members = members_.size(),
                   .models = models_.size(),
                   .leases = leases_.size(),
                   .waiters = waiters_.size(),
                   .rounds = rounds_.size(),
                   .timers = timers_.size(),
                   .layouts = layouts_.count(),
                   .layout_bytes = layouts_.size_bytes(),
                   .descriptor_bytes = descriptor_bytes_};
  for (const auto& [name, model] : models_) stats.versions += model.versions.size();
  for (const auto& [id, member] : members_) stats.tables += member.tables.size();
  return stats;
}

}  // namespace transfuse

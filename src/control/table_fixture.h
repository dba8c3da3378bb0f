// A lease table under a made-up clock, with calls in and effects out: for tests.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "control/lease_table.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Used from one thread.
class Table : public testing::Test {
 protected:
  static constexpr Digest kLayout{1, 2};

  Table() { put_layout(); }

  void put_layout() { ASSERT_TRUE(table().layouts().put(kLayout, "layout", now_)); }

  // -- members --
  Result<uint64_t> try_join(MemberRole role, const std::string& name, uint64_t incarnation = 7,
                            uint32_t source_count = 1, std::optional<Resume> resume = {},
                            uint64_t owner = 1) {
    Registration registration;
    registration.role = role;
    registration.name = name;
    registration.source_count = source_count;
    registration.incarnation = incarnation;
    return try_join(std::move(registration), std::move(resume), owner);
  }
  Result<uint64_t> try_join(Registration registration, std::optional<Resume> resume = {},
                            uint64_t owner = 1) {
    put_layout();
    registration.model = "policy";
    registration.layout = kLayout;
    registration.descriptor = "at " + registration.name;
    return table().join(
        JoinRequest{
            .registration = std::move(registration), .owner = owner, .resume = std::move(resume)},
        now_);
  }
  uint64_t source(const std::string& name, uint32_t count = 1, uint64_t incarnation = 7) {
    return try_join(MemberRole::kSource, name, incarnation, count).value();
  }
  uint64_t target(const std::string& name) { return try_join(MemberRole::kTarget, name).value(); }
  Result<uint64_t> try_rank(const std::string& name, uint32_t size = 2, uint64_t incarnation = 7,
                            std::optional<Resume> resume = {}) {
    Registration registration;
    registration.role = MemberRole::kTarget;
    registration.name = name;
    registration.incarnation = incarnation;
    registration.group = "engine";
    registration.group_size = size;
    return try_join(std::move(registration), std::move(resume));
  }
  uint64_t rank(const std::string& name, uint32_t size = 2, uint64_t incarnation = 7,
                std::optional<Resume> resume = {}) {
    return try_rank(name, size, incarnation, std::move(resume)).value();
  }

  // -- time --
  void wait_ms(int64_t ms) {
    now_ += std::chrono::milliseconds(ms);
    table().tick(now_);
  }
  TimePoint in_ms(int64_t ms) const { return now_ + std::chrono::milliseconds(ms); }
  void beat(std::vector<uint64_t> members, std::vector<LeaseId> leases = {}) {
    EXPECT_TRUE(table().beat(members, leases, now_).empty());
  }

  // -- sources --
  static WriteRequest replacing(uint64_t version, std::vector<uint64_t> replaces,
                                WhenLeased when_leased = WhenLeased::kRevokeAtDeadline) {
    return {.version = version, .replaces = std::move(replaces), .when_leased = when_leased};
  }
  WaiterId begin(uint64_t member, const WriteRequest& request, int64_t deadline_ms = 1000) {
    const WaiterId waiter{++last_waiter_};
    table().begin_write(waiter, member, request, in_ms(deadline_ms), now_);
    return waiter;
  }
  // As a source that trains in place: what it offers is overwritten.
  WaiterId begin(uint64_t member, uint64_t version, int64_t deadline_ms = 1000) {
    WriteRequest request{.version = version, .replaces = {}, .when_leased = {}};
    if (const uint64_t offered = held(member); offered != 0) request.replaces.push_back(offered);
    return begin(member, request, deadline_ms);
  }
  Result<DrainOutcome> drained(WaiterId waiter) { return reply<DrainReply>(waiter)->result; }
  Result<void> publish(uint64_t member, uint64_t version, uint32_t slot = 0) {
    return table().publish(
        member, {.version = version, .generation = generation_of(version), .slot = slot}, now_);
  }
  static Generation generation_of(uint64_t version) {
    return {.incarnation = 9, .counter = 2 * version};
  }
  static Offer offer_of(uint64_t version, uint32_t slot = 0) {
    return {.version = version, .generation = generation_of(version), .slot = slot};
  }
  void write(uint64_t member, uint64_t version) {
    const WaiterId waiter = begin(member, version);
    ASSERT_NE(reply<DrainReply>(waiter), nullptr);
    ASSERT_TRUE(drained(waiter));
    ASSERT_TRUE(publish(member, version));
  }
  // Into a ring of snapshots.
  void write_slot(uint64_t member, const WriteRequest& request, uint32_t slot) {
    const WaiterId waiter = begin(member, request);
    ASSERT_NE(reply<DrainReply>(waiter), nullptr);
    ASSERT_TRUE(drained(waiter)) << drained(waiter).error().message;
    ASSERT_TRUE(publish(member, request.version, slot));
  }

  // -- targets --
  WaiterId ask(uint64_t member, const VersionRequest& request = {}, int64_t deadline_ms = 1000) {
    const WaiterId waiter{++last_waiter_};
    table().acquire(waiter, member, request, in_ms(deadline_ms), now_);
    return waiter;
  }
  Lease lease(uint64_t member, const VersionRequest& request = {}) {
    const WaiterId waiter = ask(member, request);
    return reply<LeaseReply>(waiter)->result.value();
  }
  Result<void> release(uint64_t member, const Lease& lease, LeaseEnd end) {
    return table().release(member, lease.id, lease.version, {.end = end}, now_);
  }

  // -- what is seen --
  template <typename Reply>
  const Reply* reply(WaiterId waiter) {
    take_effects();
    for (const Effect& effect : seen_) {
      const auto* found = std::get_if<Reply>(&effect);
      if (found != nullptr && found->waiter == waiter) return found;
    }
    return nullptr;
  }
  void take_effects() {
    for (Effect& effect : table().take_effects()) seen_.push_back(std::move(effect));
  }
  std::vector<std::string> changes() {
    take_effects();
    std::vector<std::string> out;
    for (const Effect& effect : seen_) {
      if (const auto* changed = std::get_if<VersionChanged>(&effect)) {
        out.push_back(std::to_string(changed->version.version) + " " +
                      std::string(version_state_name(changed->version.state)));
      }
    }
    return out;
  }
  VersionInfo version(uint64_t number) {
    for (const VersionInfo& each : table().versions("policy")) {
      if (each.version == number) return each;
    }
    return {};
  }
  // The newest that a source offers; what a target holds.
  uint64_t held(uint64_t member) {
    for (const MemberInfo& each : table().members("")) {
      if (each.id == member) return each.version;
    }
    return 0;
  }
  std::vector<MemberEvent::Kind> events_of(uint64_t member) {
    take_effects();
    std::vector<MemberEvent::Kind> out;
    for (const Effect& effect : seen_) {
      const auto* notice = std::get_if<MemberNotice>(&effect);
      if (notice != nullptr && notice->member == member) out.push_back(notice->event.kind);
    }
    return out;
  }

  LeaseTable& table() { return *table_; }
  // The coordinator dies, and another one takes its place: it knows nothing.
  void restart() {
    ++life_;
    TableLimits limits;
    limits.first_id = (life_ << 40) + 1;
    table_.emplace(limits);
    seen_.clear();
    put_layout();
  }

  uint64_t life_ = 0;
  std::optional<LeaseTable> table_{std::in_place};
  TimePoint now_{std::chrono::hours(1)};
  uint64_t last_waiter_ = 0;
  std::vector<Effect> seen_;
};

}  // namespace transfuse

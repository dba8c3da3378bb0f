// A warm transport moves bytes without allocating: allocation_count.cc counts.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "conformance/allocation_count.h"
#include "conformance/conformance_fixture.h"
#include "conformance/peer_commands.h"
#include "conformance/peer_group.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {
namespace {

class WarmTest : public Conformance {
 protected:
  // 24 tickets at a time, each polled, waited for and finished.
  uint64_t cycle(const RemoteRegion& region, const std::vector<StridedCopy>& copies,
                 std::vector<uint64_t>& fingerprints, std::vector<TicketId>& live) {
    const uint64_t before = allocation_count();
    const size_t share = copies.size() / 24;
    for (size_t i = 0; i < 24; ++i) {
      const auto ticket = reader_->submit({.region = &region,
                                           .copies = {&copies[i * share], share},
                                           .fingerprints = {&fingerprints[i * share], share}});
      live.push_back(ticket.value());
    }
    while (!live.empty()) {
      if (!reader_->wait_any(live, soon())) return UINT64_MAX;
      std::erase_if(live, [&](TicketId ticket) {
        (void)reader_->progress_bytes(ticket);
        return reader_->poll(ticket) != TicketState::kPending &&
               reader_->finish(ticket).has_value();
      });
    }
    return allocation_count() - before;
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, WarmTest, testing::ValuesIn(backends_without_allocations()),
                         backend_name);

TEST_P(WarmTest, I5_AWarmCycleAllocatesNothing) {
  constexpr uint64_t kSize = 3 << 20;
  const auto peer = make_peer();
  const auto connection = connect(*peer);
  const std::array regions = {
      connection->open_region(peer->allocate(kSize, 1), soon()).value(),
      connection->open_region(peer->register_memory(kSize, 1), soon()).value()};
  const Target target = make_target(kSize);
  auto copies = pieces(target, kSize / 192);
  for (size_t i = 0; i < copies.size(); i += 2) copies[i].fingerprint = true;
  std::vector<uint64_t> fingerprints(copies.size());
  std::vector<TicketId> live;
  live.reserve(24);
  for (const auto& region : regions) {
    // A worker thread's first turn may still be to come after a cycle: warm until nothing is new.
    uint64_t allocations = 1;
    for (int i = 0; i < 200 && allocations > 0; ++i) {
      allocations = cycle(*region, copies, fingerprints, live);
    }
    EXPECT_EQ(allocations, 0u);
    uint64_t later = 0;
    for (int i = 0; i < 50; ++i) later += cycle(*region, copies, fingerprints, live);
    EXPECT_EQ(later, 0u) << region->route();
  }
  EXPECT_TRUE(target.bytes() == pattern(kSize, 1));
}

}  // namespace
}  // namespace transfuse::conformance

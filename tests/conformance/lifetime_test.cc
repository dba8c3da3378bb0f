// Peers that come, go, stop and are killed; and what is left of it afterwards: nothing.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "conformance/conformance_fixture.h"
#include "conformance/peer_commands.h"
#include "conformance/peer_group.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {
namespace {

class LifetimeTest : public Conformance {};
INSTANTIATE_TEST_SUITE_P(Backends, LifetimeTest, testing::ValuesIn(all_backends()), backend_name);
class PeerDeathTest : public ProcessConformance {};
INSTANTIATE_TEST_SUITE_P(Backends, PeerDeathTest, testing::ValuesIn(backends_of_peers_that_die()),
                         backend_name);

size_t open_descriptors() {
  const std::filesystem::directory_iterator folder("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(folder), end(folder)));
}

TEST_P(LifetimeTest, I3_StatsCountWhatIsHeldAndReturnToZero) {
  EXPECT_EQ(reader_->stats(), TransportStats{});
  std::vector<std::byte> memory(5000);
  auto allocated = reader_->allocate(10000).value();
  // Memory of the caller is no file: there another allocation takes its place.
  auto registered = (reader_->kind() == "file" ? reader_->allocate(memory.size())
                                               : reader_->register_memory(memory))
                        .value();
  EXPECT_EQ(reader_->stats(), (TransportStats{.regions = 2, .region_bytes = 15000}));
  EXPECT_NE(allocated->descriptor().id, registered->descriptor().id);
  allocated.reset();
  EXPECT_EQ(reader_->stats(), (TransportStats{.regions = 1, .region_bytes = 5000}));
  registered.reset();

  const auto peer = make_peer();
  auto connection = connect(*peer);
  auto region = connection->open_region(peer->allocate(4096, 1), soon()).value();
  // Device memory is offered on a page of the host, which counts too.
  const uint64_t held = on_device(GetParam().of_peers()) ? 2 : 1;
  EXPECT_EQ(reader_->stats(), (TransportStats{.peers = 1, .remote_regions = held}));
  const Target target = make_target(4096);
  const auto copies = pieces(target, 4096);
  const TicketId ticket = reader_->submit({.region = region.get(), .copies = copies}).value();
  EXPECT_EQ(reader_->stats().tickets, 1u);
  EXPECT_TRUE(reader_->wait_any({&ticket, 1}, soon()));
  EXPECT_EQ(reader_->stats().tickets, 1u);
  EXPECT_TRUE(reader_->finish(ticket));
  region.reset();
  connection.reset();
  EXPECT_EQ(reader_->stats(), (TransportStats{.read_bytes = 4096}));
}

TEST_P(LifetimeTest, I3_TwoHundredCyclesLeaveDescriptorsAndStatsAsTheyWere) {
  const auto peer = make_peer();
  const std::string endpoint = peer->endpoint();
  size_t mine = 0;
  std::string theirs;
  Target target = make_target(1 << 16);
  const auto copies = pieces(target, 1 << 14);
  for (uint64_t cycle = 0; cycle < 200; ++cycle) {
    const auto allocated = peer->allocate(1 << 16, cycle);
    const auto registered = peer->register_memory(1 << 16, cycle);
    {
      const auto connection = reader_->connect(endpoint, "", soon()).value();
      for (const RegionDescriptor& descriptor : {allocated, registered}) {
        const auto region = connection->open_region(descriptor, soon()).value();
        target.fill(std::byte{0});
        ASSERT_TRUE(read(*region, copies));
        ASSERT_EQ(target.bytes(), pattern(1 << 16, cycle));
      }
    }
    peer->drop(allocated);
    peer->drop(registered);
    if (cycle == 1) {
      mine = open_descriptors();
      theirs = GetParam().process ? peer->ask("descriptors") : "";
    }
  }
  EXPECT_EQ(peer->ask("stats"), "ok 0 0");
  // The serving side closes a connection when it next looks; give it until then.
  const Deadline deadline = soon();
  while (open_descriptors() > mine && !deadline.passed()) std::this_thread::yield();
  EXPECT_LE(open_descriptors(), mine);
  if (GetParam().process) {
    const auto count = [](const std::string& answer) { return std::stoi(answer.substr(3)); };
    while (count(peer->ask("descriptors")) > count(theirs) && !deadline.passed()) {
      std::this_thread::yield();
    }
    EXPECT_LE(count(peer->ask("descriptors")), count(theirs));
  }
}

TEST_P(LifetimeTest, ATransportThatIsGoneCannotBeReached) {
  auto peer = make_peer();
  const std::string endpoint = peer->endpoint();
  const auto connection = connect(*peer);
  const auto descriptor = peer->allocate(4096, 1);
  peer.reset();
  EXPECT_EQ(connection->open_region(descriptor, soon()).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(reader_->connect(endpoint, "", soon()).error().code, ErrorCode::kUnavailable);
  const Deadline deadline = soon();
  while (connection->alive() && !deadline.passed()) std::this_thread::yield();
  EXPECT_FALSE(connection->alive());
}

TEST_P(LifetimeTest, TransportsOpenAndCloseWithoutTraces) {
  const size_t before = open_descriptors();
  for (int i = 0; i < 20; ++i) {
    const auto transport = open_backend(options()).value();
    EXPECT_TRUE(transport->endpoint());
    const auto region = transport->allocate(4096);
    EXPECT_TRUE(region);
  }
  EXPECT_EQ(open_descriptors(), before);
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

TEST_P(PeerDeathTest, I10_APeerThatWasKilledBeforeCannotBeReached) {
  auto peer = make_process();
  const std::string endpoint = peer->endpoint();
  peer->kill();
  EXPECT_EQ(reader_->connect(endpoint, "", soon()).error().code, ErrorCode::kUnavailable);
}

TEST_P(PeerDeathTest, I10_APeerThatIsKilledIsNoticedAndItsRegionsDoNotOpen) {
  auto peer = make_process();
  const auto connection = connect(*peer);
  const auto descriptor = peer->allocate(4096, 1);
  EXPECT_TRUE(connection->alive());
  peer->kill();
  const Deadline deadline = soon();
  while (connection->alive() && !deadline.passed()) std::this_thread::yield();
  EXPECT_FALSE(connection->alive());
  EXPECT_EQ(connection->open_region(descriptor, soon()).error().code, ErrorCode::kUnavailable);
}

TEST_P(PeerDeathTest, I11_ReadsOfAPeerThatIsKilledMeanwhileEndAndNeverLieAboutTheirBytes) {
  constexpr uint64_t kSize = 64 << 20;
  for (const bool owned : {false, true}) {
    auto peer = make_process();
    const auto connection = connect(*peer);
    const auto descriptor = owned ? peer->register_memory(kSize, 17) : peer->allocate(kSize, 17);
    const auto region = connection->open_region(descriptor, soon()).value();
    const auto source = pattern(kSize, 17);
    const Target target = make_target(kSize);
    const auto copies = pieces(target, 1 << 16);
    std::vector<TicketId> tickets;
    for (size_t i = 0; i + 16 <= copies.size(); i += 16) {
      const std::span<const StridedCopy> share(&copies[i], 16);
      tickets.push_back(reader_->submit({.region = region.get(), .copies = share}).value());
    }
    peer->kill();
    for (size_t i = 0; i < tickets.size(); ++i) {
      ASSERT_TRUE(reader_->wait_any({&tickets[i], 1}, soon()));
      const auto outcome = reader_->finish(tickets[i]);
      if (outcome) {
        const auto at = static_cast<long>(i) * (1 << 20);
        const auto landed = target.bytes(static_cast<uint64_t>(at), 1 << 20);
        EXPECT_TRUE(std::equal(landed.begin(), landed.end(), source.begin() + at));
      } else {
        EXPECT_EQ(outcome.error().code, ErrorCode::kUnavailable) << outcome.error().to_string();
      }
    }
    // Memory of a process that is gone is gone; a memfd that is mapped here is not, nor is memory
    // of a device.
    const auto later = read(*region, {copies.data(), 1});
    if (owned && !GetParam().uses_device()) {
      EXPECT_EQ(later.error().code, ErrorCode::kUnavailable);
    } else if (later) {
      const auto landed = target.bytes(0, 1 << 16);
      EXPECT_TRUE(std::equal(landed.begin(), landed.end(), source.begin()));
    }
  }
}

TEST_P(PeerDeathTest, I11_AStoppedPeerCostsNoMoreThanTheDeadline) {
  const auto peer = make_process();
  const std::string endpoint = peer->endpoint();
  const auto connection = connect(*peer);
  const auto mapped_descriptor = peer->allocate(1 << 20, 3);
  const auto other_descriptor = peer->allocate(1 << 20, 5);
  const auto mapped = connection->open_region(mapped_descriptor, soon()).value();
  const auto owned = connection->open_region(peer->register_memory(1 << 20, 4), soon()).value();
  peer->stop();
  EXPECT_TRUE(connection->alive());
  const auto connected = reader_->connect(endpoint, "", Deadline::after_ms(200));
  ASSERT_FALSE(connected);
  EXPECT_EQ(connected.error().code, ErrorCode::kDeadlineExceeded) << connected.error().to_string();
  const auto opened = connection->open_region(other_descriptor, Deadline::after_ms(200));
  // What is offered on a page that is open already needs nothing of the peer.
  EXPECT_EQ(opened.has_value(), GetParam().uses_device());
  if (!opened) {
    EXPECT_EQ(opened.error().code, ErrorCode::kDeadlineExceeded) << opened.error().to_string();
  }

  // Reads are one-sided: they need nothing of the peer.
  const Target target = make_target(1 << 20);
  EXPECT_TRUE(read(*mapped, pieces(target, 1 << 18)));
  EXPECT_EQ(target.bytes(), pattern(1 << 20, 3));
  EXPECT_TRUE(read(*owned, pieces(target, 1 << 18)));
  EXPECT_EQ(target.bytes(), pattern(1 << 20, 4));

  peer->resume();
  EXPECT_TRUE(connection->open_region(other_descriptor, soon()));
  EXPECT_TRUE(reader_->connect(endpoint, "", soon()));
}

TEST_P(PeerDeathTest, I8_ARestartedPeerIsAnotherPeer) {
  auto peer = make_process();
  const std::string endpoint = peer->endpoint();
  const auto connection = connect(*peer);
  const auto descriptor = peer->allocate(4096, 1);
  const auto region = connection->open_region(descriptor, soon()).value();
  peer->kill();
  const auto successor = make_process();
  EXPECT_NE(successor->endpoint(), endpoint);
  const auto again = successor->allocate(4096, 2);
  EXPECT_FALSE(connection->open_region(again, soon()));
  const auto fresh = connect(*successor);
  const auto fresh_region = fresh->open_region(again, soon()).value();
  const Target target = make_target(4096);
  EXPECT_TRUE(read(*fresh_region, pieces(target, 4096)));
  EXPECT_EQ(target.bytes(), pattern(4096, 2));
}

TEST_P(PeerDeathTest, ASocketOfAKilledPeerDoesNotStay) {
  auto peer = make_process();
  EXPECT_FALSE(peer->endpoint().empty());
  EXPECT_FALSE(std::filesystem::is_empty(folder_.path()));
  peer->kill();
  const auto next = open_backend(options()).value();
  EXPECT_TRUE(std::filesystem::is_empty(folder_.path()));
}

}  // namespace
}  // namespace transfuse::conformance

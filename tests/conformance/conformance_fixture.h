// What every conformance test starts from: a reading transport, peers of the same backend, and
// short ways to say common things.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "conformance/backends.h"
#include "conformance/peer_commands.h"
#include "conformance/peer_group.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {

inline std::string backend_name(const testing::TestParamInfo<Backend>& info) {
  return info.param.name;
}

// What reads write, wherever the backend has it.
class Target {
 public:
  Target(const std::string& backend, uint64_t size_bytes)
      : memory_(allocate_memory(backend, size_bytes)) {}
  Target(const std::string& backend, std::span<const std::byte> bytes)
      : Target(backend, bytes.size()) {
    move_bytes(data(), bytes.data(), bytes.size());
  }

  std::byte* data() const { return memory_->bytes().data(); }
  uint64_t size() const { return memory_->bytes().size(); }
  operator std::span<std::byte>() const { return memory_->bytes(); }  // NOLINT: as a vector does
  std::vector<std::byte> bytes() const { return bytes(0, size()); }
  std::vector<std::byte> bytes(uint64_t from, uint64_t count) const {
    std::vector<std::byte> copied(count);
    move_bytes(copied.data(), data() + from, count);
    return copied;
  }
  void fill(std::byte value) {
    const std::vector<std::byte> bytes(size(), value);
    move_bytes(data(), bytes.data(), bytes.size());
  }

 private:
  std::unique_ptr<TestMemory> memory_;
};

// Long enough for a loaded machine; nothing waits for it unless something is broken.
inline Deadline soon() { return Deadline::after_ms(30000); }

class Conformance : public testing::TestWithParam<Backend> {
 protected:
  static void SetUpTestSuite() { signal(SIGPIPE, SIG_IGN); }
  void SetUp() override {
    const std::string missing = missing_for(GetParam());
    if (!missing.empty()) GTEST_SKIP() << missing;
    reader_ = open_backend(options()).value();
  }
  void TearDown() override {
    if (reader_ == nullptr) return;
    TransportStats rest = reader_->stats();
    rest.read_bytes = 0;
    EXPECT_EQ(rest, TransportStats{}) << "something of this test is still held";
  }

  BackendOptions options(std::string token = "") const {
    return {.backend = GetParam().backend, .folder = folder_.path(), .token = std::move(token)};
  }
  std::unique_ptr<TestPeer> make_peer(const std::string& token = "") const {
    if (GetParam().process) return std::make_unique<ProcessPeer>(peer_options(token));
    return std::make_unique<InsidePeer>(peer_options(token));
  }
  BackendOptions peer_options(std::string token = "") const {
    BackendOptions peer = options(std::move(token));
    peer.backend = GetParam().of_peers();
    return peer;
  }
  Target make_target(uint64_t size_bytes) const { return {GetParam().of_targets(), size_bytes}; }
  Target make_target(std::span<const std::byte> bytes) const {
    return {GetParam().of_targets(), bytes};
  }
  std::unique_ptr<Peer> connect(TestPeer& peer) {
    return reader_->connect(peer.endpoint(), "", soon()).value();
  }

  Result<void> read(const RemoteRegion& region, std::span<const StridedCopy> copies,
                    std::span<uint64_t> fingerprints = {}, const RemoteRegion* scales = nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(const TicketId ticket, reader_->submit({.region = &region,
                                                                       .copies = copies,
                                                                       .fingerprints = fingerprints,
                                                                       .scale_region = scales}));
    EXPECT_TRUE(reader_->wait_any({&ticket, 1}, soon()));
    if (reader_->poll(ticket) == TicketState::kPending) return unfinished(ticket);
    return reader_->finish(ticket);
  }
  // Waits until no write is possible any more.
  TicketState settled(TicketId ticket) {
    EXPECT_TRUE(reader_->wait_any({&ticket, 1}, soon()));
    const Deadline deadline = soon();
    while (reader_->poll(ticket) == TicketState::kPoisoned && !deadline.passed()) {
      std::this_thread::yield();
    }
    return reader_->poll(ticket);
  }

  static StridedCopy bytes_copy(uint64_t offset, std::byte* target, uint64_t size_bytes) {
    StridedCopy copy;
    copy.source_offset_bytes = offset;
    copy.target = target;
    copy.count[2] = static_cast<uint32_t>(size_bytes);
    copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
    return copy;
  }
  static std::vector<StridedCopy> pieces(std::span<std::byte> target, uint64_t piece_bytes) {
    std::vector<StridedCopy> copies;
    for (uint64_t at = 0; at < target.size(); at += piece_bytes) {
      copies.push_back(
          bytes_copy(at, target.data() + at, std::min<uint64_t>(piece_bytes, target.size() - at)));
    }
    return copies;
  }

  TemporaryFolder folder_;
  std::unique_ptr<Transport> reader_;

 private:
  Error unfinished(TicketId ticket) {
    reader_->cancel(ticket);
    settled(ticket);
    (void)reader_->finish(ticket).has_value();
    return {ErrorCode::kDeadlineExceeded, "the read did not end"};
  }
};

// Peers that are processes.
class ProcessConformance : public Conformance {
 protected:
  std::unique_ptr<ProcessPeer> make_process() const {
    return std::make_unique<ProcessPeer>(peer_options());
  }
};

}  // namespace transfuse::conformance

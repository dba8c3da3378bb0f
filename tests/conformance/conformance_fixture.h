// What every conformance test starts from: a reading transport, peers of the same backend, and
// short ways to say common things.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "conformance/peer_commands.h"
#include "conformance/peer_group.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {

struct Backend {
  std::string name;
  std::string backend;
  bool process = false;  // peers are processes of their own
};
inline std::ostream& operator<<(std::ostream& out, const Backend& backend) {
  return out << backend.name;
}
inline const Backend kLocal = {"Local", "local", false};
inline const Backend kFaulty = {"FaultyWithoutFaults", "faulty", false};
inline const Backend kShmInside = {"ShmInOneProcess", "shm", false};
inline const Backend kShm = {"Shm", "shm", true};
inline const Backend kFileInside = {"FileInOneProcess", "file", false};
inline const Backend kFile = {"File", "file", true};
inline std::string backend_name(const testing::TestParamInfo<Backend>& info) {
  return info.param.name;
}

// Long enough for a loaded machine; nothing waits for it unless something is broken.
inline Deadline soon() { return Deadline::after_ms(30000); }

class Conformance : public testing::TestWithParam<Backend> {
 protected:
  static void SetUpTestSuite() { signal(SIGPIPE, SIG_IGN); }
  void SetUp() override { reader_ = open_backend(options()).value(); }
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
    if (GetParam().process) return std::make_unique<ProcessPeer>(options(token));
    return std::make_unique<InsidePeer>(options(token));
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
    return std::make_unique<ProcessPeer>(options());
  }
};

}  // namespace transfuse::conformance

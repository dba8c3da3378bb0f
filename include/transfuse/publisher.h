// The side that is read: offers the weights of one process, version after version.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

class Plan;

// Where a parameter of this process lies. Memory inside a region of `transport` (allocate()) is
// read at its best; anything else is registered as the caller's own memory.
struct ParameterMemory {
  std::string name;
  std::byte* data = nullptr;
  uint64_t size_bytes = 0;
};

// What readers of a version read while the trainer goes on.
enum class Retention : uint8_t {
  kInPlace,   // the weights themselves: the next write waits for readers, or revokes them
  kSnapshot,  // a copy in one of `snapshot_slots` slots, made by publish(): training goes on at
              // once
};

// Where snapshots of weights lie that are on a device.
enum class SnapshotPlace : uint8_t {
  kWithWeights,  // on the device: copied at the speed of its memory
  kHost,         // takes none of the device's memory; copied and read over PCIe
};

struct PublisherOptions {
  std::string model = "model";
  std::string name;                        // of this source, unique in the model: "trainer0"
  uint32_t source_count = 1;               // sources that make a version complete
  std::vector<const LocalRegion*> arenas;  // outlive the publisher
  std::string token;                       // TransportOptions::token of `transport`
  uint32_t fingerprint_threads = 0;        // 0: one per core that this process may use
  int64_t drain_ms = 30000;  // the longest wait for readers, of begin_write() or publish()
  // Copies in memory that the transport allocates when the publisher is opened, each of the bytes
  // of all parameters (snapshot_bytes()). 0: only kInPlace.
  uint32_t snapshot_slots = 0;
  SnapshotPlace snapshot_place = SnapshotPlace::kWithWeights;
  double snapshot_gigabytes_per_second = 0;  // into snapshots in the host; 0: as fast as possible
  // publish() of a snapshot returns when its copy has begun. A thread of the publisher copies,
  // proves and offers the version; until the next begin_write() the caller must not write.
  bool snapshot_async = false;
  Retention retention = Retention::kInPlace;
  // kSnapshot: if readers hold a lease on every slot. kRevokeAtDeadline waits drain_ms first.
  WhenLeased when_leased = WhenLeased::kRevokeAtDeadline;
  Metadata metadata;  // of this source, for as long as it lives; its kind is that of the layout
  // publish() states the revision of what it publishes: one more pass over the weights. For sources
  // that hold the whole model; revision_of() says what else it needs.
  bool compute_revision = false;
};

// What a source says of one version.
struct VersionWords {
  Metadata metadata{};
  // Zero: not stated, or computed. With compute_revision: what the weights must have.
  Digest revision{};
};

struct WriteTiming {
  int64_t waited_us = 0;  // for readers
  uint32_t revoked = 0;
  int64_t copy_waited_us = 0;  // snapshot_async: until the version before was copied
};

struct PublishTiming {
  int64_t waited_us = 0;  // for a slot
  uint32_t revoked = 0;
  int64_t copy_us = 0;   // into the slot
  bool skipped = false;  // WhenLeased::kSkip: every slot was leased; readers never see this version
  bool copying = false;  // snapshot_async: readers see it when it is copied, see snapshot()
};

// Of the last version that publish() left to the publisher's thread.
enum class SnapshotState : uint8_t {
  kNone,
  kCopying,
  kPublished,
  kSkipped,  // as PublishTiming::skipped
  kFailed,   // wait_published() says why
};
struct SnapshotProgress {
  SnapshotState state = SnapshotState::kNone;
  uint64_t version = 0;
  uint64_t copied_bytes = 0;
  uint64_t size_bytes = 0;
  int64_t elapsed_us = 0;  // of one that has ended: copied and published
};

// Memory that `slots` snapshots of `layout` need, beside the weights.
uint64_t snapshot_bytes(const Layout& layout, uint32_t slots);
// Memory of the fingerprint tables that a source with so many snapshot slots keeps for `plan`.
uint64_t fingerprint_table_bytes(const Plan& plan, const Layout& source, uint32_t slots);

// The content address of the weights in `memory`, see content_revision(). kLayoutMismatch names a
// tensor of which the layout holds only a part. `threads` 0: one per core.
Result<Digest> revision_of(const Layout& layout, std::span<const ParameterMemory> memory,
                           uint32_t threads = 0);

// kInPlace: the weights are read where the trainer keeps them. Between begin_write() and publish()
// nobody may read; outside of it the caller must not write. kSnapshot: the caller may write at any
// time but during publish(), which copies; a leased copy is never overwritten. With snapshot_async
// the copy goes on after publish(): what comes next (begin_write(), publish(), set_retention(),
// close()) waits for its end, drain_ms at most, and returns why it failed. Then the version is
// still being written: publish() it again, or abort_write() it. `transport` and `control` outlive
// the publisher. Used from one thread at a time.
class Publisher {
 public:
  // `memory` names every parameter of `layout` exactly once (I2: by name). Fails with
  // kInvalidArgument, kLayoutMismatch (a parameter has another size), kAlreadyExists (a live
  // publisher has the name), kUnavailable, kResourceExhausted (no room for the snapshots: checked
  // before anything is allocated).
  static Result<std::unique_ptr<Publisher>> open(Transport& transport, Control& control,
                                                 const Layout& layout,
                                                 std::vector<ParameterMemory> memory,
                                                 const PublisherOptions& options);
  // Leaves; a version that is being written, or copied, is aborted.
  virtual ~Publisher() = default;

  // Versions rise. Waits for readers of the weights themselves (options.drain_ms), then revokes
  // them; for none if the version before was a snapshot. kDeadlineExceeded: a copy of the weights
  // goes on.
  virtual Result<WriteTiming> begin_write(uint64_t version) = 0;
  // kFingerprintMismatch: the weights do not have the stated revision; nothing is published, and
  // publish() may be called again.
  Result<PublishTiming> publish(uint64_t version) { return publish(version, VersionWords{}); }
  virtual Result<PublishTiming> publish(uint64_t version, const VersionWords& words) = 0;
  // From the next begin_write() on. kInvalidArgument: kSnapshot without slots, or while writing.
  virtual Result<void> set_retention(Retention retention) = 0;
  // Gives up the version that is being written, or copied: nothing of it is ever visible. The
  // version before is gone too, unless it is a snapshot.
  virtual Result<void> abort_write(std::string_view reason) = 0;
  virtual uint64_t version() const = 0;           // last published, 0 if none or while writing
  virtual SnapshotProgress snapshot() const = 0;  // from any thread
  // snapshot_async: success when the last version is there or skipped (or there was none), else why
  // it failed; kDeadlineExceeded: it is still being copied, and goes on.
  virtual Result<SnapshotProgress> wait_published(Deadline deadline) = 0;
  virtual Result<void> close() = 0;
};

}  // namespace transfuse

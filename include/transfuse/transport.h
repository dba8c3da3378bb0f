// Moves bytes between registered regions of processes, by one-sided reads of the reader. Knows
// nothing of tensors or versions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/region.h"  // IWYU pragma: export
#include "transfuse/result.h"

namespace transfuse {

enum class TicketId : uint64_t {};  // never reused, does not wrap

// A process that can be read.
class Peer {
 public:
  virtual ~Peer() = default;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  // kNotFound: the peer has no such region (any more). kCorrupt: what the peer handed out does not
  // match the descriptor.
  virtual Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                            Deadline deadline) = 0;
  // Handle `index` of a region that was made by offer_handles(). What its maker refused is refused
  // here. kUnsupported where the transport carries none.
  virtual Result<MemoryHandle> open_handle(RegionId /*region*/, uint64_t /*index*/,
                                           Deadline /*deadline*/) {
    return carries_no_handles();
  }
  // False once the peer process is known to be gone; never blocks.
  virtual bool alive() const = 0;

 protected:
  Peer() = default;
};

// What a read may take, so that others go on beside it. 0: all there is.
struct CopyLimits {
  double gigabytes_per_second = 0;  // of bytes written
  uint32_t multiprocessors = 0;     // of the device that reads
};

// A read of one region, or of several that join: its copies, executed in any order by any number of
// threads. Spans belong to the caller and stay valid and unchanged until the ticket has ended
// (landed, failed or cancelled).
struct ReadRequest {
  const RemoteRegion* region = nullptr;  // of every copy, where `regions` is empty
  std::span<const StridedCopy> copies{};
  std::span<uint64_t>
      fingerprints{};  // empty, or one per copy: written where copies[i].fingerprint is set
  // Empty, or one per copy: all of them join (RemoteRegion::joins_requests()).
  std::span<const RemoteRegion* const> regions{};
  // Where the scales lie that dequantising copies read, if not in the region of their numbers: of
  // every copy, or (empty, or one per copy; null: with its numbers) where `regions` is not empty.
  const RemoteRegion* scale_region = nullptr;
  std::span<const RemoteRegion* const> scale_regions{};
  CopyLimits limits{};  // where the region joins
};

enum class TicketState : uint8_t {
  kPending,
  kLanded,     // every byte is in place and visible to the thread that polls
  kFailed,     // see finish(); part of the target may be written, nothing writes any more
  kCancelled,  // nothing writes any more
  kPoisoned,  // cancelled by the caller, but a late write is still possible: the target memory must
              // not be used
};

struct TransportStats {
  uint64_t regions = 0;  // live registrations
  uint64_t region_bytes = 0;
  uint64_t peers = 0;           // live connections
  uint64_t remote_regions = 0;  // live mappings or handles
  uint64_t tickets = 0;         // submitted and not yet finished
  uint64_t poisoned_bytes = 0;  // target bytes that an abandoned ticket may still write
  uint64_t read_bytes = 0;      // since open
  bool operator==(const TransportStats&) const = default;
};

struct TransportOptions {
  // 0: one per core that this process may use.
  uint32_t threads = 0;
  // shm only: let any process of this user read caller-owned memory (PR_SET_PTRACER_ANY). Only on
  // request.
  bool allow_any_tracer = false;
  // Secret that a peer must present to be served; empty: none is asked for.
  std::string token{};
};

// Thread-safe: every call may come from any thread. Submit, then poll; no callbacks.
class Transport {
 public:
  virtual ~Transport() = default;  // waits for its own worker threads only, never for a peer
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  virtual std::string_view kind() const = 0;  // "local", "shm", ...

  // -- to be read --
  // Zeroed memory of the transport's best kind, page aligned. kResourceExhausted where there is no
  // room.
  virtual Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) = 0;
  // The same on the device that it reads into. kUnsupported: it has none.
  virtual Result<std::unique_ptr<LocalRegion>> allocate_on_device(uint64_t size_bytes) {
    return no_device("allocate " + std::to_string(size_bytes) + " bytes on");
  }
  // Memory that the caller owns and keeps alive while the handle lives.
  virtual Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) = 0;
  // The same of memory that is there to be written: where its allocator does not share it, peers
  // that open the region are told kNotFound, and that is all.
  virtual Result<std::unique_ptr<LocalRegion>> register_target(std::span<std::byte> memory) {
    return register_memory(memory);
  }
  // A region without bytes, whose handles peers ask for one by one: each is made, sent and closed.
  // kUnsupported where the transport carries none.
  virtual Result<std::unique_ptr<LocalRegion>> offer_handles(
      HandleMaker /*make*/) {  // NOLINT: kept
    return carries_no_handles();
  }
  // The memory around `address` that is shared as one: spans within it need one registration only.
  // Empty: as the caller likes (memory of the host, by pages).
  virtual std::span<std::byte> allocation_of(const std::byte* /*address*/) { return {}; }
  // What a peer passes to connect(): opaque, valid while this transport lives.
  virtual Result<std::string> endpoint() = 0;

  // -- to read --
  // kUnavailable: nobody there. kPermissionDenied: wrong user or token.
  virtual Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                                Deadline deadline) = 0;
  // Whose endpoints connect() takes: its own kind's, or that of the transport it stands on.
  virtual std::string_view endpoint_kind() const { return kind(); }
  // A transport like this one whose own reads go through `host`: files into memory of a device.
  virtual std::unique_ptr<Transport> reading_through(std::unique_ptr<Transport> host) {
    return host;
  }
  // This process' own memory on the device, as one region: source_offset_bytes is an address, and a
  // copy without a target is only summed. kUnsupported: it has no device. Lives with the transport.
  virtual Result<const RemoteRegion*> own_memory() { return no_device("copy within"); }

  // Checks every copy against the size of its region (kCorrupt, nothing is started) and against
  // poisoned target memory (kPoisoned). Does not allocate once warm.
  virtual Result<TicketId> submit(const ReadRequest& request) = 0;
  virtual TicketState poll(TicketId ticket) = 0;
  // Returns when any ticket of `tickets` is no longer pending, or at the deadline: true in the
  // first case.
  virtual bool wait_any(std::span<const TicketId> tickets, Deadline deadline) = 0;
  // Bytes landed so far, for progress and stall detection.
  virtual uint64_t progress_bytes(TicketId ticket) = 0;
  // Asks for an end. The state becomes kCancelled when no later write is possible; until then
  // kPoisoned.
  virtual void cancel(TicketId ticket) = 0;
  // Takes the outcome and frees the ticket: success if landed, else the error (kCancelled if
  // cancelled). Only for a ticket that is not kPending; a kPoisoned one is freed when it has ended,
  // its memory stays poisoned until then.
  virtual Result<void> finish(TicketId ticket) = 0;

  virtual TransportStats stats() const = 0;

 protected:
  Transport() = default;
  Error no_device(std::string_view what) const {
    return {ErrorCode::kUnsupported, "transport '" + std::string(kind()) + "' has no device to " +
                                         std::string(what) + ": open a session with a device"};
  }
};

// Within one process; the memory of every `local` transport is reachable from every other.
Result<std::unique_ptr<Transport>> open_local_transport(const TransportOptions& options = {});
// Between processes of one host. `runtime_folder` (0700, the caller's) holds the socket.
Result<std::unique_ptr<Transport>> open_shm_transport(std::string_view runtime_folder,
                                                      const TransportOptions& options = {});
// Files of this host, read by offset; nobody needs to be alive who wrote them. `folder`: where
// allocate() puts files; empty: it only reads. Memory of the caller cannot be served.
Result<std::unique_ptr<Transport>> open_file_transport(std::string_view folder = {},
                                                       const TransportOptions& options = {});

}  // namespace transfuse

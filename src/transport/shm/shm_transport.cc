// The transport between processes of one host: regions of this process, peers, and the reads of
// their regions.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "copy/read_queue.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/connection.h"
#include "transport/shm/region_server.h"
#include "transport/shm/runtime_folder.h"
#include "transport/shm/shared_memory.h"
#include "transport/shm/system_error.h"
#include "transport/shm/vm_source.h"
#include "transport/shm/wire.h"

namespace transfuse {
namespace shm {
namespace {

// What a transport, its regions and its peers share. In a forked child it is left alone: its locks
// may be held, and its threads do not exist.
struct Core {
  Core(RuntimeFolder opened, const TransportOptions& given)
      : options(given),
        queue({.threads = given.threads, .scratch_bytes = kVmScratchBytes}),
        folder(std::move(opened)) {}

  bool in_child() const { return ::getpid() != pid; }
  Error inherited() const {
    return {ErrorCode::kUnavailable,
            fmt::format("shm transport: opened by process {}, used in its forked child {}", pid,
                        ::getpid())};
  }

  const pid_t pid = ::getpid();
  const TransportOptions options;
  RegionTable table;
  ReadQueue queue;
  std::atomic<uint64_t> peers{0};
  std::atomic<uint64_t> remote_regions{0};
  Mutex mutex;
  RuntimeFolder folder GUARDED_BY(mutex);
  std::unique_ptr<RegionServer> server GUARDED_BY(mutex);  // from the first endpoint() on
};

// Memory of this process in the table of its transport. Used from one thread.
class ShmLocalRegion final : public LocalRegion {
 public:
  ShmLocalRegion(Core& core, SharedMemory memory)
      : core_(core),
        memory_(std::move(memory)),
        bytes_(memory_.mapping.data(), memory_.mapping.size_bytes()),
        id_(core.table.add({.fd = memory_.fd.get(),
                            .address = 0,
                            .size_bytes = bytes_.size(),
                            .kind = RegionKind::kMemfd})) {}
  ShmLocalRegion(Core& core, std::span<std::byte> memory)
      : core_(core),
        bytes_(memory),
        id_(core.table.add({.fd = -1,
                            .address = reinterpret_cast<uint64_t>(memory.data()),
                            .size_bytes = memory.size(),
                            .kind = RegionKind::kCallerOwned})) {}
  ~ShmLocalRegion() override {
    if (!core_.in_child()) core_.table.remove(id_);
  }

  std::span<std::byte> bytes() const override { return bytes_; }
  RegionDescriptor descriptor() const override { return {id_, bytes_.size()}; }

 private:
  Core& core_;
  SharedMemory memory_;
  std::span<std::byte> bytes_;
  RegionId id_;
};

// Handles in the table of its transport. Used from one thread.
class ShmHandles final : public LocalRegion {
 public:
  ShmHandles(Core& core, HandleMaker make)
      : core_(core),
        make_(std::move(make)),
        id_(core.table.add({.kind = RegionKind::kHandle, .make = &make_})) {}
  ~ShmHandles() override {
    if (!core_.in_child()) core_.table.remove(id_);
  }
  std::span<std::byte> bytes() const override { return {}; }
  RegionDescriptor descriptor() const override { return {id_, 0}; }

 private:
  Core& core_;
  const HandleMaker make_;
  RegionId id_;
};

// Safe to call from any thread.
class ShmRemoteRegion final : public RemoteRegion {
 public:
  ShmRemoteRegion(Core& core, std::atomic<uint64_t>& siblings, Mapping mapping)
      : ShmRemoteRegion(core, siblings,
                        std::make_unique<MappedSource>(mapping.data(), mapping.size_bytes()),
                        "memfd") {
    mapping_ = std::move(mapping);
  }
  ShmRemoteRegion(Core& core, std::atomic<uint64_t>& siblings, std::unique_ptr<ReadSource> source,
                  std::string_view route)
      : core_(core), siblings_(siblings), source_(std::move(source)), route_(route) {
    ++siblings_;
    ++core_.remote_regions;
  }
  ~ShmRemoteRegion() override {
    if (core_.in_child()) return;
    core_.queue.retire(*source_, {ErrorCode::kCancelled, "shm region: closed while it was read"});
    --core_.remote_regions;
    --siblings_;
  }

  uint64_t size_bytes() const override { return source_->size_bytes(); }
  std::string_view route() const override { return route_; }
  std::span<const std::byte> mapped() const override {
    return {mapping_.data(), mapping_.size_bytes()};
  }
  const ReadSource& source() const { return *source_; }
  bool belongs_to(const Core& core) const { return &core == &core_; }

 private:
  Core& core_;
  std::atomic<uint64_t>& siblings_;  // regions of its peer
  Mapping mapping_;
  std::unique_ptr<ReadSource> source_;
  std::string_view route_;
};

// Safe to call from any thread.
class ShmPeer final : public Peer {
 public:
  ShmPeer(Core& core, std::unique_ptr<Connection> connection)
      : core_(core), connection_(std::move(connection)) {
    ++core_.peers;
  }
  ~ShmPeer() override {
    if (core_.in_child()) {
      // Another thread of the parent may wait in it: it cannot be taken down here.
      static_cast<void>(connection_.release());
      return;
    }
    TRANSFUSE_CHECK(regions_.load() == 0);  // a region must not outlive its peer
    --core_.peers;
  }

  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override {
    if (core_.in_child()) return core_.inherited();
    TRANSFUSE_ASSIGN_OR_RETURN(const OfferedRegion offered,
                               connection_->open_region(descriptor.id, deadline));
    const auto id = static_cast<uint64_t>(descriptor.id);
    if (offered.size_bytes != descriptor.size_bytes || offered.size_bytes == 0) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("region {}: expected {} bytes by its descriptor, found {}", id,
                               descriptor.size_bytes, offered.size_bytes)};
    }
    if (offered.kind == RegionKind::kMemfd) {
      TRANSFUSE_ASSIGN_OR_RETURN(Mapping mapping, map_peer_memory(offered.fd, offered.size_bytes));
      return std::unique_ptr<RemoteRegion>(
          std::make_unique<ShmRemoteRegion>(core_, regions_, std::move(mapping)));
    }
    if (offered.address > UINT64_MAX - offered.size_bytes) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("region {}: {} bytes at {:#x} leave the address space", id,
                               offered.size_bytes, offered.address)};
    }
    auto source = std::make_unique<VmSource>(*connection_, offered.address, offered.size_bytes);
    TRANSFUSE_RETURN_IF_ERROR(source->probe());
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<ShmRemoteRegion>(core_, regions_, std::move(source), "process_vm_readv"));
  }
  Result<MemoryHandle> open_handle(RegionId region, uint64_t index, Deadline deadline) override {
    if (core_.in_child()) return core_.inherited();
    TRANSFUSE_ASSIGN_OR_RETURN(OfferedRegion offered,
                               connection_->open_handle(region, index, deadline));
    return MemoryHandle{.fd = offered.fd.release(), .size_bytes = offered.size_bytes};
  }
  bool alive() const override { return !core_.in_child() && connection_->alive(); }

 private:
  Core& core_;
  std::unique_ptr<Connection> connection_;
  std::atomic<uint64_t> regions_{0};
};

// Safe to call from any thread.
class ShmTransport final : public Transport {
 public:
  ShmTransport(RuntimeFolder folder, const TransportOptions& options)
      : core_(std::make_unique<Core>(std::move(folder), options)) {}
  ~ShmTransport() override {
    if (core_->in_child()) {
      static_cast<void>(core_.release());
      return;
    }
    const TransportStats live = stats();  // regions and peers must not outlive their transport
    TRANSFUSE_CHECK(live.regions == 0 && live.peers == 0);
  }

  std::string_view kind() const override { return "shm"; }

  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    if (core_->in_child()) return core_->inherited();
    TRANSFUSE_ASSIGN_OR_RETURN(SharedMemory memory, create_shared_memory(size_bytes));
    return std::unique_ptr<LocalRegion>(
        std::make_unique<ShmLocalRegion>(*core_, std::move(memory)));
  }

  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    if (core_->in_child()) return core_->inherited();
    if (memory.empty()) {
      return Error{ErrorCode::kInvalidArgument, "shm region: expected at least 1 byte, found 0"};
    }
    // EINVAL: a kernel without Yama, where nothing has to be allowed.
    if (core_->options.allow_any_tracer &&
        ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0) != 0 && errno != EINVAL) {
      return Error{
          ErrorCode::kPermissionDenied,
          fmt::format("shm region: expected prctl(PR_SET_PTRACER) to allow readers, found: "
                      "{}",
                      errno_text(errno))};
    }
    return std::unique_ptr<LocalRegion>(std::make_unique<ShmLocalRegion>(*core_, memory));
  }

  Result<std::unique_ptr<LocalRegion>> offer_handles(HandleMaker make) override {
    if (core_->in_child()) return core_->inherited();
    return std::unique_ptr<LocalRegion>(std::make_unique<ShmHandles>(*core_, std::move(make)));
  }

  Result<std::string> endpoint() override {
    if (core_->in_child()) return core_->inherited();
    const MutexLock lock(core_->mutex);
    if (!core_->server) {
      TRANSFUSE_ASSIGN_OR_RETURN(Listener listener, core_->folder.listen());
      TRANSFUSE_ASSIGN_OR_RETURN(
          core_->server,
          RegionServer::start(std::move(listener), core_->table, core_->options.token));
    }
    return core_->folder.endpoint();
  }

  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    if (core_->in_child()) return core_->inherited();
    TRANSFUSE_ASSIGN_OR_RETURN(auto connection, Connection::open(endpoint, token, deadline));
    return std::unique_ptr<Peer>(std::make_unique<ShmPeer>(*core_, std::move(connection)));
  }

  Result<TicketId> submit(const ReadRequest& request) override {
    if (core_->in_child()) return core_->inherited();
    const auto* region = dynamic_cast<const ShmRemoteRegion*>(request.region);
    if (region == nullptr || !region->belongs_to(*core_)) {
      return Error{ErrorCode::kInvalidArgument,
                   "shm read: expected a region that a peer of this transport opened"};
    }
    const auto* scales = dynamic_cast<const ShmRemoteRegion*>(request.scale_region);
    if (request.scale_region != nullptr && (scales == nullptr || !scales->belongs_to(*core_))) {
      return Error{ErrorCode::kInvalidArgument,
                   "shm read: expected scales in a region that a peer of this transport opened"};
    }
    return core_->queue.submit(region->source(), request.copies, request.fingerprints,
                               scales == nullptr ? nullptr : &scales->source());
  }
  TicketState poll(TicketId ticket) override {
    return core_->in_child() ? TicketState::kFailed : core_->queue.poll(ticket);
  }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    return core_->in_child() || core_->queue.wait_any(tickets, deadline);
  }
  uint64_t progress_bytes(TicketId ticket) override {
    return core_->in_child() ? 0 : core_->queue.progress_bytes(ticket);
  }
  void cancel(TicketId ticket) override {
    if (!core_->in_child()) core_->queue.cancel(ticket);
  }
  Result<void> finish(TicketId ticket) override {
    if (core_->in_child()) return core_->inherited();
    return core_->queue.finish(ticket);
  }

  TransportStats stats() const override {
    TransportStats stats;
    if (core_->in_child()) return stats;
    core_->table.add_stats(stats);
    core_->queue.add_stats(stats);
    stats.peers = core_->peers.load();
    stats.remote_regions = core_->remote_regions.load();
    return stats;
  }

 private:
  std::unique_ptr<Core> core_;
};

}  // namespace
}  // namespace shm

Result<std::unique_ptr<Transport>> open_shm_transport(std::string_view runtime_folder,
                                                      const TransportOptions& options) {
  if (options.token.size() > shm::kMaxTokenBytes) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("shm token: expected at most {} bytes, found {}", shm::kMaxTokenBytes,
                             options.token.size())};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(shm::RuntimeFolder folder, shm::RuntimeFolder::open(runtime_folder));
  return std::unique_ptr<Transport>(
      std::make_unique<shm::ShmTransport>(std::move(folder), options));
}

}  // namespace transfuse

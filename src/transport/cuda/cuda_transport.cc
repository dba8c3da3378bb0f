// Device memory by CUDA IPC and exported handles, read by one launch a request; everything else is
// the host transport's.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "copy/copy.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/offered_memory.h"
#include "transport/cuda/physical_memory.h"

namespace transfuse {

class CudaTransport;

namespace {

using cuda::CopyOptions;
using cuda::Current;
using cuda::Device;
using cuda::Devices;
using cuda::Event;
using cuda::EventKind;
using cuda::kBoardBytes;
using cuda::kOfferBytes;
using cuda::MemoryOffer;
using cuda::OfferBoards;
using cuda::OfferedMemory;
using cuda::OpenedMemory;
using cuda::PreparedCopies;
using cuda::Stream;

// Tickets of reads of device memory have this bit, those of the host's transport do not.
constexpr uint64_t kDeviceBit = uint64_t{1} << 63;
constexpr size_t kKeptTables = 4;  // prepared copies a region: one each for the slots of a source
constexpr auto kPollPause = std::chrono::microseconds(20);

// What all objects of one transport share.
struct Core {
  std::unique_ptr<Transport> host;
  std::unique_ptr<OfferBoards> boards;
  std::unique_ptr<Devices> devices;
  const Device* device = nullptr;  // reads go here
  std::atomic<uint64_t> regions{0};
  std::atomic<uint64_t> region_bytes{0};
  std::atomic<uint64_t> remote_regions{0};
  std::atomic<uint64_t> read_bytes{0};
};

class CudaLocalRegion final : public LocalRegion {
 public:
  CudaLocalRegion(Core& core, std::unique_ptr<OfferedMemory> memory)
      : core_(core), memory_(std::move(memory)) {
    ++core_.regions;
    core_.region_bytes += bytes().size();
  }
  ~CudaLocalRegion() override {
    --core_.regions;
    core_.region_bytes -= bytes().size();
  }
  std::span<std::byte> bytes() const override { return memory_->bytes(); }
  RegionDescriptor descriptor() const override { return memory_->descriptor(); }
  Result<void> refresh() override { return memory_->refresh(); }

 private:
  Core& core_;
  std::unique_ptr<OfferedMemory> memory_;
};

class CudaPeer;

// Its offer, as it was when it was opened, and where it is seen to change.
struct OpenedOffer {
  CudaPeer* peer = nullptr;
  RegionId board{};
  std::span<const std::byte, kOfferBytes> place;
  MemoryOffer offer{};
};

// Copies that were made ready for one request, and what is under way of them.
struct Prepared {
  uint64_t reuse = 0;
  PreparedCopies copies;
  bool busy = false;
};

// Tickets of it end before it does.
class CudaRemoteRegion final : public RemoteRegion {
 public:
  CudaRemoteRegion(Core& core, OpenedMemory memory, const OpenedOffer& opened)
      : core_(core), memory_(std::move(memory)), opened_(opened) {
    ++core_.remote_regions;
  }
  ~CudaRemoteRegion() override;
  uint64_t size_bytes() const override { return opened_.offer.size_bytes; }
  std::string_view route() const override {
    if (memory_.by_handles())
      return memory_.same_device() ? "cuda_vmm, one GPU" : "cuda_vmm, peer GPU";
    return memory_.same_device() ? "cuda_ipc, one GPU" : "cuda_ipc, peer GPU";
  }
  bool current() const override {
    return cuda::offered_identity(opened_.place) == opened_.offer.identity;
  }
  // Before every read. What was read before other memory was mapped is the generation's to judge;
  // until the region is closed the physical memory stays, so that no read meets a hole.
  Result<void> check_current() const {
    if (current()) return {};
    return Error{ErrorCode::kTornRead,
                 "device memory: its owner mapped other memory there since it was opened, or took "
                 "it back: it is to be opened anew"};
  }
  const OpenedMemory& memory() const { return memory_; }

  // Of the transport, under its mutex.
  std::vector<std::unique_ptr<Prepared>> kept;
  CudaTransport* transport = nullptr;

 private:
  Core& core_;
  OpenedMemory memory_;
  const OpenedOffer opened_;
};

// Safe to call from any thread.
class CudaPeer final : public Peer {
 public:
  CudaPeer(Core& core, CudaTransport& transport, std::unique_ptr<Peer> host)
      : core_(core), transport_(transport), host_(std::move(host)) {}

  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline deadline) override;
  Result<MemoryHandle> open_handle(RegionId region, uint64_t index, Deadline deadline) override {
    return host_->open_handle(region, index, deadline);
  }
  bool alive() const override { return host_->alive(); }
  void close_board(RegionId id) EXCLUDES(mutex_);

 private:
  struct Board {
    std::unique_ptr<RemoteRegion> region;
    uint32_t users = 0;  // regions whose offers lie on it
  };
  // Its bytes; to be closed again.
  Result<std::span<const std::byte>> open_board(RegionId id, Deadline deadline) EXCLUDES(mutex_);
  Result<std::unique_ptr<RemoteRegion>> open_offer(OpenedOffer& opened,
                                                   const RegionDescriptor& descriptor,
                                                   Deadline deadline);

  Core& core_;
  CudaTransport& transport_;
  std::unique_ptr<Peer> host_;
  Mutex mutex_;
  std::map<RegionId, Board> boards_ GUARDED_BY(mutex_);
};

}  // namespace

// Safe to call from any thread. All reads go over one stream: one that comes after a cancelled read
// writes after it, so that none has to be refused for poisoned memory.
class CudaTransport final : public Transport {
 public:
  explicit CudaTransport(std::unique_ptr<Core> core, Stream stream)
      : core_(std::move(core)), stream_(std::move(stream)) {}
  ~CudaTransport() override { TRANSFUSE_CHECK(core_->regions == 0 && core_->remote_regions == 0); }

  std::string_view kind() const override { return "cuda"; }

  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return core_->host->allocate(size_bytes);
  }

  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    if (memory.empty()) return core_->host->register_memory(memory);
    TRANSFUSE_ASSIGN_OR_RETURN(const Device* device, core_->devices->device_of(memory));
    if (device == nullptr) return core_->host->register_memory(memory);
    const OfferedMemory::Owner owner{.device = device->uuid(),
                                     .process = core_->devices->process()};
    TRANSFUSE_ASSIGN_OR_RETURN(
        auto offered,
        OfferedMemory::open(*core_->host, *core_->boards,
                            std::make_unique<cuda::DriverMemory>(*device), owner, memory));
    return std::unique_ptr<LocalRegion>(
        std::make_unique<CudaLocalRegion>(*core_, std::move(offered)));
  }
  Result<std::unique_ptr<LocalRegion>> offer_handles(HandleMaker make) override {
    return core_->host->offer_handles(std::move(make));
  }

  Result<std::string> endpoint() override { return core_->host->endpoint(); }

  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto host, core_->host->connect(endpoint, token, deadline));
    return std::unique_ptr<Peer>(std::make_unique<CudaPeer>(*core_, *this, std::move(host)));
  }

  Result<TicketId> submit(const ReadRequest& request) override EXCLUDES(mutex_);
  TicketState poll(TicketId ticket) override EXCLUDES(mutex_);
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override EXCLUDES(mutex_);
  uint64_t progress_bytes(TicketId ticket) override EXCLUDES(mutex_);
  void cancel(TicketId ticket) override EXCLUDES(mutex_);
  Result<void> finish(TicketId ticket) override EXCLUDES(mutex_);

  TransportStats stats() const override EXCLUDES(mutex_) {
    TransportStats stats = core_->host->stats();
    const MutexLock lock(mutex_);
    stats.regions += core_->regions;
    stats.region_bytes += core_->region_bytes;
    stats.remote_regions += core_->remote_regions;
    stats.tickets += tickets_.size();
    stats.read_bytes += core_->read_bytes;
    for (const auto& [id, ticket] : tickets_) {
      if (ticket.cancelled && !ticket.outcome)
        stats.poisoned_bytes += ticket.prepared->copies.target_bytes();
    }
    return stats;
  }

  // Waits for what still reads `region` and forgets what was made ready for it.
  void retire(const CudaRemoteRegion& region) EXCLUDES(mutex_);

 private:
  struct Ticket {
    const CudaRemoteRegion* region = nullptr;
    Prepared* prepared = nullptr;
    std::unique_ptr<Prepared> own;  // where nothing is kept
    std::span<const StridedCopy> copies;
    std::span<uint64_t> fingerprints;
    Event done;
    bool cancelled = false;
    std::optional<Result<void>> outcome;  // once it has ended
  };

  static bool is_ours(TicketId id) { return (static_cast<uint64_t>(id) & kDeviceBit) != 0; }
  Ticket& at(TicketId id) REQUIRES(mutex_) {
    const auto found = tickets_.find(static_cast<uint64_t>(id));
    TRANSFUSE_CHECK(found != tickets_.end());
    return found->second;
  }
  Result<Prepared*> prepare(const CudaRemoteRegion& region, const ReadRequest& request,
                            std::unique_ptr<Prepared>& own) REQUIRES(mutex_);
  // Asks the device whether it has ended.
  void settle(Ticket& ticket) REQUIRES(mutex_);

  std::unique_ptr<Core> core_;
  Stream stream_;
  mutable Mutex mutex_;
  std::map<uint64_t, Ticket> tickets_ GUARDED_BY(mutex_);
  std::vector<Event> events_ GUARDED_BY(mutex_);  // of ended tickets
  uint64_t last_ticket_ GUARDED_BY(mutex_) = 0;
};

namespace {

CudaRemoteRegion::~CudaRemoteRegion() {
  transport->retire(*this);
  opened_.peer->close_board(opened_.board);
  --core_.remote_regions;
}

Result<std::span<const std::byte>> CudaPeer::open_board(RegionId id, Deadline deadline) {
  {
    const MutexLock lock(mutex_);
    const auto known = boards_.find(id);
    if (known != boards_.end()) {
      ++known->second.users;
      return known->second.region->mapped();
    }
  }
  TRANSFUSE_ASSIGN_OR_RETURN(auto region,
                             host_->open_region({.id = id, .size_bytes = kBoardBytes}, deadline));
  if (region->mapped().size() != kBoardBytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("region {}: expected offers of device memory in shared memory, found "
                             "memory that is read by '{}'",
                             static_cast<uint64_t>(id), region->route())};
  }
  const MutexLock lock(mutex_);
  Board& board = boards_[id];
  if (board.region == nullptr) board.region = std::move(region);
  ++board.users;
  return board.region->mapped();
}

void CudaPeer::close_board(RegionId id) {
  std::unique_ptr<RemoteRegion> last;  // closed without the lock
  const MutexLock lock(mutex_);
  const auto found = boards_.find(id);
  TRANSFUSE_CHECK(found != boards_.end());
  if (--found->second.users > 0) return;
  last = std::move(found->second.region);
  boards_.erase(found);
}

Result<std::unique_ptr<RemoteRegion>> CudaPeer::open_region(const RegionDescriptor& descriptor,
                                                            Deadline deadline) {
  const auto place = cuda::offer_place(descriptor.id);
  if (!place) return host_->open_region(descriptor, deadline);
  if (place->slot >= cuda::kOffersPerBoard) {
    return Error{ErrorCode::kCorrupt, fmt::format("region {}: no number of device memory",
                                                  static_cast<uint64_t>(descriptor.id))};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto board, open_board(place->board, deadline));
  OpenedOffer opened{.peer = this,
                     .board = place->board,
                     .place = board.subspan(place->slot * kOfferBytes).first<kOfferBytes>()};
  auto region = open_offer(opened, descriptor, deadline);
  if (!region) close_board(place->board);
  return region;
}

Result<std::unique_ptr<RemoteRegion>> CudaPeer::open_offer(OpenedOffer& opened,
                                                           const RegionDescriptor& descriptor,
                                                           Deadline deadline) {
  while (true) {
    TRANSFUSE_ASSIGN_OR_RETURN(opened.offer, cuda::read_offer(opened.place, deadline));
    if (opened.offer.size_bytes != descriptor.size_bytes) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("region {}: expected {} bytes by its descriptor, found {}",
                               static_cast<uint64_t>(descriptor.id), descriptor.size_bytes,
                               opened.offer.size_bytes)};
    }
    auto memory = core_.devices->open(
        opened.offer, opened.place, *core_.device,
        [&](uint64_t index) { return host_->open_handle(opened.offer.handles, index, deadline); });
    if (!memory) {
      const bool same = cuda::offered_identity(opened.place) == opened.offer.identity;
      if (same || deadline.passed()) return Unexpected{std::move(memory).error()};
      continue;  // other memory was mapped there meanwhile
    }
    auto region = std::make_unique<CudaRemoteRegion>(core_, std::move(*memory), opened);
    region->transport = &transport_;
    return std::unique_ptr<RemoteRegion>(std::move(region));
  }
}

}  // namespace

// What was kept for the request, or copies made ready now.
Result<Prepared*> CudaTransport::prepare(const CudaRemoteRegion& region, const ReadRequest& request,
                                         std::unique_ptr<Prepared>& own) {
  auto& kept = const_cast<CudaRemoteRegion&>(region).kept;
  if (request.reuse != 0) {
    const auto found = std::ranges::find_if(kept, [&](const auto& prepared) {
      return prepared->reuse == request.reuse && !prepared->busy;
    });
    if (found != kept.end()) return found->get();
  }
  for (const StridedCopy& copy : request.copies) {
    TRANSFUSE_RETURN_IF_ERROR(check_copy(copy, region.size_bytes()));
  }
  const bool fingerprints = !request.fingerprints.empty();
  CopyOptions options;
  options.engines.copy_engines = !region.memory().same_device();
  if (!fingerprints) options.table.item_bytes = uint64_t{64} << 10;
  const std::vector<uint32_t> sources(request.copies.size(), 0);
  TRANSFUSE_ASSIGN_OR_RETURN(
      PreparedCopies copies,
      PreparedCopies::make(*core_->device, request.copies, sources, 1, options));
  auto prepared =
      std::make_unique<Prepared>(Prepared{.reuse = request.reuse, .copies = std::move(copies)});
  if (request.reuse == 0) {
    own = std::move(prepared);
    return own.get();
  }
  if (kept.size() >= kKeptTables) {
    const auto idle = std::ranges::find_if(kept, [](const auto& old) { return !old->busy; });
    if (idle != kept.end()) kept.erase(idle);
  }
  kept.push_back(std::move(prepared));
  return kept.back().get();
}

Result<TicketId> CudaTransport::submit(const ReadRequest& request) {
  const auto* region = dynamic_cast<const CudaRemoteRegion*>(request.region);
  if (region == nullptr) return core_->host->submit(request);
  if (!request.fingerprints.empty() && request.fingerprints.size() != request.copies.size()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} fingerprints for {} copies", request.fingerprints.size(),
                             request.copies.size())};
  }
  TRANSFUSE_RETURN_IF_ERROR(region->check_current());
  const MutexLock lock(mutex_);
  Ticket ticket;
  ticket.region = region;
  ticket.copies = request.copies;
  ticket.fingerprints = request.fingerprints;
  TRANSFUSE_ASSIGN_OR_RETURN(ticket.prepared, prepare(*region, request, ticket.own));
  if (events_.empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(ticket.done, Event::create(*core_->device, EventKind::kOrder));
  } else {
    ticket.done = std::move(events_.back());
    events_.pop_back();
  }
  const CUdeviceptr base = region->memory().address();
  TRANSFUSE_RETURN_IF_ERROR(ticket.prepared->copies.launch({&base, 1}, {.stream = stream_.get()}));
  const Current current = core_->device->use();
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(core_->device->driver(), cuEventRecord, ticket.done.get(), stream_.get()));
  ticket.prepared->busy = true;
  const uint64_t id = ++last_ticket_ | kDeviceBit;
  tickets_.emplace(id, std::move(ticket));
  return TicketId{id};
}

void CudaTransport::settle(Ticket& ticket) {
  if (ticket.outcome) return;
  const cuda::Driver& driver = core_->device->driver();
  const Current current = core_->device->use();
  const CUresult state = driver.cuEventQuery(ticket.done.get());
  if (state == CUDA_ERROR_NOT_READY) return;
  ticket.outcome = driver.check(state, "copies on the device");
  ticket.prepared->busy = false;
  if (!*ticket.outcome) return;
  core_->read_bytes += ticket.prepared->copies.target_bytes();
  const auto sums = ticket.prepared->copies.sums();
  for (size_t i = 0; i < sums.size(); ++i) {
    if (ticket.copies[i].fingerprint) ticket.fingerprints[i] = sums[i];
  }
}

TicketState CudaTransport::poll(TicketId id) {
  if (!is_ours(id)) return core_->host->poll(id);
  const MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  settle(ticket);
  if (!ticket.outcome) return ticket.cancelled ? TicketState::kPoisoned : TicketState::kPending;
  if (!*ticket.outcome) return TicketState::kFailed;
  return ticket.cancelled ? TicketState::kCancelled : TicketState::kLanded;
}

bool CudaTransport::wait_any(std::span<const TicketId> tickets, Deadline deadline) {
  if (std::ranges::none_of(tickets, is_ours)) return core_->host->wait_any(tickets, deadline);
  while (true) {
    for (const TicketId id : tickets) {
      if (poll(id) != TicketState::kPending) return true;
    }
    if (deadline.passed()) return false;
    std::this_thread::sleep_for(kPollPause);
  }
}

uint64_t CudaTransport::progress_bytes(TicketId id) {
  if (!is_ours(id)) return core_->host->progress_bytes(id);
  const MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  settle(ticket);
  return ticket.outcome && *ticket.outcome ? ticket.prepared->copies.target_bytes() : 0;
}

void CudaTransport::cancel(TicketId id) {
  if (!is_ours(id)) return core_->host->cancel(id);
  const MutexLock lock(mutex_);
  at(id).cancelled = true;
}

Result<void> CudaTransport::finish(TicketId id) {
  if (!is_ours(id)) return core_->host->finish(id);
  const MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  settle(ticket);
  TRANSFUSE_CHECK(ticket.outcome);  // not pending
  Result<void> outcome = std::move(*ticket.outcome);
  if (outcome && ticket.cancelled)
    outcome = Error{ErrorCode::kCancelled, "cancelled by the caller"};
  events_.push_back(std::move(ticket.done));
  tickets_.erase(static_cast<uint64_t>(id));
  return outcome;
}

void CudaTransport::retire(const CudaRemoteRegion& region) {
  const MutexLock lock(mutex_);
  const Current current = core_->device->use();
  for (auto& [id, ticket] : tickets_) {
    if (ticket.region != &region || ticket.outcome) continue;
    const auto& driver = core_->device->driver();
    Result<void> ended =
        driver.check(driver.cuEventSynchronize(ticket.done.get()), "copies on the device");
    ticket.prepared->busy = false;
    ticket.outcome =
        ended ? Result<void>(Error{ErrorCode::kCancelled, "cuda region: closed while it was read"})
              : std::move(ended);
  }
}

Result<std::unique_ptr<Transport>> open_cuda_transport(std::unique_ptr<Transport> host,
                                                       int device) {
  auto core = std::make_unique<Core>();
  TRANSFUSE_ASSIGN_OR_RETURN(core->devices, Devices::open());
  TRANSFUSE_ASSIGN_OR_RETURN(core->device, core->devices->device(device));
  core->host = std::move(host);
  core->boards = std::make_unique<OfferBoards>(*core->host);
  TRANSFUSE_ASSIGN_OR_RETURN(Stream stream, Stream::create(*core->device));
  return std::unique_ptr<Transport>(
      std::make_unique<CudaTransport>(std::move(core), std::move(stream)));
}

}  // namespace transfuse

// Device memory by CUDA IPC, read by one launch a request; what lies in the host is the host
// transport's, and what goes from one to the other is staged.
#include <cuda.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
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
#include "transfuse/gpu.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/copy_key.h"
#include "transport/cuda/device.h"
#include "transport/cuda/devices.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/open_transport.h"
#include "transport/cuda/regions.h"
#include "transport/cuda/request_rules.h"
#include "transport/cuda/staged_reads.h"

namespace transfuse {

namespace {

using cuda::CopyKey;
using cuda::CopyOptions;
using cuda::Core;
using cuda::CudaRemoteRegion;
using cuda::CudaTickets;
using cuda::Current;
using cuda::Device;
using cuda::Devices;
using cuda::Event;
using cuda::EventKind;
using cuda::Memory;
using cuda::PreparedCopies;
using cuda::StagedRead;
using cuda::StagedReads;
using cuda::Stream;

// Tickets that are not the host transport's have this bit.
constexpr uint64_t kDeviceBit = uint64_t{1} << 63;
constexpr size_t kKeptTables = 64;  // of requests that come again every cycle
// For so long after a request has begun nobody sleeps: 20 us become 100 in a virtual machine, and a
// refit of 8 GB takes 20 ms.
constexpr auto kQuickPolls = std::chrono::milliseconds(30);
constexpr auto kPollPause = std::chrono::microseconds(20);

}  // namespace

// Safe to call from any thread. All reads of devices go over one stream: one that comes after a
// cancelled read writes after it, so that none has to be refused for poisoned memory.
class CudaTransport final : public Transport, private CudaTickets {
 public:
  explicit CudaTransport(std::unique_ptr<Core> core)
      : core_(std::move(core)),
        own_(std::make_unique<CudaRemoteRegion>(static_cast<CudaTickets&>(*this))),
        staged_(*core_->host, *core_->device) {}
  ~CudaTransport() override {
    own_.reset();
    TRANSFUSE_CHECK(core_->regions == 0 && core_->remote_regions == 0);
  }

  std::string_view kind() const override { return "cuda"; }
  std::string_view endpoint_kind() const override { return core_->host->endpoint_kind(); }

  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return core_->host->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> allocate_on_device(uint64_t size_bytes) override;
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    return register_as(memory, false);
  }
  Result<std::unique_ptr<LocalRegion>> register_target(std::span<std::byte> memory) override {
    return register_as(memory, true);
  }
  Result<std::unique_ptr<LocalRegion>> offer_handles(HandleMaker make) override {
    return core_->host->offer_handles(std::move(make));
  }
  std::span<std::byte> allocation_of(const std::byte* address) override {
    return core_->devices->allocation_of(address);
  }

  Result<std::string> endpoint() override { return core_->host->endpoint(); }

  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto host, core_->host->connect(endpoint, token, deadline));
    return make_peer(*core_, *this, std::move(host));
  }
  std::unique_ptr<Transport> reading_through(std::unique_ptr<Transport> host) override {
    auto core = std::make_unique<Core>();
    core->host = std::move(host);
    core->boards = std::make_unique<cuda::OfferBoards>(*core->host);
    core->devices = core_->devices;
    core->device = core_->device;
    return std::make_unique<CudaTransport>(std::move(core));
  }
  Result<const RemoteRegion*> own_memory() override { return own_.get(); }

  Result<TicketId> submit(const ReadRequest& request) override EXCLUDES(mutex_);
  TicketState poll(TicketId ticket) override EXCLUDES(mutex_);
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override EXCLUDES(mutex_);
  uint64_t progress_bytes(TicketId ticket) override EXCLUDES(mutex_);
  void cancel(TicketId ticket) override EXCLUDES(mutex_);
  Result<void> finish(TicketId ticket) override EXCLUDES(mutex_);

  TransportStats stats() const override EXCLUDES(mutex_);

 private:
  void retire(const CudaRemoteRegion& region) override EXCLUDES(mutex_);
  // Copies that were made ready for one request.
  struct Prepared {
    CopyKey key;
    std::vector<uint64_t> source_bytes;  // of the regions that its copies were checked against
    PreparedCopies copies;
    bool busy = false;
  };
  struct Ticket {
    uint64_t id = 0;  // 0: free
    const RemoteRegion* region = nullptr;
    std::span<const RemoteRegion* const> regions;
    const RemoteRegion* scale_region = nullptr;
    std::span<const RemoteRegion* const> scale_regions;
    std::span<const StridedCopy> copies;
    std::span<uint64_t> fingerprints;
    Prepared* prepared = nullptr;  // null: staged; until it has ended, then others may use it
    Event done;                    // of what is prepared
    uint64_t landed_bytes = 0;     // likewise
    std::unique_ptr<StagedRead> staged;
    bool cancelled = false;
    std::optional<Result<void>> outcome;  // once it has ended

    bool reads(const CudaRemoteRegion& one) const {
      const auto among = [&one](std::span<const RemoteRegion* const> list) {
        return std::ranges::find(list, &one) != list.end();
      };
      return (regions.empty() && region == &one) || scale_region == &one || among(regions) ||
             among(scale_regions);
    }
    uint64_t target_bytes() const;
  };

  Result<std::unique_ptr<LocalRegion>> register_as(std::span<std::byte> memory, bool target);
  static bool is_ours(TicketId id) { return (static_cast<uint64_t>(id) & kDeviceBit) != 0; }
  Ticket& at(TicketId id) REQUIRES(mutex_) {
    const auto found = std::ranges::find(tickets_, static_cast<uint64_t>(id), &Ticket::id);
    TRANSFUSE_CHECK(found != tickets_.end());
    return *found;
  }
  // nullptr: it is of no peer of this transport.
  const CudaRemoteRegion* ours(const RemoteRegion* region) const {
    const auto* found = dynamic_cast<const CudaRemoteRegion*>(region);
    return found != nullptr && found->belongs_to(*this) ? found : nullptr;
  }
  Ticket& new_ticket(const ReadRequest& request) REQUIRES(mutex_);
  Result<void> number_sources(const ReadRequest& request) REQUIRES(mutex_);
  Result<uint32_t> number_of(const RemoteRegion* region_of_peer) REQUIRES(mutex_);
  Result<void> check_sources(const ReadRequest& request, size_t copy) const REQUIRES(mutex_);
  Result<void> check_copies(const ReadRequest& request) const REQUIRES(mutex_);
  Result<Prepared*> prepare(const ReadRequest& request) REQUIRES(mutex_);
  Result<TicketId> submit_on_device(const ReadRequest& request) REQUIRES(mutex_);
  // Puts what is prepared for the ticket on the stream.
  Result<void> start(Ticket& ticket, const CopyLimits& limits) REQUIRES(mutex_);
  Result<TicketId> submit_staged(const ReadRequest& request) REQUIRES(mutex_);
  // Asks the device, or the staging thread, whether it has ended.
  void settle(Ticket& ticket) REQUIRES(mutex_);
  Deadline quick_until() EXCLUDES(mutex_) {
    const MutexLock lock(mutex_);
    return Deadline(last_start_ + kQuickPolls);
  }

  std::unique_ptr<Core> core_;
  std::unique_ptr<CudaRemoteRegion> own_;
  mutable StagedReads staged_;
  mutable Mutex mutex_;
  Stream stream_ GUARDED_BY(mutex_);  // made with the first read
  std::vector<Ticket> tickets_ GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Prepared>> kept_ GUARDED_BY(mutex_);  // last used last
  uint64_t last_ticket_ GUARDED_BY(mutex_) = 0;
  TimePoint last_start_ GUARDED_BY(mutex_){};
  uint64_t requests_ GUARDED_BY(mutex_) = 0;
  // Of the request that is being submitted.
  std::vector<const CudaRemoteRegion*> distinct_ GUARDED_BY(mutex_);
  std::vector<uint32_t> sources_ GUARDED_BY(mutex_);        // per copy: index into distinct_
  std::vector<uint32_t> scale_sources_ GUARDED_BY(mutex_);  // likewise, of the scales it reads
  std::vector<CUdeviceptr> bases_ GUARDED_BY(mutex_);
  std::vector<uint64_t> source_bytes_ GUARDED_BY(mutex_);
};

Result<std::unique_ptr<LocalRegion>> CudaTransport::register_as(std::span<std::byte> memory,
                                                                bool target) {
  if (memory.empty()) return core_->host->register_memory(memory);
  TRANSFUSE_ASSIGN_OR_RETURN(const Device* device, core_->devices->device_of(memory));
  if (device == nullptr) return core_->host->register_memory(memory);
  if (device->uuid() != core_->device->uuid()) {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format("memory at {} lies on device {}, this transport is for device {}: open "
                    "one for each",
                    fmt::ptr(memory.data()), device->ordinal(), core_->device->ordinal())};
  }
  auto offered = offer_region(*core_, memory, Memory());
  if (offered || !target || offered.error().code != ErrorCode::kUnsupported) return offered;
  return keep_target(*core_, memory);
}

Result<std::unique_ptr<LocalRegion>> CudaTransport::allocate_on_device(uint64_t size_bytes) {
  TRANSFUSE_ASSIGN_OR_RETURN(
      Memory memory, Memory::allocate(*core_->device, cuda::MemoryKind::kDevice, size_bytes));
  TRANSFUSE_RETURN_IF_ERROR(memory.clear());
  const std::span<std::byte> bytes(memory.as<std::byte>(), size_bytes);
  return offer_region(*core_, bytes, std::move(memory));
}

uint64_t CudaTransport::Ticket::target_bytes() const {
  if (prepared != nullptr) return prepared->copies.target_bytes();
  uint64_t sum = 0;
  for (const StridedCopy& copy : copies) sum += copy.target_bytes();
  return sum;
}

CudaTransport::Ticket& CudaTransport::new_ticket(const ReadRequest& request) {
  auto free = std::ranges::find(tickets_, uint64_t{0}, &Ticket::id);
  if (free == tickets_.end()) free = tickets_.emplace(tickets_.end());
  free->id = ++last_ticket_ | kDeviceBit;
  free->region = request.region;
  free->regions = request.regions;
  free->scale_region = request.scale_region;
  free->scale_regions = request.scale_regions;
  free->copies = request.copies;
  free->fingerprints = request.fingerprints;
  free->prepared = nullptr;
  free->landed_bytes = 0;
  free->cancelled = false;
  free->outcome.reset();
  return *free;
}

// The region's number among those that the request reads, each once.
Result<uint32_t> CudaTransport::number_of(const RemoteRegion* region_of_peer) {
  const CudaRemoteRegion* const region = ours(region_of_peer);
  if (region == nullptr) return cuda::not_ours();
  if (region->request == requests_) return region->number;
  if (!region->on_device()) return cuda::joins_none();
  // What was read before other memory was mapped is the generation's to judge; until the region is
  // closed the physical memory stays, so that no read meets a hole.
  if (!region->current()) {
    return Error{ErrorCode::kTornRead,
                 "device memory: its owner mapped other memory there since it was opened, or "
                 "took it back: it is to be opened anew"};
  }
  region->request = requests_;
  region->number = static_cast<uint32_t>(distinct_.size());
  distinct_.push_back(region);
  bases_.push_back(region->address());
  source_bytes_.push_back(region->size_bytes());
  return region->number;
}

// Says which regions are read, and which of them each copy reads.
Result<void> CudaTransport::number_sources(const ReadRequest& request) {
  ++requests_;
  distinct_.clear();
  bases_.clear();
  source_bytes_.clear();
  sources_.resize(request.copies.size());
  scale_sources_.resize(request.copies.size());
  const RemoteRegion* last = nullptr;
  for (size_t i = 0; i < request.copies.size(); ++i) {
    const RemoteRegion* const named = request.regions.empty() ? request.region : request.regions[i];
    if (named != nullptr && named == last) {
      sources_[i] = sources_[i - 1];
    } else {
      TRANSFUSE_ASSIGN_OR_RETURN(sources_[i], number_of(named));
    }
    last = named;
    const RemoteRegion* const scales =
        request.scale_regions.empty() ? request.scale_region : request.scale_regions[i];
    scale_sources_[i] = sources_[i];
    if (scales != nullptr) {
      TRANSFUSE_ASSIGN_OR_RETURN(scale_sources_[i], number_of(scales));
    }
  }
  return {};
}

// Bounds of the sources (I13).
Result<void> CudaTransport::check_sources(const ReadRequest& request, size_t copy) const {
  return check_copy(request.copies[copy], distinct_[sources_[copy]]->size_bytes(),
                    distinct_[scale_sources_[copy]]->size_bytes());
}

// Bounds, and that the targets can be written: a kernel that cannot loses the whole context.
Result<void> CudaTransport::check_copies(const ReadRequest& request) const {
  std::span<std::byte> known;
  std::span<std::byte> known_scales;
  for (size_t i = 0; i < request.copies.size(); ++i) {
    const StridedCopy& copy = request.copies[i];
    TRANSFUSE_RETURN_IF_ERROR(check_sources(request, i));
    TRANSFUSE_RETURN_IF_ERROR(core_->devices->check_target(*core_->device, copy.target, known));
    if (copy.scales == nullptr || !quantizes(copy.op)) continue;
    TRANSFUSE_RETURN_IF_ERROR(
        core_->devices->check_target(*core_->device, copy.scales->target, known_scales));
  }
  return {};
}

// What was kept for the same copies of regions of the same sizes, which were checked then, or
// copies made ready now.
Result<CudaTransport::Prepared*> CudaTransport::prepare(const ReadRequest& request) {
  const bool sums = !request.fingerprints.empty();
  const bool engines = std::ranges::all_of(distinct_, &CudaRemoteRegion::is_elsewhere);
  CopyKey key = cuda::key_of(request.copies, sources_, scale_sources_, sums);
  key.high ^= engines ? 1 : 0;
  const auto found = std::ranges::find_if(kept_, [&](const auto& kept) {
    return kept->key == key && kept->source_bytes == source_bytes_ && !kept->busy;
  });
  if (found != kept_.end()) {
    std::rotate(found, found + 1, kept_.end());
    return kept_.back().get();
  }
  TRANSFUSE_RETURN_IF_ERROR(check_copies(request));
  CopyOptions options;
  options.engines.copy_engines = engines;
  if (!sums) options.table.item_bytes = uint64_t{64} << 10;
  TRANSFUSE_ASSIGN_OR_RETURN(
      PreparedCopies copies,
      PreparedCopies::make(*core_->device, request.copies, sources_,
                           static_cast<uint32_t>(distinct_.size()), options, scale_sources_));
  if (kept_.size() >= kKeptTables) {
    const auto idle = std::ranges::find_if(kept_, [](const auto& old) { return !old->busy; });
    if (idle != kept_.end()) kept_.erase(idle);
  }
  kept_.push_back(std::make_unique<Prepared>(
      Prepared{.key = key, .source_bytes = source_bytes_, .copies = std::move(copies)}));
  return kept_.back().get();
}

Result<TicketId> CudaTransport::submit(const ReadRequest& request) {
  if (!request.fingerprints.empty() && request.fingerprints.size() != request.copies.size()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{} fingerprints for {} copies", request.fingerprints.size(),
                             request.copies.size())};
  }
  const CudaRemoteRegion* const region = ours(request.region);
  const CudaRemoteRegion* const scales =
      request.scale_region == nullptr ? region : ours(request.scale_region);
  if (region == nullptr || scales == nullptr) return cuda::not_ours();
  bool into_device = true;  // a sum of device memory has no target
  if (!request.copies.empty() && request.copies[0].target != nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Device* device,
                               core_->devices->device_of({request.copies[0].target, 1}));
    into_device = device != nullptr;
  }
  const bool from_host = region->host() != nullptr;
  if (from_host && (!into_device || request.copies.empty())) {
    ReadRequest inner = request;
    inner.region = region->host();
    if (request.scale_region != nullptr) {
      inner.scale_region = scales->host();
      if (inner.scale_region == nullptr) return cuda::scales_on_device();
    }
    if (!request.regions.empty()) return cuda::joins_none();
    return core_->host->submit(inner);
  }
  const MutexLock lock(mutex_);
  const bool reads = region->on_device() && scales->on_device();
  return reads && into_device ? submit_on_device(request) : submit_staged(request);
}

Result<TicketId> CudaTransport::submit_on_device(const ReadRequest& request) {
  TRANSFUSE_RETURN_IF_ERROR(number_sources(request));
  if (stream_.get() == nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(stream_, Stream::create(*core_->device));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(Prepared * prepared, prepare(request));
  Ticket& ticket = new_ticket(request);
  ticket.prepared = prepared;
  if (auto started = start(ticket, request.limits); !started) {
    ticket.id = 0;
    return Unexpected{std::move(started).error()};
  }
  prepared->busy = true;
  return TicketId{ticket.id};
}

Result<void> CudaTransport::start(Ticket& ticket, const CopyLimits& limits) {
  if (ticket.done.get() == nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(ticket.done, Event::create(*core_->device, EventKind::kOrder));
  }
  last_start_ = std::chrono::steady_clock::now();
  TRANSFUSE_RETURN_IF_ERROR(ticket.prepared->copies.launch(
      bases_, {.stream = stream_.get(),
               .multiprocessors = cuda::multiprocessors_for(limits),
               .gigabytes_per_second = limits.gigabytes_per_second}));
  const Current current = core_->device->use();
  const cuda::Driver& driver = core_->device->driver();
  auto recorded = TRANSFUSE_CUDA(driver, cuEventRecord, ticket.done.get(), stream_.get());
  // Nobody waits for a ticket that was not given out.
  if (!recorded) (void)driver.cuStreamSynchronize(stream_.get());
  return recorded;
}

Result<TicketId> CudaTransport::submit_staged(const ReadRequest& request) {
  auto read = std::make_unique<StagedRead>();
  read->copies = request.copies;
  read->fingerprints = request.fingerprints;
  read->gigabytes_per_second = request.limits.gigabytes_per_second;
  const auto* region = static_cast<const CudaRemoteRegion*>(request.region);
  if (region->host() != nullptr) {
    if (!request.regions.empty()) return cuda::joins_none();
    read->host_region = region->host();
    distinct_.assign(1, region);
    sources_.assign(request.copies.size(), 0);
    if (request.scale_region != nullptr) {
      distinct_.push_back(static_cast<const CudaRemoteRegion*>(request.scale_region));
      read->host_scales = distinct_.back()->host();
      if (read->host_scales == nullptr) return cuda::scales_on_device();
    }
    scale_sources_.assign(request.copies.size(), static_cast<uint32_t>(distinct_.size() - 1));
    TRANSFUSE_RETURN_IF_ERROR(check_copies(request));
  } else {
    TRANSFUSE_RETURN_IF_ERROR(number_sources(request));
    for (size_t i = 0; i < request.copies.size(); ++i) {
      TRANSFUSE_RETURN_IF_ERROR(check_sources(request, i));
      read->bases.push_back(bases_[sources_[i]]);
      read->scale_bases.push_back(bases_[scale_sources_[i]]);
    }
  }
  TRANSFUSE_RETURN_IF_ERROR(staged_.submit(*read));
  Ticket& ticket = new_ticket(request);
  ticket.staged = std::move(read);
  return TicketId{ticket.id};
}

void CudaTransport::settle(Ticket& ticket) {
  if (ticket.outcome) return;
  if (ticket.staged != nullptr) {
    if (!staged_.ended(*ticket.staged)) return;
    ticket.outcome = *ticket.staged->outcome;
    // Reads of the host are counted where they are done.
    if (*ticket.outcome && ticket.staged->host_region == nullptr) {
      core_->read_bytes += ticket.target_bytes();
    }
    return;
  }
  const cuda::Driver& driver = core_->device->driver();
  const Current current = core_->device->use();
  const CUresult state = driver.cuEventQuery(ticket.done.get());
  if (state == CUDA_ERROR_NOT_READY) return;
  ticket.outcome = driver.check(state, "copies on the device");
  ticket.prepared->busy = false;
  if (!*ticket.outcome) return;
  ticket.landed_bytes = ticket.prepared->copies.target_bytes();
  core_->read_bytes += ticket.landed_bytes;
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
  if (ticket.cancelled) return TicketState::kCancelled;
  return *ticket.outcome ? TicketState::kLanded : TicketState::kFailed;
}

bool CudaTransport::wait_any(std::span<const TicketId> tickets, Deadline deadline) {
  if (std::ranges::none_of(tickets, is_ours)) return core_->host->wait_any(tickets, deadline);
  const Deadline quick = quick_until();
  while (true) {
    for (const TicketId id : tickets) {
      if (poll(id) != TicketState::kPending) return true;
    }
    if (deadline.passed()) return false;
    if (!quick.passed()) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kPollPause);
    }
  }
}

uint64_t CudaTransport::progress_bytes(TicketId id) {
  if (!is_ours(id)) return core_->host->progress_bytes(id);
  const MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  settle(ticket);
  return ticket.staged != nullptr ? ticket.staged->progress.load() : ticket.landed_bytes;
}

void CudaTransport::cancel(TicketId id) {
  if (!is_ours(id)) return core_->host->cancel(id);
  const MutexLock lock(mutex_);
  Ticket& ticket = at(id);
  ticket.cancelled = true;
  if (ticket.staged != nullptr) ticket.staged->cancelled = true;
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
  ticket.staged.reset();
  ticket.id = 0;
  return outcome;
}

TransportStats CudaTransport::stats() const {
  TransportStats stats = core_->host->stats();
  const MutexLock lock(mutex_);
  stats.regions += core_->regions;
  stats.region_bytes += core_->region_bytes;
  stats.remote_regions += core_->remote_regions;
  stats.read_bytes += core_->read_bytes;
  for (const Ticket& ticket : tickets_) {
    if (ticket.id == 0) continue;
    ++stats.tickets;
    if (ticket.cancelled && !ticket.outcome) stats.poisoned_bytes += ticket.target_bytes();
  }
  return stats;
}

void CudaTransport::retire(const CudaRemoteRegion& region) {
  const MutexLock lock(mutex_);
  for (Ticket& ticket : tickets_) {
    if (ticket.id == 0 || ticket.outcome || !ticket.reads(region)) continue;
    Result<void> ended;
    if (ticket.staged != nullptr) {
      ticket.staged->cancelled = true;
      staged_.wait(*ticket.staged);
    } else {
      const Current current = core_->device->use();
      const auto& driver = core_->device->driver();
      ended = driver.check(driver.cuEventSynchronize(ticket.done.get()), "copies on the device");
      ticket.prepared->busy = false;
    }
    ticket.outcome =
        ended ? Result<void>(Error{ErrorCode::kCancelled, "cuda region: closed while it was read"})
              : std::move(ended);
  }
}

Result<std::unique_ptr<Transport>> open_cuda_transport(std::unique_ptr<Transport> host,
                                                       int device) {
  TRANSFUSE_ASSIGN_OR_RETURN(std::shared_ptr<Devices> devices, Devices::open());
  return cuda::open_transport(std::move(host), std::move(devices), device);
}

Result<std::unique_ptr<Transport>> cuda::open_transport(std::unique_ptr<Transport> host,
                                                        std::shared_ptr<Devices> devices,
                                                        int ordinal) {
  auto core = std::make_unique<Core>();
  core->devices = std::move(devices);
  TRANSFUSE_ASSIGN_OR_RETURN(core->device, core->devices->device(ordinal));
  core->host = std::move(host);
  core->boards = std::make_unique<cuda::OfferBoards>(*core->host);
  return std::unique_ptr<Transport>(std::make_unique<CudaTransport>(std::move(core)));
}

}  // namespace transfuse

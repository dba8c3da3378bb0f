// Reads between transports of one process: the bytes are there already, worker threads copy them.
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/mutex.h"
#include "base/random.h"
#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

// Memory that readers may use. Allocated memory lives as long as a handle of either side does;
// memory of the caller is not read any more once its LocalRegion has gone. Safe to call from any
// thread.
class SharedMemory {
 public:
  explicit SharedMemory(std::span<std::byte> bytes, bool owned) : bytes_(bytes), owned_(owned) {}
  ~SharedMemory() {
    if (owned_) munmap(bytes_.data(), bytes_.size());
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::span<std::byte> bytes() const { return bytes_; }
  bool owned() const { return owned_; }

  bool begin_read() EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    if (withdrawn_) return false;
    ++readers_;
    return true;
  }
  void end_read() EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    if (--readers_ == 0) idle_.notify_all();
  }
  // Waits for the copies that worker threads are in the middle of.
  void withdraw() EXCLUDES(mutex_) {
    if (owned_) return;
    MutexLock lock(mutex_);
    withdrawn_ = true;
    while (readers_ > 0) idle_.wait(mutex_);
  }

 private:
  const std::span<std::byte> bytes_;
  const bool owned_;
  Mutex mutex_;
  CondVar idle_;
  uint32_t readers_ GUARDED_BY(mutex_) = 0;
  bool withdrawn_ GUARDED_BY(mutex_) = false;
};

// What one transport lets the others see. Safe to call from any thread.
class Exposed {
 public:
  explicit Exposed(std::string token) : token_(std::move(token)) {}

  RegionId add(std::shared_ptr<SharedMemory> memory) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    const RegionId id{++last_id_};
    region_bytes_ += memory->bytes().size();
    regions_.emplace(id, std::move(memory));
    return id;
  }
  void remove(RegionId id) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    const auto found = regions_.find(id);
    region_bytes_ -= found->second->bytes().size();
    regions_.erase(found);
  }
  Result<std::shared_ptr<SharedMemory>> find(const RegionDescriptor& descriptor) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    if (closed_) return Error{ErrorCode::kUnavailable, "local peer: its transport is closed"};
    const auto found = regions_.find(descriptor.id);
    if (found == regions_.end()) {
      return Error{ErrorCode::kNotFound, "local peer: it has no region " +
                                             std::to_string(static_cast<uint64_t>(descriptor.id))};
    }
    const uint64_t size = found->second->bytes().size();
    if (size != descriptor.size_bytes) {
      return Error{ErrorCode::kCorrupt,
                   "local peer: region " + std::to_string(static_cast<uint64_t>(descriptor.id)) +
                       " has " + std::to_string(size) + " bytes, the descriptor says " +
                       std::to_string(descriptor.size_bytes)};
    }
    return found->second;
  }
  void close() EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    closed_ = true;
  }
  bool closed() EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    return closed_;
  }
  bool admits(std::string_view token) const { return token_.empty() || token == token_; }
  void add_stats(TransportStats& stats) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    stats.regions = regions_.size();
    stats.region_bytes = region_bytes_;
  }

 private:
  const std::string token_;
  Mutex mutex_;
  bool closed_ GUARDED_BY(mutex_) = false;
  uint64_t last_id_ GUARDED_BY(mutex_) = 0;
  uint64_t region_bytes_ GUARDED_BY(mutex_) = 0;
  // Shared: readers keep the memory that they opened.
  std::map<RegionId, std::shared_ptr<SharedMemory>> regions_ GUARDED_BY(mutex_);
};

// The transports of this process by endpoint. Safe to call from any thread.
class Registry {
 public:
  void add(const std::string& endpoint, std::shared_ptr<Exposed> exposed) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    transports_.emplace(endpoint, std::move(exposed));
  }
  void remove(const std::string& endpoint) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    transports_.erase(endpoint);
  }
  std::shared_ptr<Exposed> find(std::string_view endpoint) EXCLUDES(mutex_) {
    MutexLock lock(mutex_);
    const auto found = transports_.find(endpoint);
    return found == transports_.end() ? nullptr : found->second;
  }

 private:
  Mutex mutex_;
  // Shared: a peer asks it also after the transport has gone.
  std::map<std::string, std::shared_ptr<Exposed>, std::less<>> transports_ GUARDED_BY(mutex_);
};

Registry& registry() {
  static auto* instance = new Registry;  // never destroyed: transports may outlive static objects
  return *instance;
}

class LocalMemoryRegion final : public LocalRegion {
 public:
  LocalMemoryRegion(Exposed& exposed, std::shared_ptr<SharedMemory> memory)
      : exposed_(exposed), memory_(std::move(memory)), id_(exposed_.add(memory_)) {}
  ~LocalMemoryRegion() override {
    exposed_.remove(id_);
    memory_->withdraw();
  }
  std::span<std::byte> bytes() const override { return memory_->bytes(); }
  RegionDescriptor descriptor() const override { return {id_, memory_->bytes().size()}; }

 private:
  Exposed& exposed_;
  std::shared_ptr<SharedMemory> memory_;  // shared with readers
  const RegionId id_;
};

class LocalSource final : public ReadSource {
 public:
  explicit LocalSource(std::shared_ptr<SharedMemory> memory) : memory_(std::move(memory)) {}
  uint64_t size_bytes() const override { return memory_->bytes().size(); }
  std::span<const std::byte> mapped() const {
    return memory_->owned() ? memory_->bytes() : std::span<const std::byte>();
  }
  Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                    std::span<std::byte> scratch) const override {
    if (!memory_->begin_read()) {
      return Error{ErrorCode::kNotFound, "local read: the peer has ended this registration"};
    }
    const MappedSource mapped(memory_->bytes().data(), memory_->bytes().size());
    Result<void> outcome = mapped.read(copies, fingerprints, scratch);
    memory_->end_read();
    return outcome;
  }

 private:
  std::shared_ptr<SharedMemory> memory_;  // shared with the peer's region
};

class LocalRemoteRegion final : public RemoteRegion {
 public:
  LocalRemoteRegion(ReadQueue& queue, std::atomic<uint64_t>& count,
                    std::shared_ptr<SharedMemory> memory)
      : queue_(queue), count_(count), source_(std::move(memory)) {
    count_.fetch_add(1, std::memory_order_relaxed);
  }
  ~LocalRemoteRegion() override {
    queue_.retire(source_, {ErrorCode::kCancelled, "local read: the region handle was closed"});
    count_.fetch_sub(1, std::memory_order_relaxed);
  }
  uint64_t size_bytes() const override { return source_.size_bytes(); }
  std::string_view route() const override { return "local"; }
  std::span<const std::byte> mapped() const override { return source_.mapped(); }
  const ReadSource& source() const { return source_; }
  bool belongs_to(const ReadQueue& queue) const { return &queue_ == &queue; }

 private:
  ReadQueue& queue_;
  std::atomic<uint64_t>& count_;
  const LocalSource source_;
};

class LocalPeer final : public Peer {
 public:
  LocalPeer(ReadQueue& queue, std::atomic<uint64_t>& peers, std::atomic<uint64_t>& remote_regions,
            std::shared_ptr<Exposed> exposed)
      : queue_(queue),
        peers_(peers),
        remote_regions_(remote_regions),
        exposed_(std::move(exposed)) {
    peers_.fetch_add(1, std::memory_order_relaxed);
  }
  ~LocalPeer() override { peers_.fetch_sub(1, std::memory_order_relaxed); }
  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline /*deadline*/) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto memory, exposed_->find(descriptor));
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<LocalRemoteRegion>(queue_, remote_regions_, std::move(memory)));
  }
  bool alive() const override { return !exposed_->closed(); }

 private:
  ReadQueue& queue_;
  std::atomic<uint64_t>& peers_;
  std::atomic<uint64_t>& remote_regions_;
  std::shared_ptr<Exposed> exposed_;  // shared with the peer's transport and the registry
};

constexpr std::string_view kPrefix = "local:";

class LocalTransport final : public Transport {
 public:
  explicit LocalTransport(const TransportOptions& options)
      : endpoint_(std::string(kPrefix) + std::to_string(random_identity())),
        exposed_(std::make_shared<Exposed>(options.token)),
        queue_({.threads = options.threads}) {
    registry().add(endpoint_, exposed_);
  }
  ~LocalTransport() override {
    registry().remove(endpoint_);
    exposed_->close();
  }

  std::string_view kind() const override { return "local"; }

  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    if (size_bytes == 0) return Error{ErrorCode::kInvalidArgument, "allocate: 0 bytes"};
    void* memory =
        mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      return Error{ErrorCode::kResourceExhausted,
                   "allocate: no room for " + std::to_string(size_bytes) + " bytes"};
    }
    return expose({static_cast<std::byte*>(memory), size_bytes}, true);
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    if (memory.empty()) return Error{ErrorCode::kInvalidArgument, "register_memory: 0 bytes"};
    return expose(memory, false);
  }
  Result<std::string> endpoint() override { return endpoint_; }

  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline /*deadline*/) override {
    if (!endpoint.starts_with(kPrefix)) {
      return Error{ErrorCode::kInvalidArgument,
                   "connect: expected an endpoint of a local transport, found \"" +
                       std::string(endpoint) + "\""};
    }
    auto exposed = registry().find(endpoint);
    if (exposed == nullptr) {
      return Error{ErrorCode::kUnavailable,
                   "connect: no local transport is called " + std::string(endpoint)};
    }
    if (!exposed->admits(token)) {
      return Error{ErrorCode::kPermissionDenied,
                   "connect: " + std::string(endpoint) + " asks for another token"};
    }
    return std::unique_ptr<Peer>(
        std::make_unique<LocalPeer>(queue_, peers_, remote_regions_, std::move(exposed)));
  }

  Result<TicketId> submit(const ReadRequest& request) override {
    const auto* region = dynamic_cast<const LocalRemoteRegion*>(request.region);
    if (region == nullptr || !region->belongs_to(queue_)) {
      return Error{ErrorCode::kInvalidArgument,
                   "submit: the region was not opened through this transport"};
    }
    const auto* scales = dynamic_cast<const LocalRemoteRegion*>(request.scale_region);
    if (request.scale_region != nullptr && (scales == nullptr || !scales->belongs_to(queue_))) {
      return Error{ErrorCode::kInvalidArgument,
                   "submit: the region of the scales was not opened through this transport"};
    }
    return queue_.submit(region->source(), request.copies, request.fingerprints,
                         scales == nullptr ? nullptr : &scales->source());
  }
  TicketState poll(TicketId ticket) override { return queue_.poll(ticket); }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    return queue_.wait_any(tickets, deadline);
  }
  uint64_t progress_bytes(TicketId ticket) override { return queue_.progress_bytes(ticket); }
  void cancel(TicketId ticket) override { queue_.cancel(ticket); }
  Result<void> finish(TicketId ticket) override { return queue_.finish(ticket); }

  TransportStats stats() const override {
    TransportStats stats;
    exposed_->add_stats(stats);
    stats.peers = peers_.load(std::memory_order_relaxed);
    stats.remote_regions = remote_regions_.load(std::memory_order_relaxed);
    queue_.add_stats(stats);
    return stats;
  }

 private:
  Result<std::unique_ptr<LocalRegion>> expose(std::span<std::byte> memory, bool owned) {
    return std::unique_ptr<LocalRegion>(std::make_unique<LocalMemoryRegion>(
        *exposed_, std::make_shared<SharedMemory>(memory, owned)));
  }

  const std::string endpoint_;
  std::shared_ptr<Exposed> exposed_;  // shared with the registry and connected peers
  std::atomic<uint64_t> peers_{0};
  std::atomic<uint64_t> remote_regions_{0};
  ReadQueue queue_;
};

}  // namespace

Result<std::unique_ptr<Transport>> open_local_transport(const TransportOptions& options) {
  return std::unique_ptr<Transport>(std::make_unique<LocalTransport>(options));
}

}  // namespace transfuse

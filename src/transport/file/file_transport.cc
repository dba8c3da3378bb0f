// The transport whose regions are files: of a list, each with its identity, or of a folder that
// another transport serves.
#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/file_identity.h"
#include "base/mutex.h"
#include "copy/file_read.h"
#include "copy/read_queue.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/file/file_source.h"
#include "transport/file/served_folder.h"

namespace transfuse {
namespace file {
namespace {

// What a transport and its regions share. In a forked child it is left alone.
struct Core {
  explicit Core(const TransportOptions& options)
      : queue({.threads = options.threads, .scratch_bytes = kFileScratchBytes}) {}
  bool in_child() const { return ::getpid() != pid; }

  const pid_t pid = ::getpid();
  ReadQueue queue;
  std::atomic<uint64_t> peers{0};
  std::atomic<uint64_t> remote_regions{0};
};

// Safe to call from any thread.
class FileRemoteRegion final : public RemoteRegion {
 public:
  FileRemoteRegion(Core& core, std::unique_ptr<FileSource> source)
      : core_(core), source_(std::move(source)) {
    ++core_.remote_regions;
  }
  ~FileRemoteRegion() override {
    if (core_.in_child()) return;
    core_.queue.retire(*source_, {ErrorCode::kCancelled, "file region: closed while it was read"});
    --core_.remote_regions;
  }
  uint64_t size_bytes() const override { return source_->size_bytes(); }
  std::string_view route() const override { return "pread"; }
  const ReadSource& source() const { return *source_; }
  bool belongs_to(const Core& core) const { return &core == &core_; }

 private:
  Core& core_;
  const std::unique_ptr<FileSource> source_;
};

// Files, by their list or in their folder. Safe to call from any thread.
class FilePeer final : public Peer {
 public:
  FilePeer(Core& core, std::string folder, std::vector<IdentifiedFile> files)
      : core_(core), folder_(std::move(folder)), files_(std::move(files)) {
    ++core_.peers;
  }
  ~FilePeer() override {
    if (!core_.in_child()) --core_.peers;
  }

  Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                    Deadline /*deadline*/) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto source, open(descriptor.id));
    if (source->size_bytes() != descriptor.size_bytes) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("file peer: region {} has {} bytes, the descriptor says {}",
                               static_cast<uint64_t>(descriptor.id), source->size_bytes(),
                               descriptor.size_bytes)};
    }
    return std::unique_ptr<RemoteRegion>(
        std::make_unique<FileRemoteRegion>(core_, std::move(source)));
  }
  // Files need nobody who is alive.
  bool alive() const override { return folder_.empty() || folder_is_there(folder_); }

 private:
  Result<std::unique_ptr<FileSource>> open(RegionId id) const {
    if (!folder_.empty() && !folder_is_there(folder_)) {
      return Error{ErrorCode::kUnavailable,
                   fmt::format("file peer: no transport serves {} any more", folder_)};
    }
    if (!folder_.empty()) return FileSource::open(region_path(folder_, id));
    const auto number = static_cast<uint64_t>(id);
    if (number == 0 || number > files_.size()) {
      return Error{
          ErrorCode::kNotFound,
          fmt::format("file peer: it has no region {} among {} files", number, files_.size())};
    }
    return FileSource::open(files_[number - 1]);
  }

  Core& core_;
  const std::string folder_;  // empty: a list
  const std::vector<IdentifiedFile> files_;
};

class FileTransport final : public Transport {
 public:
  FileTransport(std::string_view folder, const TransportOptions& options)
      : parent_(folder), token_(options.token), core_(options) {}

  std::string_view kind() const override { return "file"; }

  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    TRANSFUSE_ASSIGN_OR_RETURN(ServedFolder * folder, served());
    return folder->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    if (memory.empty()) return Error{ErrorCode::kInvalidArgument, "register_memory: 0 bytes"};
    return Error{ErrorCode::kUnsupported,
                 "file transport: memory of the caller is no file; allocate() gives one"};
  }
  Result<std::string> endpoint() override {
    TRANSFUSE_ASSIGN_OR_RETURN(const ServedFolder* folder, served());
    return folder->endpoint();
  }

  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline /*deadline*/) override {
    std::string folder;
    std::vector<IdentifiedFile> files;
    if (endpoint.starts_with(kFolderEndpointPrefix)) {
      folder = endpoint.substr(kFolderEndpointPrefix.size());
      TRANSFUSE_RETURN_IF_ERROR(check_folder(folder, token));
    } else {
      TRANSFUSE_ASSIGN_OR_RETURN(files, parse_file_endpoint(endpoint));
    }
    return std::unique_ptr<Peer>(
        std::make_unique<FilePeer>(core_, std::move(folder), std::move(files)));
  }

  Result<TicketId> submit(const ReadRequest& request) override {
    const auto* const region = dynamic_cast<const FileRemoteRegion*>(request.region);
    if (region == nullptr || !region->belongs_to(core_)) {
      return Error{ErrorCode::kInvalidArgument,
                   "submit: the region was not opened through this transport"};
    }
    const auto* const scales = dynamic_cast<const FileRemoteRegion*>(request.scale_region);
    if (request.scale_region != nullptr && (scales == nullptr || !scales->belongs_to(core_))) {
      return Error{ErrorCode::kInvalidArgument,
                   "submit: the region of the scales was not opened through this transport"};
    }
    return core_.queue.submit(region->source(), request.copies, request.fingerprints,
                              scales == nullptr ? nullptr : &scales->source());
  }
  TicketState poll(TicketId ticket) override { return core_.queue.poll(ticket); }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    return core_.queue.wait_any(tickets, deadline);
  }
  uint64_t progress_bytes(TicketId ticket) override { return core_.queue.progress_bytes(ticket); }
  void cancel(TicketId ticket) override { core_.queue.cancel(ticket); }
  Result<void> finish(TicketId ticket) override { return core_.queue.finish(ticket); }

  TransportStats stats() const override {
    TransportStats stats;
    {
      const MutexLock lock(mutex_);
      if (served_ != nullptr) served_->add_stats(stats);
    }
    stats.peers = core_.peers;
    stats.remote_regions = core_.remote_regions;
    core_.queue.add_stats(stats);
    return stats;
  }

 private:
  // The folder is made when it is first needed: who only reads has none.
  Result<ServedFolder*> served() EXCLUDES(mutex_) {
    if (core_.in_child()) {
      return Error{ErrorCode::kUnavailable,
                   fmt::format("file transport: opened by process {}, used in its forked child {}",
                               core_.pid, ::getpid())};
    }
    const MutexLock lock(mutex_);
    if (served_ == nullptr && parent_.empty()) {
      return Error{ErrorCode::kUnsupported,
                   "file transport: opened without a folder, it can only read"};
    }
    if (served_ == nullptr) {
      TRANSFUSE_ASSIGN_OR_RETURN(served_, ServedFolder::open(parent_, token_));
    }
    return served_.get();
  }

  const std::string parent_;
  const std::string token_;
  mutable Mutex mutex_;
  std::unique_ptr<ServedFolder> served_ GUARDED_BY(mutex_);
  Core core_;
};

}  // namespace
}  // namespace file

Result<std::unique_ptr<Transport>> open_file_transport(std::string_view folder,
                                                       const TransportOptions& options) {
  return std::unique_ptr<Transport>(std::make_unique<file::FileTransport>(folder, options));
}

}  // namespace transfuse

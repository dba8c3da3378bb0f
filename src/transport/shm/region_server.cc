// The table of regions and the thread that answers for it.
#include "transport/shm/region_server.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/fd_message.h"
#include "transport/shm/runtime_folder.h"
#include "transport/shm/system_error.h"
#include "transport/shm/wire.h"

namespace transfuse::shm {
namespace {

constexpr size_t kMaxConnections = 512;        // readers of one host; the rest are told so
constexpr std::chrono::seconds kHelloTime{2};  // a connection that says nothing for so long goes
constexpr std::chrono::milliseconds kDescriptorPause{50};
constexpr int kMessagesPerTurn = 16;  // so that one busy peer does not starve the others

bool refuse(int socket, uint64_t request, ErrorCode code, std::string_view reason) {
  return send_message(socket, encode({request, Refused{code, reason}}), -1) == Transfer::kDone;
}

}  // namespace

RegionId RegionTable::add(const Entry& entry) {
  const MutexLock lock(mutex_);
  entries_.emplace(++last_id_, entry);
  bytes_ += entry.size_bytes;
  return RegionId{last_id_};
}

void RegionTable::remove(RegionId id) {
  const MutexLock lock(mutex_);
  const auto found = entries_.find(static_cast<uint64_t>(id));
  TRANSFUSE_CHECK(found != entries_.end());
  bytes_ -= found->second.size_bytes;
  entries_.erase(found);
}

bool RegionTable::answer(int socket, uint64_t request, RegionId id) {
  const MutexLock lock(mutex_);
  const auto found = entries_.find(static_cast<uint64_t>(id));
  if (found == entries_.end()) {
    return refuse(socket, request, ErrorCode::kNotFound,
                  fmt::format("region {}: not registered (any more)", static_cast<uint64_t>(id)));
  }
  const Entry& entry = found->second;
  if (entry.kind == RegionKind::kHandle) {
    return refuse(socket, request, ErrorCode::kInvalidArgument,
                  fmt::format("region {}: it has handles and no bytes", static_cast<uint64_t>(id)));
  }
  const RegionOpened opened{entry.kind, entry.size_bytes, entry.address};
  return send_message(socket, encode({request, opened}), entry.fd) == Transfer::kDone;
}

bool RegionTable::answer_handle(int socket, uint64_t request, const OpenHandle& open) {
  const MutexLock lock(mutex_);
  const auto found = entries_.find(open.region);
  if (found == entries_.end() || found->second.kind != RegionKind::kHandle) {
    return refuse(socket, request, ErrorCode::kNotFound,
                  fmt::format("region {}: no handles are offered there (any more)", open.region));
  }
  const auto handle = (*found->second.make)(open.index);
  if (!handle) return refuse(socket, request, handle.error().code, handle.error().message);
  const UniqueFd fd(handle->fd);
  const RegionOpened opened{RegionKind::kHandle, handle->size_bytes, 0};
  return send_message(socket, encode({request, opened}), fd.get()) == Transfer::kDone;
}

void RegionTable::add_stats(TransportStats& stats) const {
  const MutexLock lock(mutex_);
  stats.regions += entries_.size();
  stats.region_bytes += bytes_;
}

Result<std::unique_ptr<RegionServer>> RegionServer::start(Listener listener, RegionTable& table,
                                                          std::string token) {
  std::unique_ptr<RegionServer> server(
      new RegionServer(std::move(listener), table, std::move(token)));
  server->stop_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!server->stop_) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("shm server: expected an eventfd, found: {}", errno_text(errno))};
  }
  // Signals are for the application's own threads.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int failure = pthread_create(&server->thread_, nullptr, &RegionServer::run, server.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failure != 0) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("shm server: expected a thread, found: {}", errno_text(failure))};
  }
  server->started_ = true;
  return server;
}

RegionServer::~RegionServer() {
  if (!started_) return;
  const uint64_t one = 1;
  TRANSFUSE_CHECK(::write(stop_.get(), &one, sizeof one) == sizeof one);
  TRANSFUSE_CHECK(pthread_join(thread_, nullptr) == 0);
}

void* RegionServer::run(void* self) {
  pthread_setname_np(pthread_self(), "tf-shm-server");
  static_cast<RegionServer*>(self)->loop();
  return nullptr;
}

void RegionServer::loop() {
  std::vector<pollfd> waits;
  while (true) {
    const TimePoint now = std::chrono::steady_clock::now();
    waits.clear();
    waits.push_back({stop_.get(), POLLIN, 0});
    waits.push_back({now < accept_after_ ? -1 : listener_.fd(), POLLIN, 0});
    for (const Connection& connection : connections_) {
      waits.push_back({connection.fd.get(), POLLIN, 0});
    }
    if (::poll(waits.data(), waits.size(), poll_timeout_ms()) < 0) {
      TRANSFUSE_CHECK(errno == EINTR || errno == EAGAIN || errno == ENOMEM);
      continue;
    }
    if (waits[0].revents != 0) return;
    const TimePoint after = std::chrono::steady_clock::now();
    for (size_t i = 0; i < connections_.size(); ++i) {
      Connection& connection = connections_[i];
      const bool late = !connection.admitted && after >= connection.hello_by;
      const bool open = waits[i + 2].revents == 0 || serve(connection);
      if (late || !open) connection.fd.reset();
    }
    std::erase_if(connections_, [](const Connection& connection) { return !connection.fd; });
    if (waits[1].revents != 0) accept_new();
  }
}

int RegionServer::poll_timeout_ms() const {
  TimePoint next = TimePoint::max();
  for (const Connection& connection : connections_) {
    if (!connection.admitted) next = std::min(next, connection.hello_by);
  }
  if (accept_after_ > std::chrono::steady_clock::now()) next = std::min(next, accept_after_);
  if (next == TimePoint::max()) return -1;
  using std::chrono::milliseconds;
  return static_cast<int>(
             std::chrono::duration_cast<milliseconds>(Deadline(next).remaining()).count()) +
         1;
}

void RegionServer::accept_new() {
  for (int i = 0; i < kMessagesPerTurn; ++i) {
    UniqueFd fd(::accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      const bool gone = errno == EAGAIN || errno == EWOULDBLOCK || errno == ECONNABORTED;
      // Without descriptors the listener stays readable: no use in asking at once.
      if (!gone && errno != EINTR) {
        accept_after_ = std::chrono::steady_clock::now() + kDescriptorPause;
      }
      return;
    }
    if (auto identity = check_identity(fd.get()); !identity) {
      refuse(fd.get(), 0, identity.error().code, identity.error().message);
      continue;
    }
    if (connections_.size() >= kMaxConnections) {
      refuse(fd.get(), 0, ErrorCode::kResourceExhausted,
             fmt::format("shm server of process {}: all {} connections are in use", ::getpid(),
                         kMaxConnections));
      continue;
    }
    connections_.push_back({std::move(fd), false, std::chrono::steady_clock::now() + kHelloTime});
  }
}

bool RegionServer::serve(Connection& connection) {
  std::array<char, kMaxMessageBytes> buffer;  // NOLINT: filled by recvmsg
  for (int i = 0; i < kMessagesPerTurn; ++i) {
    const Received received = receive_message(connection.fd.get(), buffer, false);
    if (received.transfer == Transfer::kWouldBlock) return true;
    if (received.transfer == Transfer::kClosed) return false;
    if (received.transfer == Transfer::kMalformed) {
      refuse(connection.fd.get(), 0, ErrorCode::kCorrupt,
             fmt::format("shm server: expected messages of at most {} bytes", kMaxMessageBytes));
      return false;
    }
    if (!handle(connection, received.bytes)) return false;
  }
  return true;
}

bool RegionServer::handle(Connection& connection, std::string_view bytes) {
  const int socket = connection.fd.get();
  auto message = decode(bytes);
  if (!message) {
    refuse(socket, 0, message.error().code, message.error().message);
    return false;
  }
  if (const auto* hello = std::get_if<Hello>(&message->body); hello != nullptr) {
    if (hello->version != kWireVersion) {
      refuse(socket, message->request, ErrorCode::kUnsupported,
             fmt::format("shm socket: expected protocol version {}, found {}", kWireVersion,
                         hello->version));
      return false;
    }
    if (!token_.empty() && !token_matches(hello->token, token_)) {
      refuse(socket, message->request, ErrorCode::kPermissionDenied,
             "shm socket: expected the token of the serving process, found another");
      return false;
    }
    connection.admitted = true;
    return send_message(socket, encode({message->request, Welcome{}}), -1) == Transfer::kDone;
  }
  const auto* handle = std::get_if<OpenHandle>(&message->body);
  if (handle != nullptr && connection.admitted) {
    return table_.answer_handle(socket, message->request, *handle);
  }
  const auto* open = std::get_if<OpenRegion>(&message->body);
  if (open == nullptr || !connection.admitted) {
    refuse(socket, message->request, ErrorCode::kCorrupt,
           "shm socket: expected a hello, then requests, found another message");
    return false;
  }
  return table_.answer(socket, message->request, RegionId{open->region});
}

}  // namespace transfuse::shm

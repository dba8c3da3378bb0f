// Hello, requests and answers over one socket, and the life of the process behind it.
#include "transport/shm/connection.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

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

Result<UniqueFd> open_process(int32_t pid, std::string_view endpoint) {
  if (pid == 0) return UniqueFd();  // in a pid namespace that this process does not see
  UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!process && errno == ESRCH) {
    return Error{ErrorCode::kUnavailable,
                 fmt::format("shm peer {}: its process {} is gone", endpoint, pid)};
  }
  if (!process && (errno == EMFILE || errno == ENFILE)) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("shm peer {}: a pidfd: {}", endpoint, errno_text(errno))};
  }
  return process;
}

int wait_ms(Deadline deadline) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline.remaining()).count();
  return static_cast<int>(std::min<int64_t>(left, INT_MAX));
}

}  // namespace

struct Connection::Answer {
  Body body;  // its text is gone
  UniqueFd fd;
};

Result<std::unique_ptr<Connection>> Connection::open(std::string_view endpoint,
                                                     std::string_view token, Deadline deadline) {
  if (token.size() > kMaxTokenBytes) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("shm token: expected at most {} bytes, found {}", kMaxTokenBytes,
                             token.size())};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd socket, connect_socket(endpoint, deadline));
  TRANSFUSE_ASSIGN_OR_RETURN(const Identity identity, check_identity(socket.get()));
  // Before the hello: who answers it lived when its number was looked up, so the pidfd is his.
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd process, open_process(identity.pid, endpoint));
  std::unique_ptr<Connection> connection(
      new Connection(std::move(socket), std::move(process), identity, std::string(endpoint)));
  TRANSFUSE_ASSIGN_OR_RETURN(const Answer answer,
                             connection->ask(Hello{kWireVersion, token}, deadline));
  if (!std::holds_alternative<Welcome>(answer.body)) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("shm peer {}: expected a welcome, found another answer", endpoint)};
  }
  return connection;
}

Result<OfferedRegion> Connection::open_region(RegionId id, Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(Answer answer, ask(OpenRegion{static_cast<uint64_t>(id)}, deadline));
  const auto* opened = std::get_if<RegionOpened>(&answer.body);
  if (opened == nullptr || opened->kind == RegionKind::kHandle ||
      (opened->kind == RegionKind::kMemfd) != static_cast<bool>(answer.fd)) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("shm peer {}: expected region {} and its descriptor, found another "
                             "answer",
                             name_, static_cast<uint64_t>(id))};
  }
  return OfferedRegion{opened->kind, opened->size_bytes, opened->address, std::move(answer.fd)};
}

Result<OfferedRegion> Connection::open_handle(RegionId id, uint64_t index, Deadline deadline) {
  TRANSFUSE_ASSIGN_OR_RETURN(Answer answer,
                             ask(OpenHandle{static_cast<uint64_t>(id), index}, deadline));
  const auto* opened = std::get_if<RegionOpened>(&answer.body);
  if (opened == nullptr || opened->kind != RegionKind::kHandle || opened->size_bytes == 0 ||
      !answer.fd) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("shm peer {}: expected handle {} of region {} and its descriptor, "
                             "found another answer",
                             name_, index, static_cast<uint64_t>(id))};
  }
  return OfferedRegion{opened->kind, opened->size_bytes, 0, std::move(answer.fd)};
}

bool Connection::alive() const {
  std::array<pollfd, 2> waits = {{{socket_.get(), POLLRDHUP, 0}, {process_.get(), POLLIN, 0}}};
  int ready = 0;
  do {
    ready = ::poll(waits.data(), waits.size(), 0);
  } while (ready < 0 && errno == EINTR);
  return ready == 0;
}

Result<Connection::Answer> Connection::ask(const Body& body, Deadline deadline) {
  uint64_t request = 0;
  {
    const MutexLock lock(mutex_);
    while (busy_) {
      if (deadline.passed()) return too_late();
      free_.wait_until(mutex_, deadline);
    }
    busy_ = true;
    request = ++last_request_;
  }
  auto answer = exchange(request, encode({request, body}), deadline);
  const MutexLock lock(mutex_);
  busy_ = false;
  free_.notify_one();
  return answer;
}

Result<Connection::Answer> Connection::exchange(uint64_t request, const std::string& bytes,
                                                Deadline deadline) {
  while (true) {
    const Transfer sent = send_message(socket_.get(), bytes, -1);
    // A peer that refused the connection closed its end; what it said can still be read.
    if (sent != Transfer::kWouldBlock) break;
    TRANSFUSE_RETURN_IF_ERROR(wait_for(POLLOUT, deadline));
  }
  std::array<char, kMaxMessageBytes> buffer;  // NOLINT: filled by recvmsg
  while (true) {
    Received received = receive_message(socket_.get(), buffer, true);
    if (received.transfer == Transfer::kWouldBlock) {
      TRANSFUSE_RETURN_IF_ERROR(wait_for(POLLIN, deadline));
      continue;
    }
    if (received.transfer == Transfer::kClosed) return gone();
    if (received.transfer == Transfer::kMalformed) {
      return Error{ErrorCode::kCorrupt,
                   fmt::format("shm peer {}: expected a message of at most {} bytes with at most "
                               "one descriptor, found more",
                               name_, kMaxMessageBytes)};
    }
    if (received.transfer == Transfer::kNoDescriptors) {
      return Error{
          ErrorCode::kResourceExhausted,
          fmt::format("shm peer {}: no descriptor is left for its memory: raise ulimit -n", name_)};
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Message message, decode(received.bytes));
    const auto* refused = std::get_if<Refused>(&message.body);
    if (refused != nullptr && (message.request == request || message.request == 0)) {
      return Error{refused->code, fmt::format("shm peer {}: {}", name_, refused->reason)};
    }
    if (message.request != request) continue;
    return Answer{message.body, std::move(received.fd)};
  }
}

Result<void> Connection::wait_for(short events, Deadline deadline) {
  std::array<pollfd, 2> waits = {{{socket_.get(), events, 0}, {process_.get(), POLLIN, 0}}};
  const int ready = ::poll(waits.data(), waits.size(), wait_ms(deadline));
  if (ready < 0 && errno != EINTR) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("shm peer {}: poll: {}", name_, errno_text(errno))};
  }
  // What the socket still holds is read first, also from a peer that is dead.
  if (waits[0].revents != 0) return {};
  if (ready > 0 && waits[1].revents != 0) return gone();
  if (deadline.passed()) return too_late();
  return {};
}

Error Connection::gone() const {
  return {ErrorCode::kUnavailable,
          fmt::format("shm peer {} (process {}): expected an answer, found the connection closed",
                      name_, identity_.pid)};
}

Error Connection::too_late() const {
  return {ErrorCode::kDeadlineExceeded,
          fmt::format("shm peer {} (process {}): no answer by the deadline", name_, identity_.pid)};
}

}  // namespace transfuse::shm

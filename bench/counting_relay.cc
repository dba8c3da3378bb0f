// Two buffers a connection, and poll().
#include "counting_relay.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse::bench {
namespace {

constexpr int kBacklog = 16;

// What goes one way between two sockets that do not block.
struct Flow {
  int from = -1;
  int to = -1;
  std::atomic<uint64_t>* counter = nullptr;
  size_t begin = 0;
  size_t end = 0;
  bool ended = false;  // `from` sends no more, and `to` knows
  std::array<char, 65536> held{};

  bool empty() const { return begin == end; }
  // False: the connection is broken.
  bool move() {
    if (ended) return true;
    if (empty()) {
      const ssize_t got = read(from, held.data(), held.size());
      if (got < 0) return errno == EAGAIN || errno == EINTR;
      if (got == 0) {
        ended = true;
        return shutdown(to, SHUT_WR) == 0;
      }
      begin = 0;
      end = static_cast<size_t>(got);
      *counter += end;
    }
    const ssize_t put = send(to, held.data() + begin, end - begin, MSG_NOSIGNAL);
    if (put < 0) return errno == EAGAIN || errno == EINTR;
    begin += static_cast<size_t>(put);
    return true;
  }
};

Result<sockaddr_un> address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path)
    return Error{ErrorCode::kInvalidArgument, "too long for a socket: " + path};
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

UniqueFd new_socket(int flags) {
  return UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
}

}  // namespace

struct CountingRelay::Connection {
  UniqueFd member;
  UniqueFd coordinator;
  Flow up;
  Flow down;
  bool broken = false;
};

CountingRelay::CountingRelay(std::string socket, std::string coordinator_socket, UniqueFd listener,
                             UniqueFd wake)
    : socket_(std::move(socket)),
      coordinator_socket_(std::move(coordinator_socket)),
      listener_(std::move(listener)),
      wake_(std::move(wake)) {}

Result<std::unique_ptr<CountingRelay>> CountingRelay::open(const std::string& socket,
                                                           const std::string& coordinator_socket) {
  TRANSFUSE_ASSIGN_OR_RETURN(const sockaddr_un address, address_of(socket));
  UniqueFd listener = new_socket(SOCK_NONBLOCK);
  UniqueFd wake(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!listener || !wake ||
      bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      listen(listener.get(), kBacklog) != 0)
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("a relay on {}: {}", socket, std::strerror(errno))};
  std::unique_ptr<CountingRelay> relay(
      new CountingRelay(socket, coordinator_socket, std::move(listener), std::move(wake)));
  relay->thread_ = std::thread([raw = relay.get()] { raw->run(); });
  return relay;
}

CountingRelay::~CountingRelay() {
  const uint64_t one = 1;
  // An eventfd that was never written takes it.
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof one);
  thread_.join();
  unlink(socket_.c_str());
}

// A coordinator that does not answer is for the member to notice: its connection ends.
void CountingRelay::accept_one() {
  UniqueFd member(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  const auto address = address_of(coordinator_socket_);
  UniqueFd coordinator = new_socket(SOCK_NONBLOCK);
  if (!member || !address || !coordinator ||
      connect(coordinator.get(), reinterpret_cast<const sockaddr*>(&*address), sizeof *address) !=
          0)
    return;
  Connection& connection = connections_.emplace_back();
  connection.member = std::move(member);
  connection.coordinator = std::move(coordinator);
  connection.up.from = connection.down.to = connection.member.get();
  connection.up.to = connection.down.from = connection.coordinator.get();
  connection.up.counter = &up_bytes_;
  connection.down.counter = &down_bytes_;
}

void CountingRelay::run() {
  std::vector<pollfd> waited;
  const auto events = [](const Flow& read, const Flow& written) {
    return static_cast<short>((read.empty() && !read.ended ? POLLIN : 0) |
                              (written.empty() ? 0 : POLLOUT));
  };
  while (true) {
    waited.assign({{wake_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}});
    for (const Connection& c : connections_) {
      waited.push_back({c.member.get(), events(c.up, c.down), 0});
      waited.push_back({c.coordinator.get(), events(c.down, c.up), 0});
    }
    if (poll(waited.data(), waited.size(), -1) < 0 && errno != EINTR) return;
    if (waited[0].revents != 0) return;
    size_t i = 2;
    for (Connection& c : connections_) {
      const bool due = waited[i].revents != 0 || waited[i + 1].revents != 0;
      i += 2;
      if (due) c.broken = !c.up.move() || !c.down.move();
    }
    connections_.remove_if(
        [](const Connection& c) { return c.broken || (c.up.ended && c.down.ended); });
    if (waited[1].revents != 0) accept_one();
  }
}

}  // namespace transfuse::bench

// sendmsg and recvmsg with descriptors.
#include "transport/shm/fd_message.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>
#include "base/unique_fd.h"

namespace transfuse::shm {
namespace {

Transfer transfer_of(int number) {
  return number == EAGAIN || number == EWOULDBLOCK ? Transfer::kWouldBlock : Transfer::kClosed;
}

// CMSG_SPACE of one descriptor has room for two on 64-bit hosts: every one that came is taken.
bool take_fds(msghdr& header, UniqueFd& fd) {
  bool single = true;
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int received = -1;
      std::memcpy(&received, CMSG_DATA(part) + i * sizeof(int), sizeof received);
      UniqueFd owned(received);
      if (fd) {
        single = false;
      } else {
        fd = std::move(owned);
      }
    }
  }
  return single;
}

}  // namespace

Transfer send_message(int socket, std::string_view bytes, int fd) {
  iovec data{const_cast<char*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  if (fd >= 0) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    cmsghdr* part = CMSG_FIRSTHDR(&header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(part), &fd, sizeof fd);
  }
  ssize_t sent = 0;
  do {
    sent = ::sendmsg(socket, &header, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? transfer_of(errno) : Transfer::kDone;
}

Received receive_message(int socket, std::span<char> buffer, bool fd_expected) {
  Received received;
  iovec data{buffer.data(), buffer.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  if (fd_expected) {
    header.msg_control = control;
    header.msg_controllen = sizeof control;
  }
  ssize_t size = 0;
  do {
    size = ::recvmsg(socket, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // ECONNRESET comes once, where the other end closed without reading all; what it had said
    // before follows.
  } while (size < 0 && (errno == EINTR || errno == ECONNRESET));
  if (size < 0) {
    received.transfer = transfer_of(errno);
    return received;
  }
  const bool single = !fd_expected || take_fds(header, received.fd);
  received.bytes = {buffer.data(), static_cast<size_t>(size)};
  if (!single || (header.msg_flags & MSG_TRUNC) != 0) {
    received.transfer = Transfer::kMalformed;
    received.fd.reset();
  } else if (fd_expected && (header.msg_flags & MSG_CTRUNC) != 0) {
    received.transfer = received.fd ? Transfer::kMalformed : Transfer::kNoDescriptors;
    received.fd.reset();
  } else {
    // A message of no bytes is how a closed socket looks; none of ours is empty.
    received.transfer = size == 0 ? Transfer::kClosed : Transfer::kDone;
  }
  return received;
}

}  // namespace transfuse::shm

// One datagram with at most one descriptor beside it, sent and received without waiting.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "base/unique_fd.h"

namespace transfuse::shm {

enum class Transfer : unsigned char {
  kDone,
  kWouldBlock,
  kClosed,         // the other end is gone, or the socket failed
  kMalformed,      // longer than the buffer, or more than one descriptor
  kNoDescriptors,  // one was sent, but this process may have no more
};

// `fd` may be -1. kWouldBlock: nothing was sent.
Transfer send_message(int socket, std::string_view bytes, int fd);

struct Received {
  Transfer transfer = Transfer::kClosed;
  std::string_view bytes;  // of the buffer
  UniqueFd fd;
};
// Descriptors are taken only where `fd_expected`; others are closed by the kernel or here.
Received receive_message(int socket, std::span<char> buffer, bool fd_expected);

}  // namespace transfuse::shm

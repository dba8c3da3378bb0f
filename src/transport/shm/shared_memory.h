// Sealed shared memory: made, filled with pages and handed out by its owner; checked and mapped
// read-only by a reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse::shm {

// A mapping of this process, unmapped by the destructor. Used from one thread; the bytes by any.
class Mapping {
 public:
  Mapping() = default;
  Mapping(std::byte* base, uint64_t size_bytes) : base_(base), size_bytes_(size_bytes) {}
  Mapping(Mapping&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        size_bytes_(std::exchange(other.size_bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::byte* data() const { return base_; }
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  std::byte* base_ = nullptr;
  uint64_t size_bytes_ = 0;
};

// A sealed memfd and its writable mapping: no process, this one included, can shrink, grow or newly
// map it for writing.
struct SharedMemory {
  UniqueFd fd;
  Mapping mapping;
};

// Zeroed, with every page reserved and mapped. kResourceExhausted where memory, a cgroup or a limit
// of the process has no room: found before pages are taken, so that nobody is killed for it.
Result<SharedMemory> create_shared_memory(uint64_t size_bytes);

// Maps memory of a peer read-only. kCorrupt unless `fd` is a memfd of exactly `size_bytes` that
// cannot shrink (a read would end in SIGBUS), grow or be written by others.
Result<Mapping> map_peer_memory(const UniqueFd& fd, uint64_t size_bytes);

}  // namespace transfuse::shm

// Reserving, sealing and mapping memfds.
#include "transport/shm/shared_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/affinity.h"
#include "base/memory_room.h"
#include "transfuse/result.h"
#include "transport/shm/system_error.h"

namespace transfuse::shm {
namespace {

constexpr uint64_t kSliceBytes = uint64_t{256}
                                 << 20;  // memory is taken, and room checked, by slice
constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;
constexpr uint64_t kPagesPerThread = uint64_t{32} << 20;  // bytes; below, a thread does not pay
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;
#ifdef MADV_POPULATE_WRITE
constexpr int kPopulateWrite = MADV_POPULATE_WRITE;
#else
constexpr int kPopulateWrite = 23;  // Linux 5.14; older kernels answer EINVAL
#endif

Error no_room(uint64_t size_bytes, const std::string& found) {
  return Error{
      ErrorCode::kResourceExhausted,
      fmt::format("shared memory: expected room for {} bytes, found {} (memfd memory counts "
                  "against RAM and the memory control group, not against /dev/shm)",
                  size_bytes, found)};
}

// Page tables and the kernel's own pages come on top of what is asked for.
Result<void> check_room(uint64_t size_bytes) {
  const MemoryRoom room = memory_room();
  if (size_bytes > room.size_bytes || size_bytes / 128 > room.size_bytes - size_bytes) {
    return no_room(size_bytes, fmt::format("{} bytes by {}", room.size_bytes, room.limit));
  }
  return {};
}

// Maps the pages of [base, base + size) for writing, in parallel: zeroing them is most of the time.
// Only a matter of speed: what it could not do, fallocate() reports, or a later fault does.
void populate(std::byte* base, uint64_t size_bytes) {
  const uint64_t cores = usable_core_count();
  const uint64_t parts =
      std::clamp<uint64_t>(size_bytes / kPagesPerThread, 1, std::min<uint64_t>(cores, 8));
  const uint64_t part = (size_bytes / parts + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const auto map_part = [=](uint64_t begin) {
    ::madvise(base + begin, std::min(part, size_bytes - begin), kPopulateWrite);
  };
  std::vector<std::thread> threads;
  for (uint64_t begin = part; begin < size_bytes; begin += part) {
    try {
      threads.emplace_back(map_part, begin);
    } catch (const std::system_error&) {  // no thread to be had
      map_part(begin);
    }
  }
  map_part(0);
  for (std::thread& thread : threads) thread.join();
}

Result<void> reserve(int fd, std::byte* base, uint64_t size_bytes) {
  for (uint64_t begin = 0; begin < size_bytes; begin += kSliceBytes) {
    // Again for every slice: other processes of the job take memory at the same time.
    TRANSFUSE_RETURN_IF_ERROR(check_room(size_bytes - begin));
    const uint64_t slice = std::min(kSliceBytes, size_bytes - begin);
    populate(base + begin, slice);
    int failed = 0;
    do {
      failed = ::fallocate(fd, 0, static_cast<off_t>(begin), static_cast<off_t>(slice));
    } while (failed != 0 && errno == EINTR);
    if (failed != 0) {
      return no_room(size_bytes, fmt::format("{} bytes: fallocate: {}", begin, errno_text(errno)));
    }
  }
  return {};
}

}  // namespace

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(base_, other.base_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (base_ != nullptr) ::munmap(base_, size_bytes_);
}

Result<SharedMemory> create_shared_memory(uint64_t size_bytes) {
  if (size_bytes == 0) {
    return Error{ErrorCode::kInvalidArgument, "shared memory: expected at least 1 byte, found 0"};
  }
  TRANSFUSE_RETURN_IF_ERROR(check_room(size_bytes));
  rlimit limit{};  // beyond it the kernel sends SIGXFSZ
  if (::getrlimit(RLIMIT_FSIZE, &limit) == 0 && size_bytes > limit.rlim_cur) {
    return no_room(size_bytes, fmt::format("{} bytes by RLIMIT_FSIZE (ulimit -f)", limit.rlim_cur));
  }
  SharedMemory memory;
  memory.fd.reset(::memfd_create("transfuse", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.fd) {
    return Error{errno == EMFILE || errno == ENFILE ? ErrorCode::kResourceExhausted
                                                    : ErrorCode::kUnsupported,
                 fmt::format("shared memory: expected a new memfd, found: {}", errno_text(errno))};
  }
  if (::ftruncate(memory.fd.get(), static_cast<off_t>(size_bytes)) != 0) {
    return no_room(size_bytes, fmt::format("ftruncate: {}", errno_text(errno)));
  }
  void* base = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd.get(), 0);
  if (base == MAP_FAILED) {
    return no_room(size_bytes, fmt::format("mmap: {}", errno_text(errno)));
  }
  memory.mapping = Mapping(static_cast<std::byte*>(base), size_bytes);
  // Refused where the kernel has no huge pages for shared memory: then pages are small.
  if (size_bytes >= kHugePageBytes) ::madvise(base, size_bytes, MADV_HUGEPAGE);
  TRANSFUSE_RETURN_IF_ERROR(reserve(memory.fd.get(), memory.mapping.data(), size_bytes));
  if (::fcntl(memory.fd.get(), F_ADD_SEALS, kSeals) != 0) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("shared memory: expected the seals {:#x} (Linux 5.1), found: {}",
                             kSeals, errno_text(errno))};
  }
  return memory;
}

Result<Mapping> map_peer_memory(const UniqueFd& fd, uint64_t size_bytes) {
  struct stat status{};
  const int seals = ::fcntl(fd.get(), F_GET_SEALS);
  const bool fixed = seals >= 0 && (seals & F_SEAL_SHRINK) != 0 && (seals & F_SEAL_GROW) != 0 &&
                     (seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)) != 0;
  if (!fixed) {
    return Error{
        ErrorCode::kCorrupt,
        fmt::format("peer's memory: expected a memfd sealed against shrinking, growing and "
                    "writing, found {}",
                    seals < 0 ? "no memfd" : fmt::format("the seals {:#x}", seals))};
  }
  if (::fstat(fd.get(), &status) != 0 || static_cast<uint64_t>(status.st_size) != size_bytes ||
      size_bytes == 0) {
    return Error{ErrorCode::kCorrupt, fmt::format("peer's memory: expected {} bytes, found {}",
                                                  size_bytes, status.st_size)};
  }
  void* base = ::mmap(nullptr, size_bytes, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (base == MAP_FAILED) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("peer's memory: expected to map {} bytes, found: {}", size_bytes,
                             errno_text(errno))};
  }
  // The owner's core dump has it already; refused where the kernel does not know the advice.
  ::madvise(base, size_bytes, MADV_DONTDUMP);
  return Mapping(static_cast<std::byte*>(base), size_bytes);
}

}  // namespace transfuse::shm

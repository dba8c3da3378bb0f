// Memory of devices as files without a name, so that other processes can map it.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/mutex.h"
#include "fake_cuda/state.h"

namespace transfuse::fake_cuda {
namespace {

constexpr uint64_t kPage = 4096;
// What nobody wrote is no zero: so much of every new allocation says so.
constexpr uint64_t kGarbageBytes = uint64_t{1} << 16;
constexpr int kGarbage = 0xA5;

uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// Where another process finds memory of cuMemAlloc().
struct IpcHandle {
  int pid = 0;
  int fd = -1;
  uint64_t number = 0;
  uint64_t offset_bytes = 0;
  uint64_t size_bytes = 0;
  int device = 0;
};
static_assert(sizeof(IpcHandle) <= sizeof(CUipcMemHandle));

int make_file(uint64_t size_bytes, uint64_t& number) {
  const int fd = memfd_create("fake_cuda", MFD_CLOEXEC);
  struct stat status{};
  if (fd < 0) return -1;
  if (ftruncate(fd, static_cast<off_t>(size_bytes)) != 0 || fstat(fd, &status) != 0) {
    close(fd);
    return -1;
  }
  number = status.st_ino;
  return fd;
}

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }
CUdeviceptr address_of(void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

// Aligned as physical memory is.
void* reserve_addresses(uint64_t size_bytes) {
  const uint64_t all = size_bytes + kPhysicalGranularity;
  void* const got =
      mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return nullptr;
  const uint64_t begin = address_of(got);
  const uint64_t aligned = round_up(begin, kPhysicalGranularity);
  if (aligned > begin) munmap(got, aligned - begin);
  const uint64_t after = begin + all - aligned - size_bytes;
  if (after > 0) munmap(pointer(aligned + size_bytes), after);
  return pointer(aligned);
}

}  // namespace

Physical::~Physical() { close(fd); }

AddressSpace& AddressSpace::instance() {
  static auto* const space = new AddressSpace();
  return *space;
}

bool AddressSpace::open_arena(int device) {
  Arena& arena = arenas_.at(static_cast<size_t>(device));
  if (arena.fd >= 0) return true;
  const int fd = make_file(kDeviceBytes, arena.number);
  if (fd < 0) return false;
  void* const got =
      mmap(nullptr, kDeviceBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (got == MAP_FAILED) {
    close(fd);
    return false;
  }
  arena.fd = fd;
  arena.base = address_of(got);
  return true;
}

uint64_t AddressSpace::room(const Arena& arena, uint64_t size_bytes) {
  uint64_t at = 0;
  for (auto next = ranges_.lower_bound(arena.base);
       next != ranges_.end() && next->first < arena.base + kDeviceBytes; ++next) {
    const uint64_t begin = next->first - arena.base;
    if (begin >= at + size_bytes) break;
    at = begin + round_up(next->second.size_bytes, kPage);
  }
  return at + size_bytes <= kDeviceBytes ? at : UINT64_MAX;
}

std::map<CUdeviceptr, Range>::iterator AddressSpace::containing(CUdeviceptr address) {
  auto next = ranges_.upper_bound(address);
  if (next == ranges_.begin()) return ranges_.end();
  --next;
  return address < next->first + next->second.size_bytes ? next : ranges_.end();
}

CUresult AddressSpace::allocate(int device, RangeKind kind, uint64_t size_bytes,
                                CUdeviceptr& address) {
  if (size_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const MutexLock lock(mutex_);
  if (!open_arena(device)) return CUDA_ERROR_OUT_OF_MEMORY;
  uint64_t& used = used_bytes_.at(static_cast<size_t>(device));
  const Arena& arena = arenas_.at(static_cast<size_t>(device));
  const uint64_t whole = round_up(size_bytes, kPage);
  const uint64_t offset = whole > kDeviceBytes - used ? UINT64_MAX : room(arena, whole);
  if (offset == UINT64_MAX) return CUDA_ERROR_OUT_OF_MEMORY;
  address = arena.base + offset;
  ++last_number_;
  ranges_[address] = {.kind = kind,
                      .size_bytes = size_bytes,
                      .device = device,
                      .buffer_id = last_number_,
                      .block_id = last_number_};
  used += whole;
  std::memset(pointer(address), kGarbage, std::min(size_bytes, kGarbageBytes));
  return CUDA_SUCCESS;
}

CUresult AddressSpace::allocate_pinned(uint64_t size_bytes, void*& address) {
  if (size_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  void* const got = mmap(nullptr, round_up(size_bytes, kPage), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  address = got;
  std::memset(got, kGarbage, std::min(size_bytes, kGarbageBytes));
  const MutexLock lock(mutex_);
  ++last_number_;
  ranges_[address_of(got)] = {.kind = RangeKind::kPinned,
                              .size_bytes = size_bytes,
                              .buffer_id = last_number_,
                              .block_id = last_number_};
  return CUDA_SUCCESS;
}

CUresult AddressSpace::pin(CUdeviceptr address, uint64_t size_bytes) {
  if (size_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const MutexLock lock(mutex_);
  ++last_number_;
  const bool added = ranges_
                         .try_emplace(address, Range{.kind = RangeKind::kRegistered,
                                                     .size_bytes = size_bytes,
                                                     .buffer_id = last_number_,
                                                     .block_id = last_number_})
                         .second;
  return added ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
}

CUresult AddressSpace::unpin(CUdeviceptr address) {
  Stream::wait_for_all();
  const MutexLock lock(mutex_);
  const auto found = ranges_.find(address);
  if (found == ranges_.end() || found->second.kind != RangeKind::kRegistered) {
    return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
  }
  ranges_.erase(found);
  return CUDA_SUCCESS;
}

CUresult AddressSpace::free(CUdeviceptr address, bool pinned) {
  Stream::wait_for_all();
  const MutexLock lock(mutex_);
  const auto found = ranges_.find(address);
  if (found == ranges_.end()) return CUDA_ERROR_INVALID_VALUE;
  const Range& range = found->second;
  const uint64_t whole = round_up(range.size_bytes, kPage);
  if (pinned != (range.kind == RangeKind::kPinned) || range.kind >= RangeKind::kMapped) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (pinned) {
    munmap(pointer(address), whole);
  } else {
    const Arena& arena = arenas_.at(static_cast<size_t>(range.device));
    used_bytes_.at(static_cast<size_t>(range.device)) -= whole;
    fallocate(arena.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
              static_cast<off_t>(address - arena.base), static_cast<off_t>(whole));
  }
  ranges_.erase(found);
  return CUDA_SUCCESS;
}

uint64_t AddressSpace::free_bytes(int device) {
  const MutexLock lock(mutex_);
  return kDeviceBytes - used_bytes_.at(static_cast<size_t>(device));
}

std::optional<AddressSpace::Found> AddressSpace::find(CUdeviceptr address) {
  const MutexLock lock(mutex_);
  const auto found = containing(address);
  if (found == ranges_.end()) return std::nullopt;
  return Found{.address = found->first, .range = found->second};
}

uint64_t AddressSpace::reserved_bytes(CUdeviceptr address) {
  const MutexLock lock(mutex_);
  auto next = reservations_.upper_bound(address);
  if (next == reservations_.begin()) return 0;
  --next;
  return address < next->first + next->second ? next->second : 0;
}

CUresult AddressSpace::ipc_handle(CUdeviceptr address, CUipcMemHandle& handle) {
  const MutexLock lock(mutex_);
  const auto found = containing(address);
  if (found == ranges_.end() || found->second.kind != RangeKind::kDevice) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Arena& arena = arenas_.at(static_cast<size_t>(found->second.device));
  const IpcHandle made{.pid = getpid(),
                       .fd = arena.fd,
                       .number = arena.number,
                       .offset_bytes = found->first - arena.base,
                       .size_bytes = found->second.size_bytes,
                       .device = found->second.device};
  handle = {};
  std::memcpy(handle.reserved, &made, sizeof(made));
  return CUDA_SUCCESS;
}

CUresult AddressSpace::open_ipc(const CUipcMemHandle& handle, CUdeviceptr& address) {
  IpcHandle wanted;
  std::memcpy(&wanted, handle.reserved, sizeof(wanted));
  if (wanted.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
  if (wanted.device < 0 || wanted.device >= kDevices) return CUDA_ERROR_INVALID_VALUE;
  const std::string path =
      "/proc/" + std::to_string(wanted.pid) + "/fd/" + std::to_string(wanted.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return CUDA_ERROR_INVALID_VALUE;
  struct stat status{};
  const bool same = fstat(fd, &status) == 0 && status.st_ino == wanted.number &&
                    wanted.size_bytes > 0 && wanted.offset_bytes % kPage == 0 &&
                    wanted.offset_bytes + wanted.size_bytes <= kDeviceBytes;
  void* const got = same ? mmap(nullptr, wanted.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                                static_cast<off_t>(wanted.offset_bytes))
                         : MAP_FAILED;
  close(fd);
  if (got == MAP_FAILED) return same ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
  address = address_of(got);
  const MutexLock lock(mutex_);
  ++last_number_;
  ranges_[address] = {.kind = RangeKind::kOpened,
                      .size_bytes = wanted.size_bytes,
                      .device = wanted.device,
                      .buffer_id = last_number_,
                      .block_id = last_number_};
  return CUDA_SUCCESS;
}

CUresult AddressSpace::close_ipc(CUdeviceptr address) {
  Stream::wait_for_all();
  const MutexLock lock(mutex_);
  const auto found = ranges_.find(address);
  if (found == ranges_.end() || found->second.kind != RangeKind::kOpened) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  munmap(pointer(address), found->second.size_bytes);
  ranges_.erase(found);
  return CUDA_SUCCESS;
}

CUresult AddressSpace::reserve(uint64_t size_bytes, CUdeviceptr& address) {
  if (size_bytes == 0 || size_bytes % kPhysicalGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  void* const got = reserve_addresses(size_bytes);
  if (got == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  address = address_of(got);
  const MutexLock lock(mutex_);
  reservations_[address] = size_bytes;
  return CUDA_SUCCESS;
}

CUresult AddressSpace::unreserve(CUdeviceptr address, uint64_t size_bytes) {
  const MutexLock lock(mutex_);
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second != size_bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto mapped = ranges_.lower_bound(address);
  if (mapped != ranges_.end() && mapped->first < address + size_bytes) {
    return CUDA_ERROR_INVALID_VALUE;  // still mapped
  }
  munmap(pointer(address), size_bytes);
  reservations_.erase(found);
  return CUDA_SUCCESS;
}

uint64_t AddressSpace::hold(std::shared_ptr<Physical> physical) {
  handles_[++last_number_] = std::move(physical);
  return last_number_;
}

CUresult AddressSpace::create(int device, uint64_t size_bytes, unsigned handle_types,
                              uint64_t& handle) {
  if (size_bytes == 0 || size_bytes % kPhysicalGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (device < 0 || device >= kDevices) return CUDA_ERROR_INVALID_DEVICE;
  auto physical = std::make_shared<Physical>();
  physical->fd = make_file(size_bytes, physical->number);
  if (physical->fd < 0) return CUDA_ERROR_OUT_OF_MEMORY;
  physical->size_bytes = size_bytes;
  physical->device = device;
  physical->handle_types = handle_types;
  const MutexLock lock(mutex_);
  handle = hold(std::move(physical));
  return CUDA_SUCCESS;
}

CUresult AddressSpace::retain(CUdeviceptr address, uint64_t& handle) {
  const MutexLock lock(mutex_);
  const auto found = containing(address);
  if (found == ranges_.end() || found->second.kind != RangeKind::kMapped) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  handle = hold(found->second.physical);
  return CUDA_SUCCESS;
}

CUresult AddressSpace::release(uint64_t handle) {
  const MutexLock lock(mutex_);
  return handles_.erase(handle) == 1 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult AddressSpace::export_handle(uint64_t handle, int& fd) {
  const MutexLock lock(mutex_);
  const auto found = handles_.find(handle);
  if (found == handles_.end() ||
      (found->second->handle_types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  fd = fcntl(found->second->fd, F_DUPFD_CLOEXEC, 3);
  return fd >= 0 ? CUDA_SUCCESS : CUDA_ERROR_OPERATING_SYSTEM;
}

CUresult AddressSpace::import_handle(int fd, uint64_t& handle) {
  struct stat status{};
  auto physical = std::make_shared<Physical>();
  physical->fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
  if (physical->fd < 0 || fstat(physical->fd, &status) != 0) return CUDA_ERROR_INVALID_VALUE;
  physical->size_bytes = static_cast<uint64_t>(status.st_size);
  physical->number = status.st_ino;
  physical->handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  const MutexLock lock(mutex_);
  handle = hold(std::move(physical));
  return CUDA_SUCCESS;
}

CUresult AddressSpace::map(CUdeviceptr address, uint64_t size_bytes, uint64_t handle) {
  const MutexLock lock(mutex_);
  const auto held = handles_.find(handle);
  if (held == handles_.end() || size_bytes > held->second->size_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto reserved = reservations_.upper_bound(address);
  if (reserved == reservations_.begin()) return CUDA_ERROR_INVALID_VALUE;
  --reserved;
  const auto next = ranges_.lower_bound(address);
  const bool taken = containing(address) != ranges_.end() ||
                     (next != ranges_.end() && next->first < address + size_bytes);
  if (taken || address + size_bytes > reserved->first + reserved->second) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (mmap(pointer(address), size_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, held->second->fd, 0) ==
      MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  ranges_[address] = {.kind = RangeKind::kMapped,
                      .size_bytes = size_bytes,
                      .device = held->second->device,
                      .buffer_id = ++last_number_,
                      .block_id = held->second->number,
                      .physical = held->second};
  return CUDA_SUCCESS;
}

CUresult AddressSpace::unmap(CUdeviceptr address, uint64_t size_bytes) {
  Stream::wait_for_all();
  const MutexLock lock(mutex_);
  const auto found = ranges_.find(address);
  if (found == ranges_.end() || found->second.kind != RangeKind::kMapped ||
      found->second.size_bytes != size_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ranges_.erase(found);
  const void* const hole = mmap(pointer(address), size_bytes, PROT_NONE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return hole == MAP_FAILED ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

CUresult AddressSpace::allow(CUdeviceptr address, uint64_t size_bytes) {
  const MutexLock lock(mutex_);
  for (CUdeviceptr at = address; at < address + size_bytes;) {
    const auto found = ranges_.find(at);
    if (found == ranges_.end() || found->second.kind != RangeKind::kMapped) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (mprotect(pointer(at), found->second.size_bytes, PROT_READ | PROT_WRITE) != 0) {
      return CUDA_ERROR_UNKNOWN;
    }
    at += found->second.size_bytes;
  }
  return CUDA_SUCCESS;
}

}  // namespace transfuse::fake_cuda

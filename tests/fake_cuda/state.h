// What the driver that is no driver knows: devices of ordinary memory, their address space, streams
// that threads execute.
#pragma once

#include <cuda.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "base/mutex.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/scaled_kernel.h"

namespace transfuse::fake_cuda {

inline constexpr int kDevices = 2;
inline constexpr uint64_t kDeviceBytes = uint64_t{4} << 30;
inline constexpr uint64_t kPhysicalGranularity = uint64_t{2} << 20;
inline constexpr int kMultiprocessors = 4;

// -- memory --

// What cuMemCreate() gave, or a descriptor of it. Lives as long as it is held or mapped anywhere;
// no process sees how much there is of it, so that it does not count as memory in use.
struct Physical {
  Physical() = default;
  Physical(const Physical&) = delete;
  Physical& operator=(const Physical&) = delete;
  ~Physical();
  int fd = -1;
  uint64_t size_bytes = 0;
  uint64_t number = 0;  // of the file: the same in every process
  int device = 0;
  unsigned handle_types = 0;
};

enum class RangeKind : uint8_t {
  kDevice,
  kPooled,
  kManaged,
  kPinned,
  kMapped,
  kOpened,
  kRegistered
};
struct Range {
  RangeKind kind = RangeKind::kDevice;
  uint64_t size_bytes = 0;
  int device = 0;
  uint64_t buffer_id = 0;
  uint64_t block_id = 0;
  std::shared_ptr<Physical> physical{};  // kMapped
};

// Safe to call from any thread. Every function answers as the driver's function of that name does.
class AddressSpace {
 public:
  // Never destroyed: threads of streams may run when the process ends.
  static AddressSpace& instance();

  CUresult allocate(int device, RangeKind kind, uint64_t size_bytes, CUdeviceptr& address)
      EXCLUDES(mutex_);
  CUresult free(CUdeviceptr address, bool pinned) EXCLUDES(mutex_);
  CUresult allocate_pinned(uint64_t size_bytes, void*& address) EXCLUDES(mutex_);
  // Memory of the host that is there already.
  CUresult pin(CUdeviceptr address, uint64_t size_bytes) EXCLUDES(mutex_);
  CUresult unpin(CUdeviceptr address) EXCLUDES(mutex_);
  uint64_t free_bytes(int device) EXCLUDES(mutex_);

  // The range that contains `address`, and where it begins.
  struct Found {
    CUdeviceptr address = 0;
    Range range;
  };
  std::optional<Found> find(CUdeviceptr address) EXCLUDES(mutex_);
  uint64_t reserved_bytes(CUdeviceptr address) EXCLUDES(mutex_);  // of the reservation; 0: none

  CUresult ipc_handle(CUdeviceptr address, CUipcMemHandle& handle) EXCLUDES(mutex_);
  CUresult open_ipc(const CUipcMemHandle& handle, CUdeviceptr& address) EXCLUDES(mutex_);
  CUresult close_ipc(CUdeviceptr address) EXCLUDES(mutex_);

  CUresult reserve(uint64_t size_bytes, CUdeviceptr& address) EXCLUDES(mutex_);
  CUresult unreserve(CUdeviceptr address, uint64_t size_bytes) EXCLUDES(mutex_);
  CUresult create(int device, uint64_t size_bytes, unsigned handle_types, uint64_t& handle)
      EXCLUDES(mutex_);
  CUresult retain(CUdeviceptr address, uint64_t& handle) EXCLUDES(mutex_);
  CUresult release(uint64_t handle) EXCLUDES(mutex_);
  CUresult export_handle(uint64_t handle, int& fd) EXCLUDES(mutex_);
  CUresult import_handle(int fd, uint64_t& handle) EXCLUDES(mutex_);
  CUresult map(CUdeviceptr address, uint64_t size_bytes, uint64_t handle) EXCLUDES(mutex_);
  CUresult unmap(CUdeviceptr address, uint64_t size_bytes) EXCLUDES(mutex_);
  CUresult allow(CUdeviceptr address, uint64_t size_bytes) EXCLUDES(mutex_);

 private:
  // All memory of a device that is not of cuMemCreate(): one file, mapped once.
  struct Arena {
    int fd = -1;
    uint64_t number = 0;
    CUdeviceptr base = 0;
  };
  AddressSpace() = default;
  bool open_arena(int device) REQUIRES(mutex_);
  // First fit; UINT64_MAX: none.
  uint64_t room(const Arena& arena, uint64_t size_bytes) REQUIRES(mutex_);
  std::map<CUdeviceptr, Range>::iterator containing(CUdeviceptr address) REQUIRES(mutex_);
  uint64_t hold(std::shared_ptr<Physical> physical) REQUIRES(mutex_);

  Mutex mutex_;
  std::array<Arena, kDevices> arenas_ GUARDED_BY(mutex_);
  std::array<uint64_t, kDevices> used_bytes_ GUARDED_BY(mutex_) = {};
  std::map<CUdeviceptr, Range> ranges_ GUARDED_BY(mutex_);
  std::map<CUdeviceptr, uint64_t> reservations_ GUARDED_BY(mutex_);
  std::map<uint64_t, std::shared_ptr<Physical>> handles_ GUARDED_BY(mutex_);
  uint64_t last_number_ GUARDED_BY(mutex_) = 0;  // of handles and buffers
};

// -- streams --

struct Event {
  Mutex mutex;
  CondVar changed;
  uint64_t recorded GUARDED_BY(mutex) = 0;
  uint64_t reached GUARDED_BY(mutex) = 0;
  std::chrono::steady_clock::time_point when GUARDED_BY(mutex);

  bool done() EXCLUDES(mutex);
  void wait(uint64_t record) EXCLUDES(mutex);
};

enum class Kernel : uint8_t {
  kCopy,
  kCopyAndSum,
  kCopyAny,
  kCopyAnyAndSum,
  kScaledCopy,
  kScaledCopyPaced
};

// Holds no memory of its own, so that a warm stream allocates nothing.
struct Task {
  enum class Kind : uint8_t { kRows, kSet, kCopyKernel, kScaledKernel, kRecord, kWait };
  Kind kind = Kind::kRows;
  Kernel kernel = Kernel::kCopy;
  std::byte value{};
  uint32_t threads = 0;
  uint32_t shared_bytes = 0;
  uint64_t target = 0;
  uint64_t source = 0;
  uint64_t target_pitch = 0;
  uint64_t source_pitch = 0;
  uint64_t width = 0;
  uint64_t height = 1;
  CopyLaunch copy{};
  ScaledLaunch scaled{};
  std::shared_ptr<Event> event{};
  uint64_t record = 0;
};
void run_copy_kernel(const Task& task);
void run_scaled_kernel(const Task& task);

// What was captured.
struct Graph {
  std::vector<Task> tasks;
};

// Executes tasks in order on a thread of its own.
class Stream {
 public:
  explicit Stream(int device);
  ~Stream();  // all that was given to it is executed
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int device() const { return device_; }
  // On the stream, or into the graph while it is captured.
  void add(Task task) EXCLUDES(mutex_);
  void wait() EXCLUDES(mutex_);
  void begin_capture() EXCLUDES(mutex_);
  std::unique_ptr<Graph> end_capture() EXCLUDES(mutex_);
  bool capturing() EXCLUDES(mutex_);
  // As freeing memory does: until nothing is under way on any stream.
  static void wait_for_all();

 private:
  void work();

  const int device_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<Task> due_ GUARDED_BY(mutex_);
  bool running_ GUARDED_BY(mutex_) = false;
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::unique_ptr<Graph> capture_ GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace transfuse::fake_cuda

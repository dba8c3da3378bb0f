// One GPU of this process: its primary context, our kernels in it, and handles that release
// themselves.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "transfuse/result.h"
#include "transport/cuda/driver.h"

namespace transfuse::cuda {

// Makes a context current on this thread while it lives.
class Current {
 public:
  Current(const Driver& driver, CUcontext context) : driver_(driver) {
    pushed_ = driver.cuCtxPushCurrent(context) == CUDA_SUCCESS;
  }
  ~Current() {
    CUcontext popped = nullptr;
    if (pushed_) (void)driver_.cuCtxPopCurrent(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  bool pushed_ = false;
};

// The same GPU has the same one in every process, whatever CUDA_VISIBLE_DEVICES says.
using DeviceUuid = std::array<uint8_t, 16>;
std::string to_string(const DeviceUuid& uuid);  // "GPU-a12db37d-..."

// Between two GPUs; NVLink is told from PCIe by atomics that reach the other's memory.
enum class DeviceLink : uint8_t { kSameDevice, kNvlink, kPcie };

// Safe to call from any thread. Outlives all that is made on it.
class Device {
 public:
  static Result<std::unique_ptr<Device>> open(const Driver& driver, int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Driver& driver() const { return driver_; }
  CUcontext context() const { return context_; }
  int ordinal() const { return ordinal_; }
  const DeviceUuid& uuid() const { return uuid_; }
  const std::string& name() const { return name_; }
  uint32_t multiprocessors() const { return multiprocessors_; }
  Current use() const { return {driver_, context_}; }

  struct Kernels {
    CUfunction copy = nullptr;
    CUfunction copy_and_sum = nullptr;
    CUfunction copy_any = nullptr;  // of tables that use the stage, or at a pace
    CUfunction copy_any_and_sum = nullptr;
    CUfunction scaled_copy = nullptr;
    CUfunction scaled_copy_paced = nullptr;
  };
  const Kernels& kernels() const { return kernels_; }

  // How memory of `other` is reached.
  DeviceLink link_to(const Device& other) const;
  // Lets kernels of this device read memory of `other`. kUnsupported where the hardware cannot.
  Result<void> enable_peer(const Device& other) const;

 private:
  explicit Device(const Driver& driver) : driver_(driver) {}

  const Driver& driver_;
  CUdevice handle_ = 0;
  CUcontext context_ = nullptr;
  CUmodule module_ = nullptr;
  int ordinal_ = 0;
  uint32_t multiprocessors_ = 0;
  DeviceUuid uuid_{};
  std::string name_;
  Kernels kernels_;
};

// Memory of a device, or (kPinned) of the host that the device reaches. Outlived by its device.
enum class MemoryKind : uint8_t { kDevice, kPinned };
class Memory {
 public:
  static Result<Memory> allocate(const Device& device, MemoryKind kind, uint64_t size_bytes);
  Memory() = default;
  Memory(Memory&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        kind_(other.kind_),
        address_(std::exchange(other.address_, 0)),
        size_bytes_(std::exchange(other.size_bytes_, 0)) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(kind_, other.kind_);
    std::swap(address_, other.address_);
    std::swap(size_bytes_, other.size_bytes_);
    return *this;
  }
  ~Memory();

  CUdeviceptr address() const { return address_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(address_);
  }
  uint64_t size_bytes() const { return size_bytes_; }
  Result<void> clear() const;  // to zeros; waits

 private:
  const Device* device_ = nullptr;
  MemoryKind kind_ = MemoryKind::kDevice;
  CUdeviceptr address_ = 0;
  uint64_t size_bytes_ = 0;
};

// A stream of its own, that waits for no other.
class Stream {
 public:
  static Result<Stream> create(const Device& device);
  Stream() = default;
  Stream(Stream&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Stream();
  CUstream get() const { return handle_; }

 private:
  const Device* device_ = nullptr;
  CUstream handle_ = nullptr;
};

enum class EventKind : uint8_t { kOrder, kTiming };
class Event {
 public:
  static Result<Event> create(const Device& device, EventKind kind);
  Event() = default;
  Event(Event&& other) noexcept
      : device_(std::exchange(other.device_, nullptr)),
        handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Event();
  CUevent get() const { return handle_; }

 private:
  const Device* device_ = nullptr;
  CUevent handle_ = nullptr;
};

}  // namespace transfuse::cuda

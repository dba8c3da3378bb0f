// Which physical memory lies under device memory of this process, and how it is shared.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {

// An allocation of cudaMalloc, or what one cuMemMap() mapped.
struct PhysicalRange {
  uint64_t address = 0;
  uint64_t size_bytes = 0;
  uint64_t buffer_id = 0;  // the driver never gives one twice in a process
  uint64_t block_id = 0;   // of the physical pages
  bool operator==(const PhysicalRange&) const = default;
};

enum class Sharing : uint8_t {
  kIpcHandle,  // cudaMalloc
  kHandles,    // virtual memory mapping, one handle a range
};

// Whole ranges, one after another, that contain a span.
struct Backing {
  Sharing sharing = Sharing::kIpcHandle;
  std::vector<PhysicalRange> ranges;

  uint64_t address() const { return ranges.front().address; }
  uint64_t size_bytes() const {
    return ranges.back().address + ranges.back().size_bytes - address();
  }
  // The same as long as the same memory is mapped in the same places.
  uint64_t identity() const;
};

// Safe to call from any thread.
class PhysicalMemory {
 public:
  virtual ~PhysicalMemory() = default;
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  // A microsecond or two a range. kUnavailable: part of it is not mapped now. kUnsupported: its
  // allocator does not share; the message says what would.
  virtual Result<Backing> find(std::span<const std::byte> memory) const = 0;
  // Whether what find() gave is still mapped in its place: one short question a range.
  virtual bool unchanged(const Backing& backing) const = 0;
  virtual Result<CUipcMemHandle> ipc_handle(const PhysicalRange& range) const = 0;
  // A descriptor of a range of kHandles. kNotFound: other memory is mapped there by now.
  virtual Result<MemoryHandle> share(const PhysicalRange& range) const = 0;

 protected:
  PhysicalMemory() = default;
};

// As the driver knows it. Outlived by its device.
class DriverMemory final : public PhysicalMemory {
 public:
  explicit DriverMemory(const Device& device) : device_(device) {}
  Result<Backing> find(std::span<const std::byte> memory) const override;
  bool unchanged(const Backing& backing) const override;
  Result<CUipcMemHandle> ipc_handle(const PhysicalRange& range) const override;
  // kUnavailable: part of it is not mapped now.
  Result<void> check_mapped(std::span<const std::byte> memory) const;
  Result<MemoryHandle> share(const PhysicalRange& range) const override;

 private:
  const Device& device_;
};

}  // namespace transfuse::cuda

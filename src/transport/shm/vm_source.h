// Reads memory that another process owns, with process_vm_readv in full batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/shm/connection.h"

namespace transfuse::shm {

// What a worker thread's scratch must hold: big enough that system calls do not count, small enough
// for a core's second-level cache (measured: docs/transport-shm.md).
inline constexpr uint64_t kVmScratchBytes = uint64_t{1} << 20;

// The connection outlives it. Safe to call from any thread.
class VmSource final : public ReadSource {
 public:
  VmSource(const Connection& process, uint64_t address, uint64_t size_bytes)
      : process_(process), address_(address), size_bytes_(size_bytes) {}

  // Reads a byte at both ends: kPermissionDenied with the remedy where the kernel refuses, kCorrupt
  // where the peer has no memory there.
  Result<void> probe() const;

  uint64_t size_bytes() const override { return size_bytes_; }
  // kUnavailable once the process is gone, also if its number belongs to another one by now.
  Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                    std::span<std::byte> scratch) const override;

 private:
  const Connection& process_;
  const uint64_t address_;
  const uint64_t size_bytes_;
};

}  // namespace transfuse::shm

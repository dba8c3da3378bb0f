// Memory of other processes, mapped here.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

// Takes one handle, for the bytes from `offset_bytes` on; the descriptor is closed afterwards.
using HandleTaker = std::function<Result<void>(uint64_t offset_bytes, const MemoryHandle& handle)>;
// All handles of an offer, in order. kCorrupt unless they are exactly its allocations (I13). Never
// holds more than one descriptor; stops at the first error.
Result<void> take_handles(const MemoryOffer& offer, const HandleMaker& give,
                          const HandleTaker& take);

// The driver's error for a call that opens memory of another process, with what is likely missing:
// processes of two containers or users fail here.
Error cannot_open(const Error& error, const MemoryOffer& offer);

// The allocations of an offer where kernels of `reader` see them. The physical memory lives as long
// as it is mapped anywhere: the owner may die, or unmap it. Outlived by the reader.
class ImportedMemory {
 public:
  // `give` is asked for the handles, if there are any.
  static Result<ImportedMemory> open(const Device& reader, const MemoryOffer& offer,
                                     const HandleMaker& give);
  ImportedMemory(ImportedMemory&& other) noexcept
      : reader_(other.reader_),
        address_(std::exchange(other.address_, 0)),
        size_bytes_(other.size_bytes_),
        by_handles_(other.by_handles_),
        mapped_(std::move(other.mapped_)) {}
  ImportedMemory& operator=(ImportedMemory&&) = delete;
  ~ImportedMemory();

  CUdeviceptr address() const { return address_; }
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  ImportedMemory(const Device& reader, const MemoryOffer& offer)
      : reader_(reader), size_bytes_(offer.allocation_bytes), by_handles_(offer.handle_count > 0) {}
  Result<void> open_ipc(const MemoryOffer& offer);
  Result<void> map(uint64_t offset_bytes, const MemoryHandle& handle);

  const Device& reader_;
  CUdeviceptr address_ = 0;  // 0: nothing to release
  uint64_t size_bytes_;
  bool by_handles_;
  std::vector<uint64_t> mapped_;  // sizes of the mappings, one after another from address_ on
};

}  // namespace transfuse::cuda

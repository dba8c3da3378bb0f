// CUDA IPC for one allocation, a reservation and its mappings for many handles.
#include "transport/cuda/imported_memory.h"

#include <fmt/format.h>

#include <array>
#include <cstdint>

#include "base/unique_fd.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

Result<void> take_handles(const MemoryOffer& offer, const HandleMaker& give,
                          const HandleTaker& take) {
  uint64_t taken = 0;
  for (uint64_t index = 0; index < offer.handle_count; ++index) {
    TRANSFUSE_ASSIGN_OR_RETURN(const MemoryHandle handle, give(index));
    const UniqueFd fd(handle.fd);
    const uint64_t left = offer.allocation_bytes - taken;
    if (handle.size_bytes == 0 || handle.size_bytes % kHandleGranularityBytes != 0 ||
        handle.size_bytes > left) {
      return Error{
          ErrorCode::kCorrupt,
          fmt::format("device memory: handle {} of {} is of {} bytes, {} of {} are left", index,
                      offer.handle_count, handle.size_bytes, left, offer.allocation_bytes)};
    }
    TRANSFUSE_RETURN_IF_ERROR(take(taken, handle));
    taken += handle.size_bytes;
  }
  if (taken != offer.allocation_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: {} handles of {} bytes, expected {}",
                             offer.handle_count, taken, offer.allocation_bytes)};
  }
  return {};
}

Error cannot_open(const Error& error, const MemoryOffer& offer) {
  if (error.code == ErrorCode::kResourceExhausted || error.code == ErrorCode::kUnavailable ||
      error.code == ErrorCode::kCorrupt || error.code == ErrorCode::kNotFound) {
    return error;
  }
  return {
      ErrorCode::kPermissionDenied,
      fmt::format("memory of another process on {} cannot be opened: {}. Both processes must "
                  "run as one user, and in containers {}both must be given this GPU; or the "
                  "memory was freed meanwhile. Memory of the host needs none of this: open the "
                  "source or the reader without a device (device None)",
                  to_string(offer.device), error.message,
                  offer.handle_count > 0
                      ? ""
                      : "share the IPC and PID namespaces (docker --ipc=host --pid=host), and ")};
}

Result<ImportedMemory> ImportedMemory::open(const Device& reader, const MemoryOffer& offer,
                                            const HandleMaker& give) {
  ImportedMemory memory(reader, offer);
  const Driver& driver = reader.driver();
  const Current current = reader.use();
  if (!memory.by_handles_) {
    if (auto opened = memory.open_ipc(offer); !opened) return cannot_open(opened.error(), offer);
    return memory;
  }
  // All physical memory is aligned as the granularity says, which reservations are by themselves.
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemAddressReserve, &memory.address_,
                                           offer.allocation_bytes, 0, 0, 0));
  const auto map = [&](uint64_t offset_bytes, const MemoryHandle& handle) -> Result<void> {
    auto mapped = memory.map(offset_bytes, handle);
    if (!mapped) return cannot_open(mapped.error(), offer);
    return {};
  };
  TRANSFUSE_RETURN_IF_ERROR(take_handles(offer, give, map));
  const CUmemAccessDesc access{
      .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = reader.ordinal()},
      .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  const auto allowed =
      TRANSFUSE_CUDA(driver, cuMemSetAccess, memory.address_, offer.allocation_bytes, &access, 1);
  if (!allowed) return cannot_open(allowed.error(), offer);
  return memory;
}

Result<void> ImportedMemory::open_ipc(const MemoryOffer& offer) {
  const Driver& driver = reader_.driver();
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuIpcOpenMemHandle, &address_, offer.ipc_handle,
                                           CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
  uint64_t begin = 0;
  uint64_t size_bytes = 0;
  std::array<CUpointer_attribute, 2> names = {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                              CU_POINTER_ATTRIBUTE_RANGE_SIZE};
  std::array<void*, 2> values = {&begin, &size_bytes};
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuPointerGetAttributes,
                                           static_cast<unsigned>(names.size()), names.data(),
                                           values.data(), address_));
  // 0: the driver does not say.
  if (size_bytes != 0 && begin + size_bytes < address_ + offer.allocation_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: an allocation of {} bytes was offered, {} were opened",
                             offer.allocation_bytes, begin + size_bytes - address_)};
  }
  return {};
}

Result<void> ImportedMemory::map(uint64_t offset_bytes, const MemoryHandle& handle) {
  const Driver& driver = reader_.driver();
  CUmemGenericAllocationHandle imported = 0;
  const auto opened = [&]() -> Result<void> {
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(
        driver, cuMemImportFromShareableHandle, &imported,
        reinterpret_cast<void*>(static_cast<uintptr_t>(handle.fd)),  // NOLINT: as the call wants it
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    // Refuses more than the handle's allocation has.
    const auto mapped = TRANSFUSE_CUDA(driver, cuMemMap, address_ + offset_bytes, handle.size_bytes,
                                       0, imported, 0);
    (void)driver.cuMemRelease(imported);  // the mapping holds it
    return mapped;
  }();
  if (opened) mapped_.push_back(handle.size_bytes);
  return opened;
}

ImportedMemory::~ImportedMemory() {
  if (address_ == 0) return;
  const Driver& driver = reader_.driver();
  const Current current = reader_.use();
  if (!by_handles_) {
    (void)driver.cuIpcCloseMemHandle(address_);
    return;
  }
  CUdeviceptr at = address_;
  for (const uint64_t size_bytes : mapped_) {
    (void)driver.cuMemUnmap(at, size_bytes);
    at += size_bytes;
  }
  (void)driver.cuMemAddressFree(address_, size_bytes_);
}

}  // namespace transfuse::cuda

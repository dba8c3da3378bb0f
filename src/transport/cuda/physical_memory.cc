// Questions to the driver about addresses; one exported handle at a time.
#include "transport/cuda/physical_memory.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {
namespace {

// What the driver says of an address; 0 where it has nothing to say.
struct Attributes {
  uint64_t buffer_id = 0;
  uint64_t block_id = 0;
  uint64_t ipc_capable = 0;
  uint64_t pool = 0;
  uint64_t handle_types = 0;
};

Result<Attributes> attributes_of(const Driver& driver, CUdeviceptr address) {
  Attributes found;
  std::array<CUpointer_attribute, 5> names = {
      CU_POINTER_ATTRIBUTE_BUFFER_ID, CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID,
      CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
      CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES};
  // Some are shorter than a word: what they leave of it stays 0.
  std::array<void*, 5> values = {&found.buffer_id, &found.block_id, &found.ipc_capable, &found.pool,
                                 &found.handle_types};
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuPointerGetAttributes,
                                           static_cast<unsigned>(names.size()), names.data(),
                                           values.data(), address));
  return found;
}

Error not_mapped(uint64_t address) {
  return {ErrorCode::kUnavailable,
          fmt::format("device memory: nothing is mapped at {:#x} now: an engine that sleeps must "
                      "wake before its weights are read, published or received",
                      address)};
}

Result<Sharing> sharing_of(const Attributes& found, CUdeviceptr address) {
  if (found.ipc_capable != 0) return Sharing::kIpcHandle;
  if (found.pool != 0) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("device memory at {:#x} is of a pool (cudaMallocAsync), which other "
                             "processes cannot open: use cudaMalloc, with PyTorch its own "
                             "allocator (PYTORCH_CUDA_ALLOC_CONF=backend:native)",
                             address)};
  }
  if ((found.handle_types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) != 0) {
    return Sharing::kHandles;
  }
  if ((found.handle_types & CU_MEM_HANDLE_TYPE_FABRIC) != 0) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("device memory at {:#x} was created for fabric handles only, expected "
                             "file descriptors: PyTorch's expandable_segments do so where the "
                             "machine has IMEX channels; leave them off in processes whose weights "
                             "are read (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)",
                             address)};
  }
  return Error{
      ErrorCode::kUnsupported,
      fmt::format("device memory at {:#x} was created by cuMemCreate without a handle type, so "
                  "that no other process can open it. PyTorch's expandable_segments ask for one "
                  "since 2.5 unless TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0 says not to; other "
                  "allocators have to set requestedHandleTypes to "
                  "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, or weights that are read must not "
                  "come from them (vLLM's sleep mode and torch_memory_saver ask for none)",
                  address)};
}

}  // namespace

uint64_t Backing::identity() const {
  std::vector<uint64_t> words = {static_cast<uint64_t>(sharing)};
  words.reserve(1 + ranges.size() * 4);
  for (const PhysicalRange& range : ranges) {
    words.insert(words.end(), {range.address, range.size_bytes, range.buffer_id, range.block_id});
  }
  return make_identity(words);
}

Result<Backing> DriverMemory::find(std::span<const std::byte> memory) const {
  const Driver& driver = device_.driver();
  const Current current = device_.use();
  const auto begin = reinterpret_cast<CUdeviceptr>(memory.data());
  const CUdeviceptr end = begin + memory.size();
  Backing backing;
  for (CUdeviceptr at = begin; at < end;) {
    CUdeviceptr address = 0;
    size_t size = 0;
    if (driver.cuMemGetAddressRange(&address, &size, at) != CUDA_SUCCESS || size == 0) {
      return not_mapped(at);
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Attributes found, attributes_of(driver, address));
    if (found.buffer_id == 0 && found.block_id == 0) return not_mapped(at);
    TRANSFUSE_ASSIGN_OR_RETURN(const Sharing sharing, sharing_of(found, address));
    if (backing.ranges.empty()) backing.sharing = sharing;
    const bool beyond = !backing.ranges.empty() && sharing == Sharing::kIpcHandle;
    if (beyond || sharing != backing.sharing) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("{} bytes at {:#x} reach beyond their allocation, which ends at "
                               "{:#x}: register each allocation's part by itself",
                               memory.size(), begin, address)};
    }
    backing.ranges.push_back({.address = address,
                              .size_bytes = size,
                              .buffer_id = found.buffer_id,
                              .block_id = found.block_id});
    at = address + size;
  }
  return backing;
}

Result<void> DriverMemory::check_mapped(std::span<const std::byte> memory) const {
  const Driver& driver = device_.driver();
  const Current current = device_.use();
  const auto begin = reinterpret_cast<CUdeviceptr>(memory.data());
  for (CUdeviceptr at = begin; at < begin + memory.size();) {
    CUdeviceptr address = 0;
    size_t size = 0;
    if (driver.cuMemGetAddressRange(&address, &size, at) != CUDA_SUCCESS || size == 0) {
      return not_mapped(at);
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Attributes found, attributes_of(driver, address));
    if (found.buffer_id == 0 && found.block_id == 0) return not_mapped(at);
    at = address + size;
  }
  return {};
}

bool DriverMemory::unchanged(const Backing& backing) const {
  const Driver& driver = device_.driver();
  return std::ranges::all_of(backing.ranges, [&](const PhysicalRange& range) {
    uint64_t buffer_id = 0;
    uint64_t block_id = 0;
    std::array<CUpointer_attribute, 2> names = {CU_POINTER_ATTRIBUTE_BUFFER_ID,
                                                CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID};
    std::array<void*, 2> values = {&buffer_id, &block_id};
    return driver.cuPointerGetAttributes(static_cast<unsigned>(names.size()), names.data(),
                                         values.data(), range.address) == CUDA_SUCCESS &&
           buffer_id == range.buffer_id && block_id == range.block_id;
  });
}

Result<CUipcMemHandle> DriverMemory::ipc_handle(const PhysicalRange& range) const {
  const Current current = device_.use();
  CUipcMemHandle handle{};
  TRANSFUSE_RETURN_IF_ERROR(
      TRANSFUSE_CUDA(device_.driver(), cuIpcGetMemHandle, &handle, range.address));
  return handle;
}

Result<MemoryHandle> DriverMemory::share(const PhysicalRange& range) const {
  const Driver& driver = device_.driver();
  const Current current = device_.use();
  CUmemGenericAllocationHandle handle = 0;
  const CUresult retained = driver.cuMemRetainAllocationHandle(
      &handle, reinterpret_cast<void*>(range.address));  // NOLINT
  if (retained == CUDA_ERROR_INVALID_VALUE) return not_mapped(range.address);
  TRANSFUSE_RETURN_IF_ERROR(driver.check(retained, "cuMemRetainAllocationHandle"));
  int fd = -1;
  const auto shared = [&]() -> Result<void> {
    // Asked after the handle was taken: whatever was unmapped before is seen here.
    TRANSFUSE_ASSIGN_OR_RETURN(const Attributes now, attributes_of(driver, range.address));
    if (now.buffer_id != range.buffer_id || now.block_id != range.block_id) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("device memory at {:#x} was mapped anew", range.address)};
    }
    return TRANSFUSE_CUDA(driver, cuMemExportToShareableHandle, &fd, handle,
                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  }();
  (void)driver.cuMemRelease(handle);  // the descriptor holds the memory from here on
  if (!shared && shared.error().code != ErrorCode::kNotFound) {
    return Error{shared.error().code,
                 fmt::format("device memory at {:#x}: {} (its owner needs a free descriptor for "
                             "the call: ulimit -n)",
                             range.address, shared.error().message)};
  }
  TRANSFUSE_RETURN_IF_ERROR(shared);
  return MemoryHandle{.fd = fd, .size_bytes = range.size_bytes};
}

}  // namespace transfuse::cuda

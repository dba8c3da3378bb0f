// libcuda.so.1 for tests: the driver's functions that we call, on memory of the host. A program
// that is linked with it, or finds it by LD_LIBRARY_PATH, sees two GPUs joined by NVLink.
#include <cuda.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "fake_cuda/state.h"
#include "transport/cuda/copy_kernel.h"
#include "transport/cuda/scaled_kernel.h"

namespace {

using namespace transfuse;
using namespace transfuse::fake_cuda;

struct KernelEntry {
  std::string_view name;
  Kernel kernel;
};
constexpr std::array<KernelEntry, 6> kKernels = {
    KernelEntry{"transfuse_copy", Kernel::kCopy},
    KernelEntry{"transfuse_copy_and_sum", Kernel::kCopyAndSum},
    KernelEntry{"transfuse_copy_any", Kernel::kCopyAny},
    KernelEntry{"transfuse_copy_any_and_sum", Kernel::kCopyAnyAndSum},
    KernelEntry{"transfuse_scaled_copy", Kernel::kScaledCopy},
    KernelEntry{"transfuse_scaled_copy_paced", Kernel::kScaledCopyPaced}};

// A primary context is known by its device; contexts are current per thread.
struct Context {
  int device = 0;
};
std::array<Context, kDevices> contexts = {Context{0}, Context{1}};
thread_local std::vector<Context*> current_contexts;
Mutex peers_mutex;
std::array<bool, kDevices> peer_enabled GUARDED_BY(peers_mutex) = {};  // from the other device

Context* current() { return current_contexts.empty() ? nullptr : current_contexts.back(); }
Stream* stream_of(CUstream stream) { return reinterpret_cast<Stream*>(stream); }
const std::shared_ptr<Event>& event_of(CUevent event) {
  return *reinterpret_cast<std::shared_ptr<Event>*>(event);
}
bool known_device(int device) { return device >= 0 && device < kDevices; }

CUresult add(CUstream stream, Task task) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  stream_of(stream)->add(std::move(task));
  return CUDA_SUCCESS;
}

uint64_t attribute_of(CUpointer_attribute attribute, const AddressSpace::Found& found) {
  const Range& range = found.range;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return range.kind == RangeKind::kPinned || range.kind == RangeKind::kRegistered
                 ? CU_MEMORYTYPE_HOST
                 : CU_MEMORYTYPE_DEVICE;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return range.kind == RangeKind::kManaged ? 1 : 0;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return static_cast<uint64_t>(range.device);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return found.address;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return range.size_bytes;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return range.buffer_id;
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      return range.block_id;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return range.kind == RangeKind::kDevice ? 1 : 0;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return range.kind == RangeKind::kPooled ? 1 : 0;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return range.physical != nullptr ? range.physical->handle_types : 0;
    default:
      return 0;
  }
}

// As many bytes as the driver writes.
void put_attribute(CUpointer_attribute attribute, uint64_t value, void* place) {
  const bool word = attribute == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR ||
                    attribute == CU_POINTER_ATTRIBUTE_RANGE_SIZE ||
                    attribute == CU_POINTER_ATTRIBUTE_BUFFER_ID ||
                    attribute == CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID ||
                    attribute == CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE ||
                    attribute == CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES;
  const auto narrow = static_cast<uint32_t>(value);
  word ? std::memcpy(place, &value, sizeof(value)) : std::memcpy(place, &narrow, sizeof(narrow));
}

Task rows(uint64_t target, uint64_t source, uint64_t width) {
  return {.kind = Task::Kind::kRows, .target = target, .source = source, .width = width};
}

}  // namespace

extern "C" {

// -- the driver and its devices --

CUresult CUDAAPI cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult error, const char** name) {
  switch (error) {
    case CUDA_ERROR_INVALID_VALUE:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return CUDA_SUCCESS;
    case CUDA_ERROR_OUT_OF_MEMORY:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_CONTEXT:
      *name = "CUDA_ERROR_INVALID_CONTEXT";
      return CUDA_SUCCESS;
    default:
      *name = "another error";
      return CUDA_SUCCESS;
  }
}
CUresult CUDAAPI cuGetErrorString(CUresult, const char** text) {
  *text = "of the driver for tests";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetCount(int* count) {
  *count = kDevices;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  if (!known_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char* name, int size, CUdevice) {
  (void)std::snprintf(name, static_cast<size_t>(size), "GPU of the host, for tests");
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  std::memset(uuid->bytes, 0x70, sizeof(uuid->bytes));
  uuid->bytes[0] = static_cast<char>(device);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? kMultiprocessors : 0;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute, CUdevice, CUdevice) {
  *value = 1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceCanAccessPeer(int* possible, CUdevice, CUdevice) {
  *possible = 1;
  return CUDA_SUCCESS;
}

// -- contexts and modules --

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (!known_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *context = reinterpret_cast<CUcontext>(&contexts.at(static_cast<size_t>(device)));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
  return known_device(device) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  current_contexts.push_back(reinterpret_cast<Context*>(context));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
  if (current_contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = reinterpret_cast<CUcontext>(current_contexts.back());
  current_contexts.pop_back();
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxEnablePeerAccess(CUcontext peer, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (reinterpret_cast<Context*>(peer) == current()) return CUDA_ERROR_INVALID_DEVICE;
  const MutexLock lock(peers_mutex);
  const bool before = std::exchange(peer_enabled.at(static_cast<size_t>(current()->device)), true);
  return before ? CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED : CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void*) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *module = reinterpret_cast<CUmodule>(current());
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  for (const KernelEntry& entry : kKernels) {
    if (entry.name != name) continue;
    *function = reinterpret_cast<CUfunction>(const_cast<KernelEntry*>(&entry));
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned blocks, unsigned, unsigned,
                                unsigned threads, unsigned, unsigned, unsigned shared_bytes,
                                CUstream stream, void** arguments, void**) {
  if (blocks == 0 || threads == 0 || threads > 1024) return CUDA_ERROR_INVALID_VALUE;
  const auto* entry = reinterpret_cast<const KernelEntry*>(function);
  Task task{.kind = Task::Kind::kCopyKernel,
            .kernel = entry->kernel,
            .threads = threads,
            .shared_bytes = shared_bytes};
  if (entry->kernel >= Kernel::kScaledCopy) {
    task.kind = Task::Kind::kScaledKernel;
    task.scaled = *static_cast<const ScaledLaunch*>(arguments[0]);
  } else {
    task.copy = *static_cast<const CopyLaunch*>(arguments[0]);
  }
  return add(stream, std::move(task));
}

// -- memory --

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* address, size_t size) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().allocate(current()->device, RangeKind::kDevice, size, *address);
}
CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr* address, size_t size, CUstream) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().allocate(current()->device, RangeKind::kPooled, size, *address);
}
CUresult CUDAAPI cuMemAllocManaged(CUdeviceptr* address, size_t size, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().allocate(current()->device, RangeKind::kManaged, size, *address);
}
CUresult CUDAAPI cuMemFree(CUdeviceptr address) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().free(address, false);
}
CUresult CUDAAPI cuMemHostAlloc(void** address, size_t size, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().allocate_pinned(size, *address);
}
CUresult CUDAAPI cuMemFreeHost(void* address) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().free(reinterpret_cast<CUdeviceptr>(address), true);
}
CUresult CUDAAPI cuMemHostRegister(void* address, size_t size, unsigned flags) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  // A mapping that is only read is refused otherwise.
  if ((flags & CU_MEMHOSTREGISTER_READ_ONLY) == 0) return CUDA_ERROR_INVALID_VALUE;
  return AddressSpace::instance().pin(reinterpret_cast<CUdeviceptr>(address), size);
}
CUresult CUDAAPI cuMemHostUnregister(void* address) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().unpin(reinterpret_cast<CUdeviceptr>(address));
}
CUresult CUDAAPI cuMemHostGetDevicePointer(CUdeviceptr* device, void* address, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *device = reinterpret_cast<CUdeviceptr>(address);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *free = AddressSpace::instance().free_bytes(current()->device);
  *total = kDeviceBytes;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size,
                               CUstream stream) {
  return add(stream, rows(target, source, size));
}
CUresult CUDAAPI cuMemcpy2DAsync(const CUDA_MEMCPY2D* copy, CUstream stream) {
  const bool possible = copy->srcMemoryType == CU_MEMORYTYPE_UNIFIED &&
                        copy->dstMemoryType == CU_MEMORYTYPE_UNIFIED &&
                        copy->srcPitch >= copy->WidthInBytes &&
                        copy->dstPitch >= copy->WidthInBytes;
  if (!possible) return CUDA_ERROR_INVALID_VALUE;
  Task task = rows(copy->dstDevice, copy->srcDevice, copy->WidthInBytes);
  task.target_pitch = copy->dstPitch;
  task.source_pitch = copy->srcPitch;
  task.height = copy->Height;
  return add(stream, std::move(task));
}
CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr* targets, CUdeviceptr* sources, size_t* sizes,
                                    size_t count, CUmemcpyAttributes*, size_t* attribute_begins,
                                    size_t attribute_count, CUstream stream) {
  if (count == 0 || attribute_count == 0 || attribute_begins[0] != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (size_t i = 0; i < count; ++i) {
    if (const CUresult added = add(stream, rows(targets[i], sources[i], sizes[i])); added != 0) {
      return added;
    }
  }
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t size,
                                 CUstream stream) {
  return add(stream, {.kind = Task::Kind::kSet,
                      .value = static_cast<std::byte>(value),
                      .target = target,
                      .width = size});
}
CUresult CUDAAPI cuPointerGetAttribute(void* value, CUpointer_attribute attribute,
                                       CUdeviceptr address) {
  const auto found = AddressSpace::instance().find(address);
  if (!found) return CUDA_ERROR_INVALID_VALUE;
  put_attribute(attribute, attribute_of(attribute, *found), value);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes,
                                        void** values, CUdeviceptr address) {
  const auto found = AddressSpace::instance().find(address);
  const uint64_t reserved = found ? 0 : AddressSpace::instance().reserved_bytes(address);
  for (unsigned i = 0; i < count; ++i) {
    const uint64_t nothing = attributes[i] == CU_POINTER_ATTRIBUTE_RANGE_SIZE ? reserved : 0;
    put_attribute(attributes[i], found ? attribute_of(attributes[i], *found) : nothing, values[i]);
  }
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemGetAddressRange(CUdeviceptr* begin, size_t* size, CUdeviceptr address) {
  const auto found = AddressSpace::instance().find(address);
  if (!found) return CUDA_ERROR_NOT_FOUND;
  *begin = found->address;
  *size = found->range.size_bytes;
  return CUDA_SUCCESS;
}

// -- memory of other processes --

CUresult CUDAAPI cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr address) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().ipc_handle(address, *handle);
}
CUresult CUDAAPI cuIpcOpenMemHandle(CUdeviceptr* address, CUipcMemHandle handle, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().open_ipc(handle, *address);
}
CUresult CUDAAPI cuIpcCloseMemHandle(CUdeviceptr address) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  return AddressSpace::instance().close_ipc(address);
}
CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* address, size_t size, size_t, CUdeviceptr,
                                     unsigned long long) {
  return AddressSpace::instance().reserve(size, *address);
}
CUresult CUDAAPI cuMemAddressFree(CUdeviceptr address, size_t size) {
  return AddressSpace::instance().unreserve(address, size);
}
CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                             const CUmemAllocationProp* properties, unsigned long long) {
  uint64_t made = 0;
  const CUresult created = AddressSpace::instance().create(
      properties->location.id, size, static_cast<unsigned>(properties->requestedHandleTypes), made);
  *handle = made;
  return created;
}
CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  return AddressSpace::instance().release(handle);
}
CUresult CUDAAPI cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                          CUmemGenericAllocationHandle handle, unsigned long long) {
  if (offset != 0) return CUDA_ERROR_INVALID_VALUE;
  return AddressSpace::instance().map(address, size, handle);
}
CUresult CUDAAPI cuMemUnmap(CUdeviceptr address, size_t size) {
  return AddressSpace::instance().unmap(address, size);
}
CUresult CUDAAPI cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc*, size_t) {
  return AddressSpace::instance().allow(address, size);
}
CUresult CUDAAPI cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  uint64_t retained = 0;
  const CUresult result =
      AddressSpace::instance().retain(reinterpret_cast<CUdeviceptr>(address), retained);
  *handle = retained;
  return result;
}
CUresult CUDAAPI cuMemExportToShareableHandle(void* place, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType, unsigned long long) {
  return AddressSpace::instance().export_handle(handle, *static_cast<int*>(place));
}
CUresult CUDAAPI cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle,
                                                void* descriptor, CUmemAllocationHandleType) {
  uint64_t imported = 0;
  const CUresult result = AddressSpace::instance().import_handle(
      static_cast<int>(reinterpret_cast<intptr_t>(descriptor)), imported);
  *handle = imported;
  return result;
}

// -- streams, events, graphs --

CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *stream = reinterpret_cast<CUstream>(new Stream(current()->device));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamDestroy(CUstream stream) {
  delete stream_of(stream);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamSynchronize(CUstream stream) {
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (stream_of(stream)->capturing()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  stream_of(stream)->wait();
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = stream_of(stream)->capturing() ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                           : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamGetCtx(CUstream stream, CUcontext* context) {
  *context =
      reinterpret_cast<CUcontext>(&contexts.at(static_cast<size_t>(stream_of(stream)->device())));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned) {
  if (current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  *event = reinterpret_cast<CUevent>(new std::shared_ptr<Event>(std::make_shared<Event>()));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventDestroy(CUevent event) {
  delete reinterpret_cast<std::shared_ptr<Event>*>(event);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  Task task{.kind = Task::Kind::kRecord, .event = event_of(event)};
  {
    const MutexLock lock(task.event->mutex);
    task.record = ++task.event->recorded;
  }
  return add(stream, std::move(task));
}
CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  Task task{.kind = Task::Kind::kWait, .event = event_of(event)};
  {
    const MutexLock lock(task.event->mutex);
    task.record = task.event->recorded;
  }
  return add(stream, std::move(task));
}
CUresult CUDAAPI cuEventQuery(CUevent event) {
  return event_of(event)->done() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult CUDAAPI cuEventSynchronize(CUevent event) {
  uint64_t record = 0;
  {
    const MutexLock lock(event_of(event)->mutex);
    record = event_of(event)->recorded;
  }
  event_of(event)->wait(record);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  const auto when = [](CUevent event) {
    const MutexLock lock(event_of(event)->mutex);
    return event_of(event)->when;
  };
  if (!event_of(begin)->done() || !event_of(end)->done()) return CUDA_ERROR_NOT_READY;
  const std::chrono::duration<float, std::milli> between = when(end) - when(begin);
  *milliseconds = between.count();
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  stream_of(stream)->begin_capture();
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  *graph = reinterpret_cast<CUgraph>(stream_of(stream)->end_capture().release());
  return *graph == nullptr ? CUDA_ERROR_ILLEGAL_STATE : CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphInstantiate(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  *exec = reinterpret_cast<CUgraphExec>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  for (const Task& task : reinterpret_cast<Graph*>(exec)->tasks) {
    if (const CUresult added = add(stream, task); added != CUDA_SUCCESS) return added;
  }
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) {
  delete reinterpret_cast<Graph*>(graph);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec exec) {
  delete reinterpret_cast<Graph*>(exec);
  return CUDA_SUCCESS;
}

}  // extern "C"

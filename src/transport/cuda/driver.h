// The CUDA driver's API, found when the program runs: one build serves machines with and without
// GPUs.
#pragma once

#include <cuda.h>

#include <string>
#include <string_view>

#include "transfuse/result.h"

namespace transfuse::cuda {

// Every function of the driver that is called here or by tests. The header's macros give the
// versioned names.
#define TRANSFUSE_CUDA_FUNCTIONS(X) \
  X(cuInit)                         \
  X(cuDriverGetVersion)             \
  X(cuGetErrorName)                 \
  X(cuGetErrorString)               \
  X(cuDeviceGetCount)               \
  X(cuDeviceGet)                    \
  X(cuDeviceGetName)                \
  X(cuDeviceGetUuid)                \
  X(cuDeviceGetAttribute)           \
  X(cuDeviceGetP2PAttribute)        \
  X(cuDeviceCanAccessPeer)          \
  X(cuDevicePrimaryCtxRetain)       \
  X(cuDevicePrimaryCtxRelease)      \
  X(cuCtxPushCurrent)               \
  X(cuCtxPopCurrent)                \
  X(cuCtxEnablePeerAccess)          \
  X(cuModuleLoadData)               \
  X(cuModuleUnload)                 \
  X(cuModuleGetFunction)            \
  X(cuLaunchKernel)                 \
  X(cuMemAlloc)                     \
  X(cuMemAllocAsync)                \
  X(cuMemAllocManaged)              \
  X(cuMemFree)                      \
  X(cuMemHostAlloc)                 \
  X(cuMemFreeHost)                  \
  X(cuMemHostRegister)              \
  X(cuMemHostUnregister)            \
  X(cuMemHostGetDevicePointer)      \
  X(cuMemGetInfo)                   \
  X(cuMemcpyAsync)                  \
  X(cuMemcpy2DAsync)                \
  X(cuMemsetD8Async)                \
  X(cuPointerGetAttribute)          \
  X(cuPointerGetAttributes)         \
  X(cuMemGetAddressRange)           \
  X(cuIpcGetMemHandle)              \
  X(cuIpcOpenMemHandle)             \
  X(cuIpcCloseMemHandle)            \
  X(cuMemAddressReserve)            \
  X(cuMemAddressFree)               \
  X(cuMemCreate)                    \
  X(cuMemRelease)                   \
  X(cuMemMap)                       \
  X(cuMemUnmap)                     \
  X(cuMemSetAccess)                 \
  X(cuMemRetainAllocationHandle)    \
  X(cuMemExportToShareableHandle)   \
  X(cuMemImportFromShareableHandle) \
  X(cuStreamCreate)                 \
  X(cuStreamDestroy)                \
  X(cuStreamSynchronize)            \
  X(cuStreamIsCapturing)            \
  X(cuStreamWaitEvent)              \
  X(cuStreamGetCtx)                 \
  X(cuEventCreate)                  \
  X(cuEventDestroy)                 \
  X(cuEventRecord)                  \
  X(cuEventQuery)                   \
  X(cuEventSynchronize)             \
  X(cuEventElapsedTime)

// Immutable after load().
struct Driver {
#define TRANSFUSE_CUDA_MEMBER(name) decltype(&::name) name = nullptr;
  TRANSFUSE_CUDA_FUNCTIONS(TRANSFUSE_CUDA_MEMBER)  // NOLINT(readability-identifier-naming)
#undef TRANSFUSE_CUDA_MEMBER
  // Of drivers for CUDA 13 and later; null in older ones.
  decltype(&::cuMemcpyBatchAsync) batch_copy = nullptr;
  int version = 0;  // 13000 is CUDA 13.0

  // Once a process; kUnsupported where there is no driver or no device, with what is missing.
  static Result<const Driver*> load();

  // Success, or the error with the call's name and the driver's words for it. A lost context is
  // kUnavailable and says that the process must be started again; memory that ran out is
  // kResourceExhausted.
  Result<void> check(CUresult result, std::string_view call) const;
};

// driver.check() of a call of the driver: TRANSFUSE_CUDA(driver, cuMemFree, pointer).
#define TRANSFUSE_CUDA(driver, name, ...) (driver).check((driver).name(__VA_ARGS__), #name)

}  // namespace transfuse::cuda

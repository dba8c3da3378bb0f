// dlopen of libcuda, once.
#include "transport/cuda/driver.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <string>
#include <string_view>
#include <utility>

#include "transfuse/result.h"

namespace transfuse::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

#define TRANSFUSE_CUDA_TEXT_OF(name) #name
#define TRANSFUSE_CUDA_TEXT(name) TRANSFUSE_CUDA_TEXT_OF(name)

Result<Driver> open_driver() {
  // Never closed: the driver's threads and exit handlers stay.
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("no NVIDIA driver: {} (in a container, it must be started with the "
                             "host's driver mounted)",
                             dlerror())};
  }
  Driver driver;
#define TRANSFUSE_CUDA_FIND(name)                                                        \
  if (!find(library, TRANSFUSE_CUDA_TEXT(name), driver.name)) {                          \
    return Error{ErrorCode::kUnsupported,                                                \
                 fmt::format("the NVIDIA driver has no {}: expected one for CUDA 12 or " \
                             "later",                                                    \
                             TRANSFUSE_CUDA_TEXT(name))};                                \
  }
  TRANSFUSE_CUDA_FUNCTIONS(TRANSFUSE_CUDA_FIND)
#undef TRANSFUSE_CUDA_FIND
  (void)find(library, TRANSFUSE_CUDA_TEXT(cuMemcpyBatchAsync), driver.batch_copy);
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuInit, 0));
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDriverGetVersion, &driver.version));
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuDeviceGetCount, &count));
  if (count == 0) {
    return Error{ErrorCode::kUnsupported,
                 "the NVIDIA driver sees no device (CUDA_VISIBLE_DEVICES may hide them)"};
  }
  return driver;
}

}  // namespace

Result<const Driver*> Driver::load() {
  static const Result<Driver> driver = open_driver();
  if (!driver) return driver.error();
  return &*driver;
}

Result<void> Driver::check(CUresult result, std::string_view call) const {
  if (result == CUDA_SUCCESS) return {};
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(result, &name) != CUDA_SUCCESS) name = "an unknown error";
  if (cuGetErrorString(result, &text) != CUDA_SUCCESS) text = "no description";
  std::string message = fmt::format("{}: {} ({}): {}", call, name, static_cast<int>(result), text);
  switch (result) {
    case CUDA_ERROR_OUT_OF_MEMORY:
      return Error{ErrorCode::kResourceExhausted, std::move(message)};
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_NVLINK_UNCORRECTABLE:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
      return Error{ErrorCode::kUnavailable,
                   message + "; the CUDA context of this process is lost: restart the process"};
    case CUDA_ERROR_NOT_PERMITTED:
    case CUDA_ERROR_SYSTEM_NOT_READY:
      return Error{ErrorCode::kPermissionDenied, std::move(message)};
    case CUDA_ERROR_NOT_SUPPORTED:
    case CUDA_ERROR_NO_DEVICE:
    case CUDA_ERROR_PEER_ACCESS_UNSUPPORTED:
      return Error{ErrorCode::kUnsupported, std::move(message)};
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE:
      return Error{ErrorCode::kInvalidArgument, std::move(message)};
    default:
      return Error{ErrorCode::kUnavailable, std::move(message)};
  }
}

}  // namespace transfuse::cuda

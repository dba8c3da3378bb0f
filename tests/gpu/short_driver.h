// A driver that runs out of memory at the call that a test says, and that knows what it gave and
// what came back.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "transport/cuda/driver.h"

namespace transfuse {

// The functions have no place for an object: one at a time.
class ShortDriver {
 public:
  // What calls make that others take back.
  enum Made : uint8_t {
    kMemory,
    kPinned,
    kRegistered,
    kStream,
    kEvent,
    kModule,
    kContext,
    kOpened,
    kReservation,
    kHandle,
    kMapping,
    kNothing  // may fail all the same
  };
  explicit ShortDriver(const cuda::Driver& real) : driver_(real) {
    state() = &state_;
    state_.real = &real;
    replace_all();
  }
  ~ShortDriver() { state() = nullptr; }
  ShortDriver(const ShortDriver&) = delete;
  ShortDriver& operator=(const ShortDriver&) = delete;

  const cuda::Driver& get() const { return driver_; }
  // The call number `call` from now on fails, counted from 0.
  void fail_at(int64_t call) {
    state_.failed = nullptr;
    state_.left = call;
  }
  // The call that failed since, or nullptr.
  const char* failed() const { return state_.failed; }
  std::array<int64_t, kNothing> alive() const {
    std::array<int64_t, kNothing> counts{};
    for (size_t i = 0; i < counts.size(); ++i) counts[i] = state_.alive[i];
    return counts;
  }

 private:
  static constexpr int64_t kNever = -1;
  struct State {
    const cuda::Driver* real = nullptr;
    std::atomic<int64_t> left{kNever};
    std::atomic<const char*> failed{nullptr};
    std::array<std::atomic<int64_t>, kNothing> alive{};
  };
  static State*& state() {
    static State* current = nullptr;
    return current;
  }
  static bool refuses(const char* name) {
    int64_t left = state()->left;
    while (left >= 0 && !state()->left.compare_exchange_weak(left, left - 1)) continue;
    if (left != 0) return false;
    state()->failed = name;
    return true;
  }

  struct Name {
    const char* text;
  };
  template <auto kMember, Made kMade, const Name* kName, class... Arguments>
  static CUresult make(Arguments... arguments) {
    if (refuses(kName->text)) return CUDA_ERROR_OUT_OF_MEMORY;
    const CUresult result = (state()->real->*kMember)(arguments...);
    if constexpr (kMade != kNothing) {
      if (result == CUDA_SUCCESS) ++state()->alive[kMade];
    }
    return result;
  }
  template <auto kMember, Made kMade, class... Arguments>
  static CUresult take_back(Arguments... arguments) {
    const CUresult result = (state()->real->*kMember)(arguments...);
    if (result == CUDA_SUCCESS) --state()->alive[kMade];
    return result;
  }
  template <auto kMember, Made kMade, const Name* kName, class... Arguments>
  void replace_making(CUresult (*cuda::Driver::*)(Arguments...)) {
    driver_.*kMember = make<kMember, kMade, kName, Arguments...>;
  }
  template <auto kMember, Made kMade, class... Arguments>
  void replace_taking(CUresult (*cuda::Driver::*)(Arguments...)) {
    driver_.*kMember = take_back<kMember, kMade, Arguments...>;
  }

#define TRANSFUSE_MAKES(function, made)                                            \
  {                                                                                \
    static constexpr Name name{#function};                                         \
    replace_making<&cuda::Driver::function, made, &name>(&cuda::Driver::function); \
  }
#define TRANSFUSE_TAKES(function, made) \
  replace_taking<&cuda::Driver::function, made>(&cuda::Driver::function)
  void replace_all() {
    TRANSFUSE_MAKES(cuMemAlloc, kMemory)
    TRANSFUSE_TAKES(cuMemFree, kMemory);
    TRANSFUSE_MAKES(cuMemHostAlloc, kPinned)
    TRANSFUSE_TAKES(cuMemFreeHost, kPinned);
    TRANSFUSE_MAKES(cuMemHostRegister, kRegistered)
    TRANSFUSE_TAKES(cuMemHostUnregister, kRegistered);
    TRANSFUSE_MAKES(cuStreamCreate, kStream)
    TRANSFUSE_TAKES(cuStreamDestroy, kStream);
    TRANSFUSE_MAKES(cuEventCreate, kEvent)
    TRANSFUSE_TAKES(cuEventDestroy, kEvent);
    TRANSFUSE_MAKES(cuModuleLoadData, kModule)
    TRANSFUSE_TAKES(cuModuleUnload, kModule);
    TRANSFUSE_MAKES(cuDevicePrimaryCtxRetain, kContext)
    TRANSFUSE_TAKES(cuDevicePrimaryCtxRelease, kContext);
    TRANSFUSE_MAKES(cuIpcOpenMemHandle, kOpened)
    TRANSFUSE_TAKES(cuIpcCloseMemHandle, kOpened);
    TRANSFUSE_MAKES(cuMemAddressReserve, kReservation)
    TRANSFUSE_TAKES(cuMemAddressFree, kReservation);
    TRANSFUSE_MAKES(cuMemImportFromShareableHandle, kHandle)
    TRANSFUSE_MAKES(cuMemRetainAllocationHandle, kHandle)
    TRANSFUSE_TAKES(cuMemRelease, kHandle);
    TRANSFUSE_MAKES(cuMemMap, kMapping)
    TRANSFUSE_TAKES(cuMemUnmap, kMapping);
    TRANSFUSE_MAKES(cuMemSetAccess, kNothing)
    TRANSFUSE_MAKES(cuMemExportToShareableHandle, kNothing)
    TRANSFUSE_MAKES(cuIpcGetMemHandle, kNothing)
    TRANSFUSE_MAKES(cuCtxEnablePeerAccess, kNothing)
    TRANSFUSE_MAKES(cuModuleGetFunction, kNothing)
    TRANSFUSE_MAKES(cuLaunchKernel, kNothing)
    TRANSFUSE_MAKES(cuMemcpyAsync, kNothing)
    TRANSFUSE_MAKES(cuMemcpy2DAsync, kNothing)
    TRANSFUSE_MAKES(cuMemsetD8Async, kNothing)
    if (driver_.batch_copy != nullptr) TRANSFUSE_MAKES(batch_copy, kNothing)
  }
#undef TRANSFUSE_MAKES
#undef TRANSFUSE_TAKES

  cuda::Driver driver_;
  State state_;
};

}  // namespace transfuse

// Executes copies with block scales on a GPU: one kernel launch for all of them.
#pragma once

#include <cstdint>

#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/scaled_table.h"

namespace transfuse::cuda {

// A table on its device. Used from one thread; outlived by the device.
class ScaledCopies {
 public:
  ScaledCopies() = default;  // of nothing
  // kResourceExhausted where the device has no room; nothing is left behind then. Returns when the
  // table is there.
  static Result<ScaledCopies> make(const Device& device, const ScaledTable& table);

  struct Launch {
    CUstream stream = nullptr;
    uint32_t blocks = 0;              // of threads, at most
    double ns_per_byte = 0;           // of the wider side; 0: no pace
    const uint64_t* bases = nullptr;  // device memory, per source
    uint64_t* sums = nullptr;         // device memory; what is summed is added
  };
  // Puts the kernel on the stream and returns; allocates nothing.
  Result<void> launch(const Launch& launch);
  uint32_t item_count() const { return item_count_; }
  uint64_t memory_bytes() const;  // on the device

 private:
  const Device* device_ = nullptr;
  uint32_t item_count_ = 0;
  Memory runs_;
  Memory items_;
  Memory progress_;
};

}  // namespace transfuse::cuda

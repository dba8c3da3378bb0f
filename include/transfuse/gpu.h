// Memory of GPUs. Only in builds with CUDA (TRANSFUSE_CUDA).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

struct Gpu {
  int ordinal = 0;  // in this process
  std::string name;
  std::string uuid;  // "GPU-...", the same in every process
};
// The GPUs that this process sees. kUnsupported: no driver, or none.
Result<std::vector<Gpu>> list_gpus();
// Memory of GPUs between processes of one host, and, through `host`, all that lies in memory of the
// host. Reads into memory of `device` (an ordinal of this process). kUnsupported where this host
// has no GPU. Takes `host` over.
Result<std::unique_ptr<Transport>> open_cuda_transport(std::unique_ptr<Transport> host, int device);

}  // namespace transfuse

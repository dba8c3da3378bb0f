// The transport over GPUs that are open already; open_cuda_transport() opens those of the process.
#pragma once

#include <memory>

#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/devices.h"

namespace transfuse::cuda {

// Reads into memory of device `ordinal`.
Result<std::unique_ptr<Transport>> open_transport(std::unique_ptr<Transport> host,
                                                  std::shared_ptr<Devices> devices, int ordinal);

}  // namespace transfuse::cuda

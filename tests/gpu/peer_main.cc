// A process that offers memory of a GPU and does what its parent says, a line at a time:
//   allocate BYTES SEED -> "ID BYTES", fill SEED -> "done", free -> "done", end of input: leaves.
// Arguments: runtime folder, device.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "gpu/pattern.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse {
namespace {

struct Offered {
  cuda::Memory memory;
  std::unique_ptr<LocalRegion> region;
};

Result<void> fill(const cuda::Device& device, const cuda::Memory& memory, uint64_t seed) {
  const std::vector<std::byte> bytes = pattern(memory.size_bytes(), seed);
  TRANSFUSE_ASSIGN_OR_RETURN(const cuda::Stream stream, cuda::Stream::create(device));
  const cuda::Current current = device.use();
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(device.driver(), cuMemcpyAsync, memory.address(),
                                           reinterpret_cast<CUdeviceptr>(bytes.data()),
                                           bytes.size(), stream.get()));
  return TRANSFUSE_CUDA(device.driver(), cuStreamSynchronize, stream.get());
}

Result<void> serve(const char* folder, int ordinal) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto host, open_shm_transport(folder));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport, open_cuda_transport(std::move(host), ordinal));
  TRANSFUSE_ASSIGN_OR_RETURN(const cuda::Driver* driver, cuda::Driver::load());
  TRANSFUSE_ASSIGN_OR_RETURN(const auto device, cuda::Device::open(*driver, ordinal));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string endpoint, transport->endpoint());
  std::cout << endpoint << std::endl;
  Offered offered;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    std::string command;
    uint64_t bytes = 0;
    uint64_t seed = 0;
    words >> command;
    if (command == "allocate") {
      words >> bytes >> seed;
      TRANSFUSE_ASSIGN_OR_RETURN(offered.memory,
                                 cuda::Memory::allocate(*device, cuda::MemoryKind::kDevice, bytes));
      TRANSFUSE_RETURN_IF_ERROR(fill(*device, offered.memory, seed));
      TRANSFUSE_ASSIGN_OR_RETURN(
          offered.region, transport->register_memory({offered.memory.as<std::byte>(), bytes}));
      const RegionDescriptor descriptor = offered.region->descriptor();
      std::cout << static_cast<uint64_t>(descriptor.id) << ' ' << descriptor.size_bytes
                << std::endl;
    } else if (command == "fill") {
      words >> seed;
      TRANSFUSE_RETURN_IF_ERROR(fill(*device, offered.memory, seed));
      std::cout << "done" << std::endl;
    } else if (command == "free") {
      offered.region.reset();
      offered.memory = cuda::Memory();
      std::cout << "done" << std::endl;
    }
  }
  offered.region.reset();
  return {};
}

}  // namespace
}  // namespace transfuse

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const auto served = transfuse::serve(arguments[1], std::atoi(arguments[2]));
  if (!served) std::cerr << served.error().to_string() << std::endl;
  return served ? 0 : 1;
}

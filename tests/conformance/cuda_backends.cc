// The transport of GPUs: memory of one, of two, and between a GPU and the host.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "conformance/backends.h"
#include "conformance/host_transports.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::conformance {
namespace {

// Peers are processes: no process opens its own memory by CUDA IPC.
const Backend kOneGpu = {"CudaOneGpu", "cuda:0", true};
const Backend kTwoGpus = {"CudaTwoGpus", "cuda:0", true, "cuda:1"};
const Backend kFromHost = {"CudaFromHost", "cuda:0", true, "shm"};
const Backend kIntoHost = {"CudaIntoHost", "cuda:0", true, "cuda:0", true};

int ordinal_of(const std::string& backend) { return std::stoi(backend.substr(5)); }

const cuda::Device& device_of(int ordinal) {
  static std::map<int, std::unique_ptr<cuda::Device>> open;
  auto& device = open[ordinal];
  if (device == nullptr) {
    device = cuda::Device::open(*cuda::Driver::load().value(), ordinal).value();
  }
  return *device;
}

class DeviceMemory final : public TestMemory {
 public:
  DeviceMemory(const cuda::Device& device, uint64_t size_bytes)
      : memory_(cuda::Memory::allocate(device, cuda::MemoryKind::kDevice, size_bytes).value()) {
    TRANSFUSE_CHECK(memory_.clear());
    bytes_ = {memory_.as<std::byte>(), size_bytes};
  }

 private:
  cuda::Memory memory_;
};

}  // namespace

Result<std::unique_ptr<Transport>> open_backend(const BackendOptions& options) {
  if (!on_device(options.backend)) return open_host_backend(options);
  BackendOptions below = options;
  below.backend = "shm";
  TRANSFUSE_ASSIGN_OR_RETURN(auto host, open_host_backend(below));
  return open_cuda_transport(std::move(host), ordinal_of(options.backend));
}

std::vector<Backend> all_backends() { return {kOneGpu, kTwoGpus, kFromHost, kIntoHost}; }
std::vector<Backend> backends_of_peers_that_die() { return {kOneGpu, kTwoGpus}; }
std::vector<Backend> backends_without_allocations() { return {kOneGpu, kTwoGpus}; }

std::string missing_for(const Backend& backend) {
  const auto gpus = list_gpus();
  if (!gpus) return gpus.error().message;
  const size_t needed = backend.of_peers() == "cuda:1" ? 2 : 1;
  if (gpus->size() >= needed) return {};
  return fmt::format("{} GPUs are needed, this process sees {}", needed, gpus->size());
}

std::unique_ptr<TestMemory> allocate_memory(const std::string& backend, uint64_t size_bytes) {
  if (!on_device(backend)) return std::make_unique<HostMemory>(size_bytes);
  return std::make_unique<DeviceMemory>(device_of(ordinal_of(backend)), size_bytes);
}

// Addresses say where they are.
void move_bytes(std::byte* to, const std::byte* from, uint64_t size_bytes) {
  if (size_bytes == 0) return;
  const cuda::Device& device = device_of(0);
  const cuda::Stream stream = cuda::Stream::create(device).value();
  const cuda::Current current = device.use();
  TRANSFUSE_CHECK(TRANSFUSE_CUDA(device.driver(), cuMemcpyAsync, reinterpret_cast<CUdeviceptr>(to),
                                 reinterpret_cast<CUdeviceptr>(from), size_bytes, stream.get()));
  TRANSFUSE_CHECK(TRANSFUSE_CUDA(device.driver(), cuStreamSynchronize, stream.get()));
}

}  // namespace transfuse::conformance

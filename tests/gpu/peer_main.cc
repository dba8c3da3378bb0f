// A process that offers memory of a GPU and does what its parent says, a line at a time; it answers
// each with a line, "error ..." if it could not:
//   allocate BYTES SEED             memory of cudaMalloc -> "ID BYTES"
//   map COUNT RANGE_BYTES SEED      as many physical allocations in one span -> "ID BYTES"
//   remap SEED                      others at the same address; nobody is told -> "done"
//   move SEED                       the span goes, another one at another address -> "ID BYTES"
//   unmap, refresh, free, fill SEED -> "done"
//   end of input: leaves.
// Arguments: runtime folder, device.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "gpu/mapped_memory.h"
#include "gpu/pattern.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse {
namespace {

// Used from one thread.
class Offering {
 public:
  Offering(Transport& transport, const cuda::Device& device)
      : transport_(transport), device_(device) {}

  Result<std::string> obey(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "allocate") {
      uint64_t bytes = 0;
      words >> bytes >> seed_;
      TRANSFUSE_ASSIGN_OR_RETURN(memory_,
                                 cuda::Memory::allocate(device_, cuda::MemoryKind::kDevice, bytes));
      return offer(memory_.address(), bytes);
    }
    if (command == "map") {
      words >> shape_.count >> shape_.range_bytes >> seed_;
      return map();
    }
    if (command == "move") {
      words >> seed_;
      // The new one first: so it lies elsewhere.
      auto before = std::move(mapped_);
      auto moved = map();
      return moved;
    }
    if (command == "remap") {
      words >> seed_;
      mapped_->unmap();
      TRANSFUSE_RETURN_IF_ERROR(mapped_->map());
      TRANSFUSE_RETURN_IF_ERROR(fill());
    } else if (command == "unmap") {
      mapped_->unmap();
    } else if (command == "refresh") {
      TRANSFUSE_RETURN_IF_ERROR(region_->refresh());
    } else if (command == "fill") {
      words >> seed_;
      TRANSFUSE_RETURN_IF_ERROR(fill());
    } else if (command == "free") {
      region_.reset();
      memory_ = cuda::Memory();
      mapped_.reset();
    }
    return std::string("done");
  }

 private:
  Result<std::string> map() {
    TRANSFUSE_ASSIGN_OR_RETURN(mapped_, MappedMemory::create(device_, shape_));
    // As a tensor lies in its segment: neither at its begin nor to its end.
    constexpr uint64_t kBefore = 1 << 12;
    constexpr uint64_t kAfter = 1 << 13;
    return offer(mapped_->address() + kBefore, mapped_->size_bytes() - kBefore - kAfter);
  }
  Result<std::string> offer(CUdeviceptr address, uint64_t size_bytes) {
    address_ = address;
    size_bytes_ = size_bytes;
    TRANSFUSE_RETURN_IF_ERROR(fill());
    TRANSFUSE_ASSIGN_OR_RETURN(
        region_,
        transport_.register_memory({reinterpret_cast<std::byte*>(address), size_bytes}));  // NOLINT
    const RegionDescriptor descriptor = region_->descriptor();
    return fmt::format("{} {}", static_cast<uint64_t>(descriptor.id), descriptor.size_bytes);
  }
  Result<void> fill() {
    const std::vector<std::byte> bytes = pattern(size_bytes_, seed_);
    TRANSFUSE_ASSIGN_OR_RETURN(const cuda::Stream stream, cuda::Stream::create(device_));
    const cuda::Current current = device_.use();
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(device_.driver(), cuMemcpyAsync, address_,
                                             reinterpret_cast<CUdeviceptr>(bytes.data()),
                                             bytes.size(), stream.get()));
    return TRANSFUSE_CUDA(device_.driver(), cuStreamSynchronize, stream.get());
  }

  Transport& transport_;
  const cuda::Device& device_;
  MappedMemory::Shape shape_;
  cuda::Memory memory_;
  std::unique_ptr<MappedMemory> mapped_;
  CUdeviceptr address_ = 0;
  uint64_t size_bytes_ = 0;
  uint64_t seed_ = 0;
  std::unique_ptr<LocalRegion> region_;
};

Result<void> serve(const char* folder, int ordinal) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto host, open_shm_transport(folder));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport, open_cuda_transport(std::move(host), ordinal));
  TRANSFUSE_ASSIGN_OR_RETURN(const cuda::Driver* driver, cuda::Driver::load());
  TRANSFUSE_ASSIGN_OR_RETURN(const auto device, cuda::Device::open(*driver, ordinal));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string endpoint, transport->endpoint());
  std::cout << endpoint << std::endl;
  Offering offering(*transport, *device);
  std::string line;
  while (std::getline(std::cin, line)) {
    const auto answer = offering.obey(line);
    std::cout << (answer ? *answer : "error " + answer.error().to_string()) << std::endl;
  }
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

// Every transport of memory of the host.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "conformance/backends.h"
#include "conformance/host_transports.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {
namespace {

const Backend kLocal = {"Local", "local"};
const Backend kFaulty = {"FaultyWithoutFaults", "faulty"};
const Backend kShmInside = {"ShmInOneProcess", "shm"};
const Backend kShm = {"Shm", "shm", true};
const Backend kFileInside = {"FileInOneProcess", "file"};
const Backend kFile = {"File", "file", true};

}  // namespace

Result<std::unique_ptr<Transport>> open_backend(const BackendOptions& options) {
  return open_host_backend(options);
}

std::vector<Backend> all_backends() {
  return {kLocal, kFaulty, kShmInside, kShm, kFileInside, kFile};
}
// Files are read as well when the process that wrote them is gone.
std::vector<Backend> backends_of_peers_that_die() { return {kShm}; }
std::vector<Backend> backends_without_allocations() {
  return {kLocal, kShmInside, kShm, kFileInside, kFile};
}
std::string missing_for(const Backend& /*backend*/) { return {}; }

std::unique_ptr<TestMemory> allocate_memory(const std::string& /*backend*/, uint64_t size_bytes) {
  return std::make_unique<HostMemory>(size_bytes);
}
void move_bytes(std::byte* to, const std::byte* from, uint64_t size_bytes) {
  if (size_bytes > 0) std::memmove(to, from, size_bytes);
}

}  // namespace transfuse::conformance

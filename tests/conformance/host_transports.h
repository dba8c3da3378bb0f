// Transports of memory of the host, as tests open them.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "conformance/backends.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/local/faulty.h"

namespace transfuse::conformance {

// Memory of the caller is read by process_vm_readv; the tests' processes let each other do so.
inline Result<std::unique_ptr<Transport>> open_host_backend(const BackendOptions& options) {
  const TransportOptions transport = {
      .threads = options.threads, .allow_any_tracer = true, .token = options.token};
  if (options.backend == "file") return open_file_transport(options.folder, transport);
  if (options.backend == "shm") return open_shm_transport(options.folder, transport);
  if (options.backend == "faulty") {
    TRANSFUSE_ASSIGN_OR_RETURN(auto faulty, open_faulty_local_transport({}, transport));
    return std::unique_ptr<Transport>(std::move(faulty));
  }
  return open_local_transport(transport);
}

class HostMemory final : public TestMemory {
 public:
  explicit HostMemory(uint64_t size_bytes) : memory_(size_bytes) { bytes_ = memory_; }

 private:
  std::vector<std::byte> memory_;
};

}  // namespace transfuse::conformance

// The transports that a conformance program is about, and memory for what they read and write. One
// of host_backends.cc and cuda_backends.cc is linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::conformance {

// backend: "local", "faulty" (around local, without a fault), "shm" or "file", and with GPUs
// "cuda:N": on device N.
struct BackendOptions {
  std::string backend;
  std::string folder;
  std::string token{};
  uint32_t threads = 2;
};
Result<std::unique_ptr<Transport>> open_backend(const BackendOptions& options);
inline bool on_device(const std::string& backend) { return backend.starts_with("cuda:"); }

struct Backend {
  std::string name;
  std::string backend;         // of the reader
  bool process = false;        // peers are processes of their own
  std::string peer_backend{};  // where it is another one
  bool targets_in_host = false;

  const std::string& of_peers() const { return peer_backend.empty() ? backend : peer_backend; }
  std::string of_targets() const { return targets_in_host ? "shm" : backend; }
  bool uses_device() const { return on_device(backend); }
};
inline std::ostream& operator<<(std::ostream& out, const Backend& backend) {
  return out << backend.name;
}
std::vector<Backend> all_backends();
std::vector<Backend> backends_of_peers_that_die();  // and of which something can be said then
std::vector<Backend> backends_without_allocations();
// What this machine lacks for it; empty: nothing.
std::string missing_for(const Backend& backend);

// Memory that is the test's own.
class TestMemory {
 public:
  virtual ~TestMemory() = default;
  TestMemory(const TestMemory&) = delete;
  TestMemory& operator=(const TestMemory&) = delete;
  std::span<std::byte> bytes() const { return bytes_; }

 protected:
  TestMemory() = default;
  std::span<std::byte> bytes_{};
};
// Where transports of `backend` have theirs. Zeroed.
std::unique_ptr<TestMemory> allocate_memory(const std::string& backend, uint64_t size_bytes);
// Between any two places of this process.
void move_bytes(std::byte* to, const std::byte* from, uint64_t size_bytes);

}  // namespace transfuse::conformance

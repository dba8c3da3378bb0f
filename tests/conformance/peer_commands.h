// What a peer can be told, by function call or over a pipe: the same code behind both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/local/faulty.h"

namespace transfuse::conformance {

inline void fill_pattern(std::span<std::byte> bytes, uint64_t seed) {
  Random random(seed);
  size_t at = 0;
  for (; at + 8 <= bytes.size(); at += 8) {
    const uint64_t word = random.next();
    std::memcpy(bytes.data() + at, &word, 8);
  }
  for (; at < bytes.size(); ++at) bytes[at] = static_cast<std::byte>(random.next());
}
inline std::vector<std::byte> pattern(uint64_t size_bytes, uint64_t seed) {
  std::vector<std::byte> bytes(size_bytes);
  fill_pattern(bytes, seed);
  return bytes;
}

struct BackendOptions {
  std::string backend;  // "local", "faulty" (around local, without a fault), "shm" or "file"
  std::string folder;
  std::string token{};
  uint32_t threads = 2;
};
// Memory of the caller is read by process_vm_readv; the tests' processes let each other do so.
inline Result<std::unique_ptr<Transport>> open_backend(const BackendOptions& options) {
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

// Answers one line with one line: "ok ..." or "error CODE message". Used from one thread.
class PeerCommands {
 public:
  explicit PeerCommands(std::unique_ptr<Transport> transport) : transport_(std::move(transport)) {}

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    uint64_t a = 0;
    uint64_t b = 0;
    words >> command >> a >> b;
    if (command == "endpoint") return text(transport_->endpoint());
    if (command == "allocate") return hold(transport_->allocate(a), b);
    // Memory of the caller is no file: there the two are one.
    if (command == "register" && transport_->kind() == "file") {
      return hold(transport_->allocate(a), b);
    }
    if (command == "register") {
      auto memory = std::make_unique<std::vector<std::byte>>(a);
      std::vector<std::byte>& bytes = *memory;
      owned_.push_back(std::move(memory));
      return hold(transport_->register_memory(bytes), b);
    }
    if (command == "fill") {
      fill_pattern(regions_.at(a)->bytes(), b);
      return "ok";
    }
    if (command == "drop") return regions_.erase(a) == 1 ? "ok" : "error NOT_FOUND no such region";
    if (command == "stats") {
      const TransportStats stats = transport_->stats();
      return "ok " + std::to_string(stats.regions) + " " + std::to_string(stats.region_bytes);
    }
    return "error INVALID_ARGUMENT unknown command " + command;
  }

 private:
  static std::string text(const Result<std::string>& result) {
    return result ? "ok " + *result : "error " + result.error().to_string();
  }
  std::string hold(Result<std::unique_ptr<LocalRegion>> region, uint64_t seed) {
    if (!region) return "error " + region.error().to_string();
    const RegionDescriptor descriptor = (*region)->descriptor();
    fill_pattern((*region)->bytes(), seed);
    const auto id = static_cast<uint64_t>(descriptor.id);
    regions_[id] = std::move(*region);
    return "ok " + std::to_string(id) + " " + std::to_string(descriptor.size_bytes);
  }

  std::unique_ptr<Transport> transport_;
  std::vector<std::unique_ptr<std::vector<std::byte>>> owned_;
  std::map<uint64_t, std::unique_ptr<LocalRegion>> regions_;
};

}  // namespace transfuse::conformance

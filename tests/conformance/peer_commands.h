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
#include "conformance/backends.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

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

// Answers one line with one line: "ok ..." or "error CODE message". Used from one thread.
class PeerCommands {
 public:
  PeerCommands(std::unique_ptr<Transport> transport, std::string backend)
      : transport_(std::move(transport)), backend_(std::move(backend)) {}

  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    uint64_t a = 0;
    uint64_t b = 0;
    words >> command >> a >> b;
    if (command == "endpoint") return text(transport_->endpoint());
    if (command == "allocate") {
      return hold(on_device(backend_) ? transport_->allocate_on_device(a) : transport_->allocate(a),
                  b);
    }
    // Memory of the caller is no file: there the two are one.
    if (command == "register" && transport_->kind() == "file") {
      return hold(transport_->allocate(a), b);
    }
    if (command == "register") {
      owned_.push_back(allocate_memory(backend_, a));
      return hold(transport_->register_memory(owned_.back()->bytes()), b);
    }
    if (command == "fill") {
      fill(*regions_.at(a), b);
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
  static void fill(const LocalRegion& region, uint64_t seed) {
    const auto bytes = pattern(region.bytes().size(), seed);
    move_bytes(region.bytes().data(), bytes.data(), bytes.size());
  }
  static std::string text(const Result<std::string>& result) {
    return result ? "ok " + *result : "error " + result.error().to_string();
  }
  std::string hold(Result<std::unique_ptr<LocalRegion>> region, uint64_t seed) {
    if (!region) return "error " + region.error().to_string();
    const RegionDescriptor descriptor = (*region)->descriptor();
    fill(**region, seed);
    const auto id = static_cast<uint64_t>(descriptor.id);
    regions_[id] = std::move(*region);
    return "ok " + std::to_string(id) + " " + std::to_string(descriptor.size_bytes);
  }

  std::unique_ptr<Transport> transport_;
  const std::string backend_;
  std::vector<std::unique_ptr<TestMemory>> owned_;
  std::map<uint64_t, std::unique_ptr<LocalRegion>> regions_;
};

}  // namespace transfuse::conformance

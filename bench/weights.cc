// Parameters one after the other, each on a cache line.
#include "weights.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::bench {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kPageBytes = 4096;

}  // namespace

void Weights::Unmap::operator()(std::byte* p) const { munmap(p, size_bytes); }

Result<Weights> Weights::allocate(const Layout& layout, Transport* transport) {
  Weights weights;
  weights.layout_ = layout;
  uint64_t size = 0;
  for (const ParameterSpec& parameter : layout.parameters()) {
    weights.offsets_.push_back(size);
    const uint64_t bytes =
        static_cast<uint64_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype);
    size += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  size = std::max(size, kPageBytes);
  if (transport != nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(weights.arena_, transport->allocate(size));
    weights.bytes_ = weights.arena_->bytes();
  } else {
    void* p = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
      return Error{ErrorCode::kResourceExhausted,
                   fmt::format("mmap of {} bytes: {}", size, std::strerror(errno))};
    weights.private_ = {static_cast<std::byte*>(p), Unmap{size}};
    weights.bytes_ = {weights.private_.get(), size};
  }
  std::memset(weights.bytes_.data(), 0x55, weights.bytes_.size());
  return weights;
}

std::vector<ParameterMemory> Weights::memory() const {
  std::vector<ParameterMemory> memory;
  for (size_t i = 0; i < offsets_.size(); ++i) {
    const ParameterSpec& parameter = layout_.parameters()[i];
    memory.push_back(
        {parameter.name, bytes_.data() + offsets_[i],
         static_cast<uint64_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype)});
  }
  return memory;
}

void Weights::fill(uint64_t seed) {
  Random random(seed);
  for (size_t at = 0; at + sizeof(uint64_t) <= bytes_.size(); at += sizeof(uint64_t)) {
    const uint64_t word = random.next();
    std::memcpy(bytes_.data() + at, &word, sizeof word);
  }
}

void Weights::touch(uint64_t version) {
  for (size_t at = 0; at + sizeof version <= bytes_.size(); at += kPageBytes)
    std::memcpy(bytes_.data() + at, &version, sizeof version);
}

}  // namespace transfuse::bench

// The parameters of one process, in one span of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::bench {

// Owns the memory; every page of it is there. Moved, not copied. Used from one thread.
class Weights {
 public:
  // In memory of `transport` (which outlives it), or the process's own if that is null.
  static Result<Weights> allocate(const Layout& layout, Transport* transport);

  std::vector<ParameterMemory> memory() const;
  const LocalRegion* arena() const { return arena_.get(); }
  std::span<std::byte> bytes() const { return bytes_; }
  uint64_t size_bytes() const { return bytes_.size(); }

  void fill(uint64_t seed);      // pseudo-random bytes
  void touch(uint64_t version);  // changes one word of every page: a new version, cheaply

 private:
  struct Unmap {
    Unmap() : size_bytes(0) {}
    explicit Unmap(uint64_t size) : size_bytes(size) {}
    uint64_t size_bytes;
    void operator()(std::byte* p) const;
  };

  Layout layout_;
  std::vector<uint64_t> offsets_;  // per parameter
  std::unique_ptr<LocalRegion> arena_;
  std::unique_ptr<std::byte, Unmap> private_;
  std::span<std::byte> bytes_;
};

}  // namespace transfuse::bench

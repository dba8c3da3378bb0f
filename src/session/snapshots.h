// Copies of all parameters in memory of the transport, for readers of a version that the trainer
// has left behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "session/memory.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// A piece of one parameter, so small that threads share a copy evenly.
struct SnapshotChunk {
  uint32_t parameter = 0;
  uint64_t offset_bytes = 0;
  uint32_t size_bytes = 0;
};

// Immutable after open(), but for the bytes. copy() may be called for different chunks from several
// threads at once. Must not outlive its transport.
class Snapshots {
 public:
  Snapshots() = default;  // none
  // kResourceExhausted, with what is needed and what the choices are, before anything is allocated
  // (on a device: nothing is left allocated).
  static Result<Snapshots> open(Transport& transport, const Layout& layout, MemoryPlace place,
                                uint32_t count);

  MemoryPlace place() const { return place_; }

  uint32_t count() const { return static_cast<uint32_t>(regions_.size()); }
  std::span<const SnapshotChunk> chunks() const { return chunks_; }
  std::byte* data(uint32_t snapshot, uint32_t parameter) const {
    return regions_[snapshot]->bytes().data() + offsets_[parameter];
  }
  RegionDescriptor region(uint32_t snapshot) const { return regions_[snapshot]->descriptor(); }
  uint64_t offset_bytes(uint32_t parameter) const { return offsets_[parameter]; }

  // Call copy_fence() after the last chunk of a thread.
  void copy(const BoundMemory& from, uint32_t snapshot, const SnapshotChunk& chunk) const;

 private:
  std::vector<std::unique_ptr<LocalRegion>> regions_;
  std::vector<uint64_t> offsets_;  // per parameter, the same in each region
  std::vector<SnapshotChunk> chunks_;
  MemoryPlace place_ = MemoryPlace::kHost;
};

}  // namespace transfuse

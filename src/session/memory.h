// Joins a layout to the memory that the caller names: checks every parameter, registers every span.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/transport.h"

namespace transfuse {

// Where the parameters of a target lie, or what stands in for them.
struct TargetMemory {
  std::span<std::byte* const> data;  // per parameter
  MemoryPlace place = MemoryPlace::kHost;
};

// The parameters of one process in registered memory. Owns the registrations, not the memory.
// Immutable after open().
class BoundMemory {
 public:
  // What the memory is for.
  enum class Use : uint8_t { kSource, kTarget };
  // `memory` names every parameter of `layout` exactly once, each with at least its bytes (I2: by
  // name), all in the host or all on a device.
  static Result<BoundMemory> open(Transport& transport, const Layout& layout,
                                  std::span<const ParameterMemory> memory,
                                  std::span<const LocalRegion* const> arenas, Use use);

  std::byte* data(uint32_t parameter) const { return data_[parameter]; }
  TargetMemory target() const { return {.data = data_, .place = place_}; }
  const Binding& binding() const { return binding_; }  // Place::region indexes regions()
  std::span<const RegionDescriptor> regions() const { return regions_; }
  MemoryPlace place() const { return place_; }  // of all parameters
  // Before the bytes are published, or written: LocalRegion::refresh() of all registrations.
  Result<void> refresh() const;

 private:
  Binding binding_;
  std::vector<std::byte*> data_;  // per parameter, in the layout's canonical order
  std::vector<RegionDescriptor> regions_;
  MemoryPlace place_ = MemoryPlace::kHost;
  std::vector<std::unique_ptr<LocalRegion>> registrations_;  // of caller-owned spans
};

uint64_t parameter_size_bytes(const ParameterSpec& parameter);

}  // namespace transfuse

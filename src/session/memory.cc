// Matching by name, and one registration for parameters that share or touch pages.
#include "session/memory.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

#include <fmt/format.h>

namespace transfuse {
namespace {

// In the host, spans that begin on the page where the last one ended, or the next, become one
// registration: the bytes between them lie on pages that are registered anyway.
constexpr uint64_t kPageBytes = 4096;

struct Span {
  std::byte* begin;
  std::byte* end;
  uint32_t parameter;
};

const LocalRegion* arena_of(std::span<const LocalRegion* const> arenas, const std::byte* data,
                            uint64_t size_bytes) {
  for (const LocalRegion* arena : arenas) {
    const std::span<std::byte> bytes = arena->bytes();
    if (data >= bytes.data() && size_bytes <= bytes.size() &&
        static_cast<uint64_t>(data - bytes.data()) <= bytes.size() - size_bytes) {
      return arena;
    }
  }
  return nullptr;
}

// data[i] is the memory of parameter i, or an error that names the parameter.
Result<std::vector<std::byte*>> match_by_name(const Layout& layout,
                                              std::span<const ParameterMemory> memory) {
  std::vector<std::byte*> data(layout.parameters().size(), nullptr);
  std::vector<bool> seen(layout.parameters().size(), false);
  for (const ParameterMemory& given : memory) {
    const auto index = layout.find_parameter(given.name);
    if (!index) {
      return Error{
          ErrorCode::kInvalidArgument,
          fmt::format("memory given for '{}', which the layout does not have", given.name)};
    }
    if (seen[*index]) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("memory given twice for parameter '{}'", given.name)};
    }
    const uint64_t needed = parameter_size_bytes(layout.parameters()[*index]);
    if (given.size_bytes < needed || (given.data == nullptr && needed > 0)) {
      return Error{ErrorCode::kLayoutMismatch,
                   fmt::format("parameter '{}' needs {} bytes, its memory has {}", given.name,
                               needed, given.data == nullptr ? 0 : given.size_bytes)};
    }
    seen[*index] = true;
    data[*index] = given.data;
  }
  for (size_t i = 0; i < seen.size(); ++i) {
    if (!seen[i]) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("no memory given for parameter '{}'", layout.parameters()[i].name)};
    }
  }
  return data;
}

}  // namespace

uint64_t parameter_size_bytes(const ParameterSpec& parameter) {
  return static_cast<uint64_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype);
}

Result<BoundMemory> BoundMemory::open(Transport& transport, const Layout& layout,
                                      std::span<const ParameterMemory> memory,
                                      std::span<const LocalRegion* const> arenas, Use use) {
  BoundMemory bound;
  TRANSFUSE_ASSIGN_OR_RETURN(bound.data_, match_by_name(layout, memory));
  bound.binding_.layout = layout.digest();
  bound.binding_.places.resize(bound.data_.size());
  for (const LocalRegion* arena : arenas) bound.regions_.push_back(arena->descriptor());

  // The first parameter of each place.
  const ParameterSpec* in_host = nullptr;
  const ParameterSpec* on_device = nullptr;
  const auto see = [&](MemoryPlace place, uint32_t parameter) {
    const ParameterSpec*& first = place == MemoryPlace::kHost ? in_host : on_device;
    if (first == nullptr) first = &layout.parameters()[parameter];
  };
  std::vector<Span> own;
  for (uint32_t i = 0; i < bound.data_.size(); ++i) {
    const uint64_t size_bytes = parameter_size_bytes(layout.parameters()[i]);
    if (size_bytes == 0) continue;
    if (const LocalRegion* arena = arena_of(arenas, bound.data_[i], size_bytes)) {
      const auto index = static_cast<uint64_t>(std::ranges::find(arenas, arena) - arenas.begin());
      bound.binding_.places[i] = {
          .region = index,
          .offset_bytes = static_cast<uint64_t>(bound.data_[i] - arena->bytes().data())};
      see(arena->place(), i);
    } else {
      own.push_back({bound.data_[i], bound.data_[i] + size_bytes, i});
    }
  }
  std::ranges::sort(own, {}, &Span::begin);
  for (size_t first = 0; first < own.size();) {
    const std::span<std::byte> allocation = transport.allocation_of(own[first].begin);
    std::byte* end = own[first].end;
    size_t last = first + 1;
    const auto joins = [&](const Span& next) {
      if (!allocation.empty()) return next.end <= allocation.data() + allocation.size();
      const auto page = (reinterpret_cast<uintptr_t>(end) - 1) / kPageBytes;  // of the last byte
      return reinterpret_cast<uintptr_t>(next.begin) / kPageBytes <= page + 1;
    };
    while (last < own.size() && joins(own[last])) end = std::max(end, own[last++].end);
    std::byte* const begin = own[first].begin;
    const std::span<std::byte> span(begin, end);
    TRANSFUSE_ASSIGN_OR_RETURN(auto registration, use == Use::kTarget
                                                      ? transport.register_target(span)
                                                      : transport.register_memory(span));
    for (size_t i = first; i < last; ++i) {
      bound.binding_.places[own[i].parameter] = {
          .region = bound.regions_.size(),
          .offset_bytes = static_cast<uint64_t>(own[i].begin - begin)};
    }
    see(registration->place(), own[first].parameter);
    bound.regions_.push_back(registration->descriptor());
    bound.registrations_.push_back(std::move(registration));
    first = last;
  }
  if (in_host != nullptr && on_device != nullptr) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("parameter '{}' lies on a device, '{}' in the host: bring both to one "
                             "place",
                             on_device->name, in_host->name)};
  }
  if (on_device != nullptr) bound.place_ = MemoryPlace::kDevice;
  return bound;
}

Result<void> BoundMemory::refresh() const {
  for (const auto& registration : registrations_) {
    TRANSFUSE_RETURN_IF_ERROR(registration->refresh());
  }
  return {};
}

}  // namespace transfuse

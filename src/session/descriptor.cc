// The wire form of member and region descriptors.
#include "session/descriptor.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include "base/bytes.h"
#include "session/memory.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint32_t kMagic = 0x33444654;  // "TFD3"
constexpr uint64_t kMaxTextBytes = 4096;
constexpr uint64_t kMaxBindingBytes = uint64_t{16} << 20;
constexpr uint64_t kGenerationBytes = 2 * sizeof(uint64_t);

void write(ByteWriter& out, const RegionDescriptor& region) {
  out.varint(static_cast<uint64_t>(region.id));
  out.varint(region.size_bytes);
  out.varint(static_cast<uint64_t>(region.place));
}

// nullopt: no place that memory can have.
std::optional<RegionDescriptor> read_region(ByteReader& in) {
  RegionDescriptor region;
  region.id = RegionId{in.varint()};
  region.size_bytes = in.varint();
  const uint64_t place = in.varint();
  if (place > static_cast<uint64_t>(MemoryPlace::kDevice)) return std::nullopt;
  region.place = static_cast<MemoryPlace>(place);
  return region;
}

Error corrupt(std::string what) {
  return Error{ErrorCode::kCorrupt, "member descriptor: " + std::move(what)};
}

Result<void> check_binding(const Binding& binding, size_t slot,
                           const std::vector<RegionDescriptor>& regions, const Layout& layout) {
  if (binding.layout != layout.digest() || binding.places.size() != layout.parameters().size()) {
    return corrupt(fmt::format("binding {} of layout {} with {} parameters, expected {} with {}",
                               slot, binding.layout.to_string(), binding.places.size(),
                               layout.digest().to_string(), layout.parameters().size()));
  }
  for (size_t i = 0; i < binding.places.size(); ++i) {
    const ParameterSpec& parameter = layout.parameters()[i];
    const uint64_t needed = parameter_size_bytes(parameter);
    if (needed == 0) continue;
    const Place& place = binding.places[i];
    const uint64_t size = place.region < regions.size() ? regions[place.region].size_bytes : 0;
    if (place.offset_bytes > size || needed > size - place.offset_bytes) {
      return corrupt(
          fmt::format("parameter '{}' in slot {} needs bytes [{}, +{}) of region {}, "
                      "which has {}",
                      parameter.name, slot, place.offset_bytes, needed, place.region, size));
    }
  }
  return {};
}

}  // namespace

std::string encode(const MemberDescriptor& descriptor) {
  ByteWriter out;
  out.fixed(kMagic);
  out.text(descriptor.transport);
  out.text(descriptor.endpoint);
  out.text(descriptor.token);
  write(out, descriptor.control);
  out.varint(descriptor.regions.size());
  for (const RegionDescriptor& region : descriptor.regions) write(out, region);
  out.varint(descriptor.slots.size());
  for (const Binding& binding : descriptor.slots) out.text(encode(binding));
  return std::move(out).take();
}

Result<MemberDescriptor> decode_member_descriptor(std::string_view bytes, const Layout& layout) {
  ByteReader in(bytes);
  if (in.fixed<uint32_t>() != kMagic) return corrupt("not of version TFD3");
  MemberDescriptor descriptor;
  descriptor.transport = in.text(kMaxTextBytes);
  descriptor.endpoint = in.text(kMaxTextBytes);
  descriptor.token = in.text(kMaxTextBytes);
  const auto control = read_region(in);
  if (!control || control->place != MemoryPlace::kHost) {
    return corrupt("control words that are not in memory of the host");
  }
  descriptor.control = *control;
  const uint64_t region_count = in.count(3);
  descriptor.regions.reserve(region_count);
  for (uint64_t i = 0; i < region_count; ++i) {
    const auto region = read_region(in);
    if (!region) return corrupt(fmt::format("region {} lies nowhere", i));
    descriptor.regions.push_back(*region);
  }
  const uint64_t slot_count = in.count(1);
  if (!in.ok() || slot_count == 0 || slot_count > kMaxSlots) {
    return corrupt(fmt::format("expected 1 to {} slots, found {}", kMaxSlots, slot_count));
  }
  for (uint64_t slot = 0; slot < slot_count; ++slot) {
    const std::string_view binding = in.text(kMaxBindingBytes);
    if (!in.ok()) return corrupt("truncated");
    TRANSFUSE_ASSIGN_OR_RETURN(
        Binding decoded, decode_binding(std::as_bytes(std::span(binding.data(), binding.size()))));
    TRANSFUSE_RETURN_IF_ERROR(check_binding(decoded, slot, descriptor.regions, layout));
    descriptor.slots.push_back(std::move(decoded));
  }
  if (!in.ok() || in.remaining() != 0) return corrupt("truncated or too long");
  if (descriptor.control.size_bytes <
      (slot_count - 1) * kGenerationStrideBytes + kGenerationBytes) {
    return corrupt(fmt::format("no generation: {} slots, {} bytes of control words", slot_count,
                               descriptor.control.size_bytes));
  }
  return descriptor;
}

std::string encode(const RegionDescriptor& descriptor) {
  ByteWriter out;
  write(out, descriptor);
  return std::move(out).take();
}

Result<RegionDescriptor> decode_region_descriptor(std::string_view bytes) {
  ByteReader in(bytes);
  const auto region = read_region(in);
  if (!region || !in.ok() || in.remaining() != 0) return corrupt("malformed region");
  return *region;
}

}  // namespace transfuse

// What a member tells its readers, once per incarnation: how to reach it, its regions, and where
// each parameter lies in each of its slots.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// Slot 0 is the weights themselves; others are snapshots.
inline constexpr uint32_t kMaxSlots = 64;
// A cache line for the GenerationWords of each slot: a write of one disturbs no reader of another.
inline constexpr uint64_t kGenerationStrideBytes = 64;

struct MemberDescriptor {
  std::string transport;  // Transport::endpoint_kind()
  std::string endpoint;
  std::string token;         // what the endpoint asks for; the coordinator shows it to members only
  RegionDescriptor control;  // the Generation of slot i lies at i * kGenerationStrideBytes
  std::vector<RegionDescriptor> regions;
  std::vector<Binding> slots;  // one to kMaxSlots; Place::region indexes `regions`
};

std::string encode(const MemberDescriptor& descriptor);
// Checks every binding against `layout` and the regions: every parameter inside its region (I13).
// kCorrupt names the parameter.
Result<MemberDescriptor> decode_member_descriptor(std::string_view bytes, const Layout& layout);

std::string encode(const RegionDescriptor& descriptor);
Result<RegionDescriptor> decode_region_descriptor(std::string_view bytes);

}  // namespace transfuse

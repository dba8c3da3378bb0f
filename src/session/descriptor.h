// What a member tells its readers, once per incarnation: how to reach it, its regions, and where
// each parameter lies.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

struct MemberDescriptor {
  std::string transport;  // kind
  std::string endpoint;
  std::string token;         // what the endpoint asks for; the coordinator shows it to members only
  RegionDescriptor control;  // holds the Generation at offset 0
  std::vector<RegionDescriptor> regions;
  Binding binding;  // Place::region indexes `regions`
};

std::string encode(const MemberDescriptor& descriptor);
// Checks the binding against `layout` and the regions: every parameter inside its region (I13).
// kCorrupt names the parameter.
Result<MemberDescriptor> decode_member_descriptor(std::string_view bytes, const Layout& layout);

std::string encode(const RegionDescriptor& descriptor);
Result<RegionDescriptor> decode_region_descriptor(std::string_view bytes);

}  // namespace transfuse

// What travels with a lease is little; the rest is in the roster.
#include "rpc/lease_reply.h"

#include <fmt/format.h>

#include <cstdint>
#include <map>
#include <string_view>
#include <utility>

#include "rpc/convert.h"
#include "transfuse.pb.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

Result<Lease> lease_from_wire(const wire::AcquireReply& reply,
                              const std::map<uint64_t, MemberInfo>& sources,
                              std::string_view model) {
  const auto unknown = [&](std::string_view what, uint64_t member) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("a lease on version {} of model {} {} source {:x}, which the "
                             "coordinator has not described",
                             reply.version(), model, what, member)};
  };
  Lease lease{.id = LeaseId{reply.lease()},
              .version = reply.version(),
              .round = reply.round(),
              .ttl_ms = reply.ttl_ms(),
              .sources = {}};
  for (const wire::LeaseSource& each : reply.sources()) {
    const auto found = sources.find(each.member());
    if (found == sources.end()) return unknown("names", each.member());
    MemberInfo source = found->second;
    source.version = reply.version();
    source.generation = from_wire(each.generation());
    source.slot = each.slot();
    source.version_metadata = from_wire(each.metadata());
    source.revision = from_wire(each.revision());
    lease.sources.push_back(std::move(source));
  }
  for (const wire::Refusal& each : reply.refused()) {
    const auto found = sources.find(each.member());
    if (found == sources.end()) return unknown("refuses", each.member());
    lease.refused.push_back({.member = each.member(),
                             .source = found->second.name,
                             .layout = found->second.layout,
                             .reason = each.reason()});
  }
  return lease;
}

}  // namespace transfuse

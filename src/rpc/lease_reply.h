// A lease from what the coordinator answered and what the client knows of the sources.
#pragma once

#include <cstdint>
#include <map>
#include <string_view>

#include "transfuse.pb.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

// `sources`: of the roster that the reply refers to, by id. kCorrupt: it names one that is not
// there.
Result<Lease> lease_from_wire(const wire::AcquireReply& reply,
                              const std::map<uint64_t, MemberInfo>& sources,
                              std::string_view model);

}  // namespace transfuse

// How explanations spell numbers, and the sums that more than one of their forms needs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/plan.h"

namespace transfuse {

std::string spell_bytes(uint64_t bytes);   // decimal, three digits: "1.24 GB"
std::string spell_length(uint64_t bytes);  // a power of two: "64 KiB"
std::string spell_count(uint64_t count);   // "12,345"
std::string escape_xml(std::string_view text);

std::vector<uint64_t> sent_bytes(const Explanation& explanation);      // per source
std::vector<uint64_t> received_bytes(const Explanation& explanation);  // per target
// The bytes that cross the busiest link.
uint64_t bound_bytes(const Explanation& explanation);
// "one refit cannot be faster than 4.02 GB through the link of target vllm.0"
std::string spell_bound(const Explanation& explanation);

}  // namespace transfuse

// How explanations spell numbers, and the sums that more than one of their forms needs.
#include "plan/explain_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/plan.h"

namespace transfuse {

std::string spell_bytes(uint64_t bytes) {
  constexpr std::string_view kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  if (bytes < 1000) return fmt::format("{} B", bytes);
  auto value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 999.5 && unit + 1 < std::size(kUnits)) {
    value /= 1000;
    ++unit;
  }
  const int decimals = value < 9.995 ? 2 : (value < 99.95 ? 1 : 0);
  return fmt::format("{:.{}f} {}", value, decimals, kUnits[unit]);
}

std::string spell_length(uint64_t bytes) {
  constexpr std::string_view kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  size_t unit = 0;
  while (bytes >= 1024 && bytes % 1024 == 0) {
    bytes /= 1024;
    ++unit;
  }
  return fmt::format("{} {}", bytes, kUnits[unit]);
}

std::string spell_count(uint64_t count) {
  std::string digits = std::to_string(count);
  for (size_t at = digits.size(); at > 3;) {
    at -= 3;
    digits.insert(at, 1, ',');
  }
  return digits;
}

std::string escape_xml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::vector<uint64_t> sent_bytes(const Explanation& explanation) {
  std::vector<uint64_t> sums(explanation.sources.size());
  for (const PairTraffic& pair : explanation.pairs) sums[pair.source] += pair.size_bytes;
  return sums;
}

std::vector<uint64_t> received_bytes(const Explanation& explanation) {
  std::vector<uint64_t> sums(explanation.targets.size());
  for (const PairTraffic& pair : explanation.pairs) sums[pair.target] += pair.size_bytes;
  return sums;
}

uint64_t bound_bytes(const Explanation& explanation) {
  return std::max(explanation.busiest_source_bytes, explanation.busiest_target_bytes);
}

std::string spell_bound(const Explanation& explanation) {
  if (explanation.total_bytes == 0) return "nothing moves";
  return fmt::format("one refit cannot be faster than {} through the link of {}",
                     spell_bytes(bound_bytes(explanation)), explanation.busiest_link);
}

}  // namespace transfuse

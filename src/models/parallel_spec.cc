// "fsdp:dp=4,tp=2" and its like.
#include <fmt/format.h>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <system_error>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr int64_t kMaxRanks = int64_t{1} << 16;

Unexpected invalid(std::string_view message) {
  return {Error{ErrorCode::kInvalidArgument, fmt::format("parallel spec: {}", message)}};
}

Result<void> set_size(std::string_view key, std::string_view value, int64_t& size) {
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, size);
  if (error != std::errc() || stop != end || size < 1 || size > kMaxRanks) {
    return invalid(
        fmt::format("{}={}: expected a whole number from 1 to {}", key, value, kMaxRanks));
  }
  return {};
}

Result<void> set_option(std::string_view key, std::string_view value, ParallelSpec& spec) {
  if (key == "tp") return set_size(key, value, spec.tp);
  if (key == "dp") return set_size(key, value, spec.dp);
  if (key == "replicas") return set_size(key, value, spec.replicas);
  if (key == "dtype") {
    TRANSFUSE_ASSIGN_OR_RETURN(spec.dtype, parse_dtype(value));
    return {};
  }
  return invalid(
      fmt::format("option \"{}\" is not known: expected tp, dp, replicas or dtype", key));
}

}  // namespace

Result<void> check_parallel_spec(const ParallelSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  struct Size {
    const char* name;
    int64_t value;
    bool available;
  };
  int64_t ranks = 1;
  for (const Size& size :
       {Size{"tp", spec.tp, framework->has_tp}, Size{"dp", spec.dp, framework->has_dp},
        Size{"replicas", spec.replicas, true}}) {
    if (size.value < 1 || size.value > kMaxRanks) {
      return invalid(
          fmt::format("{} {}={}: expected 1 to {}", spec.family, size.name, size.value, kMaxRanks));
    }
    if (size.value != 1 && !size.available) {
      return invalid(fmt::format("{} {}={}: {} has no {}", spec.family, size.name, size.value,
                                 spec.family, size.name));
    }
    ranks *= size.value;  // at most 2^48
  }
  if (ranks > kMaxRanks) {
    return invalid(
        fmt::format("{} has {} ranks: expected at most {}", spec.family, ranks, kMaxRanks));
  }
  return {};
}

Result<ParallelSpec> parse_parallel_spec(std::string_view text) {
  ParallelSpec spec;
  const size_t colon = text.find(':');
  spec.family = text.substr(0, colon);
  TRANSFUSE_RETURN_IF_ERROR(find_framework(spec.family));
  std::set<std::string_view> seen;
  // An empty list of options is written without the colon.
  for (size_t at = colon; at != std::string_view::npos;) {
    const size_t next = text.find(',', at + 1);
    const std::string_view option = text.substr(at + 1, next - at - 1);
    const size_t equals = option.find('=');
    if (equals == std::string_view::npos) {
      return invalid(fmt::format("\"{}\" in \"{}\": expected key=value", option, text));
    }
    const std::string_view key = option.substr(0, equals);
    if (!seen.insert(key).second) return invalid(fmt::format("{} is set twice", key));
    TRANSFUSE_RETURN_IF_ERROR(set_option(key, option.substr(equals + 1), spec));
    at = next;
  }
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  return spec;
}

}  // namespace transfuse

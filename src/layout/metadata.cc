// Bounds of what sources say, and whether it is what a target demands.
#include "transfuse/metadata.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/bytes.h"
#include "transfuse/digest.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

bool printable(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return c >= 0x20 && c < 0x7F; });
}

bool is_word(std::string_view text) {
  return printable(text) && text.find(' ') == std::string_view::npos;
}

// Of another process: as much of it as a message may hold.
std::string shown(std::string_view text) {
  constexpr size_t kLongest = 64;
  std::string out(text.substr(0, kLongest));
  std::ranges::replace_if(out, [](char c) { return c < 0x20 || c >= 0x7F; }, '?');
  return text.size() > kLongest ? out + "..." : out;
}

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

Result<void> check_key(std::string_view whose, std::string_view key) {
  if (!key.empty() && key.size() <= kMaxMetadataKeyBytes && is_word(key)) return {};
  return invalid(
      fmt::format("{} has the metadata key \"{}\" of {} bytes: expected 1 to {} bytes of "
                  "printable ASCII without spaces",
                  whose, shown(key), key.size(), kMaxMetadataKeyBytes));
}

Result<void> check_value(std::string_view whose, std::string_view key, std::string_view value) {
  if (value.size() <= kMaxMetadataValueBytes && printable(value)) return {};
  return invalid(
      fmt::format("{}: the value of \"{}\" is \"{}\" ({} bytes): expected at most {} "
                  "bytes of printable ASCII",
                  whose, shown(key), shown(value), value.size(), kMaxMetadataValueBytes));
}

std::optional<int64_t> whole_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

// '*' stands for any text, also none.
bool matches(std::string_view pattern, std::string_view name) {
  size_t p = 0;
  size_t n = 0;
  std::optional<size_t> star;  // of the last '*' in the pattern
  size_t resume = 0;           // where the text that it stands for ends
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star) {
      p = *star + 1;
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

const std::string* find(const Metadata& metadata, std::string_view key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : &found->second;
}

std::string wanted(const Requirement& requirement) {
  switch (requirement.kind) {
    case Requirement::Kind::kEquals:
      return fmt::format("'{}' is demanded", requirement.value);
    case Requirement::Kind::kAtLeast:
      return fmt::format("at least {} is demanded", requirement.value);
    case Requirement::Kind::kPresent:
      return "it is demanded";
  }
  check_failed(__FILE__, __LINE__, "a Requirement::Kind outside the enum");
}

bool meets(const Requirement& requirement, const std::string& value) {
  switch (requirement.kind) {
    case Requirement::Kind::kEquals:
      return value == requirement.value;
    case Requirement::Kind::kAtLeast: {
      const auto found = whole_number(value);
      const auto least = whole_number(requirement.value);
      return found && least && *found >= *least;
    }
    case Requirement::Kind::kPresent:
      return true;
  }
  check_failed(__FILE__, __LINE__, "a Requirement::Kind outside the enum");
}

// `value`: null where nothing is said.
std::optional<std::string> misfit(const Requirement& requirement, const std::string* value,
                                  std::string_view of) {
  if (value == nullptr) {
    return fmt::format("{}'{}' is not stated, {}", of, requirement.key, wanted(requirement));
  }
  if (meets(requirement, *value)) return std::nullopt;
  return fmt::format("{}'{}' is '{}', {}", of, requirement.key, shown(*value), wanted(requirement));
}

std::optional<std::string> misfit_of_kind(const Demand& demand, std::string_view kind) {
  if (demand.kinds.empty() || std::ranges::find(demand.kinds, kind) != demand.kinds.end()) {
    return std::nullopt;
  }
  std::string accepted;
  for (const std::string& each : demand.kinds) accepted += (accepted.empty() ? "" : ", ") + each;
  if (kind.empty()) return fmt::format("it states no kind, accepted: {}", accepted);
  return fmt::format("its kind is '{}', accepted: {}", shown(kind), accepted);
}

}  // namespace

Result<void> check_kind(std::string_view whose, std::string_view kind) {
  if (kind.size() <= kMaxKindBytes && is_word(kind)) return {};
  return invalid(
      fmt::format("the kind of {} is \"{}\" ({} bytes): expected at most {} bytes of "
                  "printable ASCII without spaces",
                  whose, shown(kind), kind.size(), kMaxKindBytes));
}

Result<void> check_metadata(std::string_view whose, const Metadata& metadata) {
  if (metadata.size() > kMaxMetadataEntries) {
    return invalid(fmt::format("{} has {} entries of metadata: expected at most {}", whose,
                               metadata.size(), kMaxMetadataEntries));
  }
  size_t bytes = 0;
  for (const auto& [key, value] : metadata) {
    TRANSFUSE_RETURN_IF_ERROR(check_key(whose, key));
    TRANSFUSE_RETURN_IF_ERROR(check_value(whose, key, value));
    bytes += key.size() + value.size();
  }
  if (bytes > kMaxMetadataBytes) {
    return invalid(fmt::format("{} has {} bytes of metadata: expected at most {}", whose, bytes,
                               kMaxMetadataBytes));
  }
  return {};
}

Result<void> check_demand(std::string_view whose, const Demand& demand) {
  if (demand.kinds.size() > kMaxDemandKinds || demand.require.size() > kMaxRequirements) {
    return invalid(fmt::format(
        "{} demands one of {} kinds and {} conditions: expected at most {} "
        "and {}",
        whose, demand.kinds.size(), demand.require.size(), kMaxDemandKinds, kMaxRequirements));
  }
  for (const std::string& kind : demand.kinds) {
    TRANSFUSE_RETURN_IF_ERROR(check_kind(fmt::format("what {} accepts", whose), kind));
    if (kind.empty()) return invalid(fmt::format("{} accepts a kind without a name", whose));
  }
  for (const Requirement& requirement : demand.require) {
    TRANSFUSE_RETURN_IF_ERROR(check_key(whose, requirement.key));
    TRANSFUSE_RETURN_IF_ERROR(check_value(whose, requirement.key, requirement.value));
    if (requirement.kind == Requirement::Kind::kAtLeast && !whole_number(requirement.value)) {
      return invalid(fmt::format("{} demands '{}' of at least '{}': expected a whole number", whose,
                                 requirement.key, shown(requirement.value)));
    }
    if (requirement.tensors.size() > kMaxMetadataValueBytes || !printable(requirement.tensors)) {
      return invalid(
          fmt::format("{} demands '{}' of the tensors \"{}\": expected at most {} bytes "
                      "of printable ASCII",
                      whose, requirement.key, shown(requirement.tensors), kMaxMetadataValueBytes));
    }
  }
  return {};
}

Demand both(const Demand& demand, const Demand& more) {
  Demand out = demand;
  if (!more.kinds.empty()) out.kinds = more.kinds;
  out.require.insert(out.require.end(), more.require.begin(), more.require.end());
  if (more.revision != Digest{}) out.revision = more.revision;
  return out;
}

std::optional<std::string> misfit(const Demand& demand, const Claim& claim) {
  if (auto reason = misfit_of_kind(demand, claim.kind)) return reason;
  for (const Requirement& requirement : demand.require) {
    if (!requirement.tensors.empty()) continue;
    const std::string* value = find(claim.version, requirement.key);
    if (value == nullptr) value = find(claim.source, requirement.key);
    if (auto reason = misfit(requirement, value, "")) return reason;
  }
  if (demand.revision == Digest{} || claim.revision == demand.revision) return std::nullopt;
  return fmt::format("its revision is {}, {} is demanded",
                     claim.revision == Digest{} ? "not stated" : claim.revision.to_string(),
                     demand.revision.to_string());
}

std::optional<std::string> misfit(const Demand& demand, const Layout& layout) {
  if (auto reason = misfit_of_kind(demand, layout.kind())) return reason;
  for (const Requirement& requirement : demand.require) {
    if (requirement.tensors.empty()) continue;
    for (uint32_t tensor = 0; tensor < layout.tensors().size(); ++tensor) {
      const std::string& name = layout.tensors()[tensor].name;
      if (layout.tiles_of(tensor).empty() || !matches(requirement.tensors, name)) continue;
      const std::string* value = find(layout.metadata_of(tensor), requirement.key);
      if (auto reason = misfit(requirement, value, fmt::format("tensor '{}': ", name))) {
        return reason;
      }
    }
  }
  return std::nullopt;
}

Digest content_revision(std::span<const TensorSpec> tensors,
                        std::span<const uint64_t> fingerprints) {
  TRANSFUSE_CHECK(tensors.size() == fingerprints.size());
  ByteWriter out;
  for (size_t i = 0; i < tensors.size(); ++i) {
    TRANSFUSE_CHECK(i == 0 || tensors[i - 1].name < tensors[i].name);
    out.text(tensors[i].name);
    out.fixed(static_cast<uint8_t>(tensors[i].dtype));
    out.fixed(static_cast<uint8_t>(tensors[i].shape.rank()));
    for (const int64_t extent : tensors[i].shape.values()) {
      out.varint(static_cast<uint64_t>(extent));
    }
    out.fixed(fingerprints[i]);
  }
  const std::string bytes = std::move(out).take();
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {.high = hash.high64, .low = hash.low64 == 0 ? 1 : hash.low64};  // zero says nothing
}

}  // namespace transfuse

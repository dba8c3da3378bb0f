// What sources say of themselves beside their bytes, and what a target may demand of them.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/digest.h"
#include "transfuse/result.h"

namespace transfuse {

// For which consumer the values of a layout's tensors were made. Any word of the user's own works;
// these are known to others, too. "" says nothing.
inline constexpr std::string_view kKindHfRaw = "hf_raw";  // as published
inline constexpr std::string_view kKindVllmFused = "vllm_fused";
inline constexpr std::string_view kKindDeepgemmFp8 = "deepgemm_fp8";
inline constexpr std::string_view kKindCutlassFp8 = "cutlass_fp8";
inline constexpr std::string_view kKindTrtllm = "trtllm";

// Free words about a tensor, a source or a version: "step", "experts", "quantisation".
using Metadata = std::map<std::string, std::string, std::less<>>;

// All of it comes from other processes, and is kept and shown: bounds of one Metadata.
inline constexpr size_t kMaxMetadataEntries = 32;
inline constexpr size_t kMaxMetadataKeyBytes = 64;
inline constexpr size_t kMaxMetadataValueBytes = 1024;
inline constexpr size_t kMaxMetadataBytes = 4096;  // keys and values together
inline constexpr size_t kMaxKindBytes = 64;

// kInvalidArgument names `whose` it is, what is wrong, and the bound. Keys and kinds are printable
// ASCII without spaces, values printable ASCII.
Result<void> check_kind(std::string_view whose, std::string_view kind);
Result<void> check_metadata(std::string_view whose, const Metadata& metadata);

// One condition on metadata.
struct Requirement {
  enum class Kind : uint8_t {
    kEquals,
    kAtLeast,  // both are whole numbers
    kPresent,  // any value
  };
  std::string key;
  Kind kind = Kind::kEquals;
  std::string value{};
  // "": of the version, else of the source. Otherwise of every tensor of the source's layout whose
  // name matches; '*' stands for any text.
  std::string tensors{};
  bool operator==(const Requirement&) const = default;
};

// What a target accepts. A source that does not fit is not chosen.
struct Demand {
  std::vector<std::string> kinds{};    // one of these; empty: any
  std::vector<Requirement> require{};  // all of these
  Digest revision{};                   // of the version; zero: any
  bool empty() const { return kinds.empty() && require.empty() && revision == Digest{}; }
  bool operator==(const Demand&) const = default;
};
inline constexpr size_t kMaxDemandKinds = 32;
inline constexpr size_t kMaxRequirements = 64;
Result<void> check_demand(std::string_view whose, const Demand& demand);
// Both: requirements of both; kinds and revision of `more` where it names any.
Demand both(const Demand& demand, const Demand& more);

// What a source says about itself and about the version that it offers.
struct Claim {
  std::string_view kind;
  const Metadata& source;
  const Metadata& version;  // goes before `source`
  const Digest& revision;   // zero: not stated
};
// The first reason why it does not fit; nullopt if it does. Requirements of tensors are not looked
// at: see below.
std::optional<std::string> misfit(const Demand& demand, const Claim& claim);

class Layout;
// Of the kind and the tensors of a source's layout.
std::optional<std::string> misfit(const Demand& demand, const Layout& layout);

struct TensorSpec;
// The content address of a version: XXH3-128 over its tensors, ascending by name, each with the
// dtype in which it is held and its fingerprint (docs/fingerprint.md). So it does not depend on
// who holds the bytes or how they are sharded. Never zero.
Digest content_revision(std::span<const TensorSpec> tensors,
                        std::span<const uint64_t> fingerprints);

}  // namespace transfuse

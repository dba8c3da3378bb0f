// "fsdp:dp=4,tp=2" and its like: read, and checked against what the framework has.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

struct SizeOption {
  std::string_view name;
  int64_t ParallelSpec::* field;
  int64_t unset;  // its value where the spec does not mention it
  int64_t most = kMaxRanks;
};
constexpr int64_t kMaxVocabulary = int64_t{1} << 31;
constexpr std::array<SizeOption, 13> kSizes = {
    {{"tp", &ParallelSpec::tp, 1},
     {"dp", &ParallelSpec::dp, 1},
     {"replicas", &ParallelSpec::replicas, 1},
     {"pp", &ParallelSpec::pp, 1},
     {"vpp", &ParallelSpec::vpp, 1},
     {"cp", &ParallelSpec::cp, 1},
     {"ep", &ParallelSpec::ep, 1},
     {"etp", &ParallelSpec::etp, 0},
     {"first", &ParallelSpec::first, 0},
     {"last", &ParallelSpec::last, 0},
     {"vocab_divisor", &ParallelSpec::vocab_divisor, 128},
     {"padded_vocab", &ParallelSpec::padded_vocab, 0, kMaxVocabulary},
     {"redundant", &ParallelSpec::redundant, 0}}};

struct FlagOption {
  std::string_view name;
  bool ParallelSpec::* field;
};
constexpr std::array<FlagOption, 3> kFlags = {
    {{"ep", &ParallelSpec::expert_parallel},
     {"account_for_embedding", &ParallelSpec::account_for_embedding},
     {"account_for_loss", &ParallelSpec::account_for_loss}}};

struct WordOption {
  std::string_view name;
  bool ParallelSpec::* field;
  std::string_view off;
  std::string_view on;
  std::string_view framework = {};  // where only one has these words
};
constexpr std::array<WordOption, 9> kWords = {
    {{"placement", &ParallelSpec::round_robin, "linear", "round_robin"},
     {"w13", &ParallelSpec::up_before_gate, "gate_up", "up_gate"},
     {"norms", &ParallelSpec::separate_norms, "te", "separate"},
     {"out_norm", &ParallelSpec::out_norm_plus_one, "minus_one", "plus_one"},
     {"dense", &ParallelSpec::whole_dense, "split", "whole"},
     {"lm_head", &ParallelSpec::output_by_attention, "tp", "attention"},
     {"experts", &ParallelSpec::sequential_experts, "grouped", "sequential", "megatron"},
     {"experts", &ParallelSpec::stacked_experts, "single", "stacked", "hf"},
     {"experts", &ParallelSpec::stacked_experts, "single", "stacked", "fsdp"}}};

constexpr std::array<std::string_view, 3> kMtpWords = {"all", "shared", "none"};  // MtpTensors
constexpr std::array<std::string_view, 3> kSharedWords = {"split", "whole",
                                                          "fused"};  // SharedExperts

constexpr std::array<std::string_view, 2> kEverywhere = {"replicas", "dtype"};

Unexpected invalid(std::string_view message) {
  return {Error{ErrorCode::kInvalidArgument, fmt::format("parallel spec: {}", message)}};
}

bool contains(std::span<const std::string_view> names, std::string_view name) {
  return std::ranges::find(names, name) != names.end();
}

bool has(const Framework& framework, std::string_view option) {
  return contains(kEverywhere, option) || contains(framework.options, option);
}

bool has(const Framework& framework, const WordOption& word) {
  return has(framework, word.name) && (word.framework.empty() || word.framework == framework.name);
}

Unexpected no_such_option(const Framework& framework, std::string_view option) {
  std::string known;
  for (const std::span<const std::string_view> names :
       {framework.options, framework.flags, std::span<const std::string_view>(kEverywhere)}) {
    for (const std::string_view name : names) known += fmt::format(", {}", name);
  }
  return invalid(fmt::format("option \"{}\": {} has no {}; expected one of {}", option,
                             framework.name, option, std::string_view(known).substr(2)));
}

Result<int64_t> read_size(std::string_view key, std::string_view value, int64_t lowest,
                          int64_t most = kMaxRanks) {
  int64_t size = 0;
  const char* end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, size);
  if (error != std::errc() || stop != end || size < lowest || size > most) {
    return invalid(
        fmt::format("{}={}: expected a whole number from {} to {}", key, value, lowest, most));
  }
  return size;
}

Result<void> set_layers(std::string_view value, ParallelSpec& spec) {
  for (size_t at = 0; at != std::string_view::npos;) {
    const size_t next = value.find('/', at);
    TRANSFUSE_ASSIGN_OR_RETURN(const int64_t count,
                               read_size("layers", value.substr(at, next - at), 0));
    spec.layers.push_back(count);
    at = next == std::string_view::npos ? next : next + 1;
  }
  return {};
}

// One of the words of an enum, in its order.
template <typename Enum>
Result<void> set_enum(std::string_view key, std::string_view value,
                      std::span<const std::string_view> words, Enum& field) {
  const auto at = std::ranges::find(words, value);
  if (at == words.end()) {
    return invalid(fmt::format("{}={}: expected one of {}", key, value, fmt::join(words, ", ")));
  }
  field = static_cast<Enum>(at - words.begin());
  return {};
}

Result<void> set_expert_map(std::string_view value, ParallelSpec& spec) {
  if (value.empty()) return invalid("expert_map=: expected the path of a JSON file");
  spec.expert_map_path = value;
  return {};
}

Result<void> set_option(const Framework& framework, std::string_view key, std::string_view value,
                        ParallelSpec& spec) {
  for (const SizeOption& option : kSizes) {
    if (option.name != key) continue;
    TRANSFUSE_ASSIGN_OR_RETURN(spec.*option.field, read_size(key, value, 1, option.most));
    return {};
  }
  for (const WordOption& option : kWords) {
    if (option.name != key || !has(framework, option)) continue;
    if (value != option.on && value != option.off) {
      return invalid(fmt::format("{}={}: expected {} or {}", key, value, option.off, option.on));
    }
    spec.*option.field = value == option.on;
    return {};
  }
  if (key == "layers") return set_layers(value, spec);
  if (key == "mtp") return set_enum(key, value, kMtpWords, spec.mtp);
  if (key == "shared") return set_enum(key, value, kSharedWords, spec.shared);
  if (key == "expert_map") return set_expert_map(value, spec);
  TRANSFUSE_CHECK(key == "dtype");
  TRANSFUSE_ASSIGN_OR_RETURN(spec.dtype, parse_dtype(value));
  return {};
}

Result<void> read_option(const Framework& framework, std::string_view option, ParallelSpec& spec,
                         std::set<std::string_view>& seen) {
  const size_t equals = option.find('=');
  const std::string_view key = option.substr(0, equals);
  if (!seen.insert(key).second) return invalid(fmt::format("{} is set twice", key));
  if (contains(framework.flags, key)) {
    if (equals != std::string_view::npos) {
      return invalid(fmt::format("\"{}\": {} takes no value for {}", option, framework.name, key));
    }
    const auto* flag = std::ranges::find(kFlags, key, &FlagOption::name);
    TRANSFUSE_CHECK(flag != kFlags.end());
    spec.*flag->field = true;
    return {};
  }
  if (equals == std::string_view::npos) {
    return invalid(fmt::format("\"{}\" in a {} spec: expected key=value", option, framework.name));
  }
  if (!has(framework, key)) return no_such_option(framework, key);
  return set_option(framework, key, option.substr(equals + 1), spec);
}

// Specs are also made by hand.
Result<void> check_options(const Framework& framework, const ParallelSpec& spec) {
  for (const SizeOption& option : kSizes) {
    const int64_t value = spec.*option.field;
    if (value == option.unset) continue;
    if (value < 1 || value > option.most) {
      return invalid(
          fmt::format("{} {}={}: expected 1 to {}", spec.family, option.name, value, option.most));
    }
    if (!has(framework, option.name)) return no_such_option(framework, option.name);
  }
  for (const WordOption& option : kWords) {
    if (!(spec.*option.field)) continue;
    const bool known = std::ranges::any_of(kWords, [&](const WordOption& other) {
      return other.field == option.field && has(framework, other);
    });
    if (!known) return no_such_option(framework, option.name);
  }
  const bool mapped = !spec.expert_map_path.empty() || !spec.expert_map.physical_to_logical.empty();
  for (const auto& [set, option] : {std::pair{spec.mtp != MtpTensors::kAll, "mtp"},
                                    std::pair{spec.shared != SharedExperts::kSplit, "shared"},
                                    std::pair{mapped, "expert_map"}}) {
    if (set && !has(framework, option)) return no_such_option(framework, option);
  }
  for (const FlagOption& flag : kFlags) {
    if (spec.*flag.field && !contains(framework.flags, flag.name)) {
      return invalid(fmt::format("\"{}\": {} has no such flag", flag.name, spec.family));
    }
  }
  if (spec.layers.empty()) return {};
  if (!has(framework, "layers")) return no_such_option(framework, "layers");
  const auto count = static_cast<int64_t>(spec.layers.size());
  if (count != spec.pp * spec.vpp) {
    return invalid(fmt::format("{} layers={}: {} numbers, expected pp x vpp = {}", spec.family,
                               fmt::join(spec.layers, "/"), count, spec.pp * spec.vpp));
  }
  return {};
}

}  // namespace

int64_t bounded_product(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size > kMaxRanks || product * size > kMaxRanks) return kTooManyRanks;
    product *= size;
  }
  return product;
}

int64_t ParallelSpec::rank_count() const {
  const auto framework = find_framework(family);
  return framework ? bounded_product({(*framework)->rank_count(*this), replicas}) : 0;
}

Result<void> check_parallel_spec(const ParallelSpec& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  TRANSFUSE_RETURN_IF_ERROR(check_options(*framework, spec));
  if (spec.rank_count() > kMaxRanks) {
    return invalid(fmt::format("{} has more than {} ranks", spec.family, kMaxRanks));
  }
  if (framework->check != nullptr) return framework->check(spec);
  return {};
}

Result<ParallelRanks> parallel_ranks(const ParallelSpec& spec, int64_t rank) {
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  if (rank < 0 || rank >= spec.rank_count()) {
    return invalid(fmt::format("rank {} of a {} spec: expected 0 to {}", rank, spec.family,
                               spec.rank_count() - 1));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  return framework->ranks(spec, rank % framework->rank_count(spec));
}

Result<void> check_ranks(const ParallelSpec& spec, const ParallelRanks& ranks) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  const ParallelRanks end = framework->ranks(spec, framework->rank_count(spec) - 1);
  struct Group {
    const char* name;
    int64_t rank;
    int64_t last;
  };
  for (const Group& group :
       {Group{"tp", ranks.tp, end.tp}, Group{"pp", ranks.pp, end.pp}, Group{"dp", ranks.dp, end.dp},
        Group{"cp", ranks.cp, end.cp}, Group{"etp", ranks.etp, end.etp},
        Group{"ep", ranks.ep, end.ep}, Group{"edp", ranks.edp, end.edp}}) {
    if (group.rank >= 0 && group.rank <= group.last) continue;
    return invalid(fmt::format("{} rank {} of a {} spec: expected 0 to {}", group.name, group.rank,
                               spec.family, group.last));
  }
  return {};
}

Result<ParallelSpec> parse_parallel_spec(std::string_view text) {
  ParallelSpec spec;
  const size_t colon = text.find(':');
  spec.family = text.substr(0, colon);
  TRANSFUSE_ASSIGN_OR_RETURN(const Framework* framework, find_framework(spec.family));
  std::set<std::string_view> seen;
  // An empty list of options is written without the colon.
  for (size_t at = colon; at != std::string_view::npos;) {
    const size_t next = text.find(',', at + 1);
    TRANSFUSE_RETURN_IF_ERROR(
        read_option(*framework, text.substr(at + 1, next - at - 1), spec, seen));
    at = next;
  }
  TRANSFUSE_RETURN_IF_ERROR(check_parallel_spec(spec));
  return spec;
}

}  // namespace transfuse

// A ModelConfig from config.json, checked field by field.
#include <fmt/format.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using nlohmann::json;

// Far above any model; products of two fit in int64_t.
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr int64_t kMaxTensors = int64_t{1} << 20;

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, "config.json: " + std::move(message)}};
}

std::string shown(const json& value) {
  std::string text = value.dump();
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

// Absent and null are the same in files that transformers writes.
const json* find(const json& object, const char* field) {
  const auto at = object.find(field);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

Result<std::optional<int64_t>> optional_size(const json& object, const char* field) {
  const json* value = find(object, field);
  if (value == nullptr) return std::optional<int64_t>();
  const bool in_range =
      value->is_number_integer() &&
      (value->is_number_unsigned() ? value->get<uint64_t>() <= uint64_t{kMaxSize} : false);
  if (!in_range || value->get<int64_t>() < 1) {
    return invalid(fmt::format("field \"{}\" is {}: expected a whole number from 1 to {}", field,
                               shown(*value), kMaxSize));
  }
  return std::optional(value->get<int64_t>());
}

Result<int64_t> required_size(const json& object, const char* field) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto value, optional_size(object, field));
  if (!value) return invalid(fmt::format("field \"{}\" is missing", field));
  return *value;
}

// transformers 4 writes Qwen3-MoE's as "num_experts", 5 as "num_local_experts".
Result<int64_t> expert_count(const json& object) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto local, optional_size(object, "num_local_experts"));
  if (!local) return required_size(object, "num_experts");
  TRANSFUSE_ASSIGN_OR_RETURN(const auto count, optional_size(object, "num_experts"));
  if (count.value_or(*local) != *local) {
    return invalid(fmt::format("field \"num_experts\" is {}, field \"num_local_experts\" is {}",
                               *count, *local));
  }
  return *local;
}

Result<bool> optional_bool(const json& object, const char* field, bool fallback) {
  const json* value = find(object, field);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) {
    return invalid(fmt::format("field \"{}\" is {}: expected true or false", field, shown(*value)));
  }
  return value->get<bool>();
}

Result<std::string> required_string(const json& object, const char* field) {
  const json* value = find(object, field);
  if (value == nullptr) return invalid(fmt::format("field \"{}\" is missing", field));
  if (!value->is_string()) {
    return invalid(fmt::format("field \"{}\" is {}: expected a string", field, shown(*value)));
  }
  return value->get<std::string>();
}

Result<Dtype> dtype_of(const json& value, const char* field) {
  constexpr std::array<std::pair<std::string_view, Dtype>, 3> kNames = {
      {{"float32", Dtype::kF32}, {"float16", Dtype::kF16}, {"bfloat16", Dtype::kBF16}}};
  for (const auto& [name, dtype] : kNames) {
    if (value.is_string() && value.get_ref<const std::string&>() == name) return dtype;
  }
  return invalid(
      fmt::format("field \"{}\" is {}: expected \"float32\", \"float16\" or \"bfloat16\"", field,
                  shown(value)));
}

// transformers 4 writes "torch_dtype", 5 writes "dtype". Neither: bf16, as nearly all are
// published.
Result<Dtype> published_dtype(const json& object) {
  std::optional<Dtype> found;
  for (const char* field : {"torch_dtype", "dtype"}) {
    const json* value = find(object, field);
    if (value == nullptr) continue;
    TRANSFUSE_ASSIGN_OR_RETURN(const Dtype dtype, dtype_of(*value, field));
    if (found && *found != dtype) {
      return invalid(fmt::format("field \"dtype\" is {}, field \"torch_dtype\" is {}",
                                 dtype_name(dtype), dtype_name(*found)));
    }
    found = dtype;
  }
  return found.value_or(Dtype::kBF16);
}

Result<void> check_required_values(const json& object, const ModelFamily& family) {
  if (const json* classes = find(object, "architectures")) {
    if (!classes->is_array() || classes->size() != 1 || !(*classes)[0].is_string() ||
        (*classes)[0].get_ref<const std::string&>() != family.model_class) {
      return Error{ErrorCode::kUnsupported,
                   fmt::format("config.json: field \"architectures\" is {}: model_type {} is "
                               "described for [\"{}\"] only",
                               shown(*classes), family.architecture, family.model_class)};
    }
  }
  for (const RequiredValue& required : family.required_values) {
    const auto at = object.find(required.field);
    if (at == object.end() || at->dump() == required.json) continue;
    return Error{ErrorCode::kUnsupported,
                 fmt::format("config.json: field \"{}\" is {}: {} is described for {} only",
                             required.field, shown(*at), family.architecture, required.json)};
  }
  return {};
}

}  // namespace

Result<void> check_model_config(const ModelConfig& c) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelFamily* family, find_model_family(c.architecture));
  struct Field {
    const char* name;
    int64_t value;
    bool needed;
  };
  const bool moe = family->mixture_of_experts;
  for (const Field& field :
       std::initializer_list<Field>{{"hidden_size", c.hidden_size, true},
                                    {"intermediate_size", c.intermediate_size, !moe},
                                    {"moe_intermediate_size", c.moe_intermediate_size, moe},
                                    {"num_hidden_layers", c.num_hidden_layers, true},
                                    {"num_attention_heads", c.num_attention_heads, true},
                                    {"num_key_value_heads", c.num_key_value_heads, true},
                                    {"head_dim", c.head_dim, true},
                                    {"vocab_size", c.vocab_size, true},
                                    {"num_experts", c.num_experts, moe}}) {
    if (field.value < (field.needed ? 1 : 0) || field.value > kMaxSize) {
      return invalid(fmt::format("field \"{}\" is {}: expected {} to {}", field.name, field.value,
                                 field.needed ? 1 : 0, kMaxSize));
    }
  }
  if (c.num_attention_heads % c.num_key_value_heads != 0) {
    return invalid(
        fmt::format("field \"num_key_value_heads\" is {}: expected a divisor of "
                    "\"num_attention_heads\", which is {}",
                    c.num_key_value_heads, c.num_attention_heads));
  }
  if (c.num_attention_heads * c.head_dim > kMaxSize) {
    return invalid(
        fmt::format("field \"head_dim\" is {}: with {} attention heads expected at most "
                    "{} features",
                    c.head_dim, c.num_attention_heads, kMaxSize));
  }
  if (c.num_hidden_layers > kMaxTensors || c.num_experts > kMaxTensors ||
      family->tensor_count(c) > kMaxTensors) {
    return invalid(
        fmt::format("fields \"num_hidden_layers\" ({}) and \"num_experts\" ({}) give "
                    "more than {} tensors",
                    c.num_hidden_layers, c.num_experts, kMaxTensors));
  }
  return {};
}

Result<ModelConfig> parse_model_config(std::string_view text) {
  const json object = json::parse(text, nullptr, false);
  if (!object.is_object()) return invalid("expected a JSON object");
  ModelConfig c;
  TRANSFUSE_ASSIGN_OR_RETURN(c.architecture, required_string(object, "model_type"));
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelFamily* family, find_model_family(c.architecture));
  TRANSFUSE_RETURN_IF_ERROR(check_required_values(object, *family));
  TRANSFUSE_ASSIGN_OR_RETURN(c.hidden_size, required_size(object, "hidden_size"));
  TRANSFUSE_ASSIGN_OR_RETURN(c.num_hidden_layers, required_size(object, "num_hidden_layers"));
  TRANSFUSE_ASSIGN_OR_RETURN(c.num_attention_heads, required_size(object, "num_attention_heads"));
  TRANSFUSE_ASSIGN_OR_RETURN(c.num_key_value_heads, required_size(object, "num_key_value_heads"));
  TRANSFUSE_ASSIGN_OR_RETURN(c.vocab_size, required_size(object, "vocab_size"));
  if (family->mixture_of_experts) {
    TRANSFUSE_ASSIGN_OR_RETURN(c.moe_intermediate_size,
                               required_size(object, "moe_intermediate_size"));
    TRANSFUSE_ASSIGN_OR_RETURN(c.num_experts, expert_count(object));
    TRANSFUSE_ASSIGN_OR_RETURN(const auto dense, optional_size(object, "intermediate_size"));
    c.intermediate_size = dense.value_or(0);
  } else {
    TRANSFUSE_ASSIGN_OR_RETURN(c.intermediate_size, required_size(object, "intermediate_size"));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto head_dim, optional_size(object, "head_dim"));
  if (head_dim) {
    c.head_dim = *head_dim;
  } else if (family->default_head_dim > 0) {
    c.head_dim = family->default_head_dim;
  } else if (c.hidden_size % c.num_attention_heads == 0) {
    c.head_dim = c.hidden_size / c.num_attention_heads;
  } else {
    return invalid(
        fmt::format("field \"head_dim\" is missing and \"hidden_size\" ({}) is no "
                    "multiple of \"num_attention_heads\" ({})",
                    c.hidden_size, c.num_attention_heads));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(c.tie_word_embeddings,
                             optional_bool(object, "tie_word_embeddings", false));
  TRANSFUSE_ASSIGN_OR_RETURN(c.dtype, published_dtype(object));
  TRANSFUSE_RETURN_IF_ERROR(check_model_config(c));
  return c;
}

}  // namespace transfuse

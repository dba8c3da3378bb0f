// A ModelConfig from config.json, checked field by field.
#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
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
constexpr int64_t kOtherTensorsOfALayer = 32;  // at most, besides those of its experts

constexpr std::array<SizeField, 6> kCommonSizes = {
    {{"hidden_size", &ModelConfig::hidden_size},
     {"num_hidden_layers", &ModelConfig::num_hidden_layers},
     {"num_attention_heads", &ModelConfig::num_attention_heads},
     {"num_key_value_heads", &ModelConfig::num_key_value_heads},
     {"vocab_size", &ModelConfig::vocab_size},
     {"head_dim", &ModelConfig::head_dim}}};

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

// Some families may have none of something that others have.
Result<int64_t> size_or_none(const json& object, const SizeField& field) {
  const json* value = find(object, field.name);
  if (value != nullptr && value->is_number_unsigned() && value->get<uint64_t>() == 0) return 0;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto size, optional_size(object, field.name));
  return size.value_or(field.fallback);
}

// The number of experts goes by several names: transformers 4 and 5 differ for some families.
Result<int64_t> expert_count(const json& object, const char* own_name) {
  std::optional<int64_t> found;
  const char* found_in = nullptr;
  for (const char* field : {"num_experts", "num_local_experts", "n_routed_experts"}) {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto count, optional_size(object, field));
    if (!count) continue;
    if (found && *found != *count) {
      return invalid(
          fmt::format("field \"{}\" is {}, field \"{}\" is {}", found_in, *found, field, *count));
    }
    found = count;
    found_in = field;
  }
  if (!found) return required_size(object, own_name);
  return *found;
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

// "quantization_config" of f8 weights with one scale for every block.
Result<void> read_block_scales(const json& object, ModelConfig& c) {
  const json* quantization = find(object, "quantization_config");
  if (quantization == nullptr) return {};
  const auto unsupported = [&](const char* field, const json* value, const char* expected) {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format("config.json: field \"quantization_config\": \"{}\" is {}: {} is "
                    "described for {} only",
                    field, value == nullptr ? "missing" : shown(*value), c.architecture, expected)};
  };
  if (!quantization->is_object()) {
    return unsupported("quant_method", nullptr, "\"fp8\"");
  }
  const json* method = find(*quantization, "quant_method");
  if (method == nullptr || *method != "fp8") return unsupported("quant_method", method, "\"fp8\"");
  const json* format = find(*quantization, "fmt");
  if (format != nullptr && *format != "e4m3") return unsupported("fmt", format, "\"e4m3\"");
  const json* block = find(*quantization, "weight_block_size");
  const auto is_size = [](const json& size) {
    return size.is_number_unsigned() && size.get<uint64_t>() >= 1 &&
           size.get<uint64_t>() <= uint64_t{kMaxSize};
  };
  if (block == nullptr || !block->is_array() || block->size() != 2 || !is_size((*block)[0]) ||
      !is_size((*block)[1])) {
    return unsupported("weight_block_size", block, "[rows, columns] of a block");
  }
  c.scale_block_rows = (*block)[0].get<int64_t>();
  c.scale_block_columns = (*block)[1].get<int64_t>();
  return {};
}

// "quantization_config" of experts in mxfp4.
Result<void> read_packed_experts(const json& object, ModelConfig& c) {
  const json* quantization = find(object, "quantization_config");
  if (quantization == nullptr) return {};
  const json* method = quantization->is_object() ? find(*quantization, "quant_method") : nullptr;
  if (method == nullptr || *method != "mxfp4") {
    return Error{
        ErrorCode::kUnsupported,
        fmt::format("config.json: field \"quantization_config\": \"quant_method\" is {}: {} "
                    "is described for \"mxfp4\" only",
                    method == nullptr ? "missing" : shown(*method), c.architecture)};
  }
  c.packed_experts = true;
  return {};
}

// "layer_types" names every layer's attention; without it every interval-th is full.
Result<void> read_layer_types(const json& object, const ModelFamily& family, ModelConfig& c) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto interval, optional_size(object, "full_attention_interval"));
  const json* types = find(object, "layer_types");
  const int64_t every = interval.value_or(family.default_attention_interval);
  if (c.num_hidden_layers > kMaxTensors) return {};  // refused with all other sizes
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    c.linear_layers.push_back((layer + 1) % every != 0);
  }
  if (types == nullptr) return {};
  const auto layers = static_cast<size_t>(c.num_hidden_layers);
  if (!types->is_array() || types->size() != layers) {
    return invalid(fmt::format("field \"layer_types\" is {}: expected one for each of {} layers",
                               shown(*types), layers));
  }
  for (size_t layer = 0; layer < layers; ++layer) {
    const json& type = (*types)[layer];
    if (type != "linear_attention" && type != "full_attention") {
      return invalid(
          fmt::format("field \"layer_types\" has {} for layer {}: expected \"linear_attention\" or "
                      "\"full_attention\"",
                      shown(type), layer));
    }
    const bool linear = type == "linear_attention";
    if (interval && linear != c.linear_layers[layer]) {
      return invalid(
          fmt::format("field \"layer_types\" has {} for layer {}, field "
                      "\"full_attention_interval\" is {}",
                      shown(type), layer, *interval));
    }
    c.linear_layers[layer] = linear;
  }
  return {};
}

Result<void> read_family_fields(const json& object, const ModelFamily& family, ModelConfig& c) {
  for (const SizeField& field : family.sizes) {
    TRANSFUSE_ASSIGN_OR_RETURN(c.*field.member, field.required ? required_size(object, field.name)
                                                               : size_or_none(object, field));
  }
  for (const SwitchField& field : family.switches) {
    if (field.on == "true") {
      TRANSFUSE_ASSIGN_OR_RETURN(c.*field.member, optional_bool(object, field.name, false));
    } else {
      const json* value = find(object, field.name);
      c.*field.member = value != nullptr && value->dump() == field.on;
    }
  }
  if (family.expert_count != nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(c.num_experts, expert_count(object, family.expert_count));
  }
  if (family.default_attention_interval > 0) {
    TRANSFUSE_RETURN_IF_ERROR(read_layer_types(object, family, c));
  }
  if (family.packed_experts) return read_packed_experts(object, c);
  if (family.block_scales) return read_block_scales(object, c);
  return {};
}

Result<int64_t> head_dim_of(const json& object, const ModelFamily& family, const ModelConfig& c) {
  // The other parts of a head are positions of no weight's rows.
  if (c.kv_lora_rank > 0) return c.qk_nope_head_dim + c.qk_rope_head_dim;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto head_dim, optional_size(object, "head_dim"));
  if (head_dim) return *head_dim;
  if (family.default_head_dim > 0) return family.default_head_dim;
  if (c.hidden_size % c.num_attention_heads == 0) return c.hidden_size / c.num_attention_heads;
  return invalid(
      fmt::format("field \"head_dim\" is missing and \"hidden_size\" ({}) is no "
                  "multiple of \"num_attention_heads\" ({})",
                  c.hidden_size, c.num_attention_heads));
}

Result<void> check_fields(const ModelFamily& family, const ModelConfig& c) {
  const auto check = [&](const SizeField& field) -> Result<void> {
    const int64_t lowest = field.required ? 1 : 0;
    const int64_t value = c.*field.member;
    if (value >= lowest && value <= field.most) return {};
    return invalid(fmt::format("field \"{}\" is {}: expected {} to {}", field.name, value, lowest,
                               field.most));
  };
  for (const SizeField& field : kCommonSizes) TRANSFUSE_RETURN_IF_ERROR(check(field));
  for (const SizeField& field : family.sizes) TRANSFUSE_RETURN_IF_ERROR(check(field));
  if (family.expert_count == nullptr) return {};
  return check({family.expert_count, &ModelConfig::num_experts});
}

Result<void> check_linear_attention(const ModelConfig& c) {
  if (c.linear_layers.empty()) return {};
  if (std::cmp_not_equal(c.linear_layers.size(), c.num_hidden_layers)) {
    return invalid(fmt::format("field \"layer_types\" has {} layers, expected {}",
                               c.linear_layers.size(), c.num_hidden_layers));
  }
  if (c.linear_value_heads % c.linear_key_heads != 0) {
    return invalid(
        fmt::format("field \"linear_num_value_heads\" is {}: expected a multiple of "
                    "\"linear_num_key_heads\", which is {}",
                    c.linear_value_heads, c.linear_key_heads));
  }
  for (const auto& [field, features] :
       {std::pair{"linear_key_head_dim", c.linear_key_heads * c.linear_key_head_dim},
        std::pair{"linear_value_head_dim", c.linear_value_heads * c.linear_value_head_dim}}) {
    if (features <= kMaxSize / 4) continue;
    return invalid(fmt::format("field \"{}\": expected at most {} features together, found {}",
                               field, kMaxSize / 4, features));
  }
  return {};
}

}  // namespace

Result<void> check_model_config(const ModelConfig& c) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelFamily* family, find_model_family(c.architecture));
  TRANSFUSE_RETURN_IF_ERROR(check_fields(*family, c));
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
  for (const auto& [name, product] :
       {std::pair{"v_head_dim", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)},
        std::pair{"n_shared_experts", c.shared_experts * c.moe_intermediate_size}}) {
    if (product <= kMaxSize) continue;
    return invalid(fmt::format("field \"{}\": expected at most {} features together, found {}",
                               name, kMaxSize, product));
  }
  TRANSFUSE_RETURN_IF_ERROR(check_linear_attention(c));
  if (c.packed_experts && (c.hidden_size % 32 != 0 || c.moe_intermediate_size % 32 != 0)) {
    return invalid(fmt::format(
        "fields \"hidden_size\" ({}) and \"intermediate_size\" ({}): expected multiples "
        "of 32, the elements that share a scale in mxfp4",
        c.hidden_size, c.moe_intermediate_size));
  }
  if (c.dense_layers > c.num_hidden_layers) {
    return invalid(
        fmt::format("field \"first_k_dense_replace\" is {}: expected at most "
                    "\"num_hidden_layers\", which is {}",
                    c.dense_layers, c.num_hidden_layers));
  }
  const int64_t scaled = c.scale_block_rows > 0 ? 2 : 1;
  if (c.num_hidden_layers + c.mtp_layers > kMaxTensors || c.num_experts > kMaxTensors ||
      (c.num_hidden_layers + c.mtp_layers) * (kOtherTensorsOfALayer + 3 * c.num_experts) * scaled >
          kMaxTensors) {
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
  for (const SizeField& field : kCommonSizes) {
    if (field.member == &ModelConfig::head_dim) continue;
    TRANSFUSE_ASSIGN_OR_RETURN(c.*field.member, required_size(object, field.name));
  }
  TRANSFUSE_RETURN_IF_ERROR(read_family_fields(object, *family, c));
  TRANSFUSE_ASSIGN_OR_RETURN(c.head_dim, head_dim_of(object, *family, c));
  TRANSFUSE_ASSIGN_OR_RETURN(c.tie_word_embeddings,
                             optional_bool(object, "tie_word_embeddings", family->default_tied));
  TRANSFUSE_ASSIGN_OR_RETURN(c.dtype, published_dtype(object));
  TRANSFUSE_RETURN_IF_ERROR(check_model_config(c));
  return c;
}

}  // namespace transfuse

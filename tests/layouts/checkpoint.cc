// The published checkpoint of every family.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::frameworks {
namespace {

// The published checkpoint of a model, tensor by tensor; every element has a value of its own.
class Checkpoint {
 public:
  explicit Checkpoint(const ModelConfig& config) : c_(config) {}

  StateDict make() {
    add("model.embed_tokens.weight", {c_.vocab_size, c_.hidden_size});
    add("model.norm.weight", {c_.hidden_size});
    if (!c_.tie_word_embeddings) add("lm_head.weight", {c_.vocab_size, c_.hidden_size});
    for (int64_t n = 0; n < c_.num_hidden_layers; ++n) add_layer(n);
    if (c_.architecture == "qwen3_next") return with_mtp_module();
    for (int64_t n = c_.num_hidden_layers; n < c_.num_hidden_layers + c_.mtp_layers; ++n) {
      const std::string p = "model.layers." + std::to_string(n) + ".";
      add_layer(n);
      for (const char* norm : {"enorm", "hnorm", "shared_head.norm"}) {
        add(p + norm + ".weight", {c_.hidden_size});
      }
      add(p + "eh_proj.weight", {c_.hidden_size, 2 * c_.hidden_size});
      add(p + "embed_tokens.weight", {c_.vocab_size, c_.hidden_size});
      add(p + "shared_head.head.weight", {c_.vocab_size, c_.hidden_size});
    }
    return std::move(out_);
  }

 private:
  void add(const std::string& name, const std::vector<int64_t>& shape) {
    Tensor tensor = Tensor::zeros(shape);
    for (int32_t& value : tensor.data) value = next_++;
    TRANSFUSE_CHECK(out_.emplace(name, std::move(tensor)).second);
  }
  // A quantised one has scales.
  void linear(const std::string& name, int64_t rows, int64_t columns) {
    add(name + ".weight", {rows, columns});
    if (c_.scale_block_rows == 0) return;
    add(name + ".weight_scale_inv",
        {blocks(rows, c_.scale_block_rows), blocks(columns, c_.scale_block_columns)});
  }
  void mlp(const std::string& prefix, int64_t width) {
    const bool mixtral = c_.architecture == "mixtral";
    linear(prefix + (mixtral ? "w1" : "gate_proj"), width, c_.hidden_size);
    linear(prefix + (mixtral ? "w3" : "up_proj"), width, c_.hidden_size);
    linear(prefix + (mixtral ? "w2" : "down_proj"), c_.hidden_size, width);
  }

  StateDict with_mtp_module() {
    for (const char* norm : {"norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"}) {
      if (c_.mtp_layers > 0) add(fmt::format("mtp.{}.weight", norm), {c_.hidden_size});
    }
    if (c_.mtp_layers > 0) add("mtp.fc.weight", {c_.hidden_size, 2 * c_.hidden_size});
    for (int64_t n = 0; n < c_.mtp_layers; ++n) {
      add_layer(c_.num_hidden_layers + n, fmt::format("mtp.layers.{}.", n));
    }
    return std::move(out_);
  }

  void add_layer(int64_t n) { add_layer(n, "model.layers." + std::to_string(n) + "."); }
  void add_layer(int64_t n, const std::string& p) {
    const std::string& family = c_.architecture;
    add(p + "input_layernorm.weight", {c_.hidden_size});
    add(p + "post_attention_layernorm.weight", {c_.hidden_size});
    if (family == "gemma3_text") {
      add(p + "pre_feedforward_layernorm.weight", {c_.hidden_size});
      add(p + "post_feedforward_layernorm.weight", {c_.hidden_size});
    }
    if (is_linear(c_, n)) {
      add_linear_attention(p + "linear_attn.");
    } else if (family == "deepseek_v3") {
      add_latent_attention(p + "self_attn.");
    } else {
      add_attention(p + "self_attn.");
    }
    if (!has_experts(c_, n)) return mlp(p + "mlp.", c_.intermediate_size);
    const std::string moe = p + (family == "mixtral" ? "block_sparse_moe." : "mlp.");
    if (family == "gpt_oss") return add_stacked_experts(moe);
    if (family == "qwen3_next") {
      mlp(moe + "shared_expert.", c_.shared_expert_intermediate_size);
      add(moe + "shared_expert_gate.weight", {1, c_.hidden_size});
    }
    add(moe + "gate.weight", {c_.num_experts, c_.hidden_size});
    if (family == "glm4_moe" || family == "deepseek_v3") {
      add(moe + "gate.e_score_correction_bias", {c_.num_experts});
      mlp(moe + "shared_experts.", c_.moe_intermediate_size * c_.shared_experts);
    }
    for (int64_t x = 0; x < c_.num_experts; ++x) {
      mlp(moe + "experts." + std::to_string(x) + ".", c_.moe_intermediate_size);
    }
  }

  void add_attention(const std::string& p) {
    const int64_t q = c_.num_attention_heads * c_.head_dim;
    const int64_t kv = c_.num_key_value_heads * c_.head_dim;
    for (const auto& [name, rows] :
         std::vector<std::pair<const char*, int64_t>>{{"q", q}, {"k", kv}, {"v", kv}}) {
      const std::string linear = fmt::format("{}{}_proj", p, name);
      const bool gated = c_.architecture == "qwen3_next" && name == std::string("q");
      add(linear + ".weight", {gated ? 2 * rows : rows, c_.hidden_size});
      if (has_qkv_bias(c_)) add(linear + ".bias", {rows});
    }
    add(p + "o_proj.weight", {c_.hidden_size, q});
    if (c_.architecture == "gpt_oss") {
      add(p + "o_proj.bias", {c_.hidden_size});
      add(p + "sinks", {c_.num_attention_heads});
    }
    if (has_qk_norm(c_)) {
      add(p + "q_norm.weight", {c_.head_dim});
      add(p + "k_norm.weight", {c_.head_dim});
    }
  }

  void add_linear_attention(const std::string& p) {
    const int64_t keys = c_.linear_key_heads * c_.linear_key_head_dim;
    const int64_t values = c_.linear_value_heads * c_.linear_value_head_dim;
    add(p + "in_proj_qkvz.weight", {2 * keys + 2 * values, c_.hidden_size});
    add(p + "in_proj_ba.weight", {2 * c_.linear_value_heads, c_.hidden_size});
    add(p + "conv1d.weight", {2 * keys + values, 1, c_.linear_conv_kernel});
    add(p + "A_log", {c_.linear_value_heads});
    add(p + "dt_bias", {c_.linear_value_heads});
    add(p + "norm.weight", {c_.linear_value_head_dim});
    add(p + "out_proj.weight", {c_.hidden_size, values});
  }

  void add_stacked_experts(const std::string& p) {
    const int64_t x = c_.num_experts;
    const int64_t h = c_.hidden_size;
    const int64_t width = c_.moe_intermediate_size;
    add(p + "router.weight", {x, h});
    add(p + "router.bias", {x});
    add(p + "experts.gate_up_proj_bias", {x, 2 * width});
    add(p + "experts.down_proj_bias", {x, h});
    if (!c_.packed_experts) {
      add(p + "experts.gate_up_proj", {x, h, 2 * width});
      add(p + "experts.down_proj", {x, width, h});
      return;
    }
    add(p + "experts.gate_up_proj_blocks", {x, 2 * width, h / 32, 16});
    add(p + "experts.gate_up_proj_scales", {x, 2 * width, h / 32});
    add(p + "experts.down_proj_blocks", {x, h, width / 32, 16});
    add(p + "experts.down_proj_scales", {x, h, width / 32});
  }

  void add_latent_attention(const std::string& p) {
    const int64_t heads = c_.num_attention_heads;
    linear(p + "q_a_proj", c_.q_lora_rank, c_.hidden_size);
    add(p + "q_a_layernorm.weight", {c_.q_lora_rank});
    linear(p + "q_b_proj", heads * (c_.qk_nope_head_dim + c_.qk_rope_head_dim), c_.q_lora_rank);
    linear(p + "kv_a_proj_with_mqa", c_.kv_lora_rank + c_.qk_rope_head_dim, c_.hidden_size);
    add(p + "kv_a_layernorm.weight", {c_.kv_lora_rank});
    linear(p + "kv_b_proj", heads * (c_.qk_nope_head_dim + c_.v_head_dim), c_.kv_lora_rank);
    linear(p + "o_proj", c_.hidden_size, heads * c_.v_head_dim);
  }

  const ModelConfig& c_;
  StateDict out_;
  int32_t next_ = 1;
};

}  // namespace

bool has_qkv_bias(const ModelConfig& c) {
  return c.architecture == "qwen2" || c.architecture == "gpt_oss" ||
         (c.architecture == "glm4_moe" && c.attention_bias);
}
bool has_qk_norm(const ModelConfig& c) {
  return c.architecture.starts_with("qwen3") || c.architecture == "gemma3_text" ||
         (c.architecture == "glm4_moe" && c.qk_norm);
}
bool has_experts(const ModelConfig& c, int64_t layer) {
  return c.num_experts > 0 && layer >= c.dense_layers;
}

bool is_linear(const ModelConfig& c, int64_t layer) {
  const auto n = static_cast<size_t>(layer);
  return n < c.linear_layers.size() && c.linear_layers[n];
}

StateDict hf_state(const ModelConfig& c) { return Checkpoint(c).make(); }

}  // namespace transfuse::frameworks

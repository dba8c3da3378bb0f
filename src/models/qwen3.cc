// Qwen3 and Qwen3-MoE: the tensors of their checkpoints and the role of each.
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

// Names and shapes: docs/layouts.md, "Qwen3". Prefixes are added by the callers.
std::vector<ModelTensor> attention(const ModelConfig& c) {
  const int64_t h = c.hidden_size;
  const int64_t d = c.head_dim;
  const int64_t q_heads = c.num_attention_heads;
  const int64_t kv_heads = c.num_key_value_heads;
  const std::string qkv = "self_attn.qkv_proj.weight";
  return {
      {"input_layernorm.weight", {h}},
      {"post_attention_layernorm.weight", {h}},
      {"self_attn.q_proj.weight", {q_heads * d, h}, Split::kHeads, q_heads, qkv},
      {"self_attn.k_proj.weight", {kv_heads * d, h}, Split::kHeads, kv_heads, qkv},
      {"self_attn.v_proj.weight", {kv_heads * d, h}, Split::kHeads, kv_heads, qkv},
      {"self_attn.o_proj.weight", {h, q_heads * d}, Split::kRow},
      {"self_attn.q_norm.weight", {d}},
      {"self_attn.k_norm.weight", {d}},
  };
}

std::vector<ModelTensor> mlp(int64_t hidden, int64_t intermediate) {
  const std::string gate_up = "gate_up_proj.weight";
  return {
      {"gate_proj.weight", {intermediate, hidden}, Split::kColumn, 0, gate_up},
      {"up_proj.weight", {intermediate, hidden}, Split::kColumn, 0, gate_up},
      {"down_proj.weight", {hidden, intermediate}, Split::kRow},
  };
}

void append(std::vector<ModelTensor>& out, const std::string& prefix, std::vector<ModelTensor> more,
            bool expert = false) {
  for (ModelTensor& tensor : more) {
    tensor.name.insert(0, prefix);
    if (!tensor.fused_into.empty()) tensor.fused_into.insert(0, prefix);
    tensor.expert = expert;
    out.push_back(std::move(tensor));
  }
}

template <typename AppendMlp>
std::vector<ModelTensor> decoder(const ModelConfig& c, const AppendMlp& append_mlp) {
  std::vector<ModelTensor> out;
  out.push_back({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, Split::kVocabulary});
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    append(out, prefix, attention(c));
    append_mlp(out, prefix + "mlp.");
  }
  out.push_back({"model.norm.weight", {c.hidden_size}});
  if (!c.tie_word_embeddings) {
    out.push_back({"lm_head.weight", {c.vocab_size, c.hidden_size}, Split::kVocabulary});
  }
  return out;
}

int64_t outer_tensor_count(const ModelConfig& c) { return c.tie_word_embeddings ? 2 : 3; }

int64_t dense_tensor_count(const ModelConfig& c) {
  return c.num_hidden_layers * 11 + outer_tensor_count(c);
}

std::vector<ModelTensor> dense_tensors(const ModelConfig& c) {
  return decoder(c, [&](std::vector<ModelTensor>& out, const std::string& prefix) {
    append(out, prefix, mlp(c.hidden_size, c.intermediate_size));
  });
}

int64_t moe_tensor_count(const ModelConfig& c) {
  return c.num_hidden_layers * (9 + 3 * c.num_experts) + outer_tensor_count(c);
}

std::vector<ModelTensor> moe_tensors(const ModelConfig& c) {
  return decoder(c, [&](std::vector<ModelTensor>& out, const std::string& prefix) {
    out.push_back({prefix + "gate.weight", {c.num_experts, c.hidden_size}});
    for (int64_t expert = 0; expert < c.num_experts; ++expert) {
      append(out, prefix + "experts." + std::to_string(expert) + ".",
             mlp(c.hidden_size, c.moe_intermediate_size), true);
    }
  });
}

// Biases add tensors; a quantised checkpoint has other tensors altogether.
constexpr std::array<RequiredValue, 2> kDenseRequired = {
    {{"attention_bias", "false"}, {"quantization_config", "null"}}};
// The other two make some layers dense.
constexpr std::array<RequiredValue, 4> kMoeRequired = {{{"attention_bias", "false"},
                                                        {"quantization_config", "null"},
                                                        {"decoder_sparse_step", "1"},
                                                        {"mlp_only_layers", "[]"}}};

}  // namespace

// Qwen3Config of transformers 4.57 takes head_dim = 128 where config.json has none; Qwen3MoeConfig
// has no such field and its model divides.
constinit const ModelFamily kQwen3 = {
    .architecture = "qwen3",
    .model_class = "Qwen3ForCausalLM",
    .default_head_dim = 128,
    .required_values = kDenseRequired,
    .tensor_count = dense_tensor_count,
    .tensors = dense_tensors,
};

constinit const ModelFamily kQwen3Moe = {
    .architecture = "qwen3_moe",
    .model_class = "Qwen3MoeForCausalLM",
    .mixture_of_experts = true,
    .required_values = kMoeRequired,
    .tensor_count = moe_tensor_count,
    .tensors = moe_tensors,
};

}  // namespace transfuse

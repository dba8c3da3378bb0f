// The decoder that Llama, Qwen2 and Qwen3 share: one description, a few traits a family chooses.
#include "models/decoder.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

using Tensors = std::vector<ModelTensor>;

// Prefixes are added by the callers.
Tensors attention(const ModelConfig& c, const DecoderTraits& traits) {
  const int64_t h = c.hidden_size;
  const int64_t q_rows = c.num_attention_heads * c.head_dim;
  const int64_t kv_rows = c.num_key_value_heads * c.head_dim;
  Tensors out = {
      {"input_layernorm.weight", {h}, Role::kAttentionNorm},
      {"post_attention_layernorm.weight", {h}, Role::kMlpNorm},
      {"self_attn.q_proj.weight", {q_rows, h}, Role::kQuery},
      {"self_attn.k_proj.weight", {kv_rows, h}, Role::kKey},
      {"self_attn.v_proj.weight", {kv_rows, h}, Role::kValue},
      {"self_attn.o_proj.weight", {h, q_rows}, Role::kAttentionOutput},
  };
  if (traits.qkv_bias) {
    out.push_back({"self_attn.q_proj.bias", {q_rows}, Role::kQuery});
    out.push_back({"self_attn.k_proj.bias", {kv_rows}, Role::kKey});
    out.push_back({"self_attn.v_proj.bias", {kv_rows}, Role::kValue});
  }
  if (traits.qk_norm) {
    out.push_back({"self_attn.q_norm.weight", {c.head_dim}, Role::kQueryNorm});
    out.push_back({"self_attn.k_norm.weight", {c.head_dim}, Role::kKeyNorm});
  }
  return out;
}

Tensors mlp(int64_t hidden, int64_t intermediate) {
  return {
      {"gate_proj.weight", {intermediate, hidden}, Role::kGate},
      {"up_proj.weight", {intermediate, hidden}, Role::kUp},
      {"down_proj.weight", {hidden, intermediate}, Role::kDown},
  };
}

struct Owner {
  std::string prefix;
  int64_t layer;
  int64_t expert = -1;
};

void append(Tensors& out, const Owner& owner, Tensors more) {
  for (ModelTensor& tensor : more) {
    tensor.name.insert(0, owner.prefix);
    tensor.layer = owner.layer;
    tensor.expert = owner.expert;
    out.push_back(std::move(tensor));
  }
}

}  // namespace

int64_t decoder_tensor_count(const ModelConfig& c, const DecoderTraits& traits) {
  const int64_t attention_tensors = 6 + (traits.qkv_bias ? 3 : 0) + (traits.qk_norm ? 2 : 0);
  const int64_t mlp_tensors = traits.experts ? 1 + 3 * c.num_experts : 3;
  return c.num_hidden_layers * (attention_tensors + mlp_tensors) + (c.tie_word_embeddings ? 2 : 3);
}

Tensors decoder_tensors(const ModelConfig& c, const DecoderTraits& traits) {
  Tensors out;
  out.push_back({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, Role::kEmbedding});
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    append(out, {prefix, layer}, attention(c, traits));
    if (!traits.experts) {
      append(out, {prefix + "mlp.", layer}, mlp(c.hidden_size, c.intermediate_size));
      continue;
    }
    append(out, {prefix + "mlp.", layer},
           {{"gate.weight", {c.num_experts, c.hidden_size}, Role::kRouter}});
    for (int64_t expert = 0; expert < c.num_experts; ++expert) {
      append(out, {prefix + "mlp.experts." + std::to_string(expert) + ".", layer, expert},
             mlp(c.hidden_size, c.moe_intermediate_size));
    }
  }
  out.push_back({"model.norm.weight", {c.hidden_size}, Role::kFinalNorm});
  if (!c.tie_word_embeddings) {
    out.push_back({"lm_head.weight", {c.vocab_size, c.hidden_size}, Role::kOutput});
  }
  return out;
}

}  // namespace transfuse

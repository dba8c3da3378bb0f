// The decoder that the families share: one description, a few traits a family chooses.
#include "models/decoder.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"

namespace transfuse {
namespace {

using Tensors = std::vector<ModelTensor>;

// Prefixes are added by the callers.
Tensors qkv_attention(const ModelConfig& c, const DecoderTraits& traits) {
  const int64_t h = c.hidden_size;
  const int64_t q_rows = c.num_attention_heads * c.head_dim;
  const int64_t kv_rows = c.num_key_value_heads * c.head_dim;
  Tensors out = {
      {"q_proj.weight", {traits.output_gate ? 2 * q_rows : q_rows, h}, Role::kQuery},
      {"k_proj.weight", {kv_rows, h}, Role::kKey},
      {"v_proj.weight", {kv_rows, h}, Role::kValue},
      {"o_proj.weight", {h, q_rows}, Role::kAttentionOutput},
  };
  if (traits.output_gate) out[0].turns = {c.head_dim, c.head_dim};
  if (traits.sinks) out.push_back({"sinks", {c.num_attention_heads}, Role::kSinks});
  if (traits.output_bias) {
    out.push_back({"o_proj.bias", {h}, Role::kAttentionOutput, Content::kBias});
  }
  if (traits.qkv_bias) {
    out.push_back({"q_proj.bias", {q_rows}, Role::kQuery, Content::kBias});
    out.push_back({"k_proj.bias", {kv_rows}, Role::kKey, Content::kBias});
    out.push_back({"v_proj.bias", {kv_rows}, Role::kValue, Content::kBias});
  }
  if (traits.qk_norm) {
    out.push_back({"q_norm.weight", {c.head_dim}, Role::kQueryNorm});
    out.push_back({"k_norm.weight", {c.head_dim}, Role::kKeyNorm});
  }
  return out;
}

Tensors latent_attention(const ModelConfig& c) {
  const int64_t h = c.hidden_size;
  const int64_t heads = c.num_attention_heads;
  const int64_t q_rows = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
  const int64_t kv_rows = heads * (c.qk_nope_head_dim + c.v_head_dim);
  return {
      {"q_a_proj.weight", {c.q_lora_rank, h}, Role::kQueryDown},
      {"q_a_layernorm.weight", {c.q_lora_rank}, Role::kQueryDownNorm},
      {"q_b_proj.weight", {q_rows, c.q_lora_rank}, Role::kQueryUp},
      {"kv_a_proj_with_mqa.weight", {c.kv_lora_rank + c.qk_rope_head_dim, h}, Role::kKeyValueDown},
      {"kv_a_layernorm.weight", {c.kv_lora_rank}, Role::kKeyValueDownNorm},
      {"kv_b_proj.weight", {kv_rows, c.kv_lora_rank}, Role::kKeyValueUp},
      {"o_proj.weight", {h, heads * c.v_head_dim}, Role::kAttentionOutput},
  };
}

// Gated delta rule: for every key head its query, its key, and its value heads' values and gates.
Tensors linear_attention(const ModelConfig& c) {
  const int64_t h = c.hidden_size;
  const int64_t keys = c.linear_key_heads * c.linear_key_head_dim;
  const int64_t values = c.linear_value_heads * c.linear_value_head_dim;
  const int64_t heads = c.linear_value_heads / c.linear_key_heads;  // of values, a key head
  const int64_t width = heads * c.linear_value_head_dim;
  Tensors out = {
      {"in_proj_qkvz.weight", {2 * keys + 2 * values, h}, Role::kLinearQkvz},
      {"in_proj_ba.weight", {2 * c.linear_value_heads, h}, Role::kLinearBa},
      {"conv1d.weight", {2 * keys + values, 1, c.linear_conv_kernel}, Role::kLinearConv},
      {"A_log", {c.linear_value_heads}, Role::kLinearDecay},
      {"dt_bias", {c.linear_value_heads}, Role::kLinearStep},
      {"norm.weight", {c.linear_value_head_dim}, Role::kLinearNorm},
      {"out_proj.weight", {h, values}, Role::kLinearOutput},
  };
  out[0].turns = {c.linear_key_head_dim, c.linear_key_head_dim, width, width};
  out[1].turns = {heads, heads};
  out[2].turns = {keys, keys, values};
  return out;
}

Tensors norms(const ModelConfig& c, const DecoderTraits& traits, bool linear, bool experts) {
  const int64_t h = c.hidden_size;
  const Role before = linear                    ? Role::kLinearAttentionNorm
                      : traits.latent_attention ? Role::kLatentAttentionNorm
                                                : Role::kAttentionNorm;
  if (!traits.norms_after) {
    return {
        {"input_layernorm.weight", {h}, before},
        {"post_attention_layernorm.weight", {h}, experts ? Role::kExpertsNorm : Role::kMlpNorm}};
  }
  return {{"input_layernorm.weight", {h}, before},
          {"post_attention_layernorm.weight", {h}, Role::kAfterAttentionNorm},
          {"pre_feedforward_layernorm.weight", {h}, Role::kMlpNorm},
          {"post_feedforward_layernorm.weight", {h}, Role::kAfterMlpNorm}};
}

constexpr std::array<Role, 3> kMlpRoles = {Role::kGate, Role::kUp, Role::kDown};
constexpr std::array<Role, 3> kSharedRoles = {Role::kSharedGate, Role::kSharedUp,
                                              Role::kSharedDown};

Tensors mlp(int64_t hidden, int64_t intermediate, const std::array<std::string_view, 3>& names,
            const std::array<Role, 3>& roles) {
  const auto name = [&](size_t i) { return std::string(names[i]) + ".weight"; };
  return {
      {name(0), {intermediate, hidden}, roles[0]},
      {name(1), {intermediate, hidden}, roles[1]},
      {name(2), {hidden, intermediate}, roles[2]},
  };
}

bool is_linear(const ModelTensor& tensor) {
  constexpr std::array<Role, 5> kInFullPrecision = {
      Role::kRouter, Role::kMtpProjection, Role::kMtpEmbedding, Role::kMtpOutput, Role::kEmbedding};
  return tensor.shape.rank() == 2 &&
         std::ranges::find(kInFullPrecision, tensor.role) == kInFullPrecision.end();
}

// Collects the tensors of a decoder, layer by layer. Used from one thread.
class Decoder {
 public:
  Decoder(const ModelConfig& config, const DecoderTraits& traits) : c_(config), traits_(traits) {}

  Tensors build() {
    const Dims vocabulary = {c_.vocab_size, c_.hidden_size};
    out_.push_back({"model.embed_tokens.weight", vocabulary, Role::kEmbedding});
    for (int64_t layer = 0; layer < c_.num_hidden_layers; ++layer) add_layer(layer);
    out_.push_back({"model.norm.weight", {c_.hidden_size}, Role::kFinalNorm});
    if (!c_.tie_word_embeddings) {
      out_.push_back({"lm_head.weight", vocabulary, Role::kOutput});
    }
    for (int64_t layer = 0; layer < c_.mtp_layers; ++layer) {
      add_mtp(c_.num_hidden_layers + layer);
    }
    return std::move(out_);
  }

 private:
  std::string prefix(int64_t layer) const {
    const bool mtp = traits_.mtp_module && layer >= c_.num_hidden_layers;
    return mtp ? "mtp.layers." + std::to_string(layer - c_.num_hidden_layers) + "."
               : "model.layers." + std::to_string(layer) + ".";
  }

  void add_layer(int64_t layer) {
    const bool experts = traits_.experts && layer >= c_.dense_layers;
    const auto at = static_cast<size_t>(layer);
    const bool linear = at < c_.linear_layers.size() && c_.linear_layers[at];
    append(prefix(layer), layer, norms(c_, traits_, linear, experts));
    append(prefix(layer) + (linear ? "linear_attn." : "self_attn."), layer,
           linear                     ? linear_attention(c_)
           : traits_.latent_attention ? latent_attention(c_)
                                      : qkv_attention(c_, traits_));
    if (experts) return add_experts(layer);
    append(prefix(layer) + "mlp.", layer,
           mlp(c_.hidden_size, c_.intermediate_size, DecoderTraits{}.expert_matrices, kMlpRoles));
  }

  void add_experts(int64_t layer) {
    const std::string module = prefix(layer) + std::string(traits_.experts_module) + ".";
    if (traits_.stacked_experts != nullptr) {
      return append(module, layer, traits_.stacked_experts(c_));
    }
    append(module, layer, {{"gate.weight", {c_.num_experts, c_.hidden_size}, Role::kRouter}});
    if (traits_.router_bias) {
      append(module, layer,
             {{"gate.e_score_correction_bias",
               {c_.num_experts},
               Role::kRouterBias,
               Content::kBias,
               Dtype::kF32}});
    }
    for (int64_t expert = 0; expert < c_.num_experts; ++expert) {
      append(module + "experts." + std::to_string(expert) + ".", layer,
             mlp(c_.hidden_size, c_.moe_intermediate_size, traits_.expert_matrices, kMlpRoles),
             expert);
    }
    if (traits_.shared_expert) {
      append(module + "shared_expert.", layer,
             mlp(c_.hidden_size, c_.shared_expert_intermediate_size,
                 DecoderTraits{}.expert_matrices, kSharedRoles));
      append(module, layer,
             {{"shared_expert_gate.weight", {1, c_.hidden_size}, Role::kSharedRouter}});
    }
    if (c_.shared_experts == 0) return;
    append(module + "shared_experts.", layer,
           mlp(c_.hidden_size, c_.shared_experts * c_.moe_intermediate_size,
               DecoderTraits{}.expert_matrices, kSharedRoles));
  }

  // A layer that predicts a further token, from the embedding of one and the hidden state before.
  void add_mtp(int64_t layer) {
    const int64_t h = c_.hidden_size;
    if (traits_.mtp_module) {
      append("mtp.", layer,
             {{"pre_fc_norm_embedding.weight", {h}, Role::kMtpEmbeddingNorm},
              {"pre_fc_norm_hidden.weight", {h}, Role::kMtpHiddenNorm},
              {"fc.weight", {h, 2 * h}, Role::kMtpProjection},
              {"norm.weight", {h}, Role::kMtpFinalNorm}});
      return add_layer(layer);
    }
    append(prefix(layer), layer,
           {{"embed_tokens.weight", {c_.vocab_size, h}, Role::kMtpEmbedding},
            {"enorm.weight", {h}, Role::kMtpEmbeddingNorm},
            {"hnorm.weight", {h}, Role::kMtpHiddenNorm},
            {"eh_proj.weight", {h, 2 * h}, Role::kMtpProjection}});
    add_layer(layer);
    append(prefix(layer) + "shared_head.", layer,
           {{"norm.weight", {h}, Role::kMtpFinalNorm},
            {"head.weight", {c_.vocab_size, h}, Role::kMtpOutput}});
  }

  void append(const std::string& prefix, int64_t layer, Tensors more, int64_t expert = -1) {
    for (ModelTensor& tensor : more) {
      tensor.name.insert(0, prefix);
      tensor.layer = layer;
      tensor.expert = expert;
      const bool scaled = c_.scale_block_rows > 0 && is_linear(tensor);
      if (scaled) tensor.dtype = Dtype::kF8E4M3;
      out_.push_back(std::move(tensor));
      if (scaled) out_.push_back(scales_of(out_.back()));
    }
  }

  ModelTensor scales_of(const ModelTensor& weight) const {
    const int64_t rows = c_.scale_block_rows;
    const int64_t columns = c_.scale_block_columns;
    ModelTensor scales = weight;
    scales.name += kScaleSuffix;
    scales.content = Content::kScale;
    scales.dtype = Dtype::kF32;
    scales.weight_shape = weight.shape;
    scales.block = {rows, columns};
    scales.shape = {(weight.shape[0] + rows - 1) / rows, (weight.shape[1] + columns - 1) / columns};
    return scales;
  }

  const ModelConfig& c_;
  const DecoderTraits& traits_;
  Tensors out_;
};

}  // namespace

Tensors decoder_tensors(const ModelConfig& config, const DecoderTraits& traits) {
  return Decoder(config, traits).build();
}

}  // namespace transfuse

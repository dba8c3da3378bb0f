// Megatron-Core ranks as its initialisation and a checkpoint bridge make them: groups from mixed
// radix digits, layer offsets from the pipeline sizes, weights reshaped by query group.
#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "layouts/frameworks.h"
#include "layouts/tensor.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::frameworks {
namespace {

// Digits of `rank` in the given radices, fastest first (RankGenerator with order tp-cp-ep-dp-pp).
std::vector<int64_t> digits(int64_t rank, const std::vector<int64_t>& radices) {
  std::vector<int64_t> out;
  for (const int64_t radix : radices) {
    out.push_back(rank % radix);
    rank /= radix;
  }
  return out;
}

class MegatronProcess {
 public:
  MegatronProcess(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                  int64_t rank)
      : c_(config), hf_(hf), spec_(spec) {
    etp_size_ = spec.etp > 0 ? spec.etp : spec.tp;
    int64_t stage = std::lcm(spec.tp * spec.cp, spec.ep * etp_size_);
    if (spec.tp * spec.cp * spec.dp > stage) stage = spec.tp * spec.cp * spec.dp;
    const auto dense = digits(rank, {spec.tp, spec.cp, stage / (spec.tp * spec.cp), spec.pp});
    const auto expert = digits(rank, {etp_size_, spec.ep, stage / (etp_size_ * spec.ep), spec.pp});
    tp_rank_ = dense[0];
    pp_rank_ = dense[3];
    etp_rank_ = expert[0];
    ep_rank_ = expert[1];
    TRANSFUSE_CHECK(expert[3] == pp_rank_);
  }

  StateDict load() {
    for (int64_t chunk = 0; chunk < spec_.vpp; ++chunk) {
      chunk_ = spec_.vpp > 1 ? std::to_string(chunk) + ":" : "";
      const bool first = pp_rank_ == 0 && chunk == 0;
      const bool last = pp_rank_ == spec_.pp - 1 && chunk == spec_.vpp - 1;
      const Tensor& embedding = hf_.at("model.embed_tokens.weight");
      if (first) set("embedding.word_embeddings.weight", vocabulary(embedding));
      if (last) {
        set("decoder.final_layernorm.weight", hf_.at("model.norm.weight"));
        if (!c_.tie_word_embeddings) {
          set("output_layer.weight", vocabulary(hf_.at("lm_head.weight")));
        } else if (!first) {
          // The first and the last stage each hold the shared weight.
          set("output_layer.weight", vocabulary(embedding));
        }
        load_mtp(first);
      }
      for (int64_t local = 0; local < layers_to_build(chunk); ++local) {
        load_layer("decoder.layers." + std::to_string(local) + ".", layer_offset(chunk) + local);
      }
    }
    return out_;
  }

 private:
  void set(const std::string& name, const Tensor& value) {
    TRANSFUSE_CHECK(out_.emplace(chunk_ + name, value).second);
  }

  // get_num_layers_to_build
  int64_t layers_to_build(int64_t chunk) const {
    if (!spec_.layers.empty()) {
      return spec_.layers[static_cast<size_t>(chunk * spec_.pp + pp_rank_)];
    }
    int64_t layers = c_.num_hidden_layers;
    int64_t stages = spec_.pp;
    if (spec_.first > 0) {
      layers -= spec_.first;
      --stages;
    }
    if (spec_.last > 0) {
      layers -= spec_.last;
      --stages;
    }
    int64_t mine = stages > 0 ? layers / stages : 0;
    if (pp_rank_ == 0 && spec_.first > 0) mine = spec_.first;
    if (pp_rank_ == spec_.pp - 1 && spec_.last > 0) mine = spec_.last;
    return mine / spec_.vpp;
  }

  // get_transformer_layer_offset
  int64_t layer_offset(int64_t chunk) const {
    if (!spec_.layers.empty()) {
      const auto end = spec_.layers.begin() + chunk * spec_.pp + pp_rank_;
      return std::accumulate(spec_.layers.begin(), end, int64_t{0});
    }
    const int64_t first = spec_.first / spec_.vpp;
    const int64_t last = spec_.last / spec_.vpp;
    const int64_t middle = (c_.num_hidden_layers - spec_.first - spec_.last) / spec_.vpp;
    const int64_t before = spec_.first > 0 ? 1 : 0;
    const int64_t stages = spec_.pp - before - (spec_.last > 0 ? 1 : 0);
    const int64_t start = chunk * (first + middle + last);
    if (pp_rank_ == 0) return start;
    return start + first + (stages > 0 ? (pp_rank_ - before) * (middle / stages) : 0);
  }

  Tensor vocabulary(const Tensor& weight) const {
    if (spec_.tp == 1) return weight;
    const int64_t multiple = spec_.vocab_divisor * spec_.tp;
    int64_t rows = weight.shape[0];
    while (rows % multiple != 0) ++rows;
    return weight.padded(rows).chunk(spec_.tp, tp_rank_, 0);
  }

  // merge_qkv_weights / merge_qkv_biases of the bridge, then one column-parallel scatter.
  Tensor qkv(const std::string& attention, const std::string& kind) const {
    const int64_t groups = c_.num_key_value_heads;
    const int64_t per_group = c_.num_attention_heads / groups;
    const int64_t width = kind == "bias" ? 1 : c_.hidden_size;
    const auto heads = [&](const char* name, int64_t count) {
      return hf_.at(attention + name + "_proj." + kind).view({groups, count, c_.head_dim, width});
    };
    const Tensor merged = cat({heads("q", per_group), heads("k", 1), heads("v", 1)}, 1);
    const int64_t rows = groups * (per_group + 2) * c_.head_dim;
    TRANSFUSE_CHECK(rows % spec_.tp == 0);
    const Tensor flat = kind == "bias" ? merged.view({rows}) : merged.view({rows, width});
    return flat.chunk(spec_.tp, tp_rank_, 0);
  }

  // QKVMapping with attention_output_gate: a head of the checkpoint is its queries, then its gates.
  Tensor gated_qkv(const std::string& attention) const {
    const int64_t groups = c_.num_key_value_heads;
    const int64_t per_group = c_.num_attention_heads / groups;
    const int64_t h = c_.hidden_size;
    const Tensor q =
        hf_.at(attention + "q_proj.weight").view({c_.num_attention_heads, 2, c_.head_dim, h});
    const auto heads = [&](int64_t which) {
      return q.narrow(1, which, 1).view({groups, per_group, c_.head_dim, h});
    };
    const auto single = [&](const char* name) {
      return hf_.at(attention + name + "_proj.weight").view({groups, 1, c_.head_dim, h});
    };
    const Tensor merged = cat({heads(0), heads(1), single("k"), single("v")}, 1);
    return merged.view({groups * (2 * per_group + 2) * c_.head_dim, h})
        .chunk(spec_.tp, tp_rank_, 0);
  }

  // merge_gdn_linear_weights: every part's heads cut evenly over the ranks.
  Tensor in_proj(const std::string& from) const {
    const int64_t keys = c_.linear_key_heads;
    const int64_t h = c_.hidden_size;
    const int64_t heads = c_.linear_value_heads / keys;
    const int64_t width = heads * c_.linear_value_head_dim;
    const int64_t dim = c_.linear_key_head_dim;
    std::vector<Tensor> parts;
    const auto split = [&](const Tensor& all, const std::vector<int64_t>& sizes) {
      const Tensor by_head = all.view({keys, all.shape[0] / keys, h});
      int64_t begin = 0;
      for (const int64_t size : sizes) {
        parts.push_back(
            by_head.narrow(1, begin, size).view({keys * size, h}).chunk(spec_.tp, tp_rank_, 0));
        begin += size;
      }
    };
    split(hf_.at(from + "in_proj_qkvz.weight"), {dim, dim, width, width});
    split(hf_.at(from + "in_proj_ba.weight"), {heads, heads});
    return cat(parts, 0);
  }

  void load_linear_attention(const std::string& to, const std::string& from) {
    set(to + "in_proj.weight", in_proj(from));
    const int64_t keys = c_.linear_key_heads * c_.linear_key_head_dim;
    const int64_t values = c_.linear_value_heads * c_.linear_value_head_dim;
    const Tensor& conv = hf_.at(from + "conv1d.weight");
    set(to + "conv1d.weight", cat({conv.narrow(0, 0, keys).chunk(spec_.tp, tp_rank_, 0),
                                   conv.narrow(0, keys, keys).chunk(spec_.tp, tp_rank_, 0),
                                   conv.narrow(0, 2 * keys, values).chunk(spec_.tp, tp_rank_, 0)},
                                  0));
    for (const char* name : {"A_log", "dt_bias"}) {
      set(to + name, hf_.at(from + name).chunk(spec_.tp, tp_rank_, 0));
    }
    set(to + "out_norm.weight_plus_one", hf_.at(from + "norm.weight"));
    set(to + "out_proj.weight", hf_.at(from + "out_proj.weight").chunk(spec_.tp, tp_rank_, 1));
  }

  // Each rank's part of gate and of up, one after the other.
  Tensor gated(const std::string& mlp, int64_t size, int64_t rank) const {
    const bool mixtral = c_.architecture == "mixtral";
    return cat({hf_.at(mlp + (mixtral ? "w1" : "gate_proj") + ".weight").chunk(size, rank, 0),
                hf_.at(mlp + (mixtral ? "w3" : "up_proj") + ".weight").chunk(size, rank, 0)},
               0);
  }
  Tensor down(const std::string& mlp, int64_t size, int64_t rank) const {
    const bool mixtral = c_.architecture == "mixtral";
    return hf_.at(mlp + (mixtral ? "w2" : "down_proj") + ".weight").chunk(size, rank, 1);
  }

  void load_layer(const std::string& to, int64_t global) {
    load_layer(to, global, "model.layers." + std::to_string(global) + ".");
  }
  void load_layer(const std::string& to, int64_t global, const std::string& from) {
    const std::string attention = from + "self_attn.";
    const bool linear = is_linear(c_, global);
    const bool moe = has_experts(c_, global);
    const bool gemma = c_.architecture == "gemma3_text";
    const bool latent = c_.architecture == "deepseek_v3";
    const bool fused_norms = !spec_.separate_norms;
    set(to + (!fused_norms || latent ? "input_layernorm.weight"
              : linear               ? "self_attention.in_proj.layer_norm_weight"
                                     : "self_attention.linear_qkv.layer_norm_weight"),
        hf_.at(from + "input_layernorm.weight"));
    if (linear) {
      load_linear_attention(to + "self_attention.", from + "linear_attn.");
    } else if (c_.architecture == "qwen3_next") {
      set(to + "self_attention.linear_qkv.weight", gated_qkv(attention));
    } else if (latent) {
      load_latent_attention(to + "self_attention.", attention);
    } else {
      set(to + "self_attention.linear_qkv.weight", qkv(attention, "weight"));
    }
    if (has_qkv_bias(c_)) set(to + "self_attention.linear_qkv.bias", qkv(attention, "bias"));
    if (c_.architecture == "gpt_oss") {
      set(to + "self_attention.linear_proj.bias", hf_.at(attention + "o_proj.bias"));
      set(to + "self_attention.core_attention.softmax_offset",
          hf_.at(attention + "sinks").chunk(spec_.tp, tp_rank_, 0));
    }
    if (has_qk_norm(c_) && !linear) {
      set(to + "self_attention.q_layernorm.weight", hf_.at(attention + "q_norm.weight"));
      set(to + "self_attention.k_layernorm.weight", hf_.at(attention + "k_norm.weight"));
    }
    if (!linear) {
      set(to + "self_attention.linear_proj.weight",
          hf_.at(attention + "o_proj.weight").chunk(spec_.tp, tp_rank_, 1));
    }
    // In a layer of experts the norm cannot be fused: it comes before the router too.
    set(to +
            (fused_norms && !moe ? "mlp.linear_fc1.layer_norm_weight" : "pre_mlp_layernorm.weight"),
        hf_.at(from + (gemma ? "pre_feedforward" : "post_attention") + "_layernorm.weight"));
    if (gemma) {
      set(to + "self_attention.linear_proj.post_layernorm.weight",
          hf_.at(from + "post_attention_layernorm.weight"));
      set(to + "mlp.linear_fc2.post_layernorm.weight",
          hf_.at(from + "post_feedforward_layernorm.weight"));
    }
    if (moe) {
      return load_experts(to + "mlp.",
                          from + (c_.architecture == "mixtral" ? "block_sparse_moe." : "mlp."));
    }
    set(to + "mlp.linear_fc1.weight", gated(from + "mlp.", spec_.tp, tp_rank_));
    set(to + "mlp.linear_fc2.weight", down(from + "mlp.", spec_.tp, tp_rank_));
  }

  // The linears down are duplicated by TransformerEngine's, column parallel without it.
  void load_latent_attention(const std::string& to, const std::string& from) {
    for (const char* x : {"q", "kv"}) {
      const bool q = std::string(x) == "q";
      const Tensor& down = hf_.at(from + (q ? "q_a_proj.weight" : "kv_a_proj_with_mqa.weight"));
      set(fmt::format("{}linear_{}_down_proj.weight", to, x),
          spec_.separate_norms ? down.chunk(spec_.tp, tp_rank_, 0) : down);
      set(fmt::format("{}linear_{}_up_proj.weight", to, x),
          hf_.at(from + (q ? "q_b_proj.weight" : "kv_b_proj.weight")).chunk(spec_.tp, tp_rank_, 0));
      set(spec_.separate_norms ? fmt::format("{}{}_layernorm.weight", to, x)
                               : fmt::format("{}linear_{}_up_proj.layer_norm_weight", to, x),
          hf_.at(from + (q ? "q_a_layernorm.weight" : "kv_a_layernorm.weight")));
    }
  }

  void load_experts(const std::string& to, const std::string& from) {
    if (c_.architecture == "gpt_oss") return load_stacked_experts(to, from);
    set(to + "router.weight", hf_.at(from + "gate.weight"));
    if (c_.architecture == "qwen3_next") {
      set(to + "shared_experts.linear_fc1.weight",
          gated(from + "shared_expert.", spec_.tp, tp_rank_));
      set(to + "shared_experts.linear_fc2.weight",
          down(from + "shared_expert.", spec_.tp, tp_rank_));
      set(to + "shared_experts.gate_weight", hf_.at(from + "shared_expert_gate.weight"));
    }
    const auto bias = hf_.find(from + "gate.e_score_correction_bias");
    if (bias != hf_.end()) set(to + "router.expert_bias", bias->second);
    if (c_.shared_experts > 0) {
      set(to + "shared_experts.linear_fc1.weight",
          gated(from + "shared_experts.", spec_.tp, tp_rank_));
      set(to + "shared_experts.linear_fc2.weight",
          down(from + "shared_experts.", spec_.tp, tp_rank_));
    }
    const int64_t held = c_.num_experts / spec_.ep;
    for (int64_t local = 0; local < held; ++local) {
      const std::string expert = fmt::format("{}experts.{}.", from, ep_rank_ * held + local);
      const auto name = [&](const char* linear) {
        return spec_.sequential_experts
                   ? fmt::format("{}experts.local_experts.{}.{}.weight", to, local, linear)
                   : fmt::format("{}experts.{}.weight{}", to, linear, local);
      };
      set(name("linear_fc1"), gated(expert, etp_size_, etp_rank_));
      set(name("linear_fc2"), down(expert, etp_size_, etp_rank_));
    }
  }

  // GPTOSSMLPGateUpProjMapping, GPTOSSMLPDownProjMapping: [in, out] becomes [out, in], then every
  // second row is gate, then every second row is up.
  void load_stacked_experts(const std::string& to, const std::string& from) {
    set(to + "router.weight", hf_.at(from + "router.weight"));
    set(to + "router.bias", hf_.at(from + "router.bias"));
    TRANSFUSE_CHECK(etp_size_ == 1);
    const int64_t held = c_.num_experts / spec_.ep;
    for (int64_t local = 0; local < held; ++local) {
      for (const char* kind : {"weight", "bias"}) {
        const bool bias = kind == std::string("bias");
        const auto expert = [&](const char* name) {
          const Tensor one = hf_.at(fmt::format("{}experts.{}{}", from, name, bias ? "_bias" : ""))
                                 .narrow(0, ep_rank_ * held + local, 1);
          return bias ? one.view({one.shape[1], 1})
                      : one.transposed().view({one.shape[2], one.shape[1]});
        };
        const auto name = [&](const char* linear) {
          return spec_.sequential_experts
                     ? fmt::format("{}experts.local_experts.{}.{}.{}", to, local, linear, kind)
                     : fmt::format("{}experts.{}.{}{}", to, linear, kind, local);
        };
        const Tensor both = expert("gate_up_proj");
        std::vector<Tensor> rows;
        for (const int64_t first : {0, 1}) {
          for (int64_t row = first; row < both.shape[0]; row += 2) {
            rows.push_back(both.narrow(0, row, 1));
          }
        }
        set(name("linear_fc1"), cat(rows, 0));
        set(name("linear_fc2"), expert("down_proj"));
      }
    }
  }

  // On the last stage, which has an embedding for them. The output is the model's.
  void load_mtp(bool has_embedding) {
    if (c_.mtp_layers == 0 || spec_.mtp == MtpTensors::kNone) return;
    if (!has_embedding) {
      set("embedding.word_embeddings.weight", vocabulary(hf_.at("model.embed_tokens.weight")));
    }
    for (int64_t k = 0; k < c_.mtp_layers; ++k) {
      const std::string to = fmt::format("mtp.layers.{}.", k);
      if (c_.architecture == "qwen3_next") {
        set(to + "enorm.weight", hf_.at("mtp.pre_fc_norm_embedding.weight"));
        set(to + "hnorm.weight", hf_.at("mtp.pre_fc_norm_hidden.weight"));
        set(to + "eh_proj.weight", hf_.at("mtp.fc.weight").chunk(spec_.tp, tp_rank_, 0));
        set(to + "final_layernorm.weight", hf_.at("mtp.norm.weight"));
        load_layer(to + "mtp_model_layer.", c_.num_hidden_layers + k,
                   fmt::format("mtp.layers.{}.", k));
        continue;
      }
      const std::string from = fmt::format("model.layers.{}.", c_.num_hidden_layers + k);
      set(to + "enorm.weight", hf_.at(from + "enorm.weight"));
      set(to + "hnorm.weight", hf_.at(from + "hnorm.weight"));
      set(to + "eh_proj.weight", hf_.at(from + "eh_proj.weight").chunk(spec_.tp, tp_rank_, 0));
      set(to + "final_layernorm.weight", hf_.at(from + "shared_head.norm.weight"));
      load_layer(to + "mtp_model_layer.", c_.num_hidden_layers + k);
    }
  }

  const ModelConfig& c_;
  const StateDict& hf_;
  const ParallelSpec& spec_;
  int64_t etp_size_ = 1;
  int64_t tp_rank_ = 0;
  int64_t pp_rank_ = 0;
  int64_t etp_rank_ = 0;
  int64_t ep_rank_ = 0;
  std::string chunk_;
  StateDict out_;
};

}  // namespace

StateDict megatron_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                         int64_t rank) {
  return MegatronProcess(config, hf, spec, rank).load();
}

}  // namespace transfuse::frameworks

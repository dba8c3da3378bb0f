// SGLang's workers: parameters are made as its classes make them, and every tensor of the
// checkpoint goes through the weight_loader of its parameter.
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

// A group that cuts a layer.
struct Group {
  int64_t rank = 0;
  int64_t size = 1;
};

class SglangWorker {
 public:
  SglangWorker(const ModelConfig& config, const ParallelSpec& spec, int64_t rank)
      : c_(config), spec_(spec) {
    make_groups(rank);
    // get_pp_indices: the last stages have one more.
    const int64_t base = c_.num_hidden_layers / spec_.pp;
    const int64_t fewer = spec_.pp - c_.num_hidden_layers % spec_.pp;
    for (int64_t p = 0; p < spec_.pp; ++p) {
      int64_t count = p < fewer ? base : base + 1;
      if (!spec_.layers.empty()) count = spec_.layers[static_cast<size_t>(p)];
      if (p < pp_.rank) start_layer_ += count;
      if (p == pp_.rank) end_layer_ = start_layer_ + count;
    }
  }

  StateDict load(const StateDict& hf) {
    for (const auto& [name, tensor] : hf) load_one(name, tensor);
    return std::move(parameters_);
  }

 private:
  // initialize_model_parallel: ranks are counted off group by group.
  void make_groups(int64_t rank) {
    pp_ = {rank / spec_.tp, spec_.pp};
    tp_ = {rank % spec_.tp, spec_.tp};
    int64_t counted = 0;
    const int64_t attn_tp = spec_.tp / spec_.dp / spec_.cp;
    for (int64_t replica = 0; replica < spec_.dp * spec_.cp; ++replica) {
      for (int64_t t = 0; t < attn_tp; ++t) {
        if (counted++ == tp_.rank) attn_tp_ = {t, attn_tp};
      }
    }
    counted = 0;
    const int64_t moe_tp = spec_.etp > 0 ? spec_.etp : spec_.tp / spec_.ep;
    for (int64_t moe_dp = 0; moe_dp < spec_.tp / (spec_.ep * moe_tp); ++moe_dp) {
      for (int64_t e = 0; e < spec_.ep; ++e) {
        for (int64_t t = 0; t < moe_tp; ++t) {
          if (counted++ != tp_.rank) continue;
          moe_ep_ = {e, spec_.ep};
          moe_tp_ = {t, moe_tp};
        }
      }
    }
    TRANSFUSE_CHECK(counted == spec_.tp);
  }

  bool is(const char* family) const { return c_.architecture == family; }

  Tensor& parameter(const std::string& name, const std::vector<int64_t>& shape) {
    const auto [at, fresh] = parameters_.try_emplace(name);
    if (fresh) at->second = Tensor::zeros(shape);
    TRANSFUSE_CHECK(at->second.shape == shape);
    return at->second;
  }

  static Tensor part(const Tensor& tensor, int dim, Group group) {
    const int64_t length = tensor.shape[static_cast<size_t>(dim)];
    TRANSFUSE_CHECK(length % group.size == 0);
    return tensor.narrow(dim, group.rank * (length / group.size), length / group.size);
  }

  // "a.b.c.weight" -> "c"
  static std::string module_of(const std::string& name) {
    const std::string path = name.substr(0, name.rfind('.'));
    return path.substr(path.rfind('.') + 1);
  }
  static std::string in_module(std::string name, const std::string& module) {
    const std::string old = module_of(name);
    return name.replace(name.rfind('.') - old.size(), old.size(), module);
  }

  void load_one(const std::string& name, const Tensor& tensor) {
    if (!name.starts_with("model.layers.")) return load_outer(name, tensor);
    const int64_t layer = std::stoll(name.substr(13));
    if (layer < start_layer_ || layer >= end_layer_) return;
    const bool bias = name.ends_with("e_score_correction_bias");
    if (bias && is("deepseek_v3") && !c_.noaux_routing) return;
    if (name.find(".experts.") != std::string::npos) return load_expert(name, layer, tensor);
    const bool shared = name.find(".shared_experts.") != std::string::npos;
    if (shared && spec_.shared == SharedExperts::kFused) return load_fused_shared(name, tensor);
    Group mlp = spec_.whole_dense ? Group{} : tp_;
    if (shared) mlp = spec_.shared == SharedExperts::kWhole ? Group{} : tp_;
    const std::string module = module_of(name);
    if (module == "q_proj" || module == "k_proj" || module == "v_proj") {
      return load_qkv(in_module(name, "qkv_proj"), module[0], tensor);
    }
    if (module == "gate_proj" || module == "up_proj") {
      const Tensor shard = part(tensor, 0, mlp);
      parameter(in_module(name, "gate_up_proj"), {2 * shard.shape[0], shard.shape[1]})
          .copy_into(0, module == "up_proj" ? shard.shape[0] : 0, shard);
      return;
    }
    if (module == "q_a_proj" || module == "kv_a_proj_with_mqa") return cache_a_proj(name, tensor);
    if (module == "q_b_proj" || module == "kv_b_proj") {
      parameters_[name] = part(tensor, 0, attn_tp_);
    } else if (module == "o_proj") {
      parameters_[name] = part(tensor, 1, attn_tp_);
    } else if (module == "down_proj") {
      parameters_[name] = part(tensor, 1, mlp);
    } else {
      parameters_[name] = tensor;
    }
  }

  // Waits for the other one, then torch.cat([q_a_proj, kv_a_proj], dim=0).
  void cache_a_proj(const std::string& name, const Tensor& tensor) {
    cached_[name] = tensor;
    const auto q = cached_.find(in_module(name, "q_a_proj"));
    const auto kv = cached_.find(in_module(name, "kv_a_proj_with_mqa"));
    if (q == cached_.end() || kv == cached_.end()) return;
    parameters_[in_module(name, "fused_qkv_a_proj_with_mqa")] = cat({q->second, kv->second}, 0);
  }

  void load_outer(const std::string& name, const Tensor& tensor) {
    const bool first = pp_.rank == 0;
    const bool last = pp_.rank == pp_.size - 1;
    if (name == "model.norm.weight") {
      if (last) parameters_[name] = tensor;
      return;
    }
    const bool head_everywhere = is("llama") || is("qwen3_moe") || is("mixtral") || is("glm4_moe");
    const bool has_head = last || head_everywhere;
    const Group head = spec_.output_by_attention ? attn_tp_ : tp_;
    if (name == "lm_head.weight") {
      if (has_head) parameters_[name] = vocabulary(tensor, head);
      return;
    }
    if (is("gemma3_text")) {  // an nn.Embedding
      parameters_[name] = tensor;
      return;
    }
    const bool by_attention = spec_.dp > 1;
    if (first) parameters_[name] = vocabulary(tensor, by_attention ? attn_tp_ : tp_);
    if (!c_.tie_word_embeddings || !has_head) return;
    const bool never_shared = is("qwen3_moe") || is("mixtral") || is("glm4_moe");
    const bool shared_here = !is("llama") && pp_.size > 1;
    if (never_shared || shared_here) parameters_["lm_head.weight"] = vocabulary(tensor, head);
  }

  // pad_vocab_size, and wider where the ranks do not divide that.
  static Tensor vocabulary(const Tensor& tensor, Group group) {
    int64_t padding = 64;
    if ((tensor.shape[0] + padding - 1) / padding * padding % group.size != 0) {
      padding *= group.size;
    }
    return part(tensor.padded((tensor.shape[0] + padding - 1) / padding * padding), 0, group);
  }

  // QKVParallelLinear.weight_loader
  void load_qkv(const std::string& name, char shard_id, const Tensor& tensor) {
    const int64_t size = attn_tp_.size;
    const int64_t heads = c_.num_attention_heads / size;
    const bool replicated = size >= c_.num_key_value_heads;
    const int64_t kv_heads = replicated ? 1 : c_.num_key_value_heads / size;
    const int64_t replicas = replicated ? size / c_.num_key_value_heads : 1;
    const int64_t head_rows =
        tensor.shape[0] / (shard_id == 'q' ? c_.num_attention_heads : c_.num_key_value_heads);
    std::vector<int64_t> shape = tensor.shape;
    shape[0] = (heads + 2 * kv_heads) * head_rows;
    const int64_t shard = (shard_id == 'q' ? heads : kv_heads) * head_rows;
    const int64_t rank = shard_id == 'q' ? attn_tp_.rank : attn_tp_.rank / replicas;
    const int64_t offset = shard_id == 'q'   ? 0
                           : shard_id == 'k' ? heads * head_rows
                                             : (heads + kv_heads) * head_rows;
    parameter(name, shape).copy_into(0, offset, tensor.narrow(0, rank * shard, shard));
  }

  // FusedMoE.weight_loader: every physical copy that this rank stores.
  void load_expert(const std::string& name, int64_t layer, const Tensor& tensor) {
    const size_t at = name.find(".experts.");
    const int64_t logical = std::stoll(name.substr(at + 9));
    const auto physical = physical_experts(c_, spec_, layer);
    const auto held = static_cast<int64_t>(physical.size()) / moe_ep_.size;
    for (size_t id = 0; id < physical.size(); ++id) {
      const int64_t local = static_cast<int64_t>(id) - moe_ep_.rank * held;
      if (physical[id] != logical || local < 0 || local >= held) continue;
      load_physical(name, name.substr(0, at), local, tensor);
    }
  }

  // mlp.shared_experts becomes mlp.experts.{n_routed_experts}, behind the routed ones of each rank.
  void load_fused_shared(const std::string& name, const Tensor& tensor) {
    const int64_t held = (c_.num_experts + spec_.redundant) / moe_ep_.size;
    load_physical(name, name.substr(0, name.find(".shared_experts.")), held, tensor);
  }

  void load_physical(const std::string& name, const std::string& block, int64_t local,
                     const Tensor& tensor) {
    const std::string module = module_of(name);
    const bool down = module == "down_proj" || module == "w2";
    const bool up = module == "up_proj" || module == "w3";
    const int64_t count = (c_.num_experts + spec_.redundant) / moe_ep_.size +
                          (spec_.shared == SharedExperts::kFused ? 1 : 0);
    const Tensor shard = part(tensor, down ? 1 : 0, moe_tp_);
    const std::string suffix = "_" + name.substr(name.rfind('.') + 1);
    const std::string stack_name = block + ".experts." + (down ? "w2" : "w13") + suffix;
    Tensor& stack =
        parameter(stack_name, {count, down ? shard.shape[0] : 2 * shard.shape[0], shard.shape[1]});
    Tensor one = stack.narrow(0, local, 1).view({stack.shape[1], stack.shape[2]});
    one.copy_into(0, !down && up != spec_.up_before_gate ? shard.shape[0] : 0, shard);
    stack.copy_into(0, local, one.view({1, stack.shape[1], stack.shape[2]}));
  }

  const ModelConfig& c_;
  const ParallelSpec& spec_;
  Group pp_;
  Group tp_;
  Group attn_tp_;
  Group moe_ep_;
  Group moe_tp_;
  int64_t start_layer_ = 0;
  int64_t end_layer_ = 0;
  StateDict cached_;
  StateDict parameters_;
};

}  // namespace

StateDict sglang_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                       int64_t rank) {
  return SglangWorker(config, spec, rank).load(hf);
}

}  // namespace transfuse::frameworks

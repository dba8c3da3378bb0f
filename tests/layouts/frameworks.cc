// The published checkpoint, FSDP2 and vLLM, each in the framework's own way.
#include "layouts/frameworks.h"

#include <fmt/format.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "layouts/tensor.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::frameworks {
namespace {

bool ends_with_any(const std::string& name, const std::vector<std::string>& ends) {
  for (const std::string& end : ends) {
    if (name.ends_with(end)) return true;
  }
  return false;
}

}  // namespace

StateDict hf_state(const ModelConfig& c) {
  StateDict out;
  int32_t next = 1;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape) {
    Tensor tensor = Tensor::zeros(shape);
    for (int32_t& value : tensor.data) value = next++;
    out.emplace(name, std::move(tensor));
  };
  const bool moe = c.architecture == "qwen3_moe";
  const int64_t h = c.hidden_size;
  const int64_t q = c.num_attention_heads * c.head_dim;
  const int64_t kv = c.num_key_value_heads * c.head_dim;
  add("model.embed_tokens.weight", {c.vocab_size, h});
  add("model.norm.weight", {h});
  if (!c.tie_word_embeddings) add("lm_head.weight", {c.vocab_size, h});
  for (int64_t n = 0; n < c.num_hidden_layers; ++n) {
    const std::string p = "model.layers." + std::to_string(n) + ".";
    add(p + "input_layernorm.weight", {h});
    add(p + "post_attention_layernorm.weight", {h});
    for (const auto& [name, rows] :
         std::vector<std::pair<const char*, int64_t>>{{"q", q}, {"k", kv}, {"v", kv}}) {
      const std::string linear = fmt::format("{}self_attn.{}_proj", p, name);
      add(linear + ".weight", {rows, h});
      if (c.architecture == "qwen2") add(linear + ".bias", {rows});
    }
    add(p + "self_attn.o_proj.weight", {h, q});
    if (c.architecture.starts_with("qwen3")) {
      add(p + "self_attn.q_norm.weight", {c.head_dim});
      add(p + "self_attn.k_norm.weight", {c.head_dim});
    }
    if (moe) add(p + "mlp.gate.weight", {c.num_experts, h});
    for (int64_t x = 0; x < (moe ? c.num_experts : 1); ++x) {
      const std::string mlp = p + (moe ? "mlp.experts." + std::to_string(x) + "." : "mlp.");
      const int64_t width = moe ? c.moe_intermediate_size : c.intermediate_size;
      add(mlp + "gate_proj.weight", {width, h});
      add(mlp + "up_proj.weight", {width, h});
      add(mlp + "down_proj.weight", {h, width});
    }
  }
  return out;
}

// parallelize_module cuts first (columns of row-wise linears, rows of the others), fully_shard then
// cuts dim 0 of what is left. Mesh (dp, tp).
StateDict fsdp_state(const StateDict& hf, const ParallelSpec& spec, int64_t rank) {
  const int64_t tp_rank = rank % spec.tp;
  const int64_t dp_rank = rank / spec.tp % spec.dp;
  StateDict out;
  for (const auto& [name, tensor] : hf) {
    Tensor local = tensor;
    if (ends_with_any(name, {"o_proj.weight", "down_proj.weight"})) {
      local = local.chunk(spec.tp, tp_rank, 1);
    } else if (ends_with_any(name, {"q_proj.weight", "k_proj.weight", "v_proj.weight", ".bias",
                                    "gate_proj.weight", "up_proj.weight", "embed_tokens.weight",
                                    "lm_head.weight"})) {
      local = local.chunk(spec.tp, tp_rank, 0);
    }
    out.emplace(name, local.chunk(spec.dp, dp_rank, 0));
  }
  return out;
}

namespace {

// One worker of vLLM: parameters are allocated, then every checkpoint tensor goes through the
// weight_loader of its parameter.
class VllmWorker {
 public:
  VllmWorker(const ModelConfig& config, const ParallelSpec& spec, int64_t rank)
      : c_(config), spec_(spec) {
    // all_ranks.reshape(dp, pp, tp)
    int64_t world_rank = 0;
    for (int64_t d = 0; d < spec.dp; ++d) {
      for (int64_t p = 0; p < spec.pp; ++p) {
        for (int64_t t = 0; t < spec.tp; ++t) {
          if (world_rank++ != rank) continue;
          dp_rank_ = d;
          pp_rank_ = p;
          tp_rank_ = t;
        }
      }
    }
    start_layer_ = 0;
    for (int64_t p = 0; p <= pp_rank_; ++p) {
      start_layer_ = end_layer_;
      end_layer_ += partition()[static_cast<size_t>(p)];
    }
  }

  StateDict load(const StateDict& hf) {
    for (const auto& [name, tensor] : hf) load_one(name, tensor);
    return std::move(parameters_);
  }

 private:
  // get_pp_indices
  std::vector<int64_t> partition() const {
    if (!spec_.layers.empty()) return spec_.layers;
    const auto stages = static_cast<size_t>(spec_.pp);
    std::vector<int64_t> partitions(stages, c_.num_hidden_layers / spec_.pp);
    const auto remaining = static_cast<size_t>(c_.num_hidden_layers % spec_.pp);
    for (size_t i = 2; i < remaining + 2; ++i) ++partitions[stages - i];
    return partitions;
  }

  Tensor& parameter(const std::string& name, const std::vector<int64_t>& shape) {
    const auto [at, fresh] = parameters_.try_emplace(name);
    if (fresh) at->second = Tensor::zeros(shape);
    TRANSFUSE_CHECK(at->second.shape == shape);
    return at->second;
  }

  void load_one(const std::string& name, const Tensor& tensor) {
    if (name.starts_with("model.layers.")) {
      const int64_t layer = std::stoll(name.substr(13));
      if (layer < start_layer_ || layer >= end_layer_) return;  // PPMissingLayer
    }
    if (name.find(".experts.") != std::string::npos) return load_expert(name, tensor);
    if (ends_with_any(name, {"embed_tokens.weight", "lm_head.weight", "model.norm.weight"})) {
      return load_outer(name, tensor);
    }
    for (const char* shard : {"q", "k", "v"}) {
      const std::string part = std::string(".") + shard + "_proj.";
      const size_t at = name.find(part);
      if (at == std::string::npos) continue;
      std::string fused = name;
      return load_qkv(fused.replace(at, part.size(), ".qkv_proj."), *shard, tensor);
    }
    for (const int64_t shard : {0, 1}) {
      const std::string part = shard == 0 ? ".gate_proj." : ".up_proj.";
      const size_t at = name.find(part);
      if (at == std::string::npos) continue;
      std::string fused = name;
      const int64_t size = tensor.shape[0] / spec_.tp;
      parameter(fused.replace(at, part.size(), ".gate_up_proj."), {2 * size, tensor.shape[1]})
          .copy_into(0, shard * size, tensor.narrow(0, tp_rank_ * size, size));
      return;
    }
    if (ends_with_any(name, {"o_proj.weight", "down_proj.weight"})) {
      const int64_t size = tensor.shape[1] / spec_.tp;
      parameter(name, {tensor.shape[0], size})
          .copy_into(0, 0, tensor.narrow(1, tp_rank_ * size, size));
      return;
    }
    parameter(name, tensor.shape) = tensor;
  }

  // The dense models skip what a stage does not use; Qwen3MoeModel makes all of it everywhere.
  void load_outer(const std::string& name, const Tensor& tensor) {
    const bool everywhere = c_.architecture == "qwen3_moe";
    const bool last = pp_rank_ == spec_.pp - 1;
    const bool first = pp_rank_ == 0;
    const bool embedding = name == "model.embed_tokens.weight";
    const bool used = embedding ? first || (c_.tie_word_embeddings && last) : last;
    if (!used && !everywhere) return;
    if (name == "model.norm.weight") {
      parameter(name, tensor.shape) = tensor;
      return;
    }
    // pad_vocab_size
    const int64_t padded = ((tensor.shape[0] + 64 - 1) / 64) * 64;
    const int64_t rows = padded / spec_.tp;
    parameter(name, {rows, tensor.shape[1]}) =
        tensor.padded(padded).narrow(0, tp_rank_ * rows, rows);
  }

  // QKVParallelLinear.weight_loader
  void load_qkv(const std::string& name, char shard_id, const Tensor& tensor) {
    const int64_t num_heads = c_.num_attention_heads / spec_.tp;
    int64_t num_kv_heads = 1;
    int64_t num_kv_head_replicas = 1;
    if (spec_.tp >= c_.num_key_value_heads) {
      num_kv_head_replicas = spec_.tp / c_.num_key_value_heads;
    } else {
      num_kv_heads = c_.num_key_value_heads / spec_.tp;
    }
    int64_t shard_offset = 0;
    int64_t shard_size = num_heads * c_.head_dim;
    int64_t shard_rank = tp_rank_;
    if (shard_id != 'q') {
      shard_offset = (num_heads + (shard_id == 'v' ? num_kv_heads : 0)) * c_.head_dim;
      shard_size = num_kv_heads * c_.head_dim;
      shard_rank = tp_rank_ / num_kv_head_replicas;
    }
    std::vector<int64_t> shape = tensor.shape;
    shape[0] = (num_heads + 2 * num_kv_heads) * c_.head_dim;
    parameter(name, shape)
        .copy_into(0, shard_offset, tensor.narrow(0, shard_rank * shard_size, shard_size));
  }

  // determine_expert_map: global -> local, -1 where another rank has it.
  std::vector<int64_t> expert_map(int64_t ep_size, int64_t ep_rank, int64_t& local_count) const {
    std::vector<int64_t> map(static_cast<size_t>(c_.num_experts), -1);
    const int64_t base = c_.num_experts / ep_size;
    const int64_t remainder = c_.num_experts % ep_size;
    local_count = ep_rank < remainder ? base + 1 : base;
    if (spec_.round_robin) {
      int64_t local = 0;
      for (int64_t x = ep_rank; x < c_.num_experts; x += ep_size) {
        map[static_cast<size_t>(x)] = local++;
      }
      return map;
    }
    const int64_t start = ep_rank * base + (ep_rank < remainder ? ep_rank : remainder);
    for (int64_t local = 0; local < local_count; ++local) {
      map[static_cast<size_t>(start + local)] = local;
    }
    return map;
  }

  // FusedMoE.weight_loader; tensor parallelism of the experts is flattened over dp.
  void load_expert(const std::string& name, const Tensor& tensor) {
    const size_t at = name.find(".experts.");
    const int64_t expert = std::stoll(name.substr(at + 9));
    const int64_t flat_size = spec_.dp * spec_.tp;
    const int64_t flat_rank = dp_rank_ * spec_.tp + tp_rank_;
    const bool ep = spec_.expert_parallel;
    const int64_t tp_size = ep ? 1 : flat_size;
    const int64_t tp_rank = ep ? 0 : flat_rank;
    int64_t count = 0;
    const auto map = expert_map(ep ? flat_size : 1, ep ? flat_rank : 0, count);
    const int64_t local = map[static_cast<size_t>(expert)];
    if (local < 0) return;
    const int64_t width = c_.moe_intermediate_size / tp_size;
    const std::string prefix = name.substr(0, at) + ".experts.routed_experts.";
    const auto into = [&](Tensor& stack, int64_t row, const Tensor& value) {
      Tensor one = stack.narrow(0, local, 1).view({stack.shape[1], stack.shape[2]});
      one.copy_into(0, row, value);
      stack.copy_into(0, local, one.view({1, stack.shape[1], stack.shape[2]}));
    };
    if (name.ends_with("down_proj.weight")) {
      return into(parameter(prefix + "w2_weight", {count, c_.hidden_size, width}), 0,
                  tensor.narrow(1, tp_rank * width, width));
    }
    const bool second = name.ends_with("up_proj.weight") != spec_.up_before_gate;
    into(parameter(prefix + "w13_weight", {count, 2 * width, c_.hidden_size}), second ? width : 0,
         tensor.narrow(0, tp_rank * width, width));
  }

  const ModelConfig& c_;
  const ParallelSpec& spec_;
  int64_t dp_rank_ = 0;
  int64_t pp_rank_ = 0;
  int64_t tp_rank_ = 0;
  int64_t start_layer_ = 0;
  int64_t end_layer_ = 0;
  StateDict parameters_;
};

}  // namespace

StateDict vllm_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank) {
  return VllmWorker(config, spec, rank).load(hf);
}

StateDict rank_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank) {
  if (spec.family == "fsdp") return fsdp_state(hf, spec, rank);
  if (spec.family == "vllm") return vllm_state(config, hf, spec, rank);
  if (spec.family == "megatron") return megatron_state(config, hf, spec, rank);
  return hf;
}

}  // namespace transfuse::frameworks

// FSDP2 and vLLM, each in the framework's own way.
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

// What a module of transformers 5 holds: gate and up of an expert in one, all experts in one.
StateDict stack_experts(const ModelConfig& c, const StateDict& hf) {
  StateDict out;
  for (const auto& [name, tensor] : hf) {
    const size_t at = name.find(".experts.");
    std::string module = name;
    const size_t mixtral = module.find(".block_sparse_moe.");
    if (mixtral != std::string::npos) module.replace(mixtral, 18, ".mlp.");
    if (at == std::string::npos) {
      out.emplace(module, tensor);
      continue;
    }
    const std::string expert = name.substr(0, name.find('.', at + 9) + 1);
    if (expert != name.substr(0, at + 9) + "0.") continue;
    const std::string stem = module.substr(0, module.find(".experts.") + 9);
    const bool v4 = c.architecture == "mixtral";
    std::vector<Tensor> gate_up;
    std::vector<Tensor> down;
    for (int64_t x = 0; x < c.num_experts; ++x) {
      const std::string one = fmt::format("{}{}.", name.substr(0, at + 9), x);
      const auto stacked = [](const Tensor& t) { return t.view({1, t.shape[0], t.shape[1]}); };
      gate_up.push_back(stacked(cat({hf.at(one + (v4 ? "w1" : "gate_proj") + ".weight"),
                                     hf.at(one + (v4 ? "w3" : "up_proj") + ".weight")},
                                    0)));
      down.push_back(stacked(hf.at(one + (v4 ? "w2" : "down_proj") + ".weight")));
    }
    out.insert_or_assign(stem + "gate_up_proj", cat(gate_up, 0));
    out.insert_or_assign(stem + "down_proj", cat(down, 0));
  }
  return out;
}

// What the "mtp" of a spec leaves.
StateDict without_mtp(const ModelConfig& c, const StateDict& hf, const ParallelSpec& spec) {
  StateDict out;
  for (const auto& [name, tensor] : hf) {
    const bool mtp =
        name.starts_with("mtp.") ||
        (name.starts_with("model.layers.") && std::stoll(name.substr(13)) >= c.num_hidden_layers);
    const bool copy = ends_with_any(name, {".embed_tokens.weight", ".shared_head.head.weight"});
    if (mtp && (spec.mtp == MtpTensors::kNone || (spec.mtp == MtpTensors::kShared && copy))) {
      continue;
    }
    out.emplace(name, tensor);
  }
  return out;
}

}  // namespace

// parallelize_module cuts first (columns of row-wise linears, rows of the others), fully_shard then
// cuts dim 0 of what is left. Mesh (dp, tp).
StateDict fsdp_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank) {
  const int64_t tp_rank = rank % spec.tp;
  const int64_t dp_rank = rank / spec.tp % spec.dp;
  StateDict out;
  for (const auto& [name, tensor] : spec.stacked_experts ? stack_experts(config, hf) : hf) {
    const std::string module = name.substr(0, name.rfind('.') + 1);
    Tensor local = tensor;
    if (ends_with_any(module, {".o_proj.", ".down_proj.", ".w2."}) && tensor.shape.size() == 2) {
      local = local.chunk(spec.tp, tp_rank, 1);
    } else if (ends_with_any(module,
                             {".q_proj.", ".k_proj.", ".v_proj.", ".q_b_proj.", ".kv_b_proj.",
                              ".gate_proj.", ".up_proj.", ".w1.", ".w3.", ".eh_proj.", "mtp.fc.",
                              ".head.", ".embed_tokens.", "lm_head."})) {
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
      if (layer < start_layer_ || layer >= end_layer_) return;  // PPMissingLayer, or a draft model
    }
    if (name.starts_with("mtp.")) return;
    if (c_.architecture == "gpt_oss") return load_gpt_oss(name, tensor);
    if (name.find(".linear_attn.") != std::string::npos) return load_linear_attention(name, tensor);
    if (c_.architecture == "deepseek_v3" && !c_.noaux_routing &&
        name.ends_with("e_score_correction_bias")) {
      return;
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
    const bool scale = name.ends_with("_scale_inv");
    for (const int64_t shard : {0, 1}) {
      const std::string part = shard == 0 ? ".gate_proj." : ".up_proj.";
      const size_t at = name.find(part);
      if (at == std::string::npos) continue;
      std::string fused = name;
      const int64_t size = per_rank(tensor.shape[0]);
      parameter(fused.replace(at, part.size(), ".gate_up_proj."), {2 * size, tensor.shape[1]})
          .copy_into(0, shard * size, tensor.narrow(0, tp_rank_ * size, size));
      return;
    }
    const std::string module = name.substr(0, name.rfind('.') + 1);
    for (const bool first : {true, false}) {
      const std::string part = first ? ".q_a_proj." : ".kv_a_proj_with_mqa.";
      if (!module.ends_with(part)) continue;
      const int64_t unit = scale ? c_.scale_block_rows : 1;
      const int64_t q_rows = blocks(c_.q_lora_rank, unit);
      const int64_t rows = q_rows + blocks(c_.kv_lora_rank + c_.qk_rope_head_dim, unit);
      std::string fused = name;
      parameter(fused.replace(module.size() - part.size(), part.size(), ".fused_qkv_a_proj."),
                {rows, tensor.shape[1]})
          .copy_into(0, first ? 0 : q_rows, tensor);
      return;
    }
    if (ends_with_any(module, {".q_b_proj.", ".kv_b_proj."})) {
      const int64_t size = per_rank(tensor.shape[0]);
      parameter(name, {size, tensor.shape[1]}) = tensor.narrow(0, tp_rank_ * size, size);
      return;
    }
    if (ends_with_any(module, {".o_proj.", ".down_proj."})) {
      const int64_t size = per_rank(tensor.shape[1]);
      parameter(name, {tensor.shape[0], size})
          .copy_into(0, 0, tensor.narrow(1, tp_rank_ * size, size));
      return;
    }
    parameter(name, tensor.shape) = tensor;
  }

  // The names of GptOssModel; what is not an expert is loaded like everybody's.
  void load_gpt_oss(std::string name, const Tensor& tensor) {
    const auto exchange = [&](const std::string& from, const std::string& to) {
      const size_t at = name.find(from);
      if (at != std::string::npos) name.replace(at, from.size(), to);
    };
    const size_t experts = name.find(".experts.");
    if (experts != std::string::npos) {
      return load_stacked_experts(name.substr(0, experts) + ".experts.routed_experts.",
                                  name.substr(experts + 9), tensor);
    }
    if (name == "model.embed_tokens.weight") {
      load_outer(name, tensor);
      parameters_["model.embedding.weight"] = std::move(parameters_.at(name));
      parameters_.erase(name);
      return;
    }
    if (ends_with_any(name, {"lm_head.weight", "model.norm.weight"})) {
      return load_outer(name, tensor);
    }
    exchange(".self_attn.", ".attn.");
    for (const char* shard : {"q", "k", "v"}) {
      const std::string part = fmt::format(".{}_proj.", shard);
      if (name.find(part) == std::string::npos) continue;
      exchange(part, ".qkv_proj.");
      return load_qkv(name, *shard, tensor);
    }
    if (name.ends_with(".sinks")) {
      parameter(name, {per_rank(tensor.shape[0])}) = tensor.chunk(spec_.tp, tp_rank_, 0);
    } else if (name.ends_with(".o_proj.weight")) {
      parameter(name, {tensor.shape[0], per_rank(tensor.shape[1])}) =
          tensor.chunk(spec_.tp, tp_rank_, 1);
    } else {
      parameter(name, tensor.shape) = tensor;
    }
  }

  // GptOssModel._load_weights_other and, where packed, _load_weights_mxfp4: slices of all experts,
  // transposed where the file has [in, out].
  void load_stacked_experts(const std::string& to, const std::string& kind, const Tensor& tensor) {
    const int64_t size = spec_.dp * spec_.tp;
    const int64_t rank = dp_rank_ * spec_.tp + tp_rank_;
    const bool ep = spec_.expert_parallel;
    const Tensor mine = ep ? tensor.chunk(size, rank, 0) : tensor;
    const auto part = [&](const Tensor& all, int dim, int64_t unit) {
      const int64_t count = all.shape[static_cast<size_t>(dim)] / unit;
      TRANSFUSE_CHECK(ep || count % size == 0);
      return ep ? all : all.narrow(dim, rank * (count / size) * unit, count / size * unit);
    };
    const auto flat = [](const Tensor& all) {
      std::vector<int64_t> shape(all.shape.begin(), all.shape.begin() + 3);
      if (all.shape.size() == 4) shape[2] *= all.shape[3];
      return all.view(shape);
    };
    const auto store = [&](const char* name, const Tensor& value) {
      parameter(to + name, value.shape) = value;
    };
    if (kind == "gate_up_proj_bias") return store("w13_bias", part(mine, 1, 2));
    if (kind == "down_proj_bias") {
      return store("w2_bias", ep || rank == 0 ? mine : Tensor::zeros(mine.shape));
    }
    if (kind == "gate_up_proj") return store("w13_weight", part(mine, 2, 2).transposed());
    if (kind == "down_proj") return store("w2_weight", part(mine, 1, 1).transposed());
    const char* suffix = kind.ends_with("_scales") ? "weight_scale" : "weight";
    const bool down = kind.starts_with("down_proj");
    store(fmt::format("{}_{}", down ? "w2" : "w13", suffix).c_str(),
          flat(down ? part(mine, 2, 1) : part(mine, 1, 2)));
  }

  // QwenGatedDeltaNetAttention with its interleaved layout.
  void load_linear_attention(const std::string& name, const Tensor& tensor) {
    if (name.ends_with(".norm.weight")) {
      parameter(name, tensor.shape) = tensor;
    } else if (name.ends_with(".out_proj.weight")) {
      parameter(name, {tensor.shape[0], per_rank(tensor.shape[1])}) =
          tensor.chunk(spec_.tp, tp_rank_, 1);
    } else if (name.ends_with(".conv1d.weight")) {
      // mamba_v2_sharded_weight_loader
      const int64_t keys = c_.linear_key_heads * c_.linear_key_head_dim;
      const int64_t values = c_.linear_value_heads * c_.linear_value_head_dim;
      std::vector<Tensor> shards;
      for (const auto& [begin, size] :
           std::vector<std::pair<int64_t, int64_t>>{{0, keys}, {keys, keys}, {2 * keys, values}}) {
        shards.push_back(tensor.narrow(0, begin, size).chunk(spec_.tp, tp_rank_, 0));
      }
      const Tensor merged = cat(shards, 0);
      parameter(name, merged.shape) = merged;
    } else {
      std::vector<int64_t> shape = tensor.shape;
      shape[0] = per_rank(shape[0]);
      parameter(name, shape) = tensor.chunk(spec_.tp, tp_rank_, 0);
    }
  }

  int64_t per_rank(int64_t count) const {
    TRANSFUSE_CHECK(count % spec_.tp == 0);
    return count / spec_.tp;
  }

  // Most models skip what a stage does not use; some make all of it everywhere.
  void load_outer(const std::string& name, const Tensor& tensor) {
    const bool everywhere = c_.architecture == "qwen3_moe" || c_.architecture == "mixtral" ||
                            c_.architecture == "gemma3_text" || c_.architecture == "gpt_oss" ||
                            (c_.architecture == "qwen3_next" && name != "model.norm.weight");
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
    const int64_t gates = c_.architecture == "qwen3_next" ? 2 : 1;  // 1 + attn_output_gate
    const int64_t num_heads = gates * c_.num_attention_heads / spec_.tp;
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

  // The places of an expert on this rank, of `count` there.
  std::vector<int64_t> places_of(int64_t layer, int64_t expert, int64_t ep_size, int64_t ep_rank,
                                 int64_t& count) const {
    std::vector<int64_t> places;
    if (spec_.redundant == 0 && spec_.expert_map.physical_to_logical.empty()) {
      const auto map = expert_map(ep_size, ep_rank, count);
      if (map[static_cast<size_t>(expert)] >= 0) places = {map[static_cast<size_t>(expert)]};
      return places;
    }
    const auto physical = physical_experts(c_, spec_, layer);
    count = static_cast<int64_t>(physical.size()) / ep_size;
    for (int64_t local = 0; local < count; ++local) {
      if (physical[static_cast<size_t>(ep_rank * count + local)] == expert) places.push_back(local);
    }
    return places;
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
    const auto places = places_of(std::stoll(name.substr(13)), expert, ep ? flat_size : 1,
                                  ep ? flat_rank : 0, count);
    const bool down = ends_with_any(name.substr(0, name.rfind('.')), {".down_proj", ".w2"});
    const int dim = down ? 1 : 0;
    const int64_t width = tensor.shape[static_cast<size_t>(dim)] / tp_size;
    TRANSFUSE_CHECK(width * tp_size == tensor.shape[static_cast<size_t>(dim)]);
    const Tensor shard = tensor.narrow(dim, tp_rank * width, width);
    const std::string prefix = name.substr(0, at) + ".experts.routed_experts.";
    const std::string suffix = "_" + name.substr(name.rfind('.') + 1);
    if (places.empty()) return;
    const auto into = [&](Tensor& stack, int64_t row) {
      for (const int64_t local : places) {
        Tensor one = stack.narrow(0, local, 1).view({stack.shape[1], stack.shape[2]});
        one.copy_into(0, row, shard);
        stack.copy_into(0, local, one.view({1, stack.shape[1], stack.shape[2]}));
      }
    };
    if (down) return into(parameter(prefix + "w2" + suffix, {count, shard.shape[0], width}), 0);
    const bool is_up = ends_with_any(name.substr(0, name.rfind('.')), {".up_proj", ".w3"});
    into(parameter(prefix + "w13" + suffix, {count, 2 * width, shard.shape[1]}),
         is_up != spec_.up_before_gate ? width : 0);
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

// build_initial_global_physical_to_logical_map, or what the engine says now.
std::vector<int64_t> physical_experts(const ModelConfig& config, const ParallelSpec& spec,
                                      int64_t layer) {
  const auto& map = spec.expert_map.physical_to_logical;
  if (!map.empty()) {
    const auto missing = static_cast<size_t>(config.num_hidden_layers) - map.size();
    return map[static_cast<size_t>(layer) - missing];
  }
  std::vector<int64_t> physical;
  for (int64_t x = 0; x < config.num_experts; ++x) physical.push_back(x);
  for (int64_t i = 0; i < spec.redundant; ++i) physical.push_back(i % config.num_experts);
  return physical;
}

StateDict rank_state(const ModelConfig& config, const StateDict& hf, const ParallelSpec& spec,
                     int64_t rank) {
  if (spec.family == "sglang") return sglang_state(config, hf, spec, rank);
  if (spec.family == "vllm") return vllm_state(config, hf, spec, rank);
  if (spec.family == "megatron") return megatron_state(config, hf, spec, rank);
  const StateDict held = without_mtp(config, hf, spec);
  if (spec.family == "fsdp") return fsdp_state(config, held, spec, rank);
  return spec.stacked_experts ? stack_experts(config, held) : held;
}

}  // namespace transfuse::frameworks

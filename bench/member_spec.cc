// Specifications as JSON.
#include "member_spec.h"

#include <nlohmann/json.hpp>

#include "transfuse/model.h"

namespace transfuse::bench {
namespace {

nlohmann::json config_to_json(const ModelConfig& c) {
  return {{"architecture", c.architecture},
          {"hidden_size", c.hidden_size},
          {"intermediate_size", c.intermediate_size},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"num_hidden_layers", c.num_hidden_layers},
          {"num_attention_heads", c.num_attention_heads},
          {"num_key_value_heads", c.num_key_value_heads},
          {"head_dim", c.head_dim},
          {"vocab_size", c.vocab_size},
          {"num_experts", c.num_experts},
          {"tie_word_embeddings", c.tie_word_embeddings}};
}

ModelConfig config_from_json(const nlohmann::json& json) {
  ModelConfig c;
  c.architecture = json.at("architecture");
  c.hidden_size = json.at("hidden_size");
  c.intermediate_size = json.at("intermediate_size");
  c.moe_intermediate_size = json.at("moe_intermediate_size");
  c.num_hidden_layers = json.at("num_hidden_layers");
  c.num_attention_heads = json.at("num_attention_heads");
  c.num_key_value_heads = json.at("num_key_value_heads");
  c.head_dim = json.at("head_dim");
  c.vocab_size = json.at("vocab_size");
  c.num_experts = json.at("num_experts");
  c.tie_word_embeddings = json.at("tie_word_embeddings");
  return c;
}

}  // namespace

nlohmann::json to_json(const MemberSpec& spec) {
  return {{"config", config_to_json(spec.config)},
          {"layout", spec.layout},
          {"rank", spec.rank},
          {"stream", spec.stream},
          {"runtime_folder", spec.runtime_folder},
          {"address", spec.address},
          {"threads", spec.threads}};
}

MemberSpec member_spec_from_json(const nlohmann::json& json) {
  MemberSpec spec;
  spec.config = config_from_json(json.at("config"));
  spec.layout = json.at("layout");
  spec.rank = json.at("rank");
  spec.stream = json.at("stream");
  spec.runtime_folder = json.at("runtime_folder");
  spec.address = json.at("address");
  spec.threads = json.at("threads");
  return spec;
}

}  // namespace transfuse::bench

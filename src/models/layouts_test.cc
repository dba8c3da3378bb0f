// Catalogs and layouts of Qwen3 against a slow model of what each framework does with the rows.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

ModelConfig qwen3_4b() {
  return {.architecture = "qwen3",
          .hidden_size = 2560,
          .intermediate_size = 9728,
          .num_hidden_layers = 36,
          .num_attention_heads = 32,
          .num_key_value_heads = 8,
          .head_dim = 128,
          .vocab_size = 151936,
          .tie_word_embeddings = true};
}

ModelConfig qwen3_30b_a3b() {
  return {.architecture = "qwen3_moe",
          .hidden_size = 2048,
          .intermediate_size = 6144,
          .moe_intermediate_size = 768,
          .num_hidden_layers = 48,
          .num_attention_heads = 32,
          .num_key_value_heads = 4,
          .head_dim = 128,
          .vocab_size = 151936,
          .num_experts = 128};
}

// Small, with grouped KV heads, A * D != h and a vocabulary that no power of two divides.
ModelConfig small(int64_t kv_heads = 2) {
  return {.architecture = "qwen3",
          .hidden_size = 6,
          .intermediate_size = 16,
          .num_hidden_layers = 2,
          .num_attention_heads = 8,
          .num_key_value_heads = kv_heads,
          .head_dim = 2,
          .vocab_size = 67};
}

ModelConfig small_moe() {
  ModelConfig config = small();
  config.architecture = "qwen3_moe";
  config.moe_intermediate_size = 5;
  config.num_experts = 3;
  return config;
}

ParallelSpec spec(const std::string& text) { return parse_parallel_spec(text).value(); }

int64_t catalog_bytes(const Catalog& catalog) {
  int64_t bytes = 0;
  for (const TensorSpec& t : catalog) bytes += t.shape.product() * dtype_size_bytes(t.dtype);
  return bytes;
}

std::map<std::string, Dims> shapes(const ModelConfig& config) {
  std::map<std::string, Dims> out;
  const Catalog catalog = make_catalog(config).value();
  for (const TensorSpec& t : catalog) out[t.name] = t.shape;
  return out;
}

TEST(Catalog, Qwen3_4BHas398TensorsAnd8GB) {
  const Catalog catalog = make_catalog(qwen3_4b()).value();
  EXPECT_EQ(catalog.size(), 398U);
  EXPECT_EQ(catalog_bytes(catalog), 8044936192);
  const auto shape = shapes(qwen3_4b());
  EXPECT_EQ(shape.size(), 398U);
  EXPECT_EQ(shape.at("model.embed_tokens.weight"), (Dims{151936, 2560}));
  EXPECT_EQ(shape.at("model.norm.weight"), (Dims{2560}));
  EXPECT_EQ(shape.at("model.layers.35.self_attn.q_proj.weight"), (Dims{4096, 2560}));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.k_proj.weight"), (Dims{1024, 2560}));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.v_proj.weight"), (Dims{1024, 2560}));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.o_proj.weight"), (Dims{2560, 4096}));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.q_norm.weight"), (Dims{128}));
  EXPECT_EQ(shape.at("model.layers.0.self_attn.k_norm.weight"), (Dims{128}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.gate_proj.weight"), (Dims{9728, 2560}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.up_proj.weight"), (Dims{9728, 2560}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.down_proj.weight"), (Dims{2560, 9728}));
  EXPECT_EQ(shape.at("model.layers.0.input_layernorm.weight"), (Dims{2560}));
  EXPECT_EQ(shape.at("model.layers.0.post_attention_layernorm.weight"), (Dims{2560}));
  EXPECT_FALSE(shape.contains("lm_head.weight"));
  EXPECT_FALSE(shape.contains("model.layers.36.input_layernorm.weight"));
}

TEST(Catalog, Qwen3_30B_A3BHas18867TensorsAnd61GB) {
  const Catalog catalog = make_catalog(qwen3_30b_a3b()).value();
  EXPECT_EQ(catalog.size(), 18867U);
  EXPECT_EQ(catalog_bytes(catalog), 61064245248);
  const auto shape = shapes(qwen3_30b_a3b());
  EXPECT_EQ(shape.size(), 18867U);
  EXPECT_EQ(shape.at("lm_head.weight"), (Dims{151936, 2048}));
  EXPECT_EQ(shape.at("model.layers.47.mlp.gate.weight"), (Dims{128, 2048}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.experts.127.gate_proj.weight"), (Dims{768, 2048}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.experts.0.up_proj.weight"), (Dims{768, 2048}));
  EXPECT_EQ(shape.at("model.layers.0.mlp.experts.0.down_proj.weight"), (Dims{2048, 768}));
  EXPECT_FALSE(shape.contains("model.layers.0.mlp.gate_proj.weight"));
}

// An element of a catalog tensor: its name and row-major index. Zero padding: ("", 0).
using Element = std::pair<std::string, int64_t>;
using Content = std::vector<Element>;

// What tiles and fills put into every parameter. Fails where an element is written twice or never.
std::map<std::string, Content> contents(const Layout& layout) {
  std::map<std::string, Content> out;
  std::map<std::string, std::vector<int>> writes;
  for (const ParameterSpec& p : layout.parameters()) {
    out[p.name].resize(static_cast<size_t>(p.element_count));
    writes[p.name].resize(static_cast<size_t>(p.element_count));
  }
  const auto put = [&](uint32_t parameter, int64_t at, Element element) {
    const std::string& name = layout.parameters()[parameter].name;
    out[name].at(static_cast<size_t>(at)) = std::move(element);
    ++writes[name].at(static_cast<size_t>(at));
  };
  // Calls visit(index) for every index below `length`.
  const auto each = [](const Dims& length, const auto& visit) {
    for (int64_t n = 0; n < length.product(); ++n) {
      Dims index = length;
      int64_t rest = n;
      for (int d = length.rank() - 1; d >= 0; --d) {
        index[d] = rest % length[d];
        rest /= length[d];
      }
      visit(index);
    }
  };
  for (const Tile& tile : layout.tiles()) {
    const TensorSpec& tensor = layout.tensors()[tile.tensor];
    each(tile.box.length, [&](const Dims& index) {
      int64_t linear = 0;
      int64_t at = tile.element_offset;
      for (int d = 0; d < index.rank(); ++d) {
        linear = linear * tensor.shape[d] + tile.box.offset[d] + index[d];
        at += index[d] * tile.element_strides[d];
      }
      put(tile.parameter, at, {tensor.name, linear});
    });
  }
  for (const Fill& fill : layout.fills()) {
    each(fill.length, [&](const Dims& index) {
      int64_t at = fill.element_offset;
      for (int d = 0; d < index.rank(); ++d) at += index[d] * fill.element_strides[d];
      put(fill.parameter, at, {"", 0});
    });
  }
  for (const auto& [name, counts] : writes) {
    EXPECT_TRUE(std::ranges::all_of(counts, [](int n) { return n == 1; })) << name;
  }
  return out;
}

// The expected content of a parameter, appended piece by piece as a loader would.
class Loader {
 public:
  explicit Loader(std::map<std::string, Dims> tensors) : shapes_(std::move(tensors)) {}

  int64_t rows(const std::string& tensor) const { return shapes_.at(tensor)[0]; }
  int64_t columns(const std::string& tensor) const {
    return shapes_.at(tensor).rank() > 1 ? shapes_.at(tensor)[1] : 1;
  }
  void row(Content& out, const std::string& tensor, int64_t row, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) out.emplace_back(tensor, row * columns(tensor) + c);
  }
  // Rows [begin, end), columns [first, last) of the tensor.
  void box(Content& out, const std::string& tensor, std::array<int64_t, 2> r,
           std::array<int64_t, 2> c) const {
    for (int64_t i = r[0]; i < r[1]; ++i) row(out, tensor, i, c[0], c[1]);
  }
  void rows_of(Content& out, const std::string& tensor, int64_t begin, int64_t end) const {
    box(out, tensor, {begin, end}, {0, columns(tensor)});
  }

 private:
  std::map<std::string, Dims> shapes_;
};

// Rank t of tp of vLLM, head by head and row by row.
std::map<std::string, Content> vllm_contents(const ModelConfig& c, int64_t t, int64_t tp) {
  const Loader load(shapes(c));
  std::map<std::string, Content> out;
  std::vector<std::string> vocabularies = {"model.embed_tokens.weight"};
  if (!c.tie_word_embeddings) vocabularies.emplace_back("lm_head.weight");
  for (const std::string& name : vocabularies) {
    int64_t padded = c.vocab_size;
    while (padded % 64 != 0) ++padded;
    for (int64_t row = 0; row < padded; ++row) {
      if (row * tp / padded != t) continue;
      if (row < c.vocab_size) {
        load.rows_of(out[name], name, row, row + 1);
      } else {
        out[name].insert(out[name].end(), static_cast<size_t>(c.hidden_size), Element{"", 0});
      }
    }
  }
  load.rows_of(out["model.norm.weight"], "model.norm.weight", 0, c.hidden_size);
  for (int64_t n = 0; n < c.num_hidden_layers; ++n) {
    const std::string at = "model.layers." + std::to_string(n) + ".";
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight",
                             "self_attn.q_norm.weight", "self_attn.k_norm.weight"}) {
      load.rows_of(out[at + norm], at + norm, 0, load.rows(at + norm));
    }
    Content& qkv = out[at + "self_attn.qkv_proj.weight"];
    const int64_t d = c.head_dim;
    for (int64_t head = 0; head < c.num_attention_heads; ++head) {
      if (head * tp / c.num_attention_heads != t) continue;
      load.rows_of(qkv, at + "self_attn.q_proj.weight", head * d, (head + 1) * d);
    }
    // A rank holds the KV heads that its query heads attend to.
    const int64_t group = c.num_attention_heads / c.num_key_value_heads;
    for (const char* part : {"self_attn.k_proj.weight", "self_attn.v_proj.weight"}) {
      for (int64_t head = 0; head < c.num_key_value_heads; ++head) {
        bool needed = false;
        for (int64_t q = head * group; q < (head + 1) * group; ++q) {
          needed = needed || q * tp / c.num_attention_heads == t;
        }
        if (needed) load.rows_of(qkv, at + part, head * d, (head + 1) * d);
      }
    }
    const int64_t features = c.num_attention_heads * d;
    load.box(out[at + "self_attn.o_proj.weight"], at + "self_attn.o_proj.weight",
             {0, c.hidden_size}, {t * features / tp, (t + 1) * features / tp});
    for (const char* part : {"mlp.gate_proj.weight", "mlp.up_proj.weight"}) {
      load.rows_of(out[at + "mlp.gate_up_proj.weight"], at + part, t * c.intermediate_size / tp,
                   (t + 1) * c.intermediate_size / tp);
    }
    load.box(out[at + "mlp.down_proj.weight"], at + "mlp.down_proj.weight", {0, c.hidden_size},
             {t * c.intermediate_size / tp, (t + 1) * c.intermediate_size / tp});
  }
  return out;
}

TEST(VllmLayout, HoldsWhatTheLoaderPutsThereForEveryTpAndKvHeadCount) {
  int worlds = 0;
  for (const int64_t kv_heads : {1, 2, 4, 8}) {
    for (const int64_t tp : {1, 2, 4, 8}) {
      for (const bool tied : {false, true}) {
        ModelConfig config = small(kv_heads);
        config.tie_word_embeddings = tied;
        const auto layouts = make_layouts(config, spec("vllm:tp=" + std::to_string(tp))).value();
        ASSERT_EQ(layouts.size(), static_cast<size_t>(tp));
        for (int64_t t = 0; t < tp; ++t) {
          SCOPED_TRACE(testing::Message() << "G=" << kv_heads << " T=" << tp << " t=" << t);
          ASSERT_EQ(contents(layouts[static_cast<size_t>(t)]), vllm_contents(config, t, tp));
        }
        ++worlds;
      }
    }
  }
  EXPECT_EQ(worlds, 32);
}

TEST(VllmLayout, DegreesThatDoNotDivideTheHeadsAreNamed) {
  for (const int64_t tp : {3, 5, 6, 7}) {
    const auto layouts = make_layouts(small(), spec("vllm:tp=" + std::to_string(tp)));
    ASSERT_FALSE(layouts) << tp;
    EXPECT_EQ(layouts.error().code, ErrorCode::kInvalidArgument);
    EXPECT_THAT(layouts.error().message, HasSubstr("tp=" + std::to_string(tp)));
  }
  ModelConfig config = small();
  config.vocab_size = 64;
  config.num_attention_heads = 12;
  config.num_key_value_heads = 6;
  config.intermediate_size = 12;
  // 4 divides 12 query heads and 64 rows, not 6 KV heads.
  EXPECT_THAT(make_layouts(config, spec("vllm:tp=4")).error().message,
              HasSubstr("num_key_value_heads = 6"));
  config.num_key_value_heads = 3;
  EXPECT_THAT(make_layouts(config, spec("vllm:tp=4")).error().message,
              HasSubstr("num_key_value_heads = 3"));
  config.num_key_value_heads = 4;
  config.intermediate_size = 10;
  EXPECT_THAT(make_layouts(config, spec("vllm:tp=4")).error().message, HasSubstr("gate_proj"));
}

TEST(VllmLayout, NamesAndSizesOfQwen3_4BOnTwoRanks) {
  const Layout layout = make_layout(qwen3_4b(), spec("vllm:tp=2"), 1).value();
  EXPECT_EQ(layout.parameters().size(), 36U * 8U + 2U);
  const auto elements = [&](const std::string& name) {
    return layout.parameters()[layout.find_parameter(name).value()].element_count;
  };
  EXPECT_EQ(elements("model.layers.0.self_attn.qkv_proj.weight"), (16 + 4 + 4) * 128 * 2560);
  EXPECT_EQ(elements("model.layers.0.mlp.gate_up_proj.weight"), 9728 * 2560);
  EXPECT_EQ(elements("model.embed_tokens.weight"), 151936 / 2 * 2560);
  EXPECT_FALSE(layout.find_parameter("lm_head.weight"));
  EXPECT_TRUE(layout.fills().empty());  // 151,936 is a multiple of 64
}

TEST(VllmLayout, ARankBeyondTheVocabularyIsAllFill) {
  ModelConfig config = small();
  config.vocab_size = 3;  // padded to 64: ranks 1 to 7 hold rows 8 and up
  const auto layouts = make_layouts(config, spec("vllm:tp=8")).value();
  for (size_t t = 0; t < 8; ++t) {
    const Layout& layout = layouts[t];
    int64_t filled = 0;
    const uint32_t embed = layout.find_parameter("model.embed_tokens.weight").value();
    for (const Fill& fill : layout.fills()) {
      if (fill.parameter == embed) filled += fill.length.product();
    }
    EXPECT_EQ(filled, (t == 0 ? 5 : 8) * config.hidden_size);
    EXPECT_EQ(layout.tiles_of(layout.find_tensor("model.embed_tokens.weight").value()).size(),
              t == 0 ? 1U : 0U);
  }
}

TEST(VllmLayout, ExpertMatricesThatTpDoesNotDivideAreNamed) {
  const auto layouts = make_layouts(small_moe(), spec("vllm:tp=2"));
  ASSERT_FALSE(layouts);
  EXPECT_EQ(layouts.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(layouts.error().message,
              HasSubstr("5 rows of model.layers.0.mlp.experts.0.gate_proj.weight"));
}

TEST(VllmLayout, ExpertParallelismNeedsExperts) {
  const auto layouts = make_layouts(small(), spec("vllm:tp=2,ep"));
  ASSERT_FALSE(layouts);
  EXPECT_EQ(layouts.error().code, ErrorCode::kInvalidArgument);
  EXPECT_THAT(layouts.error().message, HasSubstr("qwen3 without"));
}

// torch.chunk of [begin, end) by walking: the piece of every row.
std::array<int64_t, 2> chunk_range(std::array<int64_t, 2> range, int64_t n, int64_t index) {
  const int64_t piece = (range[1] - range[0] + n - 1) / n;
  int64_t begin = range[0];
  int64_t end = range[0];
  for (int64_t i = 0; i <= index; ++i) {
    begin = end;
    end = std::min(begin + piece, range[1]);
  }
  return {begin, end};
}

enum class Cut { kNone, kRows, kColumns };

Cut tp_cut(const std::string& name) {
  const auto ends_with = [&](const char* end) { return name.ends_with(end); };
  if (ends_with("o_proj.weight") || ends_with("down_proj.weight")) return Cut::kColumns;
  if (ends_with("q_proj.weight") || ends_with("k_proj.weight") || ends_with("v_proj.weight") ||
      ends_with("gate_proj.weight") || ends_with("up_proj.weight") ||
      ends_with("embed_tokens.weight") || ends_with("lm_head.weight")) {
    return Cut::kRows;
  }
  return Cut::kNone;
}

void expect_fsdp(const ModelConfig& config, int64_t dp, int64_t tp, int64_t replicas) {
  const std::string text = "fsdp:dp=" + std::to_string(dp) + ",tp=" + std::to_string(tp) +
                           ",replicas=" + std::to_string(replicas);
  SCOPED_TRACE(text);
  const auto layouts = make_layouts(config, spec(text)).value();
  ASSERT_EQ(layouts.size(), static_cast<size_t>(dp * tp * replicas));
  const auto tensors = shapes(config);
  const Loader load(tensors);
  std::map<Element, int64_t> holders;
  for (size_t rank = 0; rank < layouts.size(); ++rank) {
    const auto t = static_cast<int64_t>(rank) % tp;
    const auto d = static_cast<int64_t>(rank) / tp % dp;
    std::map<std::string, Content> expected;
    for (const auto& [name, shape] : tensors) {
      std::array<int64_t, 2> rows = {0, load.rows(name)};
      std::array<int64_t, 2> columns = {0, load.columns(name)};
      if (tp_cut(name) == Cut::kRows) rows = chunk_range(rows, tp, t);
      if (tp_cut(name) == Cut::kColumns) columns = chunk_range(columns, tp, t);
      rows = chunk_range(rows, dp, d);
      load.box(expected[name], name, rows, columns);
    }
    ASSERT_EQ(contents(layouts[rank]), expected) << "rank " << rank;
    for (const auto& [name, content] : expected) {
      for (const Element& element : content) ++holders[element];
    }
  }
  int64_t elements = 0;
  for (const auto& [name, shape] : tensors) elements += shape.product();
  EXPECT_EQ(static_cast<int64_t>(holders.size()), elements);
  for (const auto& [element, count] : holders) {
    ASSERT_EQ(count, replicas * (tp_cut(element.first) == Cut::kNone ? tp : 1)) << element.first;
  }
}

TEST(FsdpLayout, HoldsTheChunksOfTorchForEveryDegree) {
  ModelConfig config = small();
  config.num_hidden_layers = 1;
  config.vocab_size = 13;
  for (int64_t dp = 1; dp <= 8; ++dp) {
    for (int64_t tp = 1; tp <= 8; ++tp) expect_fsdp(config, dp, tp, 1);
  }
}

TEST(FsdpLayout, ReplicasHoldEqualLayouts) {
  expect_fsdp(small(), 3, 2, 2);
  const auto layouts = make_layouts(small(), spec("fsdp:dp=2,replicas=3")).value();
  for (size_t rank = 0; rank < 6; ++rank) {
    EXPECT_EQ(layouts[rank].digest(), layouts[rank % 2].digest());
  }
  EXPECT_NE(layouts[0].digest(), layouts[1].digest());
}

TEST(FsdpLayout, ExpertsAreShardedLikeOtherMatrices) {
  expect_fsdp(small_moe(), 2, 1, 1);
  expect_fsdp(small_moe(), 4, 2, 1);
}

TEST(FsdpLayout, RanksBeyondTheRowsHoldEmptyParameters) {
  ModelConfig config = small();
  const Layout layout = make_layout(config, spec("fsdp:dp=8"), 7).value();
  const uint32_t norm = layout.find_parameter("model.norm.weight").value();
  EXPECT_EQ(layout.parameters()[norm].element_count, 0);  // 6 rows on 8 ranks
  EXPECT_TRUE(layout.tiles_of(layout.find_tensor("model.norm.weight").value()).empty());
}

TEST(FsdpLayout, ParametersHaveTheDtypeOfTheSpecAndTensorsThatOfTheConfig) {
  const Layout layout = make_layout(small(), spec("fsdp:dp=2,dtype=f32"), 0).value();
  for (const ParameterSpec& p : layout.parameters()) ASSERT_EQ(p.dtype, Dtype::kF32);
  for (const TensorSpec& t : layout.tensors()) ASSERT_EQ(t.dtype, Dtype::kBF16);
}

TEST(HfLayout, HoldsEveryTensorWholeUnderItsName) {
  for (const ModelConfig& config : {small(), small_moe()}) {
    const Layout layout = make_layout(config, spec("hf:dtype=f32"), 0).value();
    const Loader load(shapes(config));
    std::map<std::string, Content> expected;
    for (const auto& [name, shape] : shapes(config)) {
      load.rows_of(expected[name], name, 0, load.rows(name));
    }
    EXPECT_EQ(contents(layout), expected);
    EXPECT_EQ(layout.parameters()[0].dtype, Dtype::kF32);
  }
}

TEST(Layouts, OneRankIsTheSameAsThatOfAll) {
  for (const char* text : {"hf:replicas=2", "fsdp:dp=3,tp=2,replicas=2", "vllm:tp=4,replicas=2"}) {
    const auto layouts = make_layouts(small(), spec(text)).value();
    for (size_t rank = 0; rank < layouts.size(); ++rank) {
      EXPECT_EQ(make_layout(small(), spec(text), static_cast<int64_t>(rank))->digest(),
                layouts[rank].digest());
    }
    const auto count = static_cast<int64_t>(layouts.size());
    for (const int64_t rank : {int64_t{-1}, count}) {
      const auto layout = make_layout(small(), spec(text), rank);
      ASSERT_FALSE(layout);
      EXPECT_THAT(layout.error().message, HasSubstr("rank " + std::to_string(rank)));
    }
  }
}

TEST(Layouts, ASpecMadeByHandIsCheckedToo) {
  for (const ParallelSpec& bad : {ParallelSpec{.family = "deepspeed"},
                                  {.family = "hf", .tp = 2},
                                  {.family = "fsdp", .dp = 0},
                                  {.family = "vllm", .cp = 2}}) {
    const auto layouts = make_layouts(small(), bad);
    ASSERT_FALSE(layouts) << bad.family;
    EXPECT_EQ(layouts.error().code, ErrorCode::kInvalidArgument);
  }
}

TEST(Layouts, Qwen3_30B_A3BShardsToTheBytesOfTheCatalog) {
  const auto layouts = make_layouts(qwen3_30b_a3b(), spec("fsdp:dp=3")).value();
  uint64_t bytes = 0;
  for (const Layout& layout : layouts) {
    EXPECT_EQ(layout.parameters().size(), 18867U);
    bytes += layout.parameter_bytes();
    EXPECT_EQ(layout.parameter_bytes(), layout.tile_bytes());
  }
  EXPECT_EQ(bytes, 61064245248U);
}

}  // namespace
}  // namespace transfuse

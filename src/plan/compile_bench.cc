// T1: how long a plan for one target rank takes to compile, how large it is, and how much memory
// compiling needs, on the real shapes of Qwen3-4B, Qwen3-30B-A3B and a 1T-class mixture of experts.
#include <benchmark/benchmark.h>
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

struct Model {
  int64_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int64_t intermediate = 0;  // of the MLP, or of one expert
  int64_t experts = 0;       // 0: dense
  int64_t vocabulary = 0;
  bool tied = false;
};

bool tiny() { return std::getenv("TRANSFUSE_BENCH_TINY") != nullptr; }
int64_t layers(int64_t wanted) { return tiny() ? 2 : wanted; }

// 398, 18,867 and 70,885 tensors.
Model qwen3_4b() { return {layers(36), 2560, 32, 8, 128, 9728, 0, 151936, true}; }
Model qwen3_30b() { return {layers(48), 2048, 32, 4, 128, 768, 128, 151936, false}; }
Model one_trillion() { return {layers(61), 7168, 64, 8, 128, 2048, 384, 163840, false}; }

enum class Part { kVocabulary, kNorm, kQ, kK, kV, kO, kGate, kUp, kDown, kRouter };

struct Piece {
  std::string name;
  Dims shape;
  Part part = Part::kNorm;
  int64_t layer = -1;
  int64_t expert = -1;
};

std::vector<Piece> pieces(const Model& m) {
  std::vector<Piece> all;
  const auto add = [&](std::string name, Dims shape, Part part, int64_t layer, int64_t expert) {
    all.push_back({std::move(name), shape, part, layer, expert});
  };
  add("model.embed_tokens.weight", {m.vocabulary, m.hidden}, Part::kVocabulary, -1, -1);
  add("model.norm.weight", {m.hidden}, Part::kNorm, -1, -1);
  if (!m.tied) add("lm_head.weight", {m.vocabulary, m.hidden}, Part::kVocabulary, -1, -1);
  for (int64_t l = 0; l < m.layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    add(p + "input_layernorm.weight", {m.hidden}, Part::kNorm, l, -1);
    add(p + "post_attention_layernorm.weight", {m.hidden}, Part::kNorm, l, -1);
    add(p + "self_attn.q_norm.weight", {m.head_dim}, Part::kNorm, l, -1);
    add(p + "self_attn.k_norm.weight", {m.head_dim}, Part::kNorm, l, -1);
    add(p + "self_attn.q_proj.weight", {m.heads * m.head_dim, m.hidden}, Part::kQ, l, -1);
    add(p + "self_attn.k_proj.weight", {m.kv_heads * m.head_dim, m.hidden}, Part::kK, l, -1);
    add(p + "self_attn.v_proj.weight", {m.kv_heads * m.head_dim, m.hidden}, Part::kV, l, -1);
    add(p + "self_attn.o_proj.weight", {m.hidden, m.heads * m.head_dim}, Part::kO, l, -1);
    if (m.experts > 0) add(p + "mlp.gate.weight", {m.experts, m.hidden}, Part::kRouter, l, -1);
    for (int64_t e = m.experts > 0 ? 0 : -1; e < m.experts; ++e) {
      const std::string q = p + (e < 0 ? "mlp." : "mlp.experts." + std::to_string(e) + ".");
      add(q + "gate_proj.weight", {m.intermediate, m.hidden}, Part::kGate, l, e);
      add(q + "up_proj.weight", {m.intermediate, m.hidden}, Part::kUp, l, e);
      add(q + "down_proj.weight", {m.hidden, m.intermediate}, Part::kDown, l, e);
      if (m.experts == 0) break;
    }
  }
  return all;
}

// A parameter of its own for one box of one tensor.
void add_alone(LayoutBuilder& builder, const Piece& piece, const Box& box, Dtype dtype) {
  const uint32_t tensor = builder.tensor({piece.name, Dtype::kBF16, piece.shape});
  if (box.element_count() == 0) return;
  builder.tile(tensor, box, builder.parameter({piece.name, dtype, box.element_count()}), 0);
}

// FSDP2: every tensor in even chunks of rows.
std::vector<Layout> fsdp(const Model& model, int64_t ranks, Dtype dtype = Dtype::kBF16) {
  std::vector<Layout> layouts;
  const std::vector<Piece> all = pieces(model);
  for (int64_t r = 0; r < ranks; ++r) {
    LayoutBuilder builder;
    for (const Piece& piece : all) {
      const int64_t chunk = (piece.shape[0] + ranks - 1) / ranks;
      Box box = Box::whole(piece.shape);
      box.offset[0] = std::min(piece.shape[0], r * chunk);
      box.length[0] = std::min(piece.shape[0], (r + 1) * chunk) - box.offset[0];
      add_alone(builder, piece, box, dtype);
    }
    layouts.push_back(builder.build().value());
  }
  return layouts;
}

// Pipeline stages of whole layers, experts whole on their expert-parallel rank, the rest on all.
std::vector<Layout> pipeline_and_experts(const Model& m, int64_t stages, int64_t expert_ranks) {
  std::vector<Layout> layouts;
  const std::vector<Piece> all = pieces(m);
  for (int64_t rank = 0; rank < stages * expert_ranks; ++rank) {
    LayoutBuilder builder;
    for (const Piece& piece : all) {
      const int64_t stage = piece.layer < 0 ? 0 : piece.layer * stages / m.layers;
      if (stage != rank / expert_ranks) continue;
      if (piece.expert >= 0 && piece.expert * expert_ranks / m.experts != rank % expert_ranks) {
        continue;
      }
      add_alone(builder, piece, Box::whole(piece.shape), Dtype::kBF16);
    }
    layouts.push_back(builder.build().value());
  }
  return layouts;
}

// One rank of an engine: fused QKV and gate/up, expert stacks, row-parallel columns.
class Engine {
 public:
  Engine(const Model& m, int64_t tp, int64_t expert_ranks) : m_(m), tp_(tp), ep_(expert_ranks) {}

  Layout rank(int64_t r) {
    r_ = r;
    for (const Piece& piece : pieces(m_)) place(piece);
    return builder_.build().value();
  }

 private:
  // Rows [r/tp, (r+1)/tp) of a tensor to row `at` of a fused parameter with `rows` rows.
  void rows(const Piece& piece, const std::string& parameter, int64_t rows, int64_t at) {
    Box box = Box::whole(piece.shape);
    box.length[0] /= tp_;
    box.offset[0] = r_ % tp_ * box.length[0];
    const int64_t width = piece.shape.product() / piece.shape[0];
    const uint32_t p = builder_.parameter({parameter, Dtype::kBF16, rows * width});
    builder_.tile(builder_.tensor({piece.name, Dtype::kBF16, piece.shape}), box, p, at * width);
  }

  void columns(const Piece& piece, const std::string& parameter, int64_t stack, int64_t index) {
    Box box = Box::whole(piece.shape);
    box.length[1] /= tp_;
    box.offset[1] = r_ % tp_ * box.length[1];
    const int64_t each = box.element_count();
    const uint32_t p = builder_.parameter({parameter, Dtype::kBF16, stack * each});
    builder_.tile(builder_.tensor({piece.name, Dtype::kBF16, piece.shape}), box, p, index * each);
  }

  void place(const Piece& piece) {
    const std::string prefix =
        piece.layer < 0 ? "" : "model.layers." + std::to_string(piece.layer) + ".";
    const int64_t q = m_.heads * m_.head_dim / tp_;
    const int64_t kv = m_.kv_heads * m_.head_dim / tp_;
    switch (piece.part) {
      case Part::kNorm:
      case Part::kRouter:
        return add_alone(builder_, piece, Box::whole(piece.shape), Dtype::kBF16);
      case Part::kVocabulary:
        return rows(piece, piece.name, piece.shape[0] / tp_, 0);
      case Part::kQ:
        return rows(piece, prefix + "self_attn.qkv_proj.weight", q + 2 * kv, 0);
      case Part::kK:
        return rows(piece, prefix + "self_attn.qkv_proj.weight", q + 2 * kv, q);
      case Part::kV:
        return rows(piece, prefix + "self_attn.qkv_proj.weight", q + 2 * kv, q + kv);
      case Part::kO:
        return columns(piece, piece.name, 1, 0);
      default:
        return place_mlp(piece, prefix);
    }
  }

  void place_mlp(const Piece& piece, const std::string& prefix) {
    const int64_t inter = m_.intermediate / tp_;
    const int64_t stack = std::max<int64_t>(1, m_.experts / ep_);
    const int64_t index = std::max<int64_t>(0, piece.expert - (r_ % ep_) * stack);
    if (piece.expert >= 0 && piece.expert / stack != r_ % ep_) return;
    if (piece.part == Part::kDown) {
      return columns(piece, prefix + "mlp.experts.w2_weight", stack, index);
    }
    rows(piece, prefix + "mlp.experts.w13_weight", stack * 2 * inter,
         index * 2 * inter + (piece.part == Part::kUp ? inter : 0));
  }

  const Model m_;
  const int64_t tp_;
  const int64_t ep_;
  int64_t r_ = 0;
  LayoutBuilder builder_;
};

// High-water mark of resident memory since the last reset, in MiB.
class PeakMemory {
 public:
  PeakMemory() {
    malloc_trim(0);  // else compiling would live in what building the layouts left behind
    std::ofstream("/proc/self/clear_refs") << "5";  // resets VmHWM; see proc(5)
    before_ = read("VmRSS:");
  }
  double grown_mib() const { return static_cast<double>(read("VmHWM:") - before_) / 1024; }

 private:
  static int64_t read(const std::string& key) {
    std::ifstream status("/proc/self/status");
    std::string word;
    int64_t kib = 0;
    while (status >> word) {
      if (word == key && status >> kib) break;
    }
    return kib;
  }
  int64_t before_ = 0;
};

void measure(benchmark::State& state, const Layout& target, const std::vector<Layout>& sources) {
  const PeakMemory memory;
  const auto plan = compile(target, sources);
  if (!plan) return state.SkipWithError(plan.error().message.c_str());
  state.counters["peak_mib"] = memory.grown_mib();
  state.counters["plan_mib"] = static_cast<double>(plan->memory_bytes()) / (1 << 20);
  state.counters["tensors"] = static_cast<double>(target.tensors().size());
  state.counters["chunks"] = static_cast<double>(plan->chunks().size());
  state.counters["runs"] = static_cast<double>(plan->runs().size());
  state.counters["holders"] = static_cast<double>(plan->holders().size());
  state.counters["bytes_per_run"] =
      static_cast<double>(plan->memory_bytes()) / static_cast<double>(plan->runs().size());
  for (auto _ : state) benchmark::DoNotOptimize(compile(target, sources));
}

void BM_Qwen3_4B_Fsdp2ToTp2(benchmark::State& state) {
  measure(state, Engine(qwen3_4b(), 2, 1).rank(1), fsdp(qwen3_4b(), 2, Dtype::kF32));
}
BENCHMARK(BM_Qwen3_4B_Fsdp2ToTp2)->Unit(benchmark::kMillisecond);

void BM_Qwen3_4B_Fsdp8ToTp4(benchmark::State& state) {
  measure(state, Engine(qwen3_4b(), 4, 1).rank(1), fsdp(qwen3_4b(), 8));
}
BENCHMARK(BM_Qwen3_4B_Fsdp8ToTp4)->Unit(benchmark::kMillisecond);

void BM_Qwen3_4B_Fsdp64ToTp8(benchmark::State& state) {
  measure(state, Engine(qwen3_4b(), 8, 1).rank(1), fsdp(qwen3_4b(), 64));
}
BENCHMARK(BM_Qwen3_4B_Fsdp64ToTp8)->Unit(benchmark::kMillisecond);

void BM_Qwen3_30B_Fsdp2ToTp4(benchmark::State& state) {
  measure(state, Engine(qwen3_30b(), 4, 1).rank(1), fsdp(qwen3_30b(), 2));
}
BENCHMARK(BM_Qwen3_30B_Fsdp2ToTp4)->Unit(benchmark::kMillisecond);

void BM_Qwen3_30B_Fsdp8ToTp4(benchmark::State& state) {
  measure(state, Engine(qwen3_30b(), 4, 1).rank(1), fsdp(qwen3_30b(), 8));
}
BENCHMARK(BM_Qwen3_30B_Fsdp8ToTp4)->Unit(benchmark::kMillisecond);

void BM_Qwen3_30B_WholeToWhole(benchmark::State& state) {
  measure(state, fsdp(qwen3_30b(), 1)[0], fsdp(qwen3_30b(), 1, Dtype::kF32));
}
BENCHMARK(BM_Qwen3_30B_WholeToWhole)->Unit(benchmark::kMillisecond);

void BM_OneTrillion_256SourcesToTp8(benchmark::State& state) {
  measure(state, Engine(one_trillion(), 8, 1).rank(3), pipeline_and_experts(one_trillion(), 8, 32));
}
BENCHMARK(BM_OneTrillion_256SourcesToTp8)->Unit(benchmark::kMillisecond);

void BM_OneTrillion_256SourcesToEp16(benchmark::State& state) {
  measure(state, Engine(one_trillion(), 1, 16).rank(3),
          pipeline_and_experts(one_trillion(), 8, 32));
}
BENCHMARK(BM_OneTrillion_256SourcesToEp16)->Unit(benchmark::kMillisecond);

void BM_Assign_Qwen3_30B(benchmark::State& state) {
  const auto plan = compile(Engine(qwen3_30b(), 4, 1).rank(1), fsdp(qwen3_30b(), 2));
  if (!plan) return state.SkipWithError(plan.error().message.c_str());
  const std::vector<uint32_t> members(2, static_cast<uint32_t>(state.range(0)));
  Assignment assignment;
  for (auto _ : state) benchmark::DoNotOptimize(assign(*plan, members, 1, assignment));
  state.counters["runs"] = static_cast<double>(plan->runs().size());
}
BENCHMARK(BM_Assign_Qwen3_30B)->Arg(1)->Arg(8)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace transfuse

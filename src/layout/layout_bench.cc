// How long a layout of a 1T-class mixture of experts takes to build, digest, encode and decode.
#include <benchmark/benchmark.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {
namespace {

struct Entry {
  TensorSpec tensor;
  std::vector<Box> boxes;
};

// 61 layers of 384 experts with three matrices: 70,272 tensors; every 2nd in two tiles: 105,408.
std::vector<Entry> experts() {
  std::vector<Entry> entries;
  for (int layer = 0; layer < 61; ++layer) {
    for (int expert = 0; expert < 384; ++expert) {
      for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
        Entry entry{{"model.layers." + std::to_string(layer) + ".mlp.experts." +
                         std::to_string(expert) + "." + part + ".weight",
                     Dtype::kBF16,
                     {2048, 7168}},
                    {}};
        if (entries.size() % 2 == 0) {
          entry.boxes = {Box::whole({2048, 7168})};
        } else {
          entry.boxes = {Box{{1024, 0}, {1024, 7168}}, Box{{0, 0}, {1024, 7168}}};
        }
        entries.push_back(std::move(entry));
      }
    }
  }
  return entries;
}

LayoutBuilder collect(const std::vector<Entry>& entries) {
  LayoutBuilder builder;
  for (const Entry& entry : entries) {
    const auto t = builder.tensor(entry.tensor);
    const auto p =
        builder.parameter({entry.tensor.name, entry.tensor.dtype, entry.tensor.shape.product()});
    for (const Box& box : entry.boxes) {
      builder.tile(t, box, p, box.offset[0] * entry.tensor.shape[1]);
    }
  }
  return builder;
}

Layout build(const std::vector<Entry>& entries) { return collect(entries).build().value(); }

void BM_BuildAndDigest(benchmark::State& state) {
  const auto entries = experts();
  for (auto _ : state) {
    state.PauseTiming();
    LayoutBuilder builder = collect(entries);
    state.ResumeTiming();
    benchmark::DoNotOptimize(builder.build().value().digest());
  }
  state.counters["tensors"] = static_cast<double>(entries.size());
}
BENCHMARK(BM_BuildAndDigest)->Unit(benchmark::kMillisecond);

void BM_Collect(benchmark::State& state) {
  const auto entries = experts();
  for (auto _ : state) benchmark::DoNotOptimize(collect(entries));
}
BENCHMARK(BM_Collect)->Unit(benchmark::kMillisecond);

void BM_Encode(benchmark::State& state) {
  const Layout layout = build(experts());
  for (auto _ : state) benchmark::DoNotOptimize(encode(layout));
  state.counters["bytes"] = static_cast<double>(encode(layout).size());
}
BENCHMARK(BM_Encode)->Unit(benchmark::kMillisecond);

void BM_Decode(benchmark::State& state) {
  const std::string bytes = encode(build(experts()));
  for (auto _ : state) {
    benchmark::DoNotOptimize(decode_layout(std::as_bytes(std::span(bytes.data(), bytes.size()))));
  }
}
BENCHMARK(BM_Decode)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace transfuse

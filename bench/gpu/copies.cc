// The copies of one target rank's plan, from sources on one GPU into a target on another or on the
// same one, beside what the copy engine reaches on one contiguous piece of the same bytes.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "gpu_stopwatch.h"
#include "measure_gpu.h"
#include "plan/copies.h"
#include "scaled_rows.h"
#include "shapes.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

using cuda::CopyOptions;
using cuda::Device;
using cuda::Driver;
using cuda::Memory;
using cuda::MemoryKind;
using cuda::PreparedCopies;

constexpr uint64_t kAlignment = 512;  // of parameters, as PyTorch's allocator gives them
constexpr uint64_t kChunkBytes = uint64_t{64} << 20;

struct Pair {
  std::string name;
  ModelConfig model;
  std::string source;
  std::string target;
};

// The parameters of one process, one after another in one allocation.
struct Placed {
  Memory memory;
  std::vector<uint64_t> offset;
};

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

class Bench {
 public:
  Bench(const Device& source, GpuStopwatch& watch, std::FILE* table)
      : source_(source), target_(watch.device()), watch_(watch), table_(table) {}

  Result<nlohmann::json> run(const Pair& pair) {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto sources, layouts_of(pair.model, pair.source));
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout target, layout_of(pair.model, pair.target, 0));
    const auto compile_start = std::chrono::steady_clock::now();
    TRANSFUSE_ASSIGN_OR_RETURN(Plan plan, compile(target, sources, {.chunk_bytes = kChunkBytes}));
    const double compile_ms = milliseconds_since(compile_start);
    const CopyTable copies(std::move(plan));

    // One allocation a distinct layout: replicas would read the same bytes.
    std::vector<Placed> placed;
    std::vector<CUdeviceptr> bases;
    for (const Layout& layout : copies.plan().source_layouts()) {
      TRANSFUSE_ASSIGN_OR_RETURN(Placed place_of, place(source_, layout));
      TRANSFUSE_RETURN_IF_ERROR(watch_.scramble(place_of.memory));
      bases.push_back(place_of.memory.address());
      placed.push_back(std::move(place_of));
    }
    TRANSFUSE_ASSIGN_OR_RETURN(const Placed into, place(target_, target));

    nlohmann::json out = {{"pair", pair.name},
                          {"source", pair.source},
                          {"target", pair.target},
                          {"tensors", target.tensors().size()},
                          {"bytes", copies.plan().size_bytes()},
                          {"runs", copies.plan().runs().size()},
                          {"compile_ms", compile_ms}};
    TRANSFUSE_ASSIGN_OR_RETURN(const double ceiling, one_piece(into.memory, placed));
    out["copy_engine_one_piece_gb_s"] = ceiling;
    struct Mode {
      const char* name;
      bool fingerprint;
      bool engines;
    };
    for (const Mode mode :
         {Mode{"kernel", false, false}, Mode{"kernel, fingerprints", true, false},
          Mode{"kernel and copy engines", false, true}, Mode{"both, fingerprints", true, true}}) {
      TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json found, measure(copies, placed, bases, into,
                                                               mode.fingerprint, mode.engines));
      found["ratio"] = found["gb_s"].get<double>() / ceiling;
      fmt::print(table_,
                 "{:34} {:24} {:8.2f} ms {:7.1f} GB/s  {:.3f} of the copy engine ({:.0f}); prepare "
                 "{:.1f} ms, table {:.1f} MiB{}\n",
                 pair.name, mode.name, found["ms"].get<double>(), found["gb_s"].get<double>(),
                 found["ratio"].get<double>(), ceiling, found["prepare_ms"].get<double>(),
                 found["table_mib"].get<double>(), found.value("verified", true) ? "" : "  WRONG");
      (void)std::fflush(table_);
      out[mode.name] = std::move(found);
    }
    return out;
  }

 private:
  Result<Placed> place(const Device& device, const Layout& layout) {
    Placed placed;
    uint64_t size = 0;
    for (const ParameterSpec& parameter : layout.parameters()) {
      placed.offset.push_back(size);
      size += static_cast<uint64_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype);
      size = (size + kAlignment - 1) / kAlignment * kAlignment;
    }
    TRANSFUSE_ASSIGN_OR_RETURN(
        placed.memory, Memory::allocate(device, MemoryKind::kDevice, std::max(size, kAlignment)));
    return placed;
  }

  // GB/s of the copy engine on as many contiguous bytes as one source and the target both have.
  Result<double> one_piece(const Memory& into, const std::vector<Placed>& placed) {
    const Placed& largest = *std::ranges::max_element(
        placed, {}, [](const Placed& p) { return p.memory.size_bytes(); });
    const uint64_t size = std::min(into.size_bytes(), largest.memory.size_bytes());
    return watch_.one_piece(into.address(), largest.memory.address(), size);
  }

  Result<nlohmann::json> measure(const CopyTable& copies, const std::vector<Placed>& placed,
                                 const std::vector<CUdeviceptr>& bases, const Placed& into,
                                 bool fingerprint, bool engines) {
    const Plan& plan = copies.plan();
    const auto prepare_start = std::chrono::steady_clock::now();
    std::vector<StridedCopy> all;
    std::vector<uint32_t> sources;
    for (const Run& run : plan.runs()) {
      const Holder& holder = plan.holders_of(run).front();
      auto* const to =
          reinterpret_cast<std::byte*>(into.memory.address() + into.offset[run.parameter]);
      all.push_back(copies.copy(run, holder, placed[holder.source_layout].offset[holder.parameter],
                                to, fingerprint));
      sources.push_back(holder.source_layout);
    }
    CopyOptions options;
    options.engines.copy_engines = engines;
    if (!fingerprint) options.table.item_bytes = uint64_t{64} << 10;
    TRANSFUSE_ASSIGN_OR_RETURN(
        PreparedCopies prepared,
        PreparedCopies::make(target_, all, sources, static_cast<uint32_t>(bases.size()), options));
    const double prepare_ms = milliseconds_since(prepare_start);
    TRANSFUSE_ASSIGN_OR_RETURN(const double ms, watch_.median_ms([&] {
      return prepared.launch(bases, {.stream = watch_.stream()});
    }));
    const auto bytes =
        static_cast<double>(std::max(prepared.target_bytes(), prepared.source_bytes()));
    nlohmann::json out = {{"ms", ms},
                          {"gb_s", bytes / ms / 1e6},
                          {"prepare_ms", prepare_ms},
                          {"table_mib", static_cast<double>(prepared.memory_bytes()) / (1 << 20)},
                          {"engine_bytes", prepared.engine_bytes()}};
    if (fingerprint) {
      // What lies in the target sums to what was read from the sources.
      TRANSFUSE_ASSIGN_OR_RETURN(const auto held, watch_.sums_at_target(all, into.memory));
      out["verified"] = std::ranges::equal(prepared.sums(), held);
    }
    return out;
  }

  const Device& source_;
  const Device& target_;
  GpuStopwatch& watch_;
  std::FILE* table_;
};

std::vector<Pair> pairs_of(bool small) {
  const ModelConfig dense = qwen3_4b(small ? 4 : 36);
  ModelConfig moe = qwen3_30b_a3b();
  if (small) moe.num_hidden_layers = 4;
  return {
      {"4B matched", dense, "hf", "hf"},
      {"4B fsdp 2 -> vllm tp 2", dense, "fsdp:dp=2", "vllm:tp=2"},
      {"4B fsdp 2 f32 -> vllm tp 2", dense, "fsdp:dp=2,dtype=f32", "vllm:tp=2"},
      {"4B megatron tp 2 -> vllm tp 1", dense, "megatron:tp=2", "vllm:tp=1"},
      {"4B megatron tp 2 -> vllm tp 4", dense, "megatron:tp=2", "vllm:tp=4"},
      {"4B megatron tp 4 -> vllm tp 2", dense, "megatron:tp=4", "vllm:tp=2"},
      {"30B matched", moe, "hf", "hf"},
      {"30B fsdp 2 -> vllm tp 2", moe, "fsdp:dp=2", "vllm:tp=2"},
      {"30B megatron tp2 pp2 ep4 -> vllm ep", moe, "megatron:tp=2,pp=2,ep=4", "vllm:tp=4,ep"},
  };
}

}  // namespace

Result<nlohmann::json> measure_gpu(const GpuOptions& options) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Driver* driver, Driver::load());
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetCount, &count));
  if (options.device < 0 || options.device >= count) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("device {}: this process sees {}", options.device, count)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto target, Device::open(*driver, options.device));
  std::unique_ptr<Device> other;
  if (count > 1) {
    TRANSFUSE_ASSIGN_OR_RETURN(other, Device::open(*driver, (options.device + 1) % count));
    TRANSFUSE_RETURN_IF_ERROR(target->enable_peer(*other));
  }
  const std::vector<Pair> pairs = pairs_of(options.small);
  nlohmann::json all = nlohmann::json::array();
  for (Device* source : {other.get(), target.get()}) {
    if (source == nullptr) continue;
    fmt::print(options.table, "== {} -> {}{}\n", source->name(), target->name(),
               source == target.get() ? ", one GPU" : ", two GPUs");
    TRANSFUSE_ASSIGN_OR_RETURN(GpuStopwatch watch, GpuStopwatch::create(*target));
    for (const Pair& pair : pairs) {
      if (pair.name.find(options.only) == std::string::npos) continue;
      Bench bench(*source, watch, options.table);
      auto found = bench.run(pair);
      if (!found && found.error().code == ErrorCode::kResourceExhausted) {
        fmt::print(options.table, "{}: {}\n", pair.name, found.error().message);
        continue;
      }
      if (!found) return found.error();
      (*found)["gpus"] = source == target.get() ? 1 : 2;
      all.push_back(std::move(*found));
    }
    TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json shapes, measure_shapes(*source, *target, options));
    TRANSFUSE_ASSIGN_OR_RETURN(const nlohmann::json scaled,
                               measure_scaled(*source, *target, options));
    shapes.insert(shapes.end(), scaled.begin(), scaled.end());
    for (nlohmann::json& shape : shapes) {
      shape["gpus"] = source == target.get() ? 1 : 2;
      all.push_back(std::move(shape));
    }
  }
  TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json staged, measure_staged(options));
  for (nlohmann::json& row : staged) all.push_back(std::move(row));
  return all;
}

}  // namespace transfuse::bench

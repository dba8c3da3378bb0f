// The copies of one target rank's plan, from sources on one GPU into a target on another or on the
// same one, beside what the copy engine reaches on one contiguous piece of the same bytes.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plan/copies.h"
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
using cuda::Event;
using cuda::EventKind;
using cuda::Memory;
using cuda::MemoryKind;
using cuda::PreparedCopies;
using cuda::Stream;

constexpr uint64_t kAlignment = 512;  // of parameters, as PyTorch's allocator gives them
constexpr int kRepetitions = 7;
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
  Bench(const Device& source, const Device& target) : source_(source), target_(target) {}

  Result<nlohmann::json> run(const Pair& pair) {
    TRANSFUSE_ASSIGN_OR_RETURN(stream_, Stream::create(target_));
    TRANSFUSE_ASSIGN_OR_RETURN(begin_, Event::create(target_, EventKind::kTiming));
    TRANSFUSE_ASSIGN_OR_RETURN(end_, Event::create(target_, EventKind::kTiming));
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
      TRANSFUSE_RETURN_IF_ERROR(scramble(place_of.memory));
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
    for (const Mode mode : {Mode{"kernel", false, false}, Mode{"kernel, fingerprints", true, false},
                            Mode{"kernel and copy engines", false, true}}) {
      TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json found, measure(copies, placed, bases, into,
                                                               mode.fingerprint, mode.engines));
      found["ratio"] = found["gb_s"].get<double>() / ceiling;
      fmt::print(
          "{:34} {:24} {:8.2f} ms {:7.1f} GB/s  {:.3f} of the copy engine ({:.0f}); prepare "
          "{:.1f} ms, table {:.1f} MiB{}\n",
          pair.name, mode.name, found["ms"].get<double>(), found["gb_s"].get<double>(),
          found["ratio"].get<double>(), ceiling, found["prepare_ms"].get<double>(),
          found["table_mib"].get<double>(), found.value("verified", true) ? "" : "  WRONG");
      std::fflush(stdout);
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

  // Pseudorandom bytes, from a block that is made here and copied on with a growing stride.
  Result<void> scramble(const Memory& memory) {
    constexpr uint64_t kBlock = (uint64_t{8} << 20) + 24;
    if (block_.empty()) {
      block_.resize(kBlock);
      uint64_t state = 88172645463325252U;
      for (auto& byte : block_) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        byte = static_cast<std::byte>(state >> 32);
      }
    }
    const cuda::Current current = target_.use();
    const Driver& driver = target_.driver();
    for (uint64_t at = 0; at < memory.size_bytes(); at += kBlock) {
      const uint64_t size = std::min(kBlock, memory.size_bytes() - at);
      TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuMemcpyAsync, memory.address() + at,
                                               reinterpret_cast<CUdeviceptr>(block_.data()), size,
                                               stream_.get()));
    }
    return TRANSFUSE_CUDA(driver, cuStreamSynchronize, stream_.get());
  }

  Result<double> timed_ms(const std::function<Result<void>()>& work) {
    const Driver& driver = target_.driver();
    const cuda::Current current = target_.use();
    std::vector<float> samples;
    for (int i = 0; i <= kRepetitions; ++i) {
      TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, begin_.get(), stream_.get()));
      TRANSFUSE_RETURN_IF_ERROR(work());
      TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, end_.get(), stream_.get()));
      TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventSynchronize, end_.get()));
      float ms = 0;
      TRANSFUSE_RETURN_IF_ERROR(
          TRANSFUSE_CUDA(driver, cuEventElapsedTime, &ms, begin_.get(), end_.get()));
      if (i > 0) samples.push_back(ms);  // the first one warms up
    }
    std::ranges::sort(samples);
    return static_cast<double>(samples[samples.size() / 2]);
  }

  // GB/s of the copy engine on as many contiguous bytes as one source and the target both have.
  Result<double> one_piece(const Memory& into, const std::vector<Placed>& placed) {
    const Placed& largest = *std::ranges::max_element(
        placed, {}, [](const Placed& p) { return p.memory.size_bytes(); });
    const uint64_t size = std::min(into.size_bytes(), largest.memory.size_bytes());
    TRANSFUSE_ASSIGN_OR_RETURN(const double ms, timed_ms([&] {
                                 return TRANSFUSE_CUDA(target_.driver(), cuMemcpyAsync,
                                                       into.address(), largest.memory.address(),
                                                       size, stream_.get());
                               }));
    return static_cast<double>(size) / ms / 1e6;
  }

  Result<nlohmann::json> measure(const CopyTable& copies, const std::vector<Placed>& placed,
                                 const std::vector<CUdeviceptr>& bases, const Placed& into,
                                 bool fingerprint, bool engines) {
    const Plan& plan = copies.plan();
    const auto prepare_start = std::chrono::steady_clock::now();
    std::vector<StridedCopy> all;
    std::vector<uint32_t> sources;
    std::vector<StridedCopy> check;
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
    TRANSFUSE_ASSIGN_OR_RETURN(const double ms, timed_ms([&] {
                                 return prepared.launch(bases, {.stream = stream_.get()});
                               }));
    const auto bytes =
        static_cast<double>(std::max(prepared.target_bytes(), prepared.source_bytes()));
    nlohmann::json out = {{"ms", ms},
                          {"gb_s", bytes / ms / 1e6},
                          {"prepare_ms", prepare_ms},
                          {"table_mib", static_cast<double>(prepared.memory_bytes()) / (1 << 20)},
                          {"engine_bytes", prepared.engine_bytes()}};
    if (fingerprint) {
      TRANSFUSE_ASSIGN_OR_RETURN(const bool same, verify(all, prepared, into));
      out["verified"] = same;
    }
    return out;
  }

  // The sums of what lies in the target are the sums of what was read from the sources.
  Result<bool> verify(std::vector<StridedCopy> copies, const PreparedCopies& moved,
                      const Placed& into) {
    for (StridedCopy& copy : copies) {
      copy.source_offset_bytes = reinterpret_cast<uint64_t>(copy.target) - into.memory.address();
      std::copy_n(copy.target_stride, 3, copy.source_stride);
      copy.target = nullptr;
      copy.op = plain(target_element_bytes(copy.op));
    }
    const std::vector<uint32_t> sources(copies.size(), 0);
    TRANSFUSE_ASSIGN_OR_RETURN(PreparedCopies held,
                               PreparedCopies::make(target_, copies, sources, 1, {}));
    const std::vector<CUdeviceptr> bases = {into.memory.address()};
    TRANSFUSE_RETURN_IF_ERROR(held.launch(bases, {.stream = stream_.get()}));
    const cuda::Current current = target_.use();
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(target_.driver(), cuStreamSynchronize, stream_.get()));
    return std::ranges::equal(moved.sums(), held.sums());
  }

  static ElementOp plain(uint32_t bytes) {
    return bytes == 1   ? ElementOp::kCopy1
           : bytes == 2 ? ElementOp::kCopy2
           : bytes == 4 ? ElementOp::kCopy4
                        : ElementOp::kCopy8;
  }

  const Device& source_;
  const Device& target_;
  Stream stream_;
  Event begin_;
  Event end_;
  std::vector<std::byte> block_;
};

Result<void> run(bool small) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Driver* driver, Driver::load());
  int count = 0;
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(*driver, cuDeviceGetCount, &count));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto target, Device::open(*driver, 0));
  std::unique_ptr<Device> other;
  if (count > 1) {
    TRANSFUSE_ASSIGN_OR_RETURN(other, Device::open(*driver, 1));
    TRANSFUSE_RETURN_IF_ERROR(target->enable_peer(*other));
  }
  const ModelConfig dense = qwen3_4b(small ? 4 : 36);
  ModelConfig moe = qwen3_30b_a3b();
  if (small) moe.num_hidden_layers = 4;
  const std::vector<Pair> pairs = {
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
  nlohmann::json all = nlohmann::json::array();
  for (Device* source : {other.get(), target.get()}) {
    if (source == nullptr) continue;
    fmt::print("== {} -> {}{}\n", source->name(), target->name(),
               source == target.get() ? ", one GPU" : ", two GPUs");
    for (const Pair& pair : pairs) {
      Bench bench(*source, *target);
      auto found = bench.run(pair);
      if (!found && found.error().code == ErrorCode::kResourceExhausted) {
        fmt::print("{}: {}\n", pair.name, found.error().message);
        continue;
      }
      if (!found) return found.error();
      (*found)["gpus"] = source == target.get() ? 1 : 2;
      all.push_back(std::move(*found));
    }
  }
  if (const char* path = std::getenv("TRANSFUSE_GPU_JSON"); path != nullptr) {
    std::FILE* file = std::fopen(path, "w");
    if (file == nullptr)
      return Error{ErrorCode::kInvalidArgument, fmt::format("cannot write {}", path)};
    fmt::print(file, "{}\n", all.dump(1));
    (void)std::fclose(file);
  }
  return {};
}

}  // namespace
}  // namespace transfuse::bench

int main(int count, char** arguments) {
  const bool small = count > 1 && std::string_view(arguments[1]) == "--small";
  const auto done = transfuse::bench::run(small);
  if (!done) fmt::print(stderr, "{}\n", done.error().to_string());
  return done ? 0 : 1;
}

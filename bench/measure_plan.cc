// T1: the time to compile a plan for one target rank, and its memory.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "measure.h"
#include "process_memory.h"
#include "stopwatch.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr double kMiB = 1 << 20;

// Compiles on the calling thread (compile() starts none), `repetitions` times.
Result<void> measure_pair(const std::string& workload, const Layout& target,
                          const std::vector<Layout>& sources, double target_ms, int repetitions,
                          const Sink& sink) {
  std::vector<double> milliseconds;
  Figure figure{"T1", workload, "compile", "ms", {}, {}};
  reset_memory_peak();
  const uint64_t before = process_memory_bytes("VmRSS");
  for (int i = 0; i < repetitions; ++i) {
    const Stopwatch watch;
    TRANSFUSE_ASSIGN_OR_RETURN(const Plan plan, compile(target, sources));
    milliseconds.push_back(watch.seconds() * 1e3);
    if (i == 0) {
      const uint64_t peak = process_memory_bytes("VmHWM");
      figure.detail = {
          {"target_ms", target_ms},
          {"tensors", target.tensors().size()},
          {"sources", sources.size()},
          {"runs", plan.runs().size()},
          {"chunks", plan.chunks().size()},
          {"plan_mib", static_cast<double>(plan.memory_bytes()) / kMiB},
          {"plan_bytes_per_run",
           static_cast<double>(plan.memory_bytes()) / static_cast<double>(plan.runs().size())},
          {"compile_peak_mib", static_cast<double>(peak - std::min(peak, before)) / kMiB},
          {"bytes_moved", plan.size_bytes()},
          {"bytes_of_target_parameters", target.parameter_bytes()}};
    }
  }
  figure.value = spread_of(std::move(milliseconds));
  sink(figure);
  return {};
}

}  // namespace

Result<void> measure_plan(const Options& options, const Sink& sink) {
  struct Case {
    std::string_view model;
    std::string_view source;
    std::string_view target;
    double target_ms;
  };
  constexpr Case kCases[] = {
      {"qwen3-4b", "hf", "hf", 2},
      {"qwen3-4b", "fsdp:dp=2", "vllm:tp=2", 2},
      {"qwen3-4b", "fsdp:dp=8", "vllm:tp=4", 2},
      {"qwen3-30b-a3b", "hf", "hf", 20},
      {"qwen3-30b-a3b", "fsdp:dp=8", "hf", 20},
      {"qwen3-30b-a3b", "fsdp:dp=8", "vllm:tp=4,ep", 20},
      {"qwen3-30b-a3b", "megatron:tp=2,pp=2,ep=4", "vllm:tp=4,ep", 20},
      {"qwen3-30b-a3b", "megatron:tp=2,pp=2,ep=4", "vllm:tp=4", 20},
  };
  for (const Case& c : kCases) {
    const ModelConfig config =
        c.model == "qwen3-4b" ? qwen3_4b(options.tiny ? 2 : 36) : qwen3_30b_a3b();
    TRANSFUSE_ASSIGN_OR_RETURN(const auto sources, layouts_of(config, c.source));
    TRANSFUSE_ASSIGN_OR_RETURN(const auto targets, layouts_of(config, c.target));
    TRANSFUSE_RETURN_IF_ERROR(measure_pair(
        fmt::format("{} {} -> {}, rank 0", c.model, c.source, c.target), targets.front(), sources,
        c.target_ms, options.tiny ? 1 : 3 * options.repetitions, sink));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const LayoutPair pair, one_trillion_class(options.tiny));
  return measure_pair(
      fmt::format("1T-class MoE, {} sources -> expert rank 0 of 8", pair.sources.size()),
      pair.target, pair.sources, 200, options.tiny ? 1 : options.repetitions, sink);
}

}  // namespace transfuse::bench

// `transfuse plan`: what a refit between two parallelisms would move, without any weights or GPU.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <ios>
#include <memory>
#include <nlohmann/json.hpp>
#include <ratio>
#include <string>
#include <utility>
#include <vector>

#include "command.h"
#include "read_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr size_t kMaxFindings = 1000;
constexpr size_t kShownFindings = 20;

struct Arguments {
  std::string config;
  std::string from;
  std::string to;
  std::string svg;
  double chunk_mib = 1;
  bool json = false;
};

// One side of the refit: a layout and a name for each rank.
struct Side {
  std::vector<Layout> layouts;
  std::vector<std::string> names;
};

struct TimedPlan {
  Plan plan;
  double compile_ms = 0;
};

Result<void> write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) return Error{ErrorCode::kInvalidArgument, "cannot write " + path};
  return {};
}

Result<Side> make_side(const ModelConfig& config, const std::string& text) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec, read_parallel_spec(text));
  Side side;
  TRANSFUSE_ASSIGN_OR_RETURN(side.layouts, make_layouts(config, spec));
  for (size_t rank = 0; rank < side.layouts.size(); ++rank) {
    side.names.push_back(spec.family + "." + std::to_string(rank));
  }
  return side;
}

// Overwrites one line of a terminal; says nothing into a file or pipe.
void show_progress(size_t done, size_t total) {
  if (total < 4 || isatty(STDERR_FILENO) == 0) return;
  std::fprintf(stderr, "\rplanned %zu of %zu targets%s", done, total,
               done == total ? "\r\033[K" : "");
  std::fflush(stderr);
}

Result<std::vector<TimedPlan>> compile_all(const Side& sources, const Side& targets,
                                           const PlanOptions& options) {
  std::vector<TimedPlan> plans;
  for (const Layout& target : targets.layouts) {
    const auto start = std::chrono::steady_clock::now();
    TRANSFUSE_ASSIGN_OR_RETURN(Plan plan, compile(target, sources.layouts, options));
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    plans.push_back({std::move(plan), took.count()});
    show_progress(plans.size(), targets.layouts.size());
  }
  return plans;
}

// The answer "no": every finding of the first target that does not fit.
int report_findings(const Side& sources, const Side& targets, bool json) {
  for (size_t t = 0; t < targets.layouts.size(); ++t) {
    const std::vector<Finding> findings =
        diagnose(targets.layouts[t], sources.layouts, kMaxFindings);
    if (findings.empty()) continue;
    if (json) {
      nlohmann::ordered_json body = {{"target", targets.names[t]},
                                     {"findings", nlohmann::ordered_json::array()}};
      for (const Finding& f : findings) {
        body["findings"].push_back({{"kind", finding_kind_name(f.kind)},
                                    {"tensor", f.tensor},
                                    {"parameter", f.parameter},
                                    {"box", f.box.to_string()},
                                    {"reason", f.reason}});
      }
      std::printf("%s\n", body.dump(2).c_str());
      return kExitNo;
    }
    std::printf("%s cannot be served by these sources:\n", targets.names[t].c_str());
    for (size_t i = 0; i < std::min(findings.size(), kShownFindings); ++i) {
      const std::string kind(finding_kind_name(findings[i].kind));
      std::printf("  %-14s  %s\n", kind.c_str(), findings[i].reason.c_str());
    }
    if (findings.size() > kShownFindings) {
      std::printf("  and %zu more (--json lists them)\n", findings.size() - kShownFindings);
    }
    return kExitNo;
  }
  return kExitNo;
}

// What one rank needs beside its weights, by the choices that it has.
struct RankMemory {
  std::string name;
  std::vector<uint64_t> size_bytes;  // one for each of the choices
};
constexpr std::array kSourceChoices = {"in_place", "snapshot_1", "snapshot_2"};
constexpr std::array kTargetChoices = {"in_place", "shadow"};

struct Memory {
  std::vector<RankMemory> sources;
  std::vector<RankMemory> targets;
};

// Sources keep fingerprints for every target, per slot; targets keep none.
Memory memory_of(const Side& sources, const Side& targets, const std::vector<TimedPlan>& plans) {
  Memory memory;
  for (size_t s = 0; s < sources.layouts.size(); ++s) {
    RankMemory& rank = memory.sources.emplace_back(RankMemory{sources.names[s], {}});
    for (uint32_t slots = 0; slots < kSourceChoices.size(); ++slots) {
      uint64_t size_bytes = slots == 0 ? 0 : snapshot_bytes(sources.layouts[s], slots);
      for (const TimedPlan& timed : plans) {
        size_bytes += fingerprint_table_bytes(timed.plan, sources.layouts[s], slots);
      }
      rank.size_bytes.push_back(size_bytes);
    }
  }
  for (size_t t = 0; t < targets.layouts.size(); ++t) {
    memory.targets.push_back({targets.names[t], {0, shadow_bytes(targets.layouts[t])}});
  }
  return memory;
}

template <size_t kCount>
void print_memory(const std::array<const char*, kCount>& choices,
                  const std::vector<RankMemory>& ranks) {
  std::printf("%-26s", "MiB beside the weights");
  for (const char* choice : choices) std::printf(" %11s", choice);
  for (const RankMemory& rank : ranks) {
    std::printf("\n%-26s", rank.name.c_str());
    for (const uint64_t size_bytes : rank.size_bytes) {
      std::printf(" %11.2f", static_cast<double>(size_bytes) / (1 << 20));
    }
  }
  std::printf("\n\n");
}

template <size_t kCount>
nlohmann::ordered_json memory_json(const std::array<const char*, kCount>& choices,
                                   const std::vector<RankMemory>& ranks) {
  auto list = nlohmann::ordered_json::array();
  for (const RankMemory& rank : ranks) {
    auto& entry = list.emplace_back(nlohmann::ordered_json{{"name", rank.name}});
    for (size_t i = 0; i < kCount; ++i) {
      entry[std::string(choices[i]) + "_bytes"] = rank.size_bytes[i];
    }
  }
  return list;
}

void print_text(const Arguments& arguments, const ModelConfig& config, const Side& targets,
                const std::vector<TimedPlan>& plans, const Memory& memory,
                const Explanation& explanation) {
  std::printf("%s from %s to %s\n\n", config.architecture.c_str(), arguments.from.c_str(),
              arguments.to.c_str());
  std::printf("%-12s %8s %8s %9s %9s %10s %11s\n", "target", "tensors", "tiles", "chunks", "runs",
              "plan KiB", "compiled ms");
  for (size_t t = 0; t < plans.size(); ++t) {
    const Plan& plan = plans[t].plan;
    std::printf("%-12s %8zu %8zu %9zu %9zu %10.0f %11.2f\n", targets.names[t].c_str(),
                plan.target().tensors().size(), plan.target().tiles().size(), plan.chunks().size(),
                plan.runs().size(), static_cast<double>(plan.memory_bytes()) / 1024,
                plans[t].compile_ms);
  }
  std::printf("\n");
  print_memory(kSourceChoices, memory.sources);
  print_memory(kTargetChoices, memory.targets);
  std::printf("%s", explanation.to_text().c_str());
  if (!arguments.svg.empty()) std::printf("picture: %s\n", arguments.svg.c_str());
}

void print_json(const Arguments& arguments, const ModelConfig& config, const Side& targets,
                const std::vector<TimedPlan>& plans, const Memory& memory,
                const Explanation& explanation) {
  nlohmann::ordered_json body;
  body["architecture"] = config.architecture;
  body["from"] = arguments.from;
  body["to"] = arguments.to;
  body["plans"] = nlohmann::ordered_json::array();
  for (size_t t = 0; t < plans.size(); ++t) {
    const Plan& plan = plans[t].plan;
    body["plans"].push_back({{"target", targets.names[t]},
                             {"key", plan.key().to_string()},
                             {"chunk_count", plan.chunks().size()},
                             {"run_count", plan.runs().size()},
                             {"size_bytes", plan.size_bytes()},
                             {"memory_bytes", plan.memory_bytes()},
                             {"compile_ms", plans[t].compile_ms}});
  }
  body["memory"] = {{"sources", memory_json(kSourceChoices, memory.sources)},
                    {"targets", memory_json(kTargetChoices, memory.targets)}};
  body["traffic"] = nlohmann::ordered_json::parse(explanation.to_json());
  std::printf("%s\n", body.dump(2).c_str());
}

Result<int> run_plan(const Arguments& arguments) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, read_file(arguments.config));
  TRANSFUSE_ASSIGN_OR_RETURN(const ModelConfig config, parse_model_config(text));
  TRANSFUSE_ASSIGN_OR_RETURN(const Side sources, make_side(config, arguments.from));
  TRANSFUSE_ASSIGN_OR_RETURN(const Side targets, make_side(config, arguments.to));
  PlanOptions options;
  options.chunk_bytes = static_cast<uint64_t>(arguments.chunk_mib * (1 << 20));
  const auto plans = compile_all(sources, targets, options);
  if (!plans && plans.error().code == ErrorCode::kLayoutMismatch) {
    return report_findings(sources, targets, arguments.json);
  }
  if (!plans) return plans.error();

  std::vector<ExplainInput> inputs;
  std::vector<Digest> digests;
  inputs.reserve(plans->size());
  for (size_t t = 0; t < plans->size(); ++t)
    inputs.push_back({targets.names[t], &(*plans)[t].plan});
  digests.reserve(sources.layouts.size());
  for (const Layout& source : sources.layouts) digests.push_back(source.digest());
  TRANSFUSE_ASSIGN_OR_RETURN(const Explanation explanation,
                             explain(inputs, sources.names, digests));
  if (!arguments.svg.empty()) {
    TRANSFUSE_RETURN_IF_ERROR(write_file(arguments.svg, explanation.to_svg()));
  }
  const Memory memory = memory_of(sources, targets, *plans);
  if (arguments.json) {
    print_json(arguments, config, targets, *plans, memory, explanation);
  } else {
    print_text(arguments, config, targets, *plans, memory, explanation);
  }
  return static_cast<int>(kExitOk);
}

}  // namespace

void add_plan_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();  // shared with the callback
  CLI::App* command = app.add_subcommand(
      "plan", "Explain and draw what a refit would move: no weights, no GPU, no processes");
  command->add_option("--config", arguments->config, "config.json of the model")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--from", arguments->from, "The sources, e.g. fsdp:dp=4 or hf")->required();
  command->add_option("--to", arguments->to, "The targets, e.g. vllm:tp=2")->required();
  command->add_option("--chunk-mib", arguments->chunk_mib, "Target bytes of a chunk")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  command->add_option("--svg", arguments->svg, "Write a picture to this file");
  command->add_flag("--json", arguments->json, "JSON to stdout");
  command->footer(
      R"(Exits with 3 where the layouts do not fit, and says what is missing or contradicts.

Examples:
  transfuse plan --config config.json --from fsdp:dp=4 --to vllm:tp=2
  transfuse plan --config config.json --from fsdp:dp=8,dtype=f32 --to vllm:tp=4 --svg plan.svg
  transfuse plan --config config.json --from hf --to fsdp:dp=2,tp=2 --json)");
  command->callback([&context, arguments] {
    context.run = [arguments] {
      const Result<int> outcome = run_plan(*arguments);
      return outcome ? *outcome : report_failure(outcome.error(), arguments->json);
    };
  });
}

}  // namespace transfuse

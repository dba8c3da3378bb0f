// `transfuse plan`: what a refit between two parallelisms would move, without any weights or GPU.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <ios>
#include <map>
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
#include "transfuse/memory_need.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/region.h"
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
  MemoryPlace sources = MemoryPlace::kHost;
  MemoryPlace targets = MemoryPlace::kHost;
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

// What one rank needs beside its weights, for each of the choices that it has.
struct RankMemory {
  std::string name;
  std::vector<MemoryNeed> needs;
};
struct SideMemory {
  MemoryPlace weights = MemoryPlace::kHost;
  std::vector<std::string> choices;
  std::vector<RankMemory> ranks;
};
struct Memory {
  SideMemory sources;
  SideMemory targets;
};

SideMemory memory_of_sources(const Side& side, const std::vector<TimedPlan>& plans,
                             MemoryPlace weights) {
  struct Named {
    const char* name;
    SourceChoice choice;
  };
  constexpr auto kHost = SnapshotPlace::kHost;
  std::vector<Named> choices = {{"in_place", {.weights = weights}},
                                {"snapshot_1", {.weights = weights, .snapshot_slots = 1}},
                                {"snapshot_2", {.weights = weights, .snapshot_slots = 2}}};
  if (weights == MemoryPlace::kDevice) {
    choices.push_back(
        {"host_1", {.weights = weights, .snapshot_slots = 1, .snapshot_place = kHost}});
    choices.push_back(
        {"host_2", {.weights = weights, .snapshot_slots = 2, .snapshot_place = kHost}});
  }
  std::vector<const Plan*> served;
  for (const TimedPlan& timed : plans) served.push_back(&timed.plan);
  SideMemory memory{.weights = weights, .choices = {}, .ranks = {}};
  for (const Named& named : choices) memory.choices.emplace_back(named.name);
  for (size_t rank = 0; rank < side.layouts.size(); ++rank) {
    RankMemory& found = memory.ranks.emplace_back(RankMemory{side.names[rank], {}});
    for (const Named& named : choices) {
      found.needs.push_back(memory_of_source(side.layouts[rank], served, named.choice));
    }
  }
  return memory;
}

SideMemory memory_of_targets(const Side& side, const std::vector<TimedPlan>& plans,
                             const Arguments& arguments) {
  SideMemory memory{.weights = arguments.targets,
                    .choices = {"in_place", "shadow", "keep_previous"},
                    .ranks = {}};
  TargetChoice choice{.weights = arguments.targets, .sources = arguments.sources};
  for (size_t rank = 0; rank < side.layouts.size(); ++rank) {
    RankMemory& found = memory.ranks.emplace_back(RankMemory{side.names[rank], {}});
    for (const std::string& name : memory.choices) {
      choice.into = name == "in_place" ? ReceiveInto::kInPlace : ReceiveInto::kShadow;
      choice.keep_previous = name == "keep_previous";
      found.needs.push_back(memory_of_target(plans[rank].plan, choice));
    }
  }
  return memory;
}

void print_memory(const SideMemory& side, const char* title, uint64_t MemoryNeed::* where) {
  std::printf("%-26s", title);
  for (const std::string& choice : side.choices) std::printf(" %13s", choice.c_str());
  for (const RankMemory& rank : side.ranks) {
    std::printf("\n%-26s", rank.name.c_str());
    for (const MemoryNeed& need : rank.needs) {
      std::printf(" %13.2f", static_cast<double>(need.*where) / (1 << 20));
    }
  }
  std::printf("\n\n");
}

void print_memory(const SideMemory& side) {
  if (side.weights == MemoryPlace::kDevice) {
    print_memory(side, "GPU MiB beside the weights", &MemoryNeed::device_bytes);
    print_memory(side, "host MiB", &MemoryNeed::host_bytes);
  } else {
    print_memory(side, "MiB beside the weights", &MemoryNeed::host_bytes);
  }
}

nlohmann::ordered_json memory_json(const SideMemory& side) {
  auto list = nlohmann::ordered_json::array();
  for (const RankMemory& rank : side.ranks) {
    auto& entry = list.emplace_back(nlohmann::ordered_json{{"name", rank.name}});
    for (size_t i = 0; i < side.choices.size(); ++i) {
      entry[side.choices[i]] = {{"device_bytes", rank.needs[i].device_bytes},
                                {"host_bytes", rank.needs[i].host_bytes}};
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
  print_memory(memory.sources);
  print_memory(memory.targets);
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
  body["memory"] = {{"sources", memory_json(memory.sources)},
                    {"targets", memory_json(memory.targets)}};
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
  options = plan_options_for(arguments.targets, options);
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
  const Memory memory{.sources = memory_of_sources(sources, *plans, arguments.sources),
                      .targets = memory_of_targets(targets, *plans, arguments)};
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
  command
      ->add_option("--chunk-mib", arguments->chunk_mib,
                   "Target bytes of a chunk (targets on GPUs: at least 64 MiB)")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  const std::map<std::string, MemoryPlace> places = {{"cpu", MemoryPlace::kHost},
                                                     {"cuda", MemoryPlace::kDevice}};
  const auto place = [&](const char* name, MemoryPlace& where, const char* help) {
    return command->add_option(name, where, help)
        ->transform(CLI::CheckedTransformer(places))
        ->type_name("cpu|cuda")
        ->default_str("cpu");
  };
  place("--source-device", arguments->sources, "Where the weights of the sources lie");
  place("--target-device", arguments->targets, "Where the weights of the targets lie");
  command->add_option("--svg", arguments->svg, "Write a picture to this file");
  command->add_flag("--json", arguments->json, "JSON to stdout");
  command->footer(
      R"(Exits with 3 where the layouts do not fit, and says what is missing or contradicts.

Examples:
  transfuse plan --config config.json --from fsdp:dp=4 --to vllm:tp=2
  transfuse plan --config config.json --from fsdp:dp=8,dtype=f32 --to vllm:tp=4 --svg plan.svg
  transfuse plan --config config.json --from fsdp:dp=2 --to vllm:tp=2 --source-device cuda \\
      --target-device cuda
  transfuse plan --config config.json --from hf --to fsdp:dp=2,tp=2 --json)");
  command->callback([&context, arguments] {
    context.run = [arguments] {
      const Result<int> outcome = run_plan(*arguments);
      return outcome ? *outcome : report_failure(outcome.error(), arguments->json);
    };
  });
}

}  // namespace transfuse

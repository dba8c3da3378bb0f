// `transfuse demo`: hands over to the Python package, which has the trainers and the engine.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "command.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// The interpreter of the environment that `transfuse` was called in.
int run(const std::vector<std::string>& arguments) {
  const char* chosen = std::getenv("TRANSFUSE_PYTHON");
  const std::string python = chosen == nullptr ? "python3" : chosen;
  std::vector<std::string> command = {python, "-m", "transfuse.demo"};
  command.insert(command.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : command) argv.push_back(word.data());
  argv.push_back(nullptr);
  execvp(python.c_str(), argv.data());
  return report_failure(
      {ErrorCode::kNotFound, "the demo needs Python with torch and transformers; '" + python +
                                 "' could not be started: " + std::strerror(errno) +
                                 " (set TRANSFUSE_PYTHON to the interpreter)"},
      false);
}

}  // namespace

void add_demo_command(CLI::App& app, CommandContext& context) {
  CLI::App* command = app.add_subcommand(
      "demo", "Reinforcement learning with refits and failures, on this machine (needs torch).");
  command->prefix_command();
  command->footer(R"(Options of the demo:
  --out FOLDER   results: plots, plan picture, report.json (default ./demo-out)
  --steps N      optimizer steps
  --seed N       of weights, data and samples
  --trainer SPEC what trains: fsdp:dp=2 (default) or megatron:tp=2 (needs megatron-core)
  --device KIND  where models lie: cpu (default) or cuda, dealt to the GPUs that there are
  --tiny         small model, few steps
  --plain        no colours, no progress bar
  --engine HOW   its layout: formula (default) or captured, from its own load_weights
  --pretrain     pre-training into one inference process instead
  --text PATH    with --pretrain: file or folder to train on (default: the GPL of this system)

Examples:
  transfuse demo
  transfuse demo --trainer megatron:tp=2
  transfuse demo --pretrain --steps 200 --text README.md --out /tmp/demo

Exit codes: 0 the reward is there, and a control run shows that it needs the refits (--pretrain: the
engine's logits are those of the trainers, bit for bit); 1 that is not so, a process failed, or
results could not be written; 2 wrong usage; 3 a Python package or a GPU is missing;
130 interrupted.)");
  command->callback(
      [command, &context] { context.run = [command] { return run(command->remaining()); }; });
}

}  // namespace transfuse

// What every command of the CLI shares: exit codes, how a failure is shown, how a command is
// registered.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "transfuse/digest.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"
#include "transfuse/versions.h"

namespace transfuse {

// Documented in `transfuse --help`: scripts branch on them.
enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,        // a typed error, printed to stderr
  kExitUsage = 2,         // the command line is wrong
  kExitNo = 3,            // the check ran and the answer is no: weights differ, layouts do not fit
  kExitInterrupted = 130  // Ctrl-C
};

// Parsing only chooses what to do; main() runs it afterwards. Used from one thread.
struct CommandContext {
  std::function<int()> run;  // returns an ExitCode
};

// Prints the error to stderr, and with `json` also as {"error": {"code", "message"}} to stdout.
// Returns kExitFailed.
int report_failure(const Error& error, bool json);

// As every command writes a version.
nlohmann::json version_to_json(const VersionInfo& version);
// A revision that is not stated is null, or "-"; text is short.
nlohmann::json revision_to_json(const Digest& revision);
std::string revision_to_text(const Digest& revision);
std::string metadata_to_text(const Metadata& metadata);  // "step=41 run=x"

// Each adds one subcommand to `app` whose callback sets context.run; defined in command_<name>.cc.
void add_bench_command(CLI::App& app, CommandContext& context);
void add_convert_command(CLI::App& app, CommandContext& context);
void add_demo_command(CLI::App& app, CommandContext& context);
void add_doctor_command(CLI::App& app, CommandContext& context);
void add_inspect_command(CLI::App& app, CommandContext& context);
void add_plan_command(CLI::App& app, CommandContext& context);
void add_serve_command(CLI::App& app, CommandContext& context);
void add_status_command(CLI::App& app, CommandContext& context);
void add_verify_command(CLI::App& app, CommandContext& context);
void add_versions_command(CLI::App& app, CommandContext& context);
void add_why_command(CLI::App& app, CommandContext& context);

}  // namespace transfuse

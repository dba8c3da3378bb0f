// The transfuse command: parses the command line, runs one command, returns its exit code.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "command.h"
#include "transfuse/result.h"

namespace transfuse {

int report_failure(const Error& error, bool json) {
  std::fprintf(stderr, "transfuse: %s\n", error.to_string().c_str());
  if (json) {
    const nlohmann::json body = {
        {"error", {{"code", error_code_name(error.code)}, {"message", error.message}}}};
    std::printf("%s\n", body.dump().c_str());
  }
  return kExitFailed;
}

namespace {

constexpr const char* kFooter = R"(Exit codes:
  0    done
  1    failed; stderr names the error code, what was expected and what was found
  2    the command line is wrong
  3    the check ran and the answer is no (weights differ, layouts do not fit, host not fit)
  130  interrupted

`transfuse COMMAND --help` shows the options of a command, with examples.)";

int run_command_line(int argc, char** argv) {
  CLI::App app{"Moves the weights of a model in training, live, into a running inference engine.",
               "transfuse"};
  app.set_version_flag("--version", "transfuse " TRANSFUSE_VERSION);
  app.require_subcommand(1);
  app.footer(kFooter);

  CommandContext context;
  add_bench_command(app, context);
  add_convert_command(app, context);
  add_demo_command(app, context);
  add_doctor_command(app, context);
  add_inspect_command(app, context);
  add_plan_command(app, context);
  add_serve_command(app, context);
  add_status_command(app, context);
  add_verify_command(app, context);
  add_versions_command(app, context);
  add_why_command(app, context);

  if (argc <= 1) {
    std::fputs(app.help().c_str(), stderr);
    return kExitUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  return context.run();
}

}  // namespace
}  // namespace transfuse

int main(int argc, char** argv) { return transfuse::run_command_line(argc, argv); }

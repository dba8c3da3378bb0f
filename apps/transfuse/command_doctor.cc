// `transfuse doctor`: what works on this host and what does not, with the remedy.
#include <sys/utsname.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "command.h"
#include "host_checks.h"

namespace transfuse {
namespace {

struct TransportKind {
  std::string_view kind;
  bool built;
  std::string_view use;
};

#ifdef TRANSFUSE_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

constexpr TransportKind kTransports[] = {
    {"local", true, "one process"},
    {"shm", true, "CPU memory of one host"},
    {"cuda", kCuda, "GPU memory of one host"},
    {"fabric", false, "network: TCP, EFA, verbs"},
    {"ucx", false, "network: InfiniBand, RoCE"},
    {"file", true, "safetensors checkpoints"},
};

struct Host {
  std::string kernel;
  std::string architecture;
};

Host describe_host() {
  utsname name{};
  if (uname(&name) != 0) return {"unknown", "unknown"};
  return {std::string(name.sysname) + " " + name.release, name.machine};
}

void print_json(const Host& host, const std::vector<HostCheck>& checks, bool fit) {
  nlohmann::json body;
  body["version"] = TRANSFUSE_VERSION;
  body["kernel"] = host.kernel;
  body["architecture"] = host.architecture;
  body["fit"] = fit;
  for (const HostCheck& check : checks) {
    body["checks"].push_back({{"name", check.name},
                              {"outcome", check_outcome_name(check.outcome)},
                              {"found", check.found},
                              {"remedy", check.remedy}});
  }
  for (const TransportKind& transport : kTransports) {
    body["transports"].push_back(
        {{"kind", transport.kind}, {"built", transport.built}, {"use", transport.use}});
  }
  std::printf("%s\n", body.dump(2).c_str());
}

void print_text(const Host& host, const std::vector<HostCheck>& checks, bool fit) {
  std::printf("transfuse %s on %s, %s\n\n", TRANSFUSE_VERSION, host.kernel.c_str(),
              host.architecture.c_str());
  for (const HostCheck& check : checks) {
    std::printf("%-8s %-20s %s\n", check_outcome_name(check.outcome), check.name.c_str(),
                check.found.c_str());
    if (!check.remedy.empty()) std::printf("%-29s remedy: %s\n", "", check.remedy.c_str());
  }
  std::printf("\nTransports\n");
  for (const TransportKind& transport : kTransports) {
    std::printf("%-8s %-20s %s\n", transport.built ? "ok" : "-", transport.kind.data(),
                transport.built ? transport.use.data() : "not in this build");
  }
  std::printf("\n%s\n", fit ? "Refits between processes of this host work."
                            : "Refits on this host will not work: see the lines marked missing.");
}

int run_doctor(bool json) {
  const Host host = describe_host();
  const std::vector<HostCheck> checks = check_host();
  const bool fit = std::none_of(checks.begin(), checks.end(), [](const HostCheck& check) {
    return check.outcome == CheckOutcome::kMissing;
  });
  if (json) {
    print_json(host, checks, fit);
  } else {
    print_text(host, checks, fit);
  }
  return fit ? kExitOk : kExitNo;
}

}  // namespace

void add_doctor_command(CLI::App& app, CommandContext& context) {
  auto json = std::make_shared<bool>(false);  // shared with the callback, which outlives this call
  CLI::App* command = app.add_subcommand("doctor", "What works on this host, and what does not");
  command->add_flag("--json", *json, "Machine-readable output");
  command->footer(R"(Each thing is tried for real: memory is reserved, a child process is read.
Exit code 0 if refits on this host work, 3 if something they need is missing.

Examples:
  transfuse doctor
  transfuse doctor --json | jq '.checks[] | select(.outcome != "ok")')");
  command->callback([&context, json] { context.run = [json] { return run_doctor(*json); }; });
}

}  // namespace transfuse

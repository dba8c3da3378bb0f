// `transfuse serve`: the coordinator, by hand on a socket or TCP, or as members start it.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "rpc/rpc.h"

namespace transfuse {
namespace {

constexpr const char* kFooter =
    R"(Members on one host need no `serve`: the first one starts a coordinator, which ends when it
is idle. By hand it is for several hosts, or to keep it running.

Examples:
  transfuse serve --socket /run/user/1000/policy.sock
  transfuse serve --tcp 127.0.0.1:7070
  (umask 077; openssl rand -hex 32 > token); transfuse serve --tcp 0.0.0.0:7070 --token-file token

Members find it by TRANSFUSE_COORDINATOR=unix:/run/user/1000/policy.sock or =host:7070.
There is no encryption: beyond a trusted network use a tunnel.)";

struct ServeArguments {
  ServeOptions options;
  bool json = false;
};

int run_serve(ServeArguments& arguments) {
  const bool json = arguments.json;
  if (arguments.options.embedded_folder.empty()) {
    arguments.options.on_ready = [json](const CoordinatorInfo& info) {
      if (json) {
        const nlohmann::json body = {
            {"address", info.address}, {"epoch", info.epoch}, {"pid", info.pid}};
        std::printf("%s\n", body.dump().c_str());
      } else {
        std::printf("serving on %s (process %u)\n", info.address.c_str(), info.pid);
      }
      std::fflush(stdout);
    };
  }
  const auto served = serve(arguments.options);
  return served ? kExitOk : report_failure(served.error(), json);
}

}  // namespace

void add_serve_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<ServeArguments>();  // shared: parsing outlives this function
  ServeOptions& options = arguments->options;
  CLI::App* command = app.add_subcommand("serve", "Run the coordinator until Ctrl-C");
  command->footer(kFooter);
  auto* socket = command->add_option("--socket", options.socket,
                                     "Path of the unix socket to listen on; only this user may "
                                     "connect");
  auto* tcp = command->add_option("--tcp", options.tcp,
                                  "Address to listen on, such as 127.0.0.1:7070 (port 0: any free "
                                  "one)");
  command->add_option("--token-file", options.token_file,
                      "File whose first line every member must know; needed beyond loopback");
  command
      ->add_option("--idle-exit-ms", options.idle_exit_ms,
                   "End after so long without members (0: never)")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--json", arguments->json, "Print the address, or an error, as JSON");
  // How a member starts it; not for people.
  auto* embedded = command->add_option("--embedded", options.embedded_folder)->group("");
  command->add_option("--job", options.job)->group("")->needs(embedded);
  command->add_flag("--detach", options.detach)->group("");
  command->add_option("--ready-fd", options.ready_fd)->group("");
  command->callback([arguments, &context, command, socket, tcp, embedded] {
    if (socket->count() + tcp->count() + embedded->count() == 0) {
      throw CLI::RequiredError("serve: one of --socket PATH and --tcp HOST:PORT");
    }
    if (embedded->count() > 0 && socket->count() + tcp->count() > 0) {
      throw CLI::ExcludesError("--embedded", command->get_name());
    }
    context.run = [arguments] { return run_serve(*arguments); };
  });
}

}  // namespace transfuse

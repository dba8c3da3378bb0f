// `transfuse bench`: measures this host, beside memcpy measured in the same run.
#include <sys/utsname.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <thread>

#ifdef TRANSFUSE_CUDA
#include "bench/gpu/measure_gpu.h"
#endif
#include "bench/measure.h"
#include "bench/source_process.h"
#include "bench/target_process.h"
#include "command.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

nlohmann::json describe_run(const bench::Options& options) {
  utsname name{};
  const bool known = uname(&name) == 0;
  return {{"version", TRANSFUSE_VERSION},
          {"processor", processor_name()},
          {"cores", std::thread::hardware_concurrency()},
          {"kernel", known ? std::string(name.sysname) + " " + name.release : "unknown"},
          {"architecture", known ? name.machine : "unknown"},
          {"repetitions", options.repetitions},
          {"threads", options.threads},
          {"qwen3_4b_layers_moved", options.layers},
          {"tiny", options.tiny}};
}

int run_bench(const bench::Options& options, bool json) {
  FILE* table = json ? stderr : stdout;  // with --json, stdout is one JSON object
  std::fprintf(table, "%s\n", bench::table_head().c_str());
  nlohmann::json figures = nlohmann::json::array();
  const Result<void> outcome = bench::run_measurements(options, [&](const bench::Figure& figure) {
    std::fprintf(table, "%s\n", bench::to_text(figure).c_str());
    std::fflush(table);
    figures.push_back(bench::to_json(figure));
  });
  if (!outcome) return report_failure(outcome.error(), json);
  if (json) {
    const nlohmann::json body = {{"run", describe_run(options)}, {"figures", figures}};
    std::printf("%s\n", body.dump(1).c_str());
  }
  return kExitOk;
}

// "cuda" or "cuda:N".
Result<int> ordinal_of(const std::string& device) {
  if (device == "cuda") return 0;
  int ordinal = -1;
  const char* const end = device.data() + device.size();
  const bool prefixed = device.starts_with("cuda:");
  const auto read = std::from_chars(device.data() + (prefixed ? 5 : 0), end, ordinal);
  if (!prefixed || read.ec != std::errc() || read.ptr != end || ordinal < 0) {
    return Error{ErrorCode::kInvalidArgument,
                 "device '" + device + "': expected cuda or cuda:N, N counted from 0"};
  }
  return ordinal;
}

Result<nlohmann::json> measure_device(const std::string& device, const bench::Options& options,
                                      FILE* table) {
  TRANSFUSE_ASSIGN_OR_RETURN(const int ordinal, ordinal_of(device));
#ifdef TRANSFUSE_CUDA
  std::string only;
  for (const std::string& name : options.only) only += (only.empty() ? "" : ",") + name;
  return bench::measure_gpu(
      {.device = ordinal, .small = options.tiny, .only = only, .table = table});
#else
  (void)options;
  (void)table;
  return Error{ErrorCode::kUnsupported,
               "device cuda:" + std::to_string(ordinal) +
                   ": this build has no transport for GPUs (it needs nvcc of CUDA 13)"};
#endif
}

int run_device_bench(const std::string& device, const bench::Options& options, bool json) {
  const auto rows = measure_device(device, options, json ? stderr : stdout);
  if (!rows) return report_failure(rows.error(), json);
  if (json) {
    const nlohmann::json body = {
        {"run", describe_run(options)}, {"device", device}, {"figures", *rows}};
    std::printf("%s\n", body.dump(1).c_str());
  }
  return kExitOk;
}

struct Arguments {
  bench::Options options;
  std::string device{};  // empty: the host
  bool json = false;
};

// A process that `bench` starts: not shown.
template <typename Decode, typename Run>
void add_process_command(CLI::App& app, CommandContext& context, const std::string& name,
                         const std::string& what, Decode decode, Run run) {
  auto text = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand(name, what);
  command->group("");
  command->add_option("specification", *text)->required();
  command->callback([&context, text, decode, run] {
    context.run = [text, decode, run] {
      const auto spec = decode(*text);
      if (!spec) return report_failure(spec.error(), false);
      const auto outcome = run(*spec);
      return outcome ? static_cast<int>(kExitOk) : report_failure(outcome.error(), false);
    };
  });
}

}  // namespace

void add_bench_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();  // shared with the callback
  bench::Options& options = arguments->options;
  CLI::App* command =
      app.add_subcommand("bench", "Measure plans, copies and refits beside memcpy on this host");
  std::string names;
  for (const bench::Measurement& m : bench::measurements()) {
    names += "  " + std::string(m.name) + std::string(14 - std::string(m.name).size(), ' ') +
             m.what + "\n";
  }
  command->add_option("--only", options.only, "Measurements by name, separated by commas")
      ->delimiter(',');
  command->add_option("--repetitions", options.repetitions, "Of every timing, interleaved")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--threads", options.threads, "0: one per core that this process may use")
      ->capture_default_str();
  command
      ->add_option("--layers", options.layers,
                   "Of the 36 of Qwen3-4B, where weights are moved (0.2 GB each, twice)")
      ->check(CLI::Range(1, 36))
      ->capture_default_str();
  command->add_option("--device", arguments->device,
                      "cuda or cuda:N: what that GPU copies instead, from itself, from the next "
                      "one and from the host; --only then is a part of a row's name");
  command->add_flag("--tiny", options.tiny,
                    "A few seconds: only shows that it runs; of a GPU, models of 4 layers");
  command->add_flag("--json", arguments->json, "JSON to stdout, the table to stderr");
  command->footer("Measurements:\n" + names + R"(
Columns: minimum, median and maximum of the repetitions.

Examples:
  transfuse bench
  transfuse bench --only plan,fingerprint
  transfuse bench --layers 2 --json > figures.json
  transfuse bench --device cuda --only "4B matched")");
  add_process_command(app, context, "bench-source", "A trainer rank of `bench`",
                      bench::decode_source_spec, bench::run_source);
  add_process_command(app, context, "bench-target", "An engine rank of `bench`",
                      bench::decode_target_spec, bench::run_target);
  command->callback([&context, arguments] {
    context.run = [arguments] {
      if (!arguments->device.empty()) {
        return run_device_bench(arguments->device, arguments->options, arguments->json);
      }
      if (arguments->options.tiny) arguments->options.repetitions = 2;
      return run_bench(arguments->options, arguments->json);
    };
  });
}

}  // namespace transfuse

// `transfuse convert`: a checkpoint on disk from one layout into another.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "command.h"
#include "read_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

struct Arguments {
  std::string config;
  ConvertRequest request;
  double shard_gb = 5;
  bool json = false;
};

// One line of a terminal, overwritten a few times a second. Used from one thread.
class ProgressBar {
 public:
  void show(uint64_t done, uint64_t total) {
    const auto now = std::chrono::steady_clock::now();
    if (done < total && now < next_) return;
    next_ = now + std::chrono::milliseconds(100);
    constexpr size_t kWidth = 40;
    const double part = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
    const auto full = static_cast<size_t>(part * kWidth);
    const double seconds = std::chrono::duration<double>(now - start_).count();
    std::fprintf(stderr, "\r[%s%s] %3.0f%%  %.2f of %.2f GB  %.2f GB/s",
                 std::string(full, '#').c_str(), std::string(kWidth - full, '.').c_str(),
                 100 * part, static_cast<double>(done) / 1e9, static_cast<double>(total) / 1e9,
                 seconds > 0 ? static_cast<double>(done) / 1e9 / seconds : 0);
    if (done >= total) std::fprintf(stderr, "\r\033[K");
    std::fflush(stderr);
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point next_ = start_;
};

double gigabytes_per_second(const ConvertReport& report) {
  const double seconds = report.move_seconds + report.sync_seconds;
  return seconds > 0 ? static_cast<double>(report.target_bytes) / 1e9 / seconds : 0;
}

// One number for all tensors: the sum of their fingerprints.
std::string sum_text(const ConvertReport& report, uint64_t TensorFingerprint::* side) {
  uint64_t sum = 0;
  for (const TensorFingerprint& tensor : report.fingerprints) sum += tensor.*side;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(sum));
  return text;
}

void print_text(const Arguments& arguments, const ConvertReport& report) {
  const ConvertRequest& request = arguments.request;
  std::printf("%s (%s, %llu files) -> %s (%s, %llu files)\n", request.source.c_str(),
              request.from.c_str(), static_cast<unsigned long long>(report.source_file_count),
              request.target.c_str(), request.to.c_str(),
              static_cast<unsigned long long>(report.target_file_count));
  std::printf("%llu tensors, %.3f GB in %.2f s and %.2f s to sync: %.2f GB/s\n",
              static_cast<unsigned long long>(report.tensor_count),
              static_cast<double>(report.target_bytes) / 1e9, report.move_seconds,
              report.sync_seconds, gigabytes_per_second(report));
  if (!request.verify) return;
  std::printf("fingerprints of %zu tensors, equal (%.2f s)\n  source %s\n  target %s\n",
              report.fingerprints.size(), report.verify_seconds,
              sum_text(report, &TensorFingerprint::source).c_str(),
              sum_text(report, &TensorFingerprint::target).c_str());
}

void print_json(const Arguments& arguments, const ConvertReport& report) {
  nlohmann::ordered_json body = {{"from", arguments.request.from},
                                 {"to", arguments.request.to},
                                 {"source", arguments.request.source},
                                 {"target", arguments.request.target},
                                 {"tensor_count", report.tensor_count},
                                 {"source_file_count", report.source_file_count},
                                 {"target_file_count", report.target_file_count},
                                 {"source_bytes", report.source_bytes},
                                 {"target_bytes", report.target_bytes},
                                 {"move_seconds", report.move_seconds},
                                 {"sync_seconds", report.sync_seconds},
                                 {"gigabytes_per_second", gigabytes_per_second(report)}};
  if (arguments.request.verify) {
    body["verify_seconds"] = report.verify_seconds;
    body["source_fingerprint"] = sum_text(report, &TensorFingerprint::source);
    body["target_fingerprint"] = sum_text(report, &TensorFingerprint::target);
    auto& tensors = body["fingerprints"] = nlohmann::ordered_json::object();
    for (const TensorFingerprint& tensor : report.fingerprints) {
      char text[17];
      std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(tensor.target));
      tensors[tensor.tensor] = text;
    }
  }
  std::printf("%s\n", body.dump(2).c_str());
}

Result<void> run_convert(Arguments& arguments) {
  ConvertRequest& request = arguments.request;
  if (!arguments.config.empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(request.config_json, read_file(arguments.config));
  }
  request.shard_bytes = static_cast<uint64_t>(arguments.shard_gb * 1e9);
  ProgressBar bar;
  if (isatty(STDERR_FILENO) != 0) {
    request.progress = [&bar](uint64_t done, uint64_t total) { bar.show(done, total); };
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const ConvertReport report, convert_checkpoint(request));
  if (arguments.json) {
    print_json(arguments, report);
  } else {
    print_text(arguments, report);
  }
  return {};
}

}  // namespace

void add_convert_command(CLI::App& app, CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();  // shared with the callback
  ConvertRequest& request = arguments->request;
  CLI::App* command =
      app.add_subcommand("convert", "Convert a safetensors checkpoint between any two layouts");
  command
      ->add_option("--config", arguments->config,
                   "config.json of the model (default: that of the source folder)")
      ->check(CLI::ExistingFile);
  command->add_option("--from", request.from, "Layout of the source, e.g. hf or fsdp:dp=4")
      ->required();
  command->add_option("source", request.source, "Folder of the source (hf: also a file)")
      ->required()
      ->check(CLI::ExistingPath);
  command->add_option("--to", request.to, "Layout of the target, e.g. vllm:tp=2")->required();
  command->add_option("target", request.target, "Folder that is made")->required();
  command->add_flag("--force", request.replace_target, "Replace a checkpoint that is there");
  command->add_flag("--verify", request.verify, "Compare fingerprints of both sides");
  command->add_option("--shard-gb", arguments->shard_gb, "Most tensor bytes of a file (hf)")
      ->check(CLI::Range(1e-9, 1e6))
      ->capture_default_str();
  command
      ->add_option("--version", request.version,
                   "Version of the weights, to be recorded (default: what the source records)")
      ->check(CLI::PositiveNumber);
  command->add_option("--threads", request.threads, "0: one per core, at most 8")
      ->check(CLI::Range(0, 256))
      ->capture_default_str();
  command->add_flag("--json", arguments->json, "JSON to stdout");
  command->footer(
      R"(A rank's parameters lie in rank0.safetensors, rank1.safetensors and so on; hf is a normal
checkpoint folder. The target appears when it is complete and synced, or not at all. Between hf and
fsdp, models of any architecture are converted by the tensors of the source itself.

Examples:
  transfuse convert --config m/config.json --from hf m --to vllm:tp=2 m-vllm --verify
  transfuse convert --config m/config.json --from fsdp:dp=4,dtype=f32 ckpt --to hf out)");
  command->callback([&context, arguments] {
    context.run = [arguments] {
      const Result<void> outcome = run_convert(*arguments);
      return outcome ? static_cast<int>(kExitOk) : report_failure(outcome.error(), arguments->json);
    };
  });
}

}  // namespace transfuse

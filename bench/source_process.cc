// The pipe between the measuring process and a source, and what the source does.
#include "source_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "base/unique_fd.h"
#include "process_memory.h"
#include "rpc/rpc.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "weights.h"

namespace transfuse::bench {
namespace {

constexpr auto kGracefulEnd = std::chrono::seconds(10);

nlohmann::json config_to_json(const ModelConfig& c) {
  return {{"architecture", c.architecture},
          {"hidden_size", c.hidden_size},
          {"intermediate_size", c.intermediate_size},
          {"moe_intermediate_size", c.moe_intermediate_size},
          {"num_hidden_layers", c.num_hidden_layers},
          {"num_attention_heads", c.num_attention_heads},
          {"num_key_value_heads", c.num_key_value_heads},
          {"head_dim", c.head_dim},
          {"vocab_size", c.vocab_size},
          {"num_experts", c.num_experts},
          {"tie_word_embeddings", c.tie_word_embeddings}};
}

ModelConfig config_from_json(const nlohmann::json& json) {
  ModelConfig c;
  c.architecture = json.at("architecture");
  c.hidden_size = json.at("hidden_size");
  c.intermediate_size = json.at("intermediate_size");
  c.moe_intermediate_size = json.at("moe_intermediate_size");
  c.num_hidden_layers = json.at("num_hidden_layers");
  c.num_attention_heads = json.at("num_attention_heads");
  c.num_key_value_heads = json.at("num_key_value_heads");
  c.head_dim = json.at("head_dim");
  c.vocab_size = json.at("vocab_size");
  c.num_experts = json.at("num_experts");
  c.tie_word_embeddings = json.at("tie_word_embeddings");
  return c;
}

}  // namespace

std::string encode(const SourceSpec& spec) {
  const nlohmann::json json = {{"config", config_to_json(spec.config)},
                               {"layout", spec.layout},
                               {"rank", spec.rank},
                               {"memory", static_cast<int>(spec.memory)},
                               {"stream", spec.stream},
                               {"runtime_folder", spec.runtime_folder}};
  return json.dump();
}

Result<SourceSpec> decode_source_spec(std::string_view text) {
  const auto json = nlohmann::json::parse(text, nullptr, false);
  if (json.is_discarded())
    return Error{ErrorCode::kInvalidArgument, "the specification of a source is not JSON"};
  try {
    SourceSpec spec;
    spec.config = config_from_json(json.at("config"));
    spec.layout = json.at("layout");
    spec.rank = json.at("rank");
    spec.memory = static_cast<SourceMemory>(json.at("memory").get<int>());
    spec.stream = json.at("stream");
    spec.runtime_folder = json.at("runtime_folder");
    return spec;
  } catch (const nlohmann::json::exception& error) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("the specification of a source: {}", error.what())};
  }
}

SourceProcess::SourceProcess(pid_t pid, UniqueFd to, FILE* from, std::string name)
    : pid_(pid), to_(std::move(to)), from_(from), name_(std::move(name)) {}

Result<std::unique_ptr<SourceProcess>> SourceProcess::start(const SourceSpec& spec) {
  std::array<int, 2> orders{}, answers{};
  if (pipe2(orders.data(), O_CLOEXEC) != 0 || pipe2(answers.data(), O_CLOEXEC) != 0)
    return Error{ErrorCode::kResourceExhausted, fmt::format("pipe2: {}", std::strerror(errno))};
  const UniqueFd orders_read(orders[0]);
  UniqueFd orders_write(orders[1]);
  UniqueFd answers_read(answers[0]);
  const UniqueFd answers_write(answers[1]);

  const std::string name = fmt::format("{} rank {}", spec.layout, spec.rank);
  const std::string text = encode(spec);
  std::array<char, 16> program{"transfuse"}, command{"bench-source"};
  std::string argument = text;
  std::array<char*, 4> arguments{program.data(), command.data(), argument.data(), nullptr};
  const pid_t pid = fork();
  if (pid < 0)
    return Error{ErrorCode::kResourceExhausted, fmt::format("fork: {}", std::strerror(errno))};
  if (pid == 0) {
    dup2(orders_read.get(), STDIN_FILENO);
    dup2(answers_write.get(), STDOUT_FILENO);
    execv("/proc/self/exe", arguments.data());
    _exit(127);
  }
  FILE* from = fdopen(answers_read.release(), "r");
  auto source =
      std::unique_ptr<SourceProcess>(new SourceProcess(pid, std::move(orders_write), from, name));
  TRANSFUSE_RETURN_IF_ERROR(source->answer(""));  // sent once, when it is ready
  return source;
}

SourceProcess::~SourceProcess() {
  to_.reset();
  std::fclose(from_);
  const auto until = std::chrono::steady_clock::now() + kGracefulEnd;
  while (waitpid(pid_, nullptr, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > until) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
      return;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Error SourceProcess::gone() const {
  return {ErrorCode::kUnavailable, fmt::format("the source process {} ended: see stderr", name_)};
}

// Sends one line (unless empty) and reads one: "ok ..." or "error ...".
Result<std::string> SourceProcess::answer(std::string_view order) {
  if (!order.empty()) {
    const std::string line = std::string(order) + "\n";
    if (write(to_.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size()))
      return gone();
  }
  char* line = nullptr;
  size_t capacity = 0;
  const ssize_t size = getline(&line, &capacity, from_);
  const std::string text = size > 0 ? std::string(line, static_cast<size_t>(size - 1)) : "";
  std::free(line);
  if (size <= 0) return gone();
  if (!text.starts_with("ok"))
    return Error{ErrorCode::kUnavailable, fmt::format("the source process {}: {}", name_, text)};
  return text.substr(std::min<size_t>(3, text.size()));
}

Result<void> SourceProcess::publish(uint64_t version) {
  TRANSFUSE_RETURN_IF_ERROR(answer(fmt::format("publish {}", version)));
  return {};
}

Result<SourceUsage> SourceProcess::usage() {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, answer("usage"));
  SourceUsage usage;
  if (std::sscanf(text.c_str(), "%lu %lu %lu", &usage.anonymous_bytes, &usage.open_files,
                  &usage.regions) != 3)
    return Error{ErrorCode::kCorrupt, fmt::format("usage of {}: '{}'", name_, text)};
  return usage;
}

Result<void> run_source(const SourceSpec& spec) {
  signal(SIGPIPE, SIG_IGN);
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parallel, parse_parallel_spec(spec.layout));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, make_layout(spec.config, parallel, spec.rank));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport, open_shm_transport(spec.runtime_folder));
  ConnectOptions connect;
  connect.runtime_folder = spec.runtime_folder;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto control, connect_control(connect));

  TRANSFUSE_ASSIGN_OR_RETURN(
      Weights weights,
      Weights::allocate(layout, spec.memory == SourceMemory::kMemfd ? transport.get() : nullptr));
  weights.fill(static_cast<uint64_t>(spec.rank) + 1);
  const uint64_t before = process_memory_bytes("RssAnon");

  PublisherOptions options;
  options.model = spec.stream;
  options.name = fmt::format("source{}", spec.rank);
  options.source_count = static_cast<uint32_t>(parallel.rank_count());
  if (weights.arena() != nullptr) options.arenas = {weights.arena()};
  TRANSFUSE_ASSIGN_OR_RETURN(const auto publisher, Publisher::open(*transport, *control, layout,
                                                                   weights.memory(), options));

  std::cout << "ok ready" << std::endl;
  for (std::string order; std::getline(std::cin, order);) {
    uint64_t version = 0;
    if (std::sscanf(order.c_str(), "publish %lu", &version) == 1) {
      const auto begun = publisher->begin_write(version);
      if (!begun) {
        std::cout << "error " << begun.error().to_string() << std::endl;
        continue;
      }
      weights.touch(version);
      const auto published = publisher->publish(version);
      std::cout << (published ? "ok" : "error " + published.error().to_string()) << std::endl;
    } else if (order == "usage") {
      const uint64_t now = process_memory_bytes("RssAnon");
      std::cout << fmt::format("ok {} {} {}", now - std::min(now, before), open_file_count(),
                               transport->stats().regions)
                << std::endl;
    }
  }
  return publisher->close();
}

}  // namespace transfuse::bench

// Starting the process, and the two ends of the pipe.
#include "child_process.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/time.h>
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
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>

#include "base/unique_fd.h"
#include "process_memory.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::bench {
namespace {

constexpr auto kGracefulEnd = std::chrono::seconds(10);

uint64_t own_cpu_us() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto us = [](const timeval& t) { return t.tv_sec * 1000000 + t.tv_usec; };
  return static_cast<uint64_t>(us(used.ru_utime) + us(used.ru_stime));
}

}  // namespace

std::string encode(const ProcessUsage& usage) {
  return fmt::format("{} {} {} {} {}", usage.anonymous_bytes, usage.open_files, usage.regions,
                     usage.handles, usage.cpu_us);
}

Result<ProcessUsage> decode_process_usage(std::string_view text) {
  ProcessUsage usage;
  if (std::sscanf(std::string(text).c_str(), "%lu %lu %lu %lu %lu", &usage.anonymous_bytes,
                  &usage.open_files, &usage.regions, &usage.handles, &usage.cpu_us) != 5)
    return Error{ErrorCode::kCorrupt, fmt::format("the usage of a process: '{}'", text)};
  return usage;
}

ProcessUsage own_usage(const Transport& transport, uint64_t anonymous_bytes_before) {
  const uint64_t now = process_memory_bytes("RssAnon");
  const TransportStats stats = transport.stats();
  return {.anonymous_bytes = now - std::min(now, anonymous_bytes_before),
          .open_files = open_file_count(),
          .regions = stats.regions,
          .handles = stats.peers + stats.remote_regions + stats.tickets,
          .cpu_us = own_cpu_us()};
}

ChildProcess::ChildProcess(pid_t pid, UniqueFd to, FILE* from, std::string name)
    : pid_(pid), to_(std::move(to)), from_(from), name_(std::move(name)) {}

Result<std::unique_ptr<ChildProcess>> ChildProcess::start(const std::string& command,
                                                          const std::string& specification,
                                                          std::string name) {
  std::array<int, 2> orders{}, answers{};
  if (pipe2(orders.data(), O_CLOEXEC) != 0 || pipe2(answers.data(), O_CLOEXEC) != 0)
    return Error{ErrorCode::kResourceExhausted, fmt::format("pipe2: {}", std::strerror(errno))};
  const UniqueFd orders_read(orders[0]);
  UniqueFd orders_write(orders[1]);
  UniqueFd answers_read(answers[0]);
  const UniqueFd answers_write(answers[1]);

  std::array<char, 16> program{"transfuse"};
  std::string role = command;
  std::string argument = specification;
  std::array<char*, 4> arguments{program.data(), role.data(), argument.data(), nullptr};
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
  auto child = std::unique_ptr<ChildProcess>(
      new ChildProcess(pid, std::move(orders_write), from, std::move(name)));
  TRANSFUSE_RETURN_IF_ERROR(child->receive());  // sent once, when it is ready
  return child;
}

ChildProcess::~ChildProcess() {
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

Error ChildProcess::gone() const {
  return {ErrorCode::kUnavailable, fmt::format("the process {} ended: see stderr", name_)};
}

Result<void> ChildProcess::send(std::string_view order) {
  const std::string line = std::string(order) + "\n";
  if (write(to_.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size()))
    return gone();
  return {};
}

// "ok ..." or "error ...".
Result<std::string> ChildProcess::receive() {
  char* line = nullptr;
  size_t capacity = 0;
  const ssize_t size = getline(&line, &capacity, from_);
  const std::string text = size > 0 ? std::string(line, static_cast<size_t>(size - 1)) : "";
  std::free(line);
  if (size <= 0) return gone();
  if (!text.starts_with("ok"))
    return Error{ErrorCode::kUnavailable, fmt::format("the process {}: {}", name_, text)};
  return text.substr(std::min<size_t>(3, text.size()));
}

Result<std::string> ChildProcess::ask(std::string_view order) {
  TRANSFUSE_RETURN_IF_ERROR(send(order));
  return receive();
}

Result<ProcessUsage> ChildProcess::usage() {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, ask("usage"));
  return decode_process_usage(text);
}

void serve_orders(const std::function<Result<std::string>(const std::string& order)>& obey) {
  signal(SIGPIPE, SIG_IGN);
  std::cout << "ok ready" << std::endl;
  for (std::string order; std::getline(std::cin, order);) {
    const Result<std::string> answer = obey(order);
    if (answer) {
      std::cout << "ok " << *answer << std::endl;
    } else {
      std::cout << "error " << answer.error().to_string() << std::endl;
    }
  }
}

}  // namespace transfuse::bench

// What the coordinator adds to a warm cycle: calls over a unix socket, and from publish to watcher.
#include <benchmark/benchmark.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>

#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"

namespace transfuse {
namespace {

Layout small_layout() {
  LayoutBuilder builder;
  const auto tensor = builder.tensor({"w", Dtype::kF32, Dims{4}});
  const auto parameter = builder.parameter({"w", Dtype::kF32, 4});
  builder.tile(tensor, Box::whole(Dims{4}), parameter, 0);
  return builder.build().value();
}

MemberId join(Control& control, MemberRole role, const std::string& name, uint32_t count) {
  const Layout layout = small_layout();
  control.put_layout(layout).value();
  Registration registration;
  registration.role = role;
  registration.model = "policy";
  registration.name = name;
  registration.source_count = count;
  registration.incarnation = 7;
  registration.layout = layout.digest();
  return control.join(registration).value();
}

// A coordinator in a process of its own, on a socket in a folder of its own; both go at the end.
class Served {
 public:
  Served() {
    std::string pattern = "/tmp/tf-bench-XXXXXX";
    folder_ = ::mkdtemp(pattern.data());
    std::array<int, 2> ready{};
    if (::pipe(ready.data()) != 0) std::abort();
    pid_ = ::fork();  // before this process has used gRPC
    if (pid_ == 0) {
      ServeOptions options;
      options.socket = folder_ + "/s";
      options.ready_fd = ready[1];
      const auto served = serve(options);
      ::_exit(served ? 0 : 1);
    }
    char byte = 0;
    ::close(ready[1]);
    if (::read(ready[0], &byte, 1) != 1 || byte != '1') std::abort();
    ::close(ready[0]);
  }
  ~Served() {
    ::kill(pid_, SIGTERM);
    ::waitpid(pid_, nullptr, 0);
    std::filesystem::remove_all(folder_);
  }
  Served(const Served&) = delete;
  Served& operator=(const Served&) = delete;

  std::unique_ptr<Control> connect() const {
    ConnectOptions options;
    options.address = "unix:" + folder_ + "/s";
    return connect_control(options).value();
  }

 private:
  std::string folder_;
  pid_t pid_ = -1;
};

Served& served() {
  static Served instance;
  return instance;
}

// The part of T2 that is the coordinator's: one lease taken and given back.
void acquire_and_release(benchmark::State& state) {
  const auto control = served().connect();
  const auto sources = static_cast<uint32_t>(state.range(0));
  for (uint32_t i = 0; i < sources; ++i) {
    const MemberId source =
        join(*control, MemberRole::kSource, "trainer" + std::to_string(i), sources);
    control->begin_write(source, {.version = 1, .replaces = {}}, Deadline::after_ms(5000)).value();
    control->publish(source, {.version = 1, .generation = {7, 2}}).value();
  }
  const MemberId target = join(*control, MemberRole::kTarget, "engine0", 1);
  for (auto _ : state) {
    const auto lease = control->acquire(target, {}, Deadline::after_ms(5000));
    benchmark::DoNotOptimize(lease.value().sources.data());
    control->release(lease->id, {LeaseEnd::kLanded}, Deadline::after_ms(5000)).value();
  }
}
BENCHMARK(acquire_and_release)
    ->Arg(1)
    ->Arg(8)
    ->Arg(64)
    ->Unit(benchmark::kMicrosecond)
    ->UseRealTime();

void begin_write_and_publish(benchmark::State& state) {
  const auto control = served().connect();
  const MemberId source = join(*control, MemberRole::kSource, "trainer0", 1);
  uint64_t version = 0;
  for (auto _ : state) {
    ++version;
    control
        ->begin_write(source, {.version = version, .replaces = {version - 1}},
                      Deadline::after_ms(5000))
        .value();
    control->publish(source, {.version = version, .generation = {7, 2 * version}}).value();
  }
}
BENCHMARK(begin_write_and_publish)->Unit(benchmark::kMicrosecond)->UseRealTime();

// From the call of publish() to the moment another handle's watch returns.
void publish_to_watcher(benchmark::State& state) {
  const auto control = served().connect();
  const auto other = served().connect();
  const MemberId source = join(*control, MemberRole::kSource, "trainer0", 1);
  const auto watch = other->watch("policy").value();
  uint64_t version = 0;
  for (auto _ : state) {
    state.PauseTiming();
    ++version;
    control
        ->begin_write(source, {.version = version, .replaces = {version - 1}},
                      Deadline::after_ms(5000))
        .value();
    state.ResumeTiming();
    control->publish(source, {.version = version, .generation = {7, 2 * version}}).value();
    while (true) {
      const auto change = watch->next(Deadline::after_ms(5000)).value();
      if (!change) return state.SkipWithError("the watch was not told");
      if (change->version == version && change->state == VersionState::kReady) break;
    }
  }
}
BENCHMARK(publish_to_watcher)->Unit(benchmark::kMicrosecond)->UseRealTime();

}  // namespace
}  // namespace transfuse

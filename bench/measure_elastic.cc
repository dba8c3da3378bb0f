// Receivers join one by one while a source publishes a version every second: metadata on the wire,
// registrations, memory and refit time, per step.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "bench/child_process.h"
#include "bench/counting_relay.h"
#include "bench/target_process.h"
#include "ceiling.h"
#include "fleet.h"
#include "measure.h"
#include "stopwatch.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"
#include "weights.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr double kKiB = 1 << 10;
constexpr double kMiB = 1 << 20;

struct Scale {
  int steps = 30;
  int receivers = 8;
  uint32_t threads = 1;    // of one receiver
  int steps_per_join = 2;  // all are there for the second half
  std::chrono::milliseconds period{1000};
};

struct Member {
  uint64_t wire_bytes = 0;  // between it and the coordinator, in this step
  ProcessUsage usage;
  uint64_t cpu_us = 0;  // in this step; all of its life in the first
};
struct Step {
  Member source;
  std::vector<Member> receivers;
  std::vector<TargetRefit> refits;
  double publish_ms = 0;  // all of the source's begin_write, step and publish
  double refits_ms = 0;   // of all receivers, from the first order to the last answer
  double memcpy_ms = 0;   // of one receiver's bytes, with the threads of all
  bool joining = false;   // a receiver's first refit is among them
  uint64_t coordinator_bytes = 0;
  uint64_t coordinator_files = 0;
  bool late = false;  // it took longer than the period
};

// The life of the fleet, step after step. Used from one thread.
class Growth {
 public:
  // `scratch` is as large as a receiver's weights.
  Growth(Fleet& fleet, const Scale& scale, const Ceiling& ceiling, Weights& scratch)
      : fleet_(fleet), scale_(scale), ceiling_(ceiling), scratch_(scratch) {}

  Result<void> run() {
    auto due = std::chrono::steady_clock::now();
    for (int i = 0; i < scale_.steps; ++i) {
      const int number = i / scale_.steps_per_join;
      const bool joining = i % scale_.steps_per_join == 0 && number < scale_.receivers;
      if (joining)
        TRANSFUSE_RETURN_IF_ERROR(fleet_.add_target({.name = fmt::format("engine{}", number)}));
      TRANSFUSE_ASSIGN_OR_RETURN(Step step, one_step());
      step.joining = joining;
      due += scale_.period;
      step.late = std::chrono::steady_clock::now() > due;
      due = std::max(due, std::chrono::steady_clock::now());
      std::this_thread::sleep_until(due);
      // With the beats of the rest of the period.
      read_wire(step);
      steps_.push_back(std::move(step));
    }
    return {};
  }
  const std::vector<Step>& steps() const { return steps_; }

 private:
  Result<Step> one_step() {
    Step step;
    const Stopwatch publish_watch;
    TRANSFUSE_RETURN_IF_ERROR(fleet_.publish());
    step.publish_ms = publish_watch.seconds() * 1e3;
    const Stopwatch refit_watch;
    TRANSFUSE_ASSIGN_OR_RETURN(step.refits, fleet_.refit());
    step.refits_ms = refit_watch.seconds() * 1e3;
    const auto threads = static_cast<uint32_t>(step.refits.size()) * scale_.threads;
    step.memcpy_ms = ceiling_.copy_seconds(scratch_.bytes(), threads) * 1e3;
    TRANSFUSE_ASSIGN_OR_RETURN(step.source.usage, fleet_.sources().front()->usage());
    target_cpu_us_.resize(fleet_.targets().size());
    for (size_t i = 0; i < fleet_.targets().size(); ++i) {
      TRANSFUSE_ASSIGN_OR_RETURN(const ProcessUsage usage, fleet_.targets()[i]->usage());
      const uint64_t before = std::exchange(target_cpu_us_[i], usage.cpu_us);
      step.receivers.push_back({.usage = usage, .cpu_us = usage.cpu_us - before});
    }
    step.coordinator_bytes = fleet_.coordinator_bytes();
    step.coordinator_files = fleet_.coordinator_files();
    return step;
  }
  void read_wire(Step& step) {
    const auto since_last = [](uint64_t& last, const WireBytes& now) {
      return now.sum() - std::exchange(last, now.sum());
    };
    step.source.wire_bytes = since_last(source_wire_, fleet_.source_wire(0));
    target_wire_.resize(step.receivers.size());
    for (size_t i = 0; i < step.receivers.size(); ++i)
      step.receivers[i].wire_bytes = since_last(target_wire_[i], fleet_.target_wire(i));
  }

  Fleet& fleet_;
  const Scale scale_;
  const Ceiling& ceiling_;
  Weights& scratch_;
  std::vector<Step> steps_;
  uint64_t source_wire_ = 0;
  std::vector<uint64_t> target_wire_;
  std::vector<uint64_t> target_cpu_us_;
};

nlohmann::json to_json(const Step& step) {
  nlohmann::json receivers = nlohmann::json::array();
  for (size_t i = 0; i < step.receivers.size(); ++i) {
    const Member& member = step.receivers[i];
    const TargetRefit& refit = step.refits[i];
    receivers.push_back({{"refit_us", refit.phases.total_us},
                         {"discover_us", refit.phases.discover_us},
                         {"lease_us", refit.phases.lease_us},
                         {"transfer_us", refit.phases.transfer_us},
                         {"verify_us", refit.phases.verify_us},
                         {"attempts", refit.attempts},
                         {"cpu_us", member.cpu_us},
                         {"wire_bytes", member.wire_bytes},
                         {"private_bytes", member.usage.anonymous_bytes},
                         {"registrations", member.usage.regions},
                         {"handles", member.usage.handles},
                         {"open_files", member.usage.open_files}});
  }
  return {{"publish_ms", step.publish_ms},
          {"refits_ms", step.refits_ms},
          {"memcpy_ms", step.memcpy_ms},
          {"joining", step.joining},
          {"late", step.late},
          {"source_wire_bytes", step.source.wire_bytes},
          {"source_private_bytes", step.source.usage.anonymous_bytes},
          {"source_registrations", step.source.usage.regions},
          {"source_open_files", step.source.usage.open_files},
          {"coordinator_private_bytes", step.coordinator_bytes},
          {"coordinator_open_files", step.coordinator_files},
          {"receivers", receivers}};
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(std::max<size_t>(values.size(), 1));
}

double last_third_over_first(const std::vector<double>& values) {
  const auto third = static_cast<std::ptrdiff_t>(std::max<size_t>(values.size() / 3, 1));
  return mean({values.end() - third, values.end()}) /
         mean({values.begin(), values.begin() + third});
}

Spread one(double value) { return {value, value, value}; }

double milliseconds(int64_t us) { return static_cast<double>(us) / 1e3; }

uint64_t registrations_of(const Step& step) {
  uint64_t sum = step.source.usage.regions;
  for (const Member& member : step.receivers) sum += member.usage.regions;
  return sum;
}

uint64_t open_files_of(const Step& step) {
  uint64_t sum = step.source.usage.open_files + step.coordinator_files;
  for (const Member& member : step.receivers) sum += member.usage.open_files;
  return sum;
}

// What a receiver costs once.
void emit_joins(const std::string& workload, const std::vector<Step>& steps, const Fleet& fleet,
                const Sink& sink) {
  std::vector<double> wire, open_ms, refit_ms;
  size_t known = 0;
  for (const Step& step : steps) {
    for (; known < step.receivers.size(); ++known) {
      wire.push_back(static_cast<double>(step.receivers[known].wire_bytes) / kKiB);
      refit_ms.push_back(milliseconds(step.refits[known].phases.total_us));
    }
  }
  for (const auto& target : fleet.targets()) open_ms.push_back(milliseconds(target->open_us()));
  const nlohmann::json detail = {{"in_order_of_joining", wire}};
  sink({"", workload, "joining: metadata", "KiB", spread_of(wire), detail});
  sink({"",
        workload,
        "joining: open and connect",
        "ms",
        spread_of(open_ms),
        {{"in_order_of_joining", open_ms}}});
  sink({"",
        workload,
        "joining: first refit",
        "ms",
        spread_of(refit_ms),
        {{"in_order_of_joining", refit_ms}}});
}

// What the steps cost in which all receivers are there and have refitted before.
void emit_steady(const std::string& workload, const std::vector<Step>& steady, const Sink& sink) {
  std::vector<double> wire, wire_per_step, refit_ms, refit_per_step, publish_ms, cpu_per_step;
  std::vector<double> source, coordinator, receiver;
  for (const Step& step : steady) {
    std::vector<double> step_wire, step_refit, step_bytes, step_cpu;
    for (size_t i = 0; i < step.receivers.size(); ++i) {
      step_wire.push_back(static_cast<double>(step.receivers[i].wire_bytes));
      step_refit.push_back(milliseconds(step.refits[i].phases.total_us));
      step_cpu.push_back(static_cast<double>(step.receivers[i].cpu_us) / 1e3);
      step_bytes.push_back(static_cast<double>(step.receivers[i].usage.anonymous_bytes));
    }
    cpu_per_step.push_back(mean(step_cpu));
    wire.insert(wire.end(), step_wire.begin(), step_wire.end());
    refit_ms.insert(refit_ms.end(), step_refit.begin(), step_refit.end());
    wire_per_step.push_back(mean(step_wire));
    refit_per_step.push_back(mean(step_refit));
    receiver.push_back(mean(step_bytes));
    source.push_back(static_cast<double>(step.source.usage.anonymous_bytes));
    coordinator.push_back(static_cast<double>(step.coordinator_bytes));
    publish_ms.push_back(step.publish_ms);
  }
  const std::string all = fmt::format("{} at once", steady.back().receivers.size());
  const std::string later = "the same, last / first third";
  sink({"",
        workload,
        "metadata a version, per receiver",
        "B",
        spread_of(wire),
        {{"per_step", wire_per_step}}});
  sink({"", workload, later, "ratio", one(last_third_over_first(wire_per_step))});
  sink({"", workload, "refit, " + all, "ms", spread_of(refit_ms), {{"per_step", refit_per_step}}});
  sink({"", workload, later, "ratio", one(last_third_over_first(refit_per_step))});
  // What other work on this host explains is out of it.
  sink({"",
        workload,
        "CPU time of a receiver, a step",
        "ms",
        spread_of(cpu_per_step),
        {{"per_step", cpu_per_step}}});
  sink({"", workload, later, "ratio", one(last_third_over_first(cpu_per_step))});
  sink({"", workload, "publish, copy into a snapshot", "ms", spread_of(publish_ms)});
  const auto more = [&](const std::string& what, auto count) {
    sink({"",
          workload,
          what + " since all joined",
          "more",
          one(static_cast<double>(count(steady.back())) -
              static_cast<double>(count(steady.front()))),
          {{"at_the_end", count(steady.back())}}});
  };
  more("registrations", registrations_of);
  more("open files", open_files_of);
  const auto memory = [&](const std::string& who, const std::vector<double>& bytes) {
    sink({"",
          workload,
          "slope of memory, " + who,
          "KiB/step",
          one(slope_of(bytes) / kKiB),
          {{"last_mib", bytes.back() / kMiB}}});
  };
  memory("source", source);
  memory("coordinator", coordinator);
  memory("a receiver", receiver);
}

// All steps; of those without a first refit the rate of all readers together, beside memcpy.
void emit_steps(const std::string& workload, const std::vector<Step>& steps, const Scale& scale,
                const Sink& sink) {
  std::vector<double> share;
  nlohmann::json each = nlohmann::json::array();
  int late = 0;
  for (const Step& step : steps) {
    if (!step.joining)
      share.push_back(static_cast<double>(step.receivers.size()) * step.memcpy_ms / step.refits_ms);
    late += step.late ? 1 : 0;
    each.push_back(to_json(step));
  }
  sink({"",
        workload,
        "memcpy x readers / refits",
        "ratio",
        spread_of(share),
        {{"period_ms", scale.period.count()}, {"late_steps", late}, {"steps", each}}});
}

Result<void> measure_one(const std::string& name, const ModelConfig& config, const Scale& scale,
                         const Sink& sink) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto fleet, Fleet::open({.name = "elastic",
                                                            .config = config,
                                                            .source = "hf",
                                                            .target = "hf",
                                                            .threads = scale.threads,
                                                            .snapshot_slots = 2,
                                                            .count_wire = true}));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, layout_of(config, "hf", 0));
  TRANSFUSE_ASSIGN_OR_RETURN(Weights scratch, Weights::allocate(layout, nullptr));
  TRANSFUSE_ASSIGN_OR_RETURN(const Ceiling ceiling,
                             Ceiling::open(scratch.size_bytes(), scale.threads));
  Growth growth(*fleet, scale, ceiling, scratch);
  TRANSFUSE_RETURN_IF_ERROR(growth.run());
  const std::string workload =
      fmt::format("{}, 1-{} receivers, {} steps", name, scale.receivers, scale.steps);
  emit_joins(workload, growth.steps(), *fleet, sink);
  // From the step after the last receiver's first.
  const int all_warm = (scale.receivers - 1) * scale.steps_per_join + 1;
  emit_steady(workload, {growth.steps().begin() + all_warm, growth.steps().end()}, sink);
  emit_steps(workload, growth.steps(), scale, sink);
  return {};
}

}  // namespace

Result<void> measure_elastic(const Options& options, const Sink& sink) {
  Scale scale;
  uint64_t total_bytes = uint64_t{256} << 20;
  if (options.tiny) {
    scale = {
        .steps = 6, .receivers = 2, .steps_per_join = 1, .period = std::chrono::milliseconds(50)};
    total_bytes = uint64_t{16} << 20;
  }
  scale.threads = options.threads == 0 ? usable_core_count() : options.threads;
  constexpr int64_t kTensors = 32;
  TRANSFUSE_RETURN_IF_ERROR(measure_one(fmt::format("32 x {} KiB", total_bytes / kTensors >> 10),
                                        equal_tensors(kTensors, total_bytes / kTensors), scale,
                                        sink));
  return measure_one(fmt::format("4b, narrow, {} MiB", total_bytes >> 20),
                     narrow_qwen3_4b(total_bytes), scale, sink);
}

}  // namespace transfuse::bench

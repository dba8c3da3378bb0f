// What is measured, and how one figure looks: the same code behind transfuse_bench and `transfuse
// bench`.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "transfuse/result.h"

namespace transfuse::bench {

struct Options {
  bool tiny = false;              // seconds in all, megabytes: proves that the benchmark runs
  int repetitions = 7;            // interleaved; the table shows min, median and max
  uint32_t threads = 0;           // 0: one per core that this process may use
  int layers = 8;                 // of the 36 of Qwen3-4B, where weights are moved
  std::vector<std::string> only;  // measurements by name; empty: all
};

// min, median and max of repetitions of one quantity.
struct Spread {
  double min = 0;
  double median = 0;
  double max = 0;
};
Spread spread_of(std::vector<double> samples);
// Least squares: y per step of x = 0, 1, 2, ...; 0 of fewer than two.
double slope_of(const std::vector<double>& y);

// One row of the table. `value` is in `unit`; `ceiling` is what the same run measured beside it.
struct Figure {
  std::string target;    // row of the table of targets: "T1"
  std::string workload;  // what was done, with which sizes
  std::string quantity;  // "compile", "refit / memcpy"
  std::string unit;      // "ms", "ratio", "GB/s", "MiB"
  Spread value;
  nlohmann::json detail = nlohmann::json::object();  // everything else that explains the value
};

// Called with each figure as soon as it is there.
using Sink = std::function<void(const Figure&)>;

struct Measurement {
  const char* name;  // as --only spells it
  const char* what;
  Result<void> (*run)(const Options& options, const Sink& sink);
};
// In the order in which they run.
const std::vector<Measurement>& measurements();

// Runs what `options` asks for. kInvalidArgument names an unknown measurement.
Result<void> run_measurements(const Options& options, const Sink& sink);

nlohmann::json to_json(const Figure& figure);
std::string table_head();
std::string to_text(const Figure& figure);  // one line of the table

Result<void> measure_plan(const Options& options, const Sink& sink);          // T1
Result<void> measure_fingerprint(const Options& options, const Sink& sink);   // T8
Result<void> measure_refit(const Options& options, const Sink& sink);         // T2, T3, T10
Result<void> measure_tensor_count(const Options& options, const Sink& sink);  // T4
Result<void> measure_modes(const Options& options, const Sink& sink);         // T2
Result<void> measure_commit(const Options& options, const Sink& sink);        // T14
Result<void> measure_stall(const Options& options, const Sink& sink);         // in_place, snapshot
Result<void> measure_soak(const Options& options, const Sink& sink);          // T11
Result<void> measure_elastic(const Options& options, const Sink& sink);       // receivers join

}  // namespace transfuse::bench

// The list of measurements, and how figures are summed up and shown.
#include "measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>
#include "transfuse/result.h"

namespace transfuse::bench {

Spread spread_of(std::vector<double> samples) {
  if (samples.empty()) return {};
  std::ranges::sort(samples);
  const size_t middle = samples.size() / 2;
  const double median =
      samples.size() % 2 == 1 ? samples[middle] : (samples[middle - 1] + samples[middle]) / 2;
  return {samples.front(), median, samples.back()};
}

double slope_of(const std::vector<double>& y) {
  if (y.size() < 2) return 0;
  const auto n = static_cast<double>(y.size());
  double sum_y = 0, sum_xy = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    sum_y += y[i];
    sum_xy += static_cast<double>(i) * y[i];
  }
  const double sum_x = n * (n - 1) / 2;
  const double sum_xx = (n - 1) * n * (2 * n - 1) / 6;
  return (n * sum_xy - sum_x * sum_y) / (n * sum_xx - sum_x * sum_x);
}

const std::vector<Measurement>& measurements() {
  static const std::vector<Measurement> list = {
      {"plan", "T1: compiling a plan for one target rank, on one core", measure_plan},
      {"fingerprint", "T8: fingerprints on the CPU, alone and in the copy", measure_fingerprint},
      {"refit", "T2, T3, T10: refits through shared memory beside memcpy", measure_refit},
      {"tensors", "T4: 18,867 tensors against 398 of the same bytes", measure_tensor_count},
      {"modes", "T2 from snapshots and through a shadow", measure_modes},
      {"commit", "T14: the commit of a shadow beside memcpy; how long an engine stands still",
       measure_commit},
      {"stall", "how long a trainer stands still for readers, in place and with snapshots",
       measure_stall},
      {"soak", "T11: a thousand refits leave nothing behind, in every mode", measure_soak},
      {"elastic", "receivers join one by one while versions come: what each costs",
       measure_elastic},
  };
  return list;
}

Result<void> run_measurements(const Options& options, const Sink& sink) {
  for (const std::string& name : options.only) {
    if (std::ranges::none_of(measurements(),
                             [&](const Measurement& m) { return m.name == name; })) {
      std::string known;
      for (const Measurement& m : measurements()) known += fmt::format(" {}", m.name);
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("no measurement is called '{}'; there are:{}", name, known)};
    }
  }
  for (const Measurement& measurement : measurements()) {
    if (!options.only.empty() &&
        std::ranges::find(options.only, measurement.name) == options.only.end())
      continue;
    TRANSFUSE_RETURN_IF_ERROR(measurement.run(options, sink));
  }
  return {};
}

nlohmann::json to_json(const Figure& figure) {
  return {{"target", figure.target}, {"workload", figure.workload}, {"quantity", figure.quantity},
          {"unit", figure.unit},     {"min", figure.value.min},     {"median", figure.value.median},
          {"max", figure.value.max}, {"detail", figure.detail}};
}

std::string table_head() {
  return fmt::format("{:<4} {:<52} {:<34} {:>10} {:>10} {:>10}", "", "workload", "quantity", "min",
                     "median", "max");
}

std::string to_text(const Figure& figure) {
  return fmt::format("{:<4} {:<52} {:<34} {:>10.4g} {:>10.4g} {:>10.4g} {}", figure.target,
                     figure.workload, figure.quantity, figure.value.min, figure.value.median,
                     figure.value.max, figure.unit);
}

}  // namespace transfuse::bench

// Layouts as a test asks for them, sound or broken, and memory of every kind to hold them.
#pragma once

#include <cstddef>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "session/known_weights.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::faults {

// "spec", "rank" and what of the small model is different ("vocab_size", ...). "broken": "overlap"
// (two tensors in one place) or "uncovered" (a parameter longer than what lies in it).
Result<Layout> make_layout(const nlohmann::json& request);

// The parameters of one process. Used from one thread.
class Weights {
 public:
  // `kind`: "heap" (the process's own), "fixed" (its own, at the same address in every process) or
  // "arena" (shared memory of `transport`).
  static Result<std::unique_ptr<Weights>> open(Transport& transport, Layout layout,
                                               const std::string& kind);
  ~Weights();
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  testing::Parameters& parameters() { return *parameters_; }
  std::vector<const LocalRegion*> arenas() const;

 private:
  Weights() = default;

  std::unique_ptr<LocalRegion> arena_;
  std::span<std::byte> mapped_;
  std::unique_ptr<testing::Parameters> parameters_;
};

}  // namespace transfuse::faults

// A model on the ranks of one framework: the layouts that src/models describes beside the bytes
// that the framework itself would hold, and a refit between two such worlds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "layouts/tensor.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"

namespace transfuse::frameworks {

struct World {
  std::string name;
  std::vector<Layout> layouts;
  std::vector<StateDict> states;  // of the same ranks
};
// Elements are counted up as i32, whatever their dtype is, so that each has a value of its own.
// Aborts where there are no such layouts.
World make_world(const ModelConfig& config, const StateDict& hf, ParallelSpec spec);
World make_world(const ModelConfig& config, const StateDict& hf, const std::string& spec);

// What is wrong between a rank's layout and its state: names, sizes, every element of every tile
// and fill, elements covered twice or never. Empty: nothing.
std::vector<std::string> compare(const Layout& layout, const StateDict& state, const StateDict& hf);

// Runs a plan on real bytes, every run from another one of its holders in turn; the sources'
// padding holds garbage. Returns the target's parameters.
StateDict refit(const Plan& plan, const World& sources, const StateDict& shapes);

}  // namespace transfuse::frameworks

// Maps of an engine's physical experts, for Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "bind.h"
#include "transfuse/model.h"

namespace transfuse::python {

using namespace nanobind::literals;

void bind_expert_map(nb::module_& m) {
  nb::class_<ExpertMap>(m, "ExpertMap",
                        "Which logical expert every physical place of an engine holds (EPLB): one "
                        "list a layer, of all decoder layers or of those with experts.")
      .def(
          "__init__",
          [](ExpertMap* self, std::vector<std::vector<int64_t>> physical_to_logical,
             int64_t version) { new (self) ExpertMap{version, std::move(physical_to_logical)}; },
          "physical_to_logical"_a, "version"_a = 0)
      .def_ro("physical_to_logical", &ExpertMap::physical_to_logical)
      .def_ro("version", &ExpertMap::version, "The engine's own count.");
  m.def(
      "parse_expert_map", [](std::string_view json) { return take(parse_expert_map(json)); },
      "json"_a,
      "Reads {'version': 3, 'physical_to_logical_map': [[0, 1, ...], ...]}, or the list alone.");
  m.def(
      "with_expert_map",
      [](ParallelSpec spec, ExpertMap expert_map) {
        spec.expert_map = std::move(expert_map);
        return spec;
      },
      "spec"_a, "expert_map"_a,
      "The spec of an engine whose experts lie as the map says. make_layout refuses a map that "
      "does not fit the model.");
}

}  // namespace transfuse::python

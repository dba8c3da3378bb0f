// Checkpoints for Python: as what a receiver falls back to, and as a catalog.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bind.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"

namespace transfuse::python {

using namespace nanobind::literals;

void bind_checkpoint(nb::module_& m) {
  nb::class_<Checkpoint>(m, "NativeCheckpoint", "See transfuse.Checkpoint.")
      .def(
          "__init__",
          [](Checkpoint* self, std::string path, std::string spec, std::string config_json,
             uint64_t version) {
            new (self) Checkpoint{.path = std::move(path),
                                  .spec = std::move(spec),
                                  .config_json = std::move(config_json),
                                  .version = version};
          },
          "path"_a, nb::kw_only(), "spec"_a, "config_json"_a, "version"_a);
  m.def(
      "read_catalog",
      [](const std::string& path, const std::string& spec) {
        const nb::gil_scoped_release unlocked;
        return take(read_catalog(path, spec));
      },
      "path"_a, "spec"_a = "hf",
      "The tensors of a model, from a checkpoint's own headers and index: hf, or fsdp without tp.");
  m.def(
      "make_layouts",
      [](const Catalog& catalog, const ParallelSpec& spec, std::optional<Dtype> dtype) {
        const nb::gil_scoped_release unlocked;
        return take(make_layouts(catalog, spec, dtype));
      },
      "catalog"_a, "spec"_a, "dtype"_a.none() = nb::none(),
      "For a model of which nothing is known but its tensors: hf, or fsdp without tp. `dtype` is "
      "of all parameters; None: each as in the catalog.");
  m.def(
      "make_layout",
      [](const Catalog& catalog, const ParallelSpec& spec, int64_t rank,
         std::optional<Dtype> dtype) {
        const nb::gil_scoped_release unlocked;
        return take(make_layout(catalog, spec, rank, dtype));
      },
      "catalog"_a, "spec"_a, "rank"_a, "dtype"_a.none() = nb::none(),
      "The same for one rank, counted within the spec.");
}

}  // namespace transfuse::python

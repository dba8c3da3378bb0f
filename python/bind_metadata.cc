// Kinds, metadata, demands and revisions for Python.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "memory.h"
#include "transfuse/digest.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/publisher.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

constexpr const char* kEqual = "def __eq__(self, arg: object, /) -> bool";

void bind_digest(nb::module_& m) {
  nb::class_<Digest>(m, "Digest",
                     "Identity of a layout, a plan, or the bytes of a version (a revision): equal "
                     "in every process.")
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def(nb::self < nb::self)
      .def_static(
          "parse", [](const std::string& text) { return take(parse_digest(text)); }, "text"_a,
          "Reads what str() gives.")
      .def("__hash__", [](const Digest& d) { return DigestHash{}(d); })
      .def("__str__", &Digest::to_string)
      .def("__repr__", [](const Digest& d) { return "Digest(" + d.to_string() + ")"; });
}

void bind_demand(nb::module_& m) {
  nb::enum_<Requirement::Kind>(m, "RequirementKind", "How a requirement is met.")
      .value("EQUALS", Requirement::Kind::kEquals)
      .value("AT_LEAST", Requirement::Kind::kAtLeast)
      .value("PRESENT", Requirement::Kind::kPresent);
  nb::class_<Requirement>(m, "Requirement",
                          "One condition on the metadata of a version or source, or (with a "
                          "pattern) of every tensor of a source's layout whose name matches.")
      .def(
          "__init__",
          [](Requirement* self, std::string key, Requirement::Kind kind, std::string value,
             std::string tensors) {
            new (self) Requirement{.key = std::move(key),
                                   .kind = kind,
                                   .value = std::move(value),
                                   .tensors = std::move(tensors)};
          },
          "key"_a, "kind"_a, "value"_a = "", "tensors"_a = "")
      .def_ro("key", &Requirement::key)
      .def_ro("kind", &Requirement::kind)
      .def_ro("value", &Requirement::value)
      .def_ro("tensors", &Requirement::tensors)
      .def(nb::self == nb::self, nb::sig(kEqual));
  nb::class_<Demand>(m, "Demand", "What a target accepts; a source that does not fit is not read.")
      .def(
          "__init__",
          [](Demand* self, std::vector<std::string> kinds, std::vector<Requirement> require,
             const std::optional<Digest>& revision) {
            new (self) Demand{.kinds = std::move(kinds),
                              .require = std::move(require),
                              .revision = revision.value_or(Digest{})};
          },
          "kinds"_a = std::vector<std::string>(), "require"_a = std::vector<Requirement>(),
          "revision"_a = nb::none())
      .def_ro("kinds", &Demand::kinds)
      .def_ro("require", &Demand::require)
      .def_prop_ro("revision", [](const Demand& d) { return stated(d.revision); })
      .def(nb::self == nb::self, nb::sig(kEqual));
}

}  // namespace

std::optional<Digest> stated(const Digest& revision) {
  return revision == Digest{} ? std::nullopt : std::optional(revision);
}

void bind_metadata(nb::module_& m) {
  bind_digest(m);
  bind_demand(m);
}

void bind_revision(nb::module_& m) {
  m.def(
      "revision",
      [](const Layout& layout, const nb::typed<nb::dict, nb::str, nb::object>& parameters,
         uint32_t threads) {
        ParameterOwners owners;
        for (const auto& [name, object] : parameters) {
          owners.add(layout, nb::cast<std::string>(name), object, false);
        }
        const nb::gil_scoped_release unlocked;
        owners.expect_host(
            "give copies of the tensors on the CPU, or let Publisher(compute_revision=True) say "
            "it");
        return take(revision_of(layout, owners.memory(), threads));
      },
      "layout"_a, "parameters"_a, "threads"_a = 0,
      "The content address of weights that this process holds whole: the same however they are "
      "fused or sharded. LayoutMismatchError names a tensor that is here in part.");
}

}  // namespace transfuse::python

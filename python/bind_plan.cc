// Plan: compile, diagnose and explain for Python.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;
using Triple = std::tuple<int64_t, int64_t, int64_t>;

Triple triple(const Strides3& strides) {
  return {strides.level[0], strides.level[1], strides.level[2]};
}

void bind_findings(nb::module_& m) {
  nb::enum_<FindingKind>(m, "FindingKind", "What is wrong between a target and its sources.")
      .value("GAP", FindingKind::kGap)
      .value("UNCOVERED", FindingKind::kUncovered)
      .value("OVERLAP", FindingKind::kOverlap)
      .value("DTYPE", FindingKind::kDtype)
      .value("SHAPE", FindingKind::kShape)
      .value("UNKNOWN_TENSOR", FindingKind::kUnknownTensor)
      .value("BLOCK", FindingKind::kBlock);
  nb::class_<Finding>(m, "Finding",
                      "One reason why no plan exists. `box` is in catalog coordinates where "
                      "`tensor` is set, else in elements of `parameter`.")
      .def_ro("kind", &Finding::kind)
      .def_ro("tensor", &Finding::tensor)
      .def_ro("parameter", &Finding::parameter)
      .def_ro("box", &Finding::box)
      .def_ro("reason", &Finding::reason)
      .def("__repr__", [](const Finding& f) {
        return "Finding(" + std::string(finding_kind_name(f.kind)) + ", " +
               (f.tensor.empty() ? f.parameter : f.tensor) + " " + f.box.to_string() + ": " +
               f.reason + ")";
      });
}

void bind_runs(nb::module_& m) {
  nb::class_<Run>(m, "Run", "One strided run of one catalog tensor into one target parameter.")
      .def_ro("target_offset", &Run::target_offset)
      .def_ro("linear_index", &Run::linear_index)
      .def_prop_ro("count",
                   [](const Run& r) {
                     return std::tuple<uint32_t, uint32_t, uint32_t>(r.count[0], r.count[1],
                                                                     r.count[2]);
                   })
      .def_ro("tensor", &Run::tensor)
      .def_ro("parameter", &Run::parameter)
      .def_ro("target_pattern", &Run::target_pattern)
      .def_ro("index_pattern", &Run::index_pattern)
      .def_prop_ro("quantizes", [](const Run& r) { return r.scales != 0; })
      .def_prop_ro("element_count", &Run::element_count);
  nb::class_<Holder>(m, "Holder", "A distinct source layout that holds a run, and where.")
      .def_ro("source_offset", &Holder::source_offset)
      .def_ro("source_layout", &Holder::source_layout)
      .def_ro("parameter", &Holder::parameter)
      .def_ro("source_pattern", &Holder::source_pattern)
      .def_prop_ro("dequantizes", [](const Holder& h) { return h.scales != 0; });
  nb::class_<Chunk>(m, "Chunk", "A range of runs: the unit of work, progress and verification.")
      .def_ro("first_run", &Chunk::first_run)
      .def_ro("run_count", &Chunk::run_count)
      .def_ro("size_bytes", &Chunk::size_bytes);
}

void bind_plan_class(nb::module_& m) {
  nb::class_<Plan>(m, "Plan",
                   "Which bytes of which sources land where in one target. Immutable; compile() "
                   "makes it.")
      .def_prop_ro("chunks", [](const Plan& p) { return to_vector(p.chunks()); })
      .def_prop_ro("runs", [](const Plan& p) { return to_vector(p.runs()); })
      .def_prop_ro("holders", [](const Plan& p) { return to_vector(p.holders()); })
      .def(
          "holders_of", [](const Plan& p, const Run& r) { return to_vector(p.holders_of(r)); },
          "run"_a)
      .def(
          "pattern", [](const Plan& p, uint32_t index) { return triple(p.pattern(index)); },
          "index"_a, "Strides of a pattern in elements, outermost first.")
      .def_prop_ro("target", [](const Plan& p) { return p.target(); })
      .def_prop_ro("source_layouts", [](const Plan& p) { return to_vector(p.source_layouts()); })
      .def_prop_ro("chunk_bytes", [](const Plan& p) { return p.options().chunk_bytes; })
      .def_prop_ro("key", [](const Plan& p) { return p.key(); })
      .def_prop_ro("size_bytes", &Plan::size_bytes)
      .def_prop_ro("memory_bytes", &Plan::memory_bytes)
      .def("box_of", [](const Plan& p, const Run& r) { return p.box_of(r); }, "run"_a);
}

void bind_explanation(nb::module_& m) {
  nb::class_<PairTraffic>(m, "PairTraffic", "Bytes from one source to one target (indices).")
      .def_ro("source", &PairTraffic::source)
      .def_ro("target", &PairTraffic::target)
      .def_ro("size_bytes", &PairTraffic::size_bytes)
      .def_ro("run_count", &PairTraffic::run_count);
  nb::class_<RunLengthBucket>(m, "RunLengthBucket", "Pieces by contiguous bytes at the source.")
      .def_ro("min_bytes", &RunLengthBucket::min_bytes)
      .def_ro("piece_count", &RunLengthBucket::piece_count)
      .def_ro("size_bytes", &RunLengthBucket::size_bytes);
  nb::class_<Explanation>(m, "Explanation", "What a set of plans costs, for people.")
      .def_ro("sources", &Explanation::sources)
      .def_ro("targets", &Explanation::targets)
      .def_ro("pairs", &Explanation::pairs)
      .def_ro("run_lengths", &Explanation::run_lengths)
      .def_ro("total_bytes", &Explanation::total_bytes)
      .def_ro("busiest_source_bytes", &Explanation::busiest_source_bytes)
      .def_ro("busiest_target_bytes", &Explanation::busiest_target_bytes)
      .def_ro("busiest_link", &Explanation::busiest_link)
      .def("to_text", &Explanation::to_text)
      .def("to_json", &Explanation::to_json)
      .def("to_svg", &Explanation::to_svg);
}

Explanation explain_plans(const std::vector<std::pair<std::string, Plan>>& targets,
                          const std::vector<std::pair<std::string, Layout>>& sources) {
  const nb::gil_scoped_release unlocked;
  std::vector<ExplainInput> inputs;
  for (const auto& [name, plan] : targets) inputs.push_back({name, &plan});
  std::vector<std::string> names;
  std::vector<Digest> digests;
  for (const auto& [name, layout] : sources) {
    names.push_back(name);
    digests.push_back(layout.digest());
  }
  return take(explain(inputs, names, digests));
}

}  // namespace

void bind_plan(nb::module_& m) {
  bind_findings(m);
  bind_runs(m);
  bind_plan_class(m);
  bind_explanation(m);
  m.def(
      "compile",
      [](const Layout& target, const std::vector<Layout>& sources, uint64_t chunk_bytes) {
        const nb::gil_scoped_release unlocked;
        return take(compile(target, sources, {.chunk_bytes = chunk_bytes}));
      },
      "target"_a, "sources"_a, "chunk_bytes"_a = PlanOptions{}.chunk_bytes,
      "Proves that the sources cover the target, and compiles the plan. LayoutMismatchError "
      "otherwise; diagnose() returns every reason.");
  m.def(
      "diagnose",
      [](const Layout& target, const std::vector<Layout>& sources, size_t limit) {
        const nb::gil_scoped_release unlocked;
        return diagnose(target, sources, limit);
      },
      "target"_a, "sources"_a, "limit"_a = 1000,
      "Everything that is wrong between a target and its sources; empty if compile() succeeds.");
  m.def(
      "plan_key",
      [](const Digest& target, const std::vector<Digest>& sources, uint64_t chunk_bytes) {
        return plan_key(target, sources, {.chunk_bytes = chunk_bytes});
      },
      "target"_a, "sources"_a, "chunk_bytes"_a = PlanOptions{}.chunk_bytes,
      "The key that compile() would give, without compiling.");
  m.def(
      "explain", &explain_plans, "targets"_a, "sources"_a,
      "Explains plans, given as (name, plan) pairs, over sources, given as (name, layout) pairs.");
}

}  // namespace transfuse::python

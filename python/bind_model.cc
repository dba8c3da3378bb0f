// Model configs, parallel specs, layouts by family and DTensor boxes for Python.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "bind.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

void bind_config(nb::module_& m) {
  nb::class_<ModelConfig>(m, "ModelConfig", "What layouts need to know of an HF config.json.")
      .def_ro("architecture", &ModelConfig::architecture)
      .def_ro("hidden_size", &ModelConfig::hidden_size)
      .def_ro("intermediate_size", &ModelConfig::intermediate_size)
      .def_ro("moe_intermediate_size", &ModelConfig::moe_intermediate_size)
      .def_ro("num_hidden_layers", &ModelConfig::num_hidden_layers)
      .def_ro("num_attention_heads", &ModelConfig::num_attention_heads)
      .def_ro("num_key_value_heads", &ModelConfig::num_key_value_heads)
      .def_ro("head_dim", &ModelConfig::head_dim)
      .def_ro("vocab_size", &ModelConfig::vocab_size)
      .def_ro("num_experts", &ModelConfig::num_experts)
      .def_ro("tie_word_embeddings", &ModelConfig::tie_word_embeddings)
      .def_ro("dtype", &ModelConfig::dtype)
      .def_ro("dense_layers", &ModelConfig::dense_layers)
      .def_ro("shared_experts", &ModelConfig::shared_experts)
      .def_ro("mtp_layers", &ModelConfig::mtp_layers);
  m.def(
      "parse_model_config", [](std::string_view json) { return take(parse_model_config(json)); },
      "json"_a, "Reads the text of an HF config.json.");
  m.def(
      "make_catalog",
      [](const ModelConfig& config) {
        const nb::gil_scoped_release unlocked;
        return take(make_catalog(config));
      },
      "config"_a, "The tensors of the published checkpoint, by HF name.");
}

void bind_spec(nb::module_& m) {
  nb::class_<ParallelSpec>(m, "ParallelSpec",
                           "Parallelism of one side, such as 'fsdp:dp=4' or 'vllm:tp=2'.")
      .def_ro("family", &ParallelSpec::family)
      .def_ro("tp", &ParallelSpec::tp)
      .def_ro("dp", &ParallelSpec::dp)
      .def_ro("replicas", &ParallelSpec::replicas)
      .def_ro("dtype", &ParallelSpec::dtype)
      .def_prop_ro("rank_count", &ParallelSpec::rank_count);
  m.def(
      "parse_parallel_spec", [](std::string_view text) { return take(parse_parallel_spec(text)); },
      "text"_a);
  m.def(
      "make_layouts",
      [](const ModelConfig& config, const ParallelSpec& spec) {
        const nb::gil_scoped_release unlocked;
        return take(make_layouts(config, spec));
      },
      "config"_a, "spec"_a, "One layout per rank, in the family's own rank order.");
  m.def(
      "make_layout",
      [](const ModelConfig& config, const ParallelSpec& spec, int64_t rank) {
        const nb::gil_scoped_release unlocked;
        return take(make_layout(config, spec, rank));
      },
      "config"_a, "spec"_a, "rank"_a,
      "The layout of one rank, counted within the spec (never the world rank).");
}

void bind_placement(nb::module_& m) {
  nb::enum_<PlacementKind>(m, "PlacementKind", "How a DTensor lies on one mesh axis.")
      .value("REPLICATE", PlacementKind::kReplicate)
      .value("SHARD", PlacementKind::kShard)
      .value("STRIDED_SHARD", PlacementKind::kStridedShard);
  nb::class_<Placement>(m, "Placement", "DTensor placement on one mesh axis.")
      .def(
          "__init__",
          [](Placement* self, PlacementKind kind, int dim, int64_t split_factor) {
            new (self) Placement{kind, dim, split_factor};
          },
          "kind"_a, "dim"_a = 0, "split_factor"_a = 1)
      .def_ro("kind", &Placement::kind)
      .def_ro("dim", &Placement::dim)
      .def_ro("split_factor", &Placement::split_factor);
  m.def(
      "dtensor_box",
      [](const Dims& global_shape, const std::vector<Placement>& placements,
         const std::vector<int64_t>& mesh_shape, const std::vector<int64_t>& coordinate) {
        return take(dtensor_box(global_shape, placements, mesh_shape, coordinate));
      },
      "global_shape"_a, "placements"_a, "mesh_shape"_a, "coordinate"_a,
      "The box of a DTensor that the process at a mesh coordinate holds, possibly empty.");
}

}  // namespace

void bind_model(nb::module_& m) {
  bind_config(m);
  bind_spec(m);
  bind_placement(m);
}

}  // namespace transfuse::python

// Model configs, parallel specs, layouts by family and DTensor boxes for Python.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bind.h"
#include "transfuse/layout.h"
#include "transfuse/live_module.h"
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

constexpr const char* kEqual = "def __eq__(self, arg: object, /) -> bool";

void bind_parallel_spec(nb::module_& m) {
  nb::class_<ParallelSpec>(m, "ParallelSpec",
                           "Parallelism of one side, such as 'fsdp:dp=4' or 'vllm:tp=2'. 0 where "
                           "the spec leaves a number open.")
      .def_ro("family", &ParallelSpec::family)
      .def_ro("tp", &ParallelSpec::tp)
      .def_ro("dp", &ParallelSpec::dp)
      .def_ro("replicas", &ParallelSpec::replicas)
      .def_ro("dtype", &ParallelSpec::dtype)
      .def_ro("pp", &ParallelSpec::pp)
      .def_ro("vpp", &ParallelSpec::vpp)
      .def_ro("cp", &ParallelSpec::cp)
      .def_ro("ep", &ParallelSpec::ep)
      .def_ro("etp", &ParallelSpec::etp)
      .def_ro("first", &ParallelSpec::first)
      .def_ro("last", &ParallelSpec::last)
      .def_ro("layers", &ParallelSpec::layers)
      .def_ro("vocab_divisor", &ParallelSpec::vocab_divisor)
      .def_ro("padded_vocab", &ParallelSpec::padded_vocab)
      .def_ro("expert_parallel", &ParallelSpec::expert_parallel)
      .def_ro("round_robin", &ParallelSpec::round_robin)
      .def_ro("up_before_gate", &ParallelSpec::up_before_gate)
      .def_ro("separate_norms", &ParallelSpec::separate_norms)
      .def_ro("sequential_experts", &ParallelSpec::sequential_experts)
      .def_ro("account_for_embedding", &ParallelSpec::account_for_embedding)
      .def_ro("account_for_loss", &ParallelSpec::account_for_loss)
      .def_prop_ro("rank_count", &ParallelSpec::rank_count);
  nb::class_<ParallelRanks>(m, "ParallelRanks",
                            "A process's place in every group of its framework.")
      .def(
          "__init__",
          [](ParallelRanks* self, int64_t tp, int64_t pp, int64_t dp, int64_t cp, int64_t etp,
             int64_t ep, int64_t edp) { new (self) ParallelRanks{tp, pp, dp, cp, etp, ep, edp}; },
          nb::kw_only(), "tp"_a = 0, "pp"_a = 0, "dp"_a = 0, "cp"_a = 0, "etp"_a = 0, "ep"_a = 0,
          "edp"_a = 0)
      .def_ro("tp", &ParallelRanks::tp)
      .def_ro("pp", &ParallelRanks::pp)
      .def_ro("dp", &ParallelRanks::dp)
      .def_ro("cp", &ParallelRanks::cp)
      .def_ro("etp", &ParallelRanks::etp, "Of experts.")
      .def_ro("ep", &ParallelRanks::ep)
      .def_ro("edp", &ParallelRanks::edp, "Replica of the experts.")
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def("__repr__", [](const ParallelRanks& r) {
        const std::pair<const char*, int64_t> groups[] = {
            {"tp=", r.tp},     {", pp=", r.pp}, {", dp=", r.dp},  {", cp=", r.cp},
            {", etp=", r.etp}, {", ep=", r.ep}, {", edp=", r.edp}};
        std::string text = "ParallelRanks(";
        for (const auto& [name, rank] : groups) text += name + std::to_string(rank);
        return text + ")";
      });
}

void bind_spec(nb::module_& m) {
  bind_parallel_spec(m);
  m.def(
      "parse_parallel_spec", [](std::string_view text) { return take(parse_parallel_spec(text)); },
      "text"_a);
  m.def(
      "parallel_ranks",
      [](const ParallelSpec& spec, int64_t rank) { return take(parallel_ranks(spec, rank)); },
      "spec"_a, "rank"_a,
      "The place of a rank, counted within the spec, in the framework's own order of ranks.");
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
  m.def(
      "make_layout",
      [](const ModelConfig& config, const ParallelSpec& spec, const ParallelRanks& ranks) {
        const nb::gil_scoped_release unlocked;
        return take(make_layout(config, spec, ranks));
      },
      "config"_a, "spec"_a, "ranks"_a,
      "The same for a process that knows its ranks from its own groups.");
}

void bind_live_module(nb::module_& m) {
  nb::class_<LiveTensor>(m, "LiveTensor",
                         "A parameter or persistent buffer as its framework describes it.")
      .def(
          "__init__",
          [](LiveTensor* self, std::string name, Dtype dtype, const Dims& shape,
             bool tensor_model_parallel, int64_t partition_dim, int64_t partition_stride) {
            new (self) LiveTensor{std::move(name),       dtype,         shape,
                                  tensor_model_parallel, partition_dim, partition_stride};
          },
          "name"_a, "dtype"_a, "shape"_a, nb::kw_only(), "tensor_model_parallel"_a = false,
          "partition_dim"_a = -1, "partition_stride"_a = 1)
      .def_ro("name", &LiveTensor::name)
      .def_ro("dtype", &LiveTensor::dtype)
      .def_ro("shape", &LiveTensor::shape)
      .def_ro("tensor_model_parallel", &LiveTensor::tensor_model_parallel)
      .def_ro("partition_dim", &LiveTensor::partition_dim)
      .def_ro("partition_stride", &LiveTensor::partition_stride);
  m.def(
      "make_live_layout",
      [](const ModelConfig& config, const ParallelSpec& spec, const ParallelRanks& ranks,
         std::vector<LiveTensor> tensors, std::vector<std::vector<int64_t>> layers,
         bool layers_of_module) {
        const nb::gil_scoped_release unlocked;
        return take(make_layout(config, spec, ranks,
                                LiveModule{std::move(tensors), std::move(layers)},
                                layers_of_module ? PipelineFrom::kModule : PipelineFrom::kSpec));
      },
      "config"_a, "spec"_a, "ranks"_a, "tensors"_a, "layers"_a, nb::kw_only(), "layers_of_module"_a,
      "The layout of a rank's Megatron-Core modules, or LayoutMismatchError where they are not "
      "what "
      "the spec means. `layers`: of each model chunk, the numbers of its decoder layers. With "
      "`layers_of_module` the spec says nothing of layers, and they are the module's.");
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
  m.def(
      "flat_range_boxes",
      [](const Dims& shape, int64_t begin, int64_t end) {
        return take(flat_range_boxes(shape, begin, end));
      },
      "shape"_a, "begin"_a, "end"_a,
      "The boxes of elements begin to end of a row-major tensor, in the order of the elements.");
}

}  // namespace

void bind_model(nb::module_& m) {
  bind_config(m);
  bind_spec(m);
  bind_live_module(m);
  bind_placement(m);
}

}  // namespace transfuse::python

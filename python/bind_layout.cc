// Catalog, box, tile, layout and their codec for Python.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "bind.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

constexpr const char* kEqual = "def __eq__(self, arg: object, /) -> bool";

void bind_dtype(nb::module_& m) {
  nb::enum_<Dtype>(m, "Dtype", "Element type of a tensor or parameter.")
      .value("F32", Dtype::kF32)
      .value("F16", Dtype::kF16)
      .value("BF16", Dtype::kBF16)
      .value("F8E4M3", Dtype::kF8E4M3)
      .value("F8E5M2", Dtype::kF8E5M2)
      .value("I8", Dtype::kI8)
      .value("U8", Dtype::kU8)
      .value("I32", Dtype::kI32)
      .value("I64", Dtype::kI64)
      .def_prop_ro("size_bytes", [](Dtype d) { return dtype_size_bytes(d); })
      .def_prop_ro("text", [](Dtype d) { return std::string(dtype_name(d)); })
      .def_static(
          "parse", [](std::string_view name) { return take(parse_dtype(name)); }, "name"_a,
          "The dtype of a name such as 'f32', 'bf16', 'f8e4m3'.");
  m.def("castable", &castable, "source"_a, "target"_a,
        "True if a refit may read `source` and write `target`.");
}

void check_box(const Box& box) {
  if (box.offset.rank() != box.length.rank())
    throw Failure({ErrorCode::kInvalidArgument,
                   "box: offset has " + std::to_string(box.offset.rank()) +
                       " dimensions, length has " + std::to_string(box.length.rank())});
}

void bind_box(nb::module_& m) {
  nb::class_<Box>(m, "Box", "Half-open box: dimension d covers [offset[d], offset[d] + length[d]).")
      .def(
          "__init__",
          [](Box* self, const Dims& offset, const Dims& length) {
            const Box box{offset, length};
            check_box(box);
            new (self) Box(box);
          },
          "offset"_a, "length"_a)
      .def_static("whole", &Box::whole, "shape"_a)
      .def_ro("offset", &Box::offset)
      .def_ro("length", &Box::length)
      .def_prop_ro("element_count", &Box::element_count)
      .def(
          "intersect",
          [](const Box& self, const Box& other) -> std::optional<Box> {
            if (self.offset.rank() != other.offset.rank())
              throw Failure({ErrorCode::kInvalidArgument,
                             "intersect: " + self.to_string() + " and " + other.to_string() +
                                 " have different numbers of dimensions"});
            return intersect(self, other);
          },
          "other"_a)
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def("__hash__", [](const Box& b) { return nb::hash(nb::str(b.to_string().c_str())); })
      .def("__repr__", [](const Box& b) { return "Box(" + b.to_string() + ")"; });
}

void bind_specs(nb::module_& m) {
  nb::class_<TensorSpec>(m, "TensorSpec", "A tensor as the published checkpoint names it.")
      .def(
          "__init__",
          [](TensorSpec* self, std::string name, Dtype dtype, const Dims& shape) {
            new (self) TensorSpec{std::move(name), dtype, shape};
          },
          "name"_a, "dtype"_a, "shape"_a)
      .def_ro("name", &TensorSpec::name)
      .def_ro("dtype", &TensorSpec::dtype)
      .def_ro("shape", &TensorSpec::shape)
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def("__repr__", [](const TensorSpec& t) {
        return "TensorSpec(" + t.name + ", " + std::string(dtype_name(t.dtype)) + ", " +
               t.shape.to_string() + ")";
      });
  nb::class_<ParameterSpec>(m, "ParameterSpec",
                            "A parameter as this process holds it: a span of storage elements.")
      .def(
          "__init__",
          [](ParameterSpec* self, std::string name, Dtype dtype, int64_t element_count) {
            new (self) ParameterSpec{std::move(name), dtype, element_count};
          },
          "name"_a, "dtype"_a, "element_count"_a)
      .def_ro("name", &ParameterSpec::name)
      .def_ro("dtype", &ParameterSpec::dtype)
      .def_ro("element_count", &ParameterSpec::element_count)
      .def_prop_ro("size_bytes",
                   [](const ParameterSpec& p) {
                     return p.element_count * static_cast<int64_t>(dtype_size_bytes(p.dtype));
                   })
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def("__repr__", [](const ParameterSpec& p) {
        return "ParameterSpec(" + p.name + ", " + std::string(dtype_name(p.dtype)) + ", " +
               std::to_string(p.element_count) + ")";
      });
  nb::class_<Tile>(m, "Tile",
                   "Element i of `box` of a tensor lies at element_offset + sum(i * strides) of a "
                   "parameter. Tensor and parameter are indices into their layout.")
      .def_ro("tensor", &Tile::tensor)
      .def_ro("parameter", &Tile::parameter)
      .def_ro("box", &Tile::box)
      .def_ro("element_offset", &Tile::element_offset)
      .def_ro("element_strides", &Tile::element_strides)
      .def(nb::self == nb::self, nb::sig(kEqual));
  nb::class_<Fill>(m, "Fill", "Elements of a parameter that hold zeros and no catalog tensor.")
      .def_ro("parameter", &Fill::parameter)
      .def_ro("element_offset", &Fill::element_offset)
      .def_ro("length", &Fill::length)
      .def_ro("element_strides", &Fill::element_strides)
      .def(nb::self == nb::self, nb::sig(kEqual));
  nb::class_<Quantization>(m, "Quantization",
                           "A tensor of fp8 e4m3 and the tensor of its f32 scales, one for every "
                           "block. Both are indices into the layout's tensors.")
      .def(
          "__init__",
          [](Quantization* made, uint32_t tensor, uint32_t scales, int64_t block_rows,
             int64_t block_columns) {
            new (made) Quantization{.tensor = tensor,
                                    .scales = scales,
                                    .block_rows = block_rows,
                                    .block_columns = block_columns};
          },
          "tensor"_a, "scales"_a, "block_rows"_a, "block_columns"_a)
      .def_ro("tensor", &Quantization::tensor)
      .def_ro("scales", &Quantization::scales)
      .def_ro("block_rows", &Quantization::block_rows)
      .def_ro("block_columns", &Quantization::block_columns)
      .def(nb::self == nb::self, nb::sig(kEqual))
      .def("__repr__", [](const Quantization& q) {
        return "Quantization(tensor=" + std::to_string(q.tensor) +
               ", scales=" + std::to_string(q.scales) +
               ", block_rows=" + std::to_string(q.block_rows) +
               ", block_columns=" + std::to_string(q.block_columns) + ")";
      });
}

Layout decode(const nb::bytes& data) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data.data()), data.size());
  const nb::gil_scoped_release unlocked;
  return take(decode_layout(bytes));
}

nb::bytes encode_layout(const Layout& layout) {
  std::string bytes;
  {
    const nb::gil_scoped_release unlocked;
    bytes = encode(layout);
  }
  return nb::bytes(bytes.data(), bytes.size());
}

void bind_layout_class(nb::module_& m) {
  nb::class_<Layout>(m, "Layout",
                     "Which boxes of which catalog tensors lie where in the parameters of one "
                     "process. Immutable; holds no addresses; build it with LayoutBuilder.")
      .def(nb::init<>())
      .def_prop_ro("tensors", [](const Layout& l) { return to_vector(l.tensors()); })
      .def_prop_ro("parameters", [](const Layout& l) { return to_vector(l.parameters()); })
      .def_prop_ro("tiles", [](const Layout& l) { return to_vector(l.tiles()); })
      .def_prop_ro("fills", [](const Layout& l) { return to_vector(l.fills()); })
      .def("find_tensor", &Layout::find_tensor, "name"_a,
           "Index of a tensor in `tensors`, or None.")
      .def("find_parameter", &Layout::find_parameter, "name"_a,
           "Index of a parameter in `parameters`, or None.")
      .def_prop_ro("digest", [](const Layout& l) { return l.digest(); })
      .def_prop_ro("kind", &Layout::kind,
                   "For which consumer the values were made: \"hf_raw\", ...; \"\": not stated.")
      .def(
          "metadata_of",
          [](const Layout& l, const std::string& tensor) {
            const auto index = l.find_tensor(tensor);
            if (!index) throw Failure({ErrorCode::kNotFound, "no tensor '" + tensor + "'"});
            return l.metadata_of(*index);
          },
          "tensor"_a, "What the layout says of a tensor.")
      .def(
          "with_kind",
          [](const Layout& l, const std::string& kind) { return take(l.with_kind(kind)); },
          "kind"_a, "The same layout with this kind, and with another digest.")
      .def_prop_ro("quantizations", [](const Layout& l) { return to_vector(l.quantizations()); })
      .def(
          "with_quantizations",
          [](const Layout& l, const std::vector<Quantization>& quantizations) {
            return take(l.with_quantizations(quantizations));
          },
          "quantizations"_a,
          "The same layout with these fp8 tensors and scales in place of its own.")
      .def_prop_ro("tile_bytes", &Layout::tile_bytes)
      .def_prop_ro("parameter_bytes", &Layout::parameter_bytes)
      .def("encode", &encode_layout, "The compact wire form.")
      .def_static("decode", &decode, "data"_a, "Reads the wire form; CorruptError if it is none.")
      .def(
          "__eq__", [](const Layout& a, const Layout& b) { return a.digest() == b.digest(); },
          nb::is_operator(), nb::sig(kEqual))
      .def("__hash__", [](const Layout& l) { return DigestHash{}(l.digest()); })
      .def("__repr__", [](const Layout& l) {
        return "Layout(" + std::to_string(l.tensors().size()) + " tensors, " +
               std::to_string(l.parameters().size()) + " parameters, " +
               std::to_string(l.tiles().size()) + " tiles, " + std::to_string(l.tile_bytes()) +
               " bytes, " + l.digest().to_string() + ")";
      });
}

// The builder's handles index its own lists: numbers from outside are checked here, before use.
class CheckedBuilder {
 public:
  uint32_t tensor(const std::string& name, Dtype dtype, const Dims& shape) {
    const uint32_t handle = builder_.tensor({name, dtype, shape});
    tensor_count_ = std::max(tensor_count_, handle + 1);
    return handle;
  }
  uint32_t parameter(const std::string& name, Dtype dtype, int64_t element_count) {
    const uint32_t handle = builder_.parameter({name, dtype, element_count});
    parameter_count_ = std::max(parameter_count_, handle + 1);
    return handle;
  }
  void tile(uint32_t tensor, const Box& box, uint32_t parameter, int64_t element_offset,
            const std::optional<Dims>& element_strides) {
    check(tensor, tensor_count_, "tensor");
    check(parameter, parameter_count_, "parameter");
    if (element_strides) {
      builder_.tile(tensor, box, parameter, element_offset, *element_strides);
    } else {
      builder_.tile(tensor, box, parameter, element_offset);
    }
  }
  void fill(uint32_t parameter, int64_t element_offset, const Dims& length,
            const std::optional<Dims>& element_strides) {
    check(parameter, parameter_count_, "parameter");
    builder_.fill(parameter, element_offset, length,
                  element_strides ? *element_strides : row_major_strides(length));
  }
  void quantization(uint32_t tensor, uint32_t scales, int64_t block_rows, int64_t block_columns) {
    check(tensor, tensor_count_, "tensor");
    check(scales, tensor_count_, "tensor");
    builder_.quantization(tensor, scales, block_rows, block_columns);
  }
  void kind(const std::string& kind) { builder_.kind(kind); }
  void metadata(uint32_t tensor, const Metadata& metadata) {
    check(tensor, tensor_count_, "tensor");
    builder_.metadata(tensor, metadata);
  }
  Layout build() {
    const nb::gil_scoped_release unlocked;
    return take(builder_.build());
  }

 private:
  static void check(uint32_t handle, uint32_t count, const char* what) {
    if (handle >= count)
      throw Failure({ErrorCode::kInvalidArgument,
                     std::string(what) + " handle " + std::to_string(handle) +
                         " is not one of the " + std::to_string(count) + " of this builder"});
  }
  LayoutBuilder builder_;
  uint32_t tensor_count_ = 0;
  uint32_t parameter_count_ = 0;
};

void bind_builder(nb::module_& m) {
  nb::class_<CheckedBuilder>(m, "LayoutBuilder",
                             "Collects a layout in any order; build() finds the errors.")
      .def(nb::init<>())
      .def("tensor", &CheckedBuilder::tensor, "name"_a, "dtype"_a, "shape"_a,
           "Adds a catalog tensor and returns its handle.")
      .def("parameter", &CheckedBuilder::parameter, "name"_a, "dtype"_a, "element_count"_a,
           "Adds a parameter of this process and returns its handle.")
      .def("tile", &CheckedBuilder::tile, "tensor"_a, "box"_a, "parameter"_a,
           "element_offset"_a = 0, "element_strides"_a = nb::none(),
           "Says that a box of a tensor lies at an offset of a parameter; strides default to "
           "row-major over the box.")
      .def("fill", &CheckedBuilder::fill, "parameter"_a, "element_offset"_a, "length"_a,
           "element_strides"_a = nb::none(), "Declares elements that hold zeros.")
      .def("quantization", &CheckedBuilder::quantization, "tensor"_a, "scales"_a,
           "block_rows"_a = 128, "block_columns"_a = 128,
           "Says that a tensor of fp8 e4m3 has its scales, one for every block, in another tensor; "
           "a block that is larger than the tensor is the tensor.")
      .def("kind", &CheckedBuilder::kind, "kind"_a,
           "States for which consumer the values are made.")
      .def("metadata", &CheckedBuilder::metadata, "tensor"_a, "metadata"_a,
           "Says something of a tensor that lasts as long as the layout.")
      .def("build", &CheckedBuilder::build);
}

}  // namespace

void bind_layout(nb::module_& m) {
  m.attr("MAX_RANK") = kMaxRank;
  bind_dtype(m);
  bind_box(m);
  bind_specs(m);
  bind_layout_class(m);
  bind_builder(m);
}

}  // namespace transfuse::python

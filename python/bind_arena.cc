// Memory that Transfuse allocates, as a Python buffer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#include "bind.h"
#include "session.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

class Arena {
 public:
  Arena(uint64_t size_bytes, std::string job, std::optional<uint32_t> threads,
        std::optional<bool> allow_any_tracer, std::optional<int> device) {
    const nb::gil_scoped_release unlocked;
    const auto session = take(Session::open({.job = std::move(job),
                                             .address = {},
                                             .token = {},
                                             .threads = threads,
                                             .allow_any_tracer = allow_any_tracer,
                                             .device = device}));
    memory_ = take(session->allocate(size_bytes));
  }
  std::span<std::byte> bytes() const { return memory_->region->bytes(); }
  std::optional<int> device() const { return memory_->session->device(); }

  // https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html: bytes in one dimension,
  // which wait for no stream.
  nb::typed<nb::dict, nb::str, nb::object> cuda_array_interface() const {
    if (!device()) throw nb::attribute_error("this arena is memory of the host");
    nb::typed<nb::dict, nb::str, nb::object> interface;
    interface["shape"] = std::make_tuple(bytes().size());
    interface["typestr"] = "|u1";
    interface["data"] = std::make_tuple(reinterpret_cast<uintptr_t>(bytes().data()), false);
    interface["version"] = 3;
    return interface;
  }

 private:
  std::shared_ptr<ArenaMemory> memory_;  // shared with publishers and receivers that use it
};

int get_buffer(PyObject* object, Py_buffer* view, int flags) noexcept {
  const Arena& arena = *nb::inst_ptr<Arena>(object);
  if (arena.device()) {
    view->obj = nullptr;
    PyErr_SetString(PyExc_BufferError,
                    "memory of a GPU is no buffer: use tensor() or __cuda_array_interface__");
    return -1;
  }
  const std::span<std::byte> bytes = arena.bytes();
  return PyBuffer_FillInfo(view, object, bytes.data(), static_cast<Py_ssize_t>(bytes.size()), 0,
                           flags);
}

PyType_Slot arena_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)}, {0, nullptr}};

}  // namespace

void bind_arena(nb::module_& m) {
  nb::class_<Arena>(m, "NativeArena", nb::type_slots(arena_slots),
                    "Zeroed memory that other processes read by mapping it: the best route on one "
                    "host. A writable buffer, or on a GPU what __cuda_array_interface__ says; it "
                    "lives as long as a view of it.")
      .def(nb::init<uint64_t, std::string, std::optional<uint32_t>, std::optional<bool>,
                    std::optional<int>>(),
           "size_bytes"_a, nb::kw_only(), "job"_a = "", "threads"_a = nb::none(),
           "allow_any_tracer"_a = nb::none(), "device"_a = nb::none())
      .def_prop_ro("device", &Arena::device, "The GPU's ordinal; None: memory of the host.")
      .def_prop_ro("__cuda_array_interface__", &Arena::cuda_array_interface)
      .def_prop_ro("size_bytes", [](const Arena& arena) { return arena.bytes().size(); })
      .def("__len__", [](const Arena& arena) { return arena.bytes().size(); });
}

}  // namespace transfuse::python

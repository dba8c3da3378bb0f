// What every binding file shares: typed errors as Python exceptions, and Dims as tuples of int.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse::python {

namespace nb = nanobind;

// Carries an Error to Python, where it becomes the exception class of its code.
class Failure : public std::exception {
 public:
  explicit Failure(Error error) : error_(std::move(error)) {}
  const Error& error() const { return error_; }
  const char* what() const noexcept override { return error_.message.c_str(); }

 private:
  Error error_;
};

template <typename T>
T take(Result<T> result) {
  if (!result) throw Failure(std::move(result).error());
  if constexpr (!std::is_void_v<T>) return std::move(result).value();
}

template <typename T>
std::vector<T> to_vector(std::span<const T> values) {
  return {values.begin(), values.end()};
}

// None in Python where it is zero.
std::optional<Digest> stated(const Digest& revision);

void bind_errors(nb::module_& m);
void bind_metadata(nb::module_& m);  // before the layout
void bind_revision(nb::module_& m);
void bind_layout(nb::module_& m);
void bind_plan(nb::module_& m);
void bind_model(nb::module_& m);
void bind_expert_map(nb::module_& m);  // after bind_model
void bind_checkpoint(nb::module_& m);
void bind_arena(nb::module_& m);
void bind_report(nb::module_& m);
void bind_session(nb::module_& m);
void bind_rpc(nb::module_& m);

}  // namespace transfuse::python

namespace nanobind::detail {

template <>
struct type_caster<transfuse::Dims> {
  NB_TYPE_CASTER(transfuse::Dims, io_name("collections.abc.Sequence[int]", "tuple[int, ...]"))

  bool from_python(handle source, uint32_t flags, cleanup_list* cleanup) noexcept {
    using Numbers = std::vector<int64_t>;
    make_caster<Numbers> numbers;
    if (!numbers.from_python(source, flags, cleanup)) return false;
    const Numbers& values = numbers.value;
    if (values.size() > static_cast<size_t>(transfuse::kMaxRank)) return false;
    value = transfuse::Dims(std::span<const int64_t>(values));
    return true;
  }

  static handle from_cpp(const transfuse::Dims& dims, rv_policy, cleanup_list*) noexcept {
    PyObject* tuple = PyTuple_New(dims.rank());
    if (tuple == nullptr) return {};
    for (int i = 0; i < dims.rank(); ++i) {
      PyObject* number = PyLong_FromLongLong(dims[i]);
      if (number == nullptr) {
        Py_DECREF(tuple);
        return {};
      }
      PyTuple_SetItem(tuple, i, number);  // takes the reference
    }
    return tuple;
  }
};

}  // namespace nanobind::detail

// ErrorCode, and the translation of a typed error into its Python exception class.
#include <nanobind/nanobind.h>

#include <exception>
#include <string>

#include "bind.h"
#include "transfuse/result.h"

namespace transfuse::python {
namespace {

// The classes live in transfuse.errors, keyed by code, so that they are ordinary typed Python.
void raise(const Error& error) {
  nb::object classes = nb::module_::import_("transfuse.errors").attr("CLASS_OF_CODE");
  nb::object exception_class = classes[nb::cast(error.code)];
  PyErr_SetObject(exception_class.ptr(), nb::str(error.message.c_str()).ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Failure& failure) {
    raise(failure.error());
  }
}

}  // namespace

void bind_errors(nb::module_& m) {
  nb::enum_<ErrorCode> codes(m, "ErrorCode", "Why an operation failed.");
  for (int i = 0; i < kErrorCodeCount; ++i) {
    const auto code = static_cast<ErrorCode>(i);
    codes.value(std::string(error_code_name(code)).c_str(), code);
  }
  nb::register_exception_translator(translate);
}

}  // namespace transfuse::python

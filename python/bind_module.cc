// The extension module: everything native that the package `transfuse` offers.
#include <nanobind/nanobind.h>

#include "bind.h"

NB_MODULE(_transfuse, m) {
  m.doc() = "Native part of transfuse; use the package, not this module.";
  nanobind::set_leak_warnings(false);
  transfuse::python::bind_errors(m);
  transfuse::python::bind_metadata(m);
  transfuse::python::bind_layout(m);
  transfuse::python::bind_revision(m);
  transfuse::python::bind_plan(m);
  transfuse::python::bind_model(m);
  transfuse::python::bind_expert_map(m);
  transfuse::python::bind_checkpoint(m);
  transfuse::python::bind_arena(m);
  transfuse::python::bind_report(m);
  transfuse::python::bind_session(m);
  transfuse::python::bind_rpc(m);
}

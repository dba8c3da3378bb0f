// Where the coordinator of a job is.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "bind.h"
#include "rpc/rpc.h"

namespace transfuse::python {

using namespace nanobind::literals;

void bind_rpc(nb::module_& m) {
  nb::class_<CoordinatorInfo>(m, "CoordinatorInfo", "The coordinator of a job.")
      .def_ro("address", &CoordinatorInfo::address)
      .def_ro("epoch", &CoordinatorInfo::epoch, "Rises with every start.")
      .def_ro("pid", &CoordinatorInfo::pid);
  m.def(
      "find_coordinator",
      [](const std::string& job, const std::string& address, const std::string& token) {
        ConnectOptions options;
        options.job = job;
        options.address = address;
        options.token = token;
        const nb::gil_scoped_release unlocked;
        return take(find_coordinator(options));
      },
      "job"_a = "", nb::kw_only(), "address"_a = "", "token"_a = "",
      "The coordinator of a job if one runs; NotFoundError otherwise. Starts none.");
}

}  // namespace transfuse::python
